"""Reading and writing safetensors checkpoints by ranges, without holding a shard or a model."""
