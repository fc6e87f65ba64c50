"""What is packed comes out bit for bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.sharding.row_packing import ALIGNMENT, pack, row_bytes, row_specs, unpack


def draw(shapes_and_dtypes):
    """Returns arrays of random bits, NaNs included."""
    rng = np.random.default_rng(0)
    dtypes = [(shape, np.dtype(dtype)) for shape, dtype in shapes_and_dtypes]
    bits = [rng.bytes(math.prod(shape) * dtype.itemsize) for shape, dtype in dtypes]
    return [jnp.asarray(np.frombuffer(b, dtype).reshape(shape)) for b, (shape, dtype) in zip(bits, dtypes)]


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize(
    "leaves",
    [
        [((8,), jnp.uint16), ((8,), jnp.float32), ((129,), jnp.float8_e4m3fn), ((3, 5), jnp.uint8)],
        [((3,), jnp.uint32), ((), jnp.float32), ((7,), jnp.bfloat16)],
        [((5,), jnp.float32), ((2, 1), jnp.int32)],
    ],
    ids=["bytes", "halves", "words"],
)
def test_unpack_reverts_pack_bit_for_bit(leaves, num_rows):
    rows = {"ids": draw([((num_rows, *shape), dtype) for shape, dtype in leaves])}
    packed = pack(rows)
    assert packed.dtype.itemsize == min(np.dtype(dtype).itemsize for _, dtype in leaves)
    unpacked = unpack(packed, row_specs(rows))
    assert jax.tree.structure(unpacked) == jax.tree.structure(rows)
    for actual, expected in zip(jax.tree.leaves(unpacked), jax.tree.leaves(rows), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


def test_row_bytes_are_those_of_packed_rows():
    rows = draw([((4, 8), jnp.uint16), ((4, 9), jnp.float32), ((4, 7168), jnp.uint8), ((4, 56), jnp.uint8)])
    packed = pack(rows)
    assert row_bytes(row_specs(rows)) == packed.nbytes // 4 == 16 + 48 + 7168 + 64
    assert row_bytes(row_specs(rows)) % ALIGNMENT == 0
