"""Proof that a converted or quantized model still is the model it was made from."""
