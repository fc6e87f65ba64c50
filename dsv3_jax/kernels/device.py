"""Which kind of device the kernels are chosen for."""

import functools

import jax


@functools.cache
def is_hopper() -> bool:
    """Tells whether the default devices are Hopper GPUs (H100, H200: compute capability 9.0)."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"
