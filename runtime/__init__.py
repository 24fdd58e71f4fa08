"""Reference runtime: runs a checkpoint as it lies on disk, for smoke tests, calibration and verification."""
