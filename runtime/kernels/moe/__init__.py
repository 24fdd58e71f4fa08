"""Kernels of the mixture of experts; each has a torch twin of the same name in `runtime.kernels.twins`."""
