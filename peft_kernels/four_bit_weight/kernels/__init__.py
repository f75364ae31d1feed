"""Kernels: tensors and a config in, tensors out. They know no problem, no autograd and no choice of a backend."""
