"""Triton kernels, one file an op; nothing here imports more than torch and triton."""
