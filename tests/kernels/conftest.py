"""Markers of the kernels' tests."""


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "deviceless: compiles for an H200 that is not there, where the jax-cuda13 packages are; `pytest -m deviceless`",
    )
