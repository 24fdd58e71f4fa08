"""The model: modules whose parameter names are the names of the checkpoint."""
