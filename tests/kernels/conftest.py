"""Markers of the kernels' tests, and threads for their interpreter."""

import os

import jax


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "deviceless: compiles for an H200 that is not there, where the jax-cuda13 packages are; `pytest -m deviceless`",
    )
    if jax.__version_info__ >= (0, 11):
        # Read by XLA when it starts: interpreted warpgroups wait for those of other blocks, each in a thread of XLA's.
        os.environ.setdefault("NPROC", "8")
