"""On-disk dialects of quantized checkpoints."""
