"""Which implementation of an op runs."""

import jax

from dsv3_jax.kernels import device

IMPLEMENTATIONS = ("reference", "pallas_gpu")


def runs_pallas(implementation: str | None, problem: str | None) -> bool:
    """Tells whether the Hopper kernel runs; otherwise it is the reference.

    Args:
      implementation: "pallas_gpu" or "reference"; None picks pallas_gpu on a Hopper GPU for operands that it supports.
      problem: what about the operands the Hopper kernel cannot run, or None.

    Raises:
      ValueError: an unknown name, or pallas_gpu named where it cannot run.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: choose one of {IMPLEMENTATIONS} or None")
    if implementation != "pallas_gpu":
        return implementation is None and problem is None and device.is_hopper()
    if problem is not None:
        raise ValueError(f"implementation='pallas_gpu' cannot run {problem}; use implementation='reference'")
    if not device.is_hopper():
        raise ValueError(
            f"implementation='pallas_gpu' needs a Hopper GPU (compute capability 9.0), and JAX's default device is "
            f"{jax.devices()[0].device_kind}; use implementation=None or 'reference'"
        )
    return True
