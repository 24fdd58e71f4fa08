"""Row-wise functions from source rows to output rows."""
