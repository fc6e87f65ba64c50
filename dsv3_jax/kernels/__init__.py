"""Ops that must be fast. Each folder is one op, its `__init__` the only import point. Kernels know arrays, not models."""
