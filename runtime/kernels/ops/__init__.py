"""Kernels of all that is not an expert; each has a torch twin of the same name in `runtime.kernels.twins`."""
