"""Which kernels are chosen for devices that are not here."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.kernels import device, dispatch

pytestmark = pytest.mark.skipif(device.is_hopper(), reason="the default device is a Hopper GPU already")


def test_programs_are_for_hopper_within_and_for_the_default_device_after():
    assert not device.is_hopper()
    with device.lowering_for_hopper():
        assert device.is_hopper()
        assert dispatch.runs_pallas("pallas_gpu", None)
    assert not device.is_hopper()


def test_default_device_is_back_after_an_error():
    with pytest.raises(RuntimeError, match="stopped"), device.lowering_for_hopper():
        raise RuntimeError("stopped")
    assert not device.is_hopper()


def test_trace_made_before_or_within_does_not_serve_the_other_side():
    seen = []

    @jax.jit
    def inner(x):
        seen.append(device.is_hopper())
        return x + 1

    x = jax.ShapeDtypeStruct((), jnp.float32)
    inner.trace(x)
    with device.lowering_for_hopper():
        inner.trace(x)
    inner.trace(x)
    assert seen == [False, True, False]
