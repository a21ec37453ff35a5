"""Triton kernels and their launchers. Imported only when a Triton kernel has to run."""
