"""Which kind of device the kernels are chosen for."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

NUM_SMS = 132  # multiprocessors of an H100 SXM and an H200; persistent kernels run one thread block on each

_is_lowering_for_hopper = contextvars.ContextVar("is_lowering_for_hopper", default=False)


def is_hopper() -> bool:
    """Tells whether programs are made for Hopper GPUs (H100, H200: compute capability 9.0).

    They are when JAX's default devices are such, and within `lowering_for_hopper`.
    """
    return _is_lowering_for_hopper.get() or _default_device_is_hopper()


@contextlib.contextmanager
def lowering_for_hopper() -> Iterator[None]:
    """Chooses the Hopper kernels for what is traced inside, whatever devices this machine has.

    For programs that are lowered for the devices of another machine and not run here. Traces made before are dropped
    at both ends, for they remember the kernels chosen then.
    """
    jax.clear_caches()
    token = _is_lowering_for_hopper.set(True)
    try:
        yield
    finally:
        _is_lowering_for_hopper.reset(token)
        jax.clear_caches()


@functools.cache
def _default_device_is_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"
