"""Checkpoint conversion for GLM-4 MoE: what the tensors are, how they are read, transformed, quantized and written."""

__version__ = "0.1.0"
