"""What a long FP8 sum loses in tensor cores, with and without promotion to float32 (§3.3.2, "increasing accumulation
precision"): measured with the kernels at hand on a GPU, emulated everywhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.benchmarks.report import Row
from dsv3_jax.fp8.formats import E4M3, QuantizedArray, num_tiles, padded_blocks
from dsv3_jax.kernels import device
from dsv3_jax.kernels.fp8_matmul import fp8_matmul

CONTRACTIONS = (4096, 16384)
PROMOTIONS = (128, 512, None)  # products between two promotions; None: all stay in the tensor cores' accumulator
INPUTS = ("positive", "normal")
SIZE = 128  # rows and columns of the product
# Hopper's accumulator as found by experiment: the products of one step and the running sum are shifted to the largest
# exponent among them and cut off after 13 fraction bits. With positive inputs this loses 7.0% at K=4096 and 22% at
# K=16384; an H200 was seen to lose 6.6% and 25%.
FRACTION_BITS = 13
PRODUCTS_PER_STEP = 32


def error_rows(
    *, contractions: tuple[int, ...] = CONTRACTIONS, size: int = SIZE, with_torch: bool = False
) -> list[Row]:
    """Returns the errors of [size, K] x [K, size] products of E4M3 codes without scales, in float32.

    Errors are relative to the mean magnitude of the exact product, which float64 gives. Every row says whether its
    arithmetic was emulated or ran: our kernel where the device is a Hopper GPU, else its reference, and torch's
    product with fast accumulation (none is promoted) and without.

    Args:
      contractions: values of K, multiples of 512.
      size: rows and columns of the product.
      with_torch: adds torch's products, which need a GPU of compute capability 8.9 or later.
    """
    rows = []
    for contraction in contractions:
        for inputs in INPUTS:
            a, b = (draw_codes((size, contraction), inputs, seed) for seed in (0, 1))
            exact = np.asarray(a).astype(np.float64) @ np.asarray(b).astype(np.float64).T
            for name, product in _products(a, b, with_torch=with_torch).items():
                errors = np.abs(np.asarray(product, np.float64) - exact) / np.abs(exact).mean()
                rows.append({"case": f"K={contraction}, {inputs} inputs", "implementation": name,
                             "mean error": errors.mean(), "largest error": errors.max()})  # fmt: skip
    return rows


def draw_codes(shape: tuple[int, int], inputs: str, seed: int) -> jax.Array:
    """Returns normal values, or their magnitudes where inputs is "positive", rounded to E4M3."""
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(np.abs(values) if inputs == "positive" else values, E4M3)


@functools.partial(jax.jit, static_argnames="promote_every")
def emulated_product(codes_a_MK: jax.Array, codes_b_NK: jax.Array, *, promote_every: int | None) -> jax.Array:
    """Multiplies E4M3 codes along K with Hopper's accumulation, float32 [M, N].

    Args:
      codes_a_MK, codes_b_NK: float8_e4m3fn; K a multiple of 32 and of promote_every.
      promote_every: products after which the accumulator is added to a float32 sum and cleared; None for never.
    """
    contraction = codes_a_MK.shape[1]
    chunk = promote_every if promote_every is not None else contraction
    assert contraction % chunk == 0 and chunk % PRODUCTS_PER_STEP == 0, (contraction, chunk)
    steps_shape = (-1, chunk // PRODUCTS_PER_STEP, PRODUCTS_PER_STEP)
    steps = tuple(
        jnp.moveaxis(codes.astype(jnp.float32).reshape(len(codes), *steps_shape), 0, 2)
        for codes in (codes_a_MK, codes_b_NK)
    )
    zeros_MN = jnp.zeros((len(codes_a_MK), len(codes_b_NK)), jnp.float32)

    def promote(total_MN, chunk_steps):
        return total_MN + jax.lax.scan(_accumulate, zeros_MN, chunk_steps)[0], None

    return jax.lax.scan(promote, zeros_MN, steps)[0]


def _accumulate(sum_MN: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    """Adds one step's products as the tensor cores do. All values are exact in float32, whose sums have 24 bits."""
    a_MI, b_NI = step
    products_MNI = a_MI[:, None] * b_NI[None]
    largest_MN = jnp.maximum(jnp.abs(sum_MN), jnp.abs(products_MNI).max(axis=-1))
    exponent_MN = jnp.maximum(jax.lax.bitcast_convert_type(largest_MN, jnp.int32) >> 23, FRACTION_BITS + 1)
    last_bit_MN = jax.lax.bitcast_convert_type(exponent_MN - FRACTION_BITS << 23, jnp.float32)
    inverse_MN = jax.lax.bitcast_convert_type(254 + FRACTION_BITS - exponent_MN << 23, jnp.float32)
    kept_MN = jnp.trunc(products_MNI * inverse_MN[..., None]).sum(axis=-1)
    return (jnp.trunc(sum_MN * inverse_MN) + kept_MN) * last_bit_MN, None


def _products(a: jax.Array, b: jax.Array, *, with_torch: bool) -> dict[str, np.ndarray]:
    """Returns the product of codes by name of the arithmetic."""
    products = {}
    for promote_every in PROMOTIONS:
        promotion = "never promoted" if promote_every is None else f"promoted every {promote_every}"
        products[f"emulated, {promotion}"] = np.asarray(emulated_product(a, b, promote_every=promote_every))
    name = "pallas_gpu" if device.is_hopper() else "reference"
    product = fp8_matmul(*_unscaled(a, b), out_dtype=jnp.float32, implementation=name)
    products[f"{name}, promoted every 128"] = np.asarray(product)
    if with_torch:
        products |= _torch_products(a, b)
    return products


def _unscaled(a: jax.Array, b: jax.Array) -> tuple[QuantizedArray, QuantizedArray]:
    """Returns codes as operands of our product whose scales are all one."""
    rows, contraction = b.shape
    tile_scales = jnp.ones((num_tiles(contraction), len(a)), jnp.float32)
    block_scales = jnp.ones((num_tiles(rows), padded_blocks(contraction)), jnp.float32)
    return QuantizedArray(a, tile_scales, "row"), QuantizedArray(b, block_scales, "block")


def _torch_products(a: jax.Array, b: jax.Array) -> dict[str, np.ndarray]:
    import torch

    one = torch.ones((), device="cuda")
    torch_a, torch_b = (  # as bytes: not every torch takes FP8 from other libraries
        torch.from_dlpack(jax.lax.bitcast_convert_type(codes, jnp.uint8)).view(torch.float8_e4m3fn) for codes in (a, b)
    )
    multiply = functools.partial(torch._scaled_mm, torch_a, torch_b.t(), one, one, out_dtype=torch.float32)
    modes = {"torch, fast accumulation": True, "torch, its own promotion": False}
    return {name: multiply(use_fast_accum=is_fast).cpu().numpy() for name, is_fast in modes.items()}
