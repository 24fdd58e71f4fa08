"""What attention keeps of the tokens it has seen."""
