"""Per-rank shards for tensor, expert and pipeline parallelism, and back."""
