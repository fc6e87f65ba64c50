"""Ops that must be fast: one folder each, its `__init__` the only import point. Kernels know arrays, not models."""
