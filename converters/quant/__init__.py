"""Which tensors are quantized, to what, and how their values are computed."""
