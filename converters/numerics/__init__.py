"""Number formats: rounding, scales and finite checks, shared by everything that changes values."""
