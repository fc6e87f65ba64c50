"""Causal attention and its gradients against a dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import attention as op
from dsv3_jax.kernels.attention import pallas_gpu, segments

BF16_TOLERANCE = 6e-3  # relative norm: inputs of the second product and the result are each rounded to 8 bits
CUDNN_TOLERANCE = 8e-3  # it also rounds every head's gradient of the keys' shared part before they are added


def make_operands(batch, length, num_heads, width, value_width, rope_width, dtype):
    rng = np.random.default_rng(length + width)
    own_width = width - rope_width
    shapes = [(batch, length, num_heads, size) for size in (width, own_width + value_width, value_width)]
    shapes.insert(2, (batch, length, rope_width))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def attend_densely(q, kv, k_rope, dout, first_key, scale):
    """Returns the output and the gradients of q, kv and k_rope by their formulas, in float64."""
    q, kv, k_rope, dout = (np.asarray(array, np.float64) for array in (q, kv, k_rope, dout))
    own_width = q.shape[-1] - k_rope.shape[-1]
    shared = np.repeat(k_rope[:, :, None], q.shape[2], axis=2)
    k, v = np.concatenate([kv[..., :own_width], shared], axis=-1), kv[..., own_width:]
    scores = np.einsum("btnx,bsnx->bnts", q, k) * scale
    keys = np.arange(k.shape[1])
    is_visible = (keys <= keys[:, None]) & (keys >= first_key[:, None, :, None])
    scores = np.where(is_visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("btnu,bsnu->bnts", dout, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bnts,btnx->bsnx", dscores, q), np.einsum("bnts,btnu->bsnu", weights, dout)
    return (
        np.einsum("bnts,bsnu->btnu", weights, v),
        np.einsum("bnts,bsnx->btnx", dscores, k),
        np.concatenate([dk[..., :own_width], dv], axis=-1),
        dk[..., own_width:].sum(axis=2),
    )


def first_keys(starts_of_rows, length):
    """Returns the first key of every query, int32 [rows, length], of documents that begin at the given positions."""
    rows = [[max([0, *(s for s in starts if s <= t)]) for t in range(length)] for starts in starts_of_rows]
    return jnp.asarray(rows, jnp.int32)


def assert_value_and_gradients_match(attend, operands, scale, tolerance, first_key_BT=None):
    q, kv, k_rope, dout = operands
    out, vjp = jax.vjp(lambda q, kv, k_rope: attend(q, kv, k_rope, first_key_BT), q, kv, k_rope)
    assert out.dtype == q.dtype
    first_key = np.zeros(q.shape[:2], int) if first_key_BT is None else np.asarray(first_key_BT)
    for actual, expected in zip((out, *vjp(dout)), attend_densely(*operands, first_key, scale)):
        error = np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)
        assert error < tolerance


@pytest.mark.parametrize("length", [5, 129, 300])
def test_reference_equals_dense_softmax(length):
    operands = make_operands(2, length, 2, 24, 16, 8, jnp.float32)
    attend = functools.partial(op.causal_attention, scale=0.3, implementation="reference")
    assert_value_and_gradients_match(attend, operands, 0.3, 1e-5)


# Documents of one token, that end at a block's end, that fill many blocks, and a whole row that is one document.
STARTS = [[3, 4, 5, 64, 128, 190], [], [127, 129, 260], [255, 256]]


@pytest.mark.parametrize("length", [5, 129, 300])
def test_reference_hides_other_documents(length):
    operands = make_operands(4, length, 2, 24, 16, 8, jnp.float32)
    attend = functools.partial(op.causal_attention, scale=0.3, implementation="reference")
    assert_value_and_gradients_match(attend, operands, 0.3, 1e-5, first_keys(STARTS, length))


@pytest.mark.parametrize("block", [64, 128])
def test_ranges_of_blocks_hold_what_is_seen_and_no_mask_is_missing(block):
    rng = np.random.default_rng(0)
    starts = [sorted(rng.choice(512, count, replace=False)) for count in (0, 1, 4, 40, 512)]
    first_key_BT = first_keys([*starts, *STARTS], 512)
    keys = np.arange(512)
    is_own = keys >= np.asarray(first_key_BT)[:, :, None]  # [B, T, S]
    is_seen = is_own & (keys <= keys[:, None])
    by_queries = segments.key_blocks(first_key_BT, tile=128, block=block)
    by_keys = segments.query_blocks(first_key_BT, tile=block, block=block)
    for row in range(len(first_key_BT)):
        for tile in range(512 // 128):
            queries = slice(tile * 128, tile * 128 + 128)
            edge, whole = (int(x[row, tile]) for x in (by_queries.edge_BM, by_queries.whole_BM))
            assert 0 <= edge <= whole <= tile * 128 // block
            assert not is_seen[row, queries, : edge * block].any()
            assert is_seen[row, queries, edge * block : (edge + 1) * block].any()
            assert is_own[row, queries, whole * block :].all() or whole == tile * 128 // block
        for tile in range(512 // block):
            own = slice(tile * block, tile * block + block)
            edge, whole = (int(x[row, tile]) for x in (by_keys.edge_BM, by_keys.whole_BM))
            assert tile < whole <= edge <= 512 // block
            assert not is_seen[row, edge * block :, own].any()
            assert is_seen[row, (edge - 1) * block : edge * block, own].any()
            assert is_own[row, (tile + 1) * block : whole * block, own].all()


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 128, 1, 192, 128, 64), jnp.float32, "float32"),
        ((1, 100, 1, 192, 128, 64), jnp.bfloat16, "T=100"),
        ((1, 128, 1, 96, 64, 64), jnp.bfloat16, "X=96"),
        ((1, 128, 1, 256, 128, 64), jnp.bfloat16, "X=256"),
        ((1, 128, 1, 192, 128, 32), jnp.bfloat16, "R=32"),
        ((1, 128, 1, 64, 64, 64), jnp.bfloat16, "X=64, R=64"),
    ],
)
def test_kernel_names_what_it_cannot_run(shape, dtype, words):
    q, kv, k_rope, _ = make_operands(*shape, dtype)
    with pytest.raises(ValueError, match=words):
        op.causal_attention(q, kv, k_rope, scale=1.0, implementation="pallas_gpu")


def test_kernel_wants_one_type_of_all_operands():
    q, kv, k_rope, _ = make_operands(1, 128, 1, 128, 64, 64, jnp.bfloat16)
    for operands in ((q, kv.astype(jnp.float16), k_rope), (q, kv, k_rope.astype(jnp.float32))):
        with pytest.raises(ValueError, match="only one 16-bit float type for all"):
            op.causal_attention(*operands, scale=1.0, implementation="pallas_gpu")


def test_backward_pass_keeps_keys_and_values_as_they_came():
    q, kv, k_rope, out = make_operands(1, 128, 2, 192, 64, 64, jnp.bfloat16)
    attend = functools.partial(pallas_gpu.causal_attention, first_key_BT=None, scale=0.1)
    _, backward = jax.eval_shape(lambda *operands: jax.vjp(attend, *operands), q, kv, k_rope)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(backward))
    assert kept == sorted(array.shape for array in (q, kv, k_rope, out, out[..., 0].swapaxes(1, 2)))


def test_kernel_needs_a_hopper_gpu():
    q, kv, k_rope, _ = make_operands(1, 128, 1, 128, 64, 64, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs a Hopper GPU.*default device is cpu"):
        op.causal_attention(q, kv, k_rope, scale=1.0, implementation="pallas_gpu")


def test_unknown_implementation_is_refused():
    q, kv, k_rope, _ = make_operands(1, 4, 1, 8, 8, 4, jnp.float32)
    with pytest.raises(ValueError, match="implementation='flash'"):
        op.causal_attention(q, kv, k_rope, scale=1.0, implementation="flash")


def test_cudnn_refuses_first_keys():
    q, kv, k_rope, _ = make_operands(1, 128, 1, 64, 64, 32, jnp.bfloat16)
    with pytest.raises(ValueError, match="cannot run first_key_BT"):
        op.causal_attention(q, kv, k_rope, first_keys([[5]], 128), scale=1.0, implementation="cudnn")


@pytest.mark.parametrize("has_segments", [False, True])
@pytest.mark.parametrize(("width", "value_width"), [(192, 128), (128, 128), (128, 64)])
def test_kernels_lower_for_cuda(width, value_width, has_segments):
    """Everything Mosaic checks without a GPU: operand layouts, tiling and shared-memory size."""
    q, kv = (jax.ShapeDtypeStruct((2, 4096, 128, size), jnp.bfloat16) for size in (width, width - 64 + value_width))
    k_rope = jax.ShapeDtypeStruct((2, 4096, 64), jnp.bfloat16)
    first_key_BT = jax.ShapeDtypeStruct((2, 4096), jnp.int32) if has_segments else None

    def value_and_gradients(*operands, first_key_BT):
        out, vjp = jax.vjp(lambda *operands: pallas_gpu.causal_attention(*operands, first_key_BT, 0.1), *operands)
        return out, vjp(out)

    exported = jax.export.export(jax.jit(value_and_gradients), platforms=["cuda"])(
        q, kv, k_rope, first_key_BT=first_key_BT
    )
    assert exported.mlir_module().count("mosaic_gpu") >= 3


@pytest.mark.parametrize("has_segments", [False, True])
def test_kernels_in_the_interpreter(monkeypatch, has_segments):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the Mosaic GPU interpreter of JAX {jax.__version__} cannot transpose operands; 0.11 can")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dsv3_jax.kernels.attention import blocks

    class Accumulator:
        """Stands in for a register accumulator, whose products from registers the interpreter does not know."""

        def __init__(self, value):
            self.value, self.at = value, self

        def __getitem__(self, index):
            return self, index[1].start

    def accumulate(value, multiply):
        accumulator = Accumulator(value)
        multiply(accumulator)
        return accumulator.value

    def multiply(accumulator, lhs, rhs, wgmma=plgpu.wgmma):
        accumulator, first = accumulator if isinstance(accumulator, tuple) else (accumulator, 0)
        if not isinstance(accumulator, Accumulator):
            return wgmma(accumulator, lhs, rhs)
        product = jnp.dot(lhs.astype(jnp.float32), rhs[...].astype(jnp.float32))
        columns_after = accumulator.value.shape[1] - first - product.shape[1]
        accumulator.value += jnp.pad(product, [(0, 0), (first, columns_after)])

    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))
    monkeypatch.setattr(plgpu, "wgmma", multiply)
    monkeypatch.setattr(blocks, "accumulate", accumulate)
    monkeypatch.setattr(blocks, "NUM_SMS", 2)
    batch, length, num_heads = (2, 384, 1) if has_segments else (1, 256, 2)
    operands = make_operands(batch, length, num_heads, 192, 64, 64, jnp.bfloat16)
    # The first row's first tile of keys is seen by the next tile in part, the second's by none.
    first_key_BT = first_keys([[100, 270], [3, 128, 320, 383]], length) if has_segments else None
    attend = functools.partial(pallas_gpu.causal_attention, scale=0.1)
    assert_value_and_gradients_match(attend, operands, 0.1, BF16_TOLERANCE, first_key_BT)


@pytest.mark.gpu
# The last two give every thread block several tiles, whose queries and outputs follow one another in its memory.
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1024, 3, 192, 128, 64),
        (1, 128, 1, 192, 128, 64),
        (1, 384, 20, 128, 64, 64),
        (16, 512, 16, 192, 128, 64),
        (64, 256, 6, 192, 128, 64),
    ],
)
@pytest.mark.parametrize("implementation", ["pallas_gpu", "cudnn"])
def test_kernels_on_hopper(shape, implementation):
    operands = make_operands(*shape, jnp.bfloat16)
    attend = functools.partial(op.causal_attention, scale=0.1, implementation=implementation)
    tolerance = CUDNN_TOLERANCE if implementation == "cudnn" else BF16_TOLERANCE
    assert_value_and_gradients_match(attend, operands, 0.1, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 1024, 3, 192, 128, 64), (4, 384, 20, 128, 64, 64)])
def test_kernels_on_hopper_hide_other_documents(shape):
    operands = make_operands(*shape, jnp.bfloat16)
    attend = functools.partial(op.causal_attention, scale=0.1, implementation="pallas_gpu")
    starts = [[*row, *(start + 500 for start in row)] for row in STARTS]
    assert_value_and_gradients_match(attend, operands, 0.1, BF16_TOLERANCE, first_keys(starts, shape[1]))
