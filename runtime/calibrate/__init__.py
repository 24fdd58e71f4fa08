"""Calibration: the model streamed over a text, one layer at a time, and what its linear layers saw."""
