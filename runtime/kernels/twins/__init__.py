"""What the kernels compute, in torch: the same names and signatures, on any device."""
