"""What a checkpoint is, and what is wrong with it: facts from headers and config, findings, and scans of the data."""
