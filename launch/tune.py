"""Ranks tiles of the Hopper products on the GPU at hand; the `tuned.py` and `tuned_fp8.py` of the ops hold the choice.

    python launch/tune.py --operation=grouped_product --tile=raster_rows=8 --tile=stages=3,raster_rows=16
    python launch/tune.py --operation=few_rows --tile=columns=32,warpgroups=4,stages=8 --json=few_rows.json

Every --tile is measured beside the tuned one over all sizes of the operation's benchmark; the last rows are geometric
means. What ranks first is printed as the expression that belongs into the table.
"""

import dataclasses
import functools

from absl import flags

from dsv3_jax import config_flags

OPERATIONS = (
    "product", "few_rows", "weight_gradient", "grouped_product", "grouped_weight_gradient", "grouped_product_bf16",
    "grouped_weight_gradient_bf16",
)  # fmt: skip
OPERATION = flags.DEFINE_enum("operation", None, OPERATIONS, "what is measured; FP8 unless it says BF16", required=True)
TILES = flags.DEFINE_multi_string(
    "tile", [], "fields to change in the operation's tile for large sizes, NAME=INTEGER,...; repeatable"
)
MODES = flags.DEFINE_multi_enum(
    "mode", ["burst"], ["single", "burst", "steady"], "how it is timed; repeatable, the first ranks"
)
CASES = flags.DEFINE_string("cases", "", "only sizes whose names contain this")
JSON = flags.DEFINE_string("json", None, "file that gets the results with the hardware and the versions")
TUNED = "tuned"
LARGE = 8192, 8192  # rows and columns of a product for which all tiles are whole


def main() -> None:
    import jax

    from dsv3_jax.benchmarks import contests, report
    from dsv3_jax.kernels import device

    if not device.is_hopper():
        raise ValueError(f"no Hopper GPU to tune for: JAX found {jax.devices()[0].device_kind}")
    held, operands, multiply, base = operation(OPERATION.value)
    tiles = {text: change(base, text) for text in TILES.value}
    entrants = (contests.Entrant(TUNED, operands, multiply),)
    entrants += tuple(
        contests.Entrant(text, operands, functools.partial(multiply, tile=tile)) for text, tile in tiles.items()
    )
    held = [dataclasses.replace(contest, entrants=entrants) for contest in held if CASES.value in contest.case]
    modes = ("steady",) if OPERATION.value == "few_rows" else tuple(MODES.value)  # few rows take too short for bursts
    rows = contests.hold(held, against=TUNED, with_torch=False, modes=modes)
    report.show(OPERATION.value, rows)
    means = [row for row in rows if row["case"] == contests.GEOMETRIC_MEAN]
    best = max(means, key=lambda row: row[f"{modes[0]} of {TUNED}"])["implementation"]
    print(f"best: {TUNED if best == TUNED else expression(tiles[best])}")
    if JSON.value:
        report.save(JSON.value, {OPERATION.value: rows})


def operation(name: str):
    """Returns the contests of an operation, which operands it takes, its function of (operands, tile), and a tile."""
    import jax.numpy as jnp

    from dsv3_jax.benchmarks import fp8_products as sizes
    from dsv3_jax.kernels.fp8_matmul import pallas_gpu as dense
    from dsv3_jax.kernels.fp8_matmul import tuned
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu as grouped_bf16
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu_fp8 as grouped
    from dsv3_jax.kernels.grouped_matmul import tuned as tuned_bf16
    from dsv3_jax.kernels.grouped_matmul import tuned_fp8

    bf16, float32, aligned = jnp.bfloat16, jnp.float32, {"alignment": 128}
    by_group = [(*groups, *shape) for groups in sizes.GROUPS for shape in sizes.GROUPED_SHAPES]
    products = [sizes.grouped_contest(*case) for case in by_group]
    gradients = [sizes.grouped_gradient_contest(*case) for case in by_group]
    if name == "product":
        held = [sizes.dense_contest(*shape, weights=True) for shape in sizes.DENSE_SHAPES]
        return held, "fp8", dense.fp8_matmul, tuned.fp8_matmul(*LARGE, bf16)
    if name == "few_rows":
        held = [
            sizes.dense_contest(t, *shape, weights=True) for t in sizes.DECODE_TOKENS for shape in sizes.DECODE_SHAPES
        ]
        return held, "fp8", dense.fp8_matmul, tuned.FewRowsTile(columns=64)
    if name == "weight_gradient":
        held = [sizes.dense_contest(n, k, tokens, weights=False) for tokens, n, k in sizes.DENSE_SHAPES]
        return held, "fp8", functools.partial(dense.fp8_matmul, out_dtype=float32), tuned.fp8_matmul(*LARGE, float32)
    if name == "grouped_product":
        multiply = functools.partial(grouped.grouped_fp8_matmul, **aligned)
        return products, "fp8", multiply, tuned_fp8.product(LARGE[0], bf16)
    if name == "grouped_weight_gradient":
        multiply = functools.partial(grouped.grouped_fp8_weight_gradient, **aligned)
        return gradients, "fp8", multiply, tuned_fp8.weight_gradient(float32)
    if name == "grouped_product_bf16":
        multiply = functools.partial(grouped_bf16.rows_times_weights, weights_are_transposed=False)
        return products, "bf16", multiply, tuned_bf16.rows_times_weights(4096)
    multiply = functools.partial(grouped_bf16.weight_gradient, out_dtype=bf16)
    return gradients, "bf16", multiply, tuned_bf16.weight_gradient(7168, 4096, bf16)


def change(tile, text: str):
    """Returns a tile with fields replaced as "name=integer,..." says.

    Raises:
      ValueError: not of that form, or no field of this tile.
    """
    names = {field.name: field.type for field in dataclasses.fields(tile)}
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value.isdigit():
            raise ValueError(f"--tile={text}: {part!r} must be NAME=INTEGER, NAME one of {', '.join(names)}")
        values[name] = bool(int(value)) if isinstance(getattr(tile, name), bool) else int(value)
    return dataclasses.replace(tile, **values)


def expression(tile) -> str:
    """Returns the Python expression of a tile, without fields that have their default."""
    given = [
        f"{field.name}={getattr(tile, field.name)!r}"
        for field in dataclasses.fields(tile)
        if field.default is dataclasses.MISSING or getattr(tile, field.name) != field.default
    ]
    return f"{type(tile).__name__}({', '.join(given)})"


if __name__ == "__main__":
    config_flags.run(main)
