"""Triton kernels; the torch functions whose bytes they reproduce are in `converters.numerics`."""
