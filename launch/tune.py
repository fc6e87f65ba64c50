"""Ranks tile shapes of the grouped-matmul kernels on the GPU at hand; its `tuned.py` holds the choice.

python launch/tune.py --groups=32 --rows=1024 --contraction=7168 --columns=4096
"""

import dataclasses
import functools

from absl import flags

from dsv3_jax import config_flags

GROUPS = flags.DEFINE_integer("groups", 8, "groups", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 4096, "rows of every group", lower_bound=1)
CONTRACTION = flags.DEFINE_integer("contraction", 7168, "K of [M, K] x [K, N]", lower_bound=64)
COLUMNS = flags.DEFINE_integer("columns", 4096, "N of [M, K] x [K, N]", lower_bound=64)
JSON = flags.DEFINE_string("json", None, "file that gets the results with the hardware and the versions")


def main() -> None:
    import jax
    import jax.numpy as jnp

    from dsv3_jax.benchmarks import report
    from dsv3_jax.benchmarks.kernels import draw_grouped, jax_contender
    from dsv3_jax.benchmarks.timing import burst_medians
    from dsv3_jax.kernels import device
    from dsv3_jax.kernels.grouped_matmul import pallas_gpu, tuned

    if not device.is_hopper():
        raise ValueError(f"no Hopper GPU to tune for: JAX found only {jax.default_backend()}")
    x, w, dy, sizes = draw_grouped(GROUPS.value, ROWS.value, CONTRACTION.value, COLUMNS.value)
    wide = tuned.Tile()
    narrow_store = dataclasses.replace(wide, store_columns=64)
    variants = [
        {}, {"cluster": 2}, {"raster_rows": 16}, {"cluster": 2, "raster_rows": 16}, {"cluster": 2, "raster_rows": 32},
    ]  # fmt: skip
    passes = {
        "product": (
            functools.partial(pallas_gpu.rows_times_weights, weights_are_transposed=False), (x, w, sizes), wide,
        ),
        "input gradient": (
            functools.partial(pallas_gpu.rows_times_weights, weights_are_transposed=True), (dy, w, sizes), wide,
        ),
        "weight gradient, bf16": (
            functools.partial(pallas_gpu.weight_gradient, out_dtype=jnp.bfloat16), (x, dy, sizes), wide,
        ),
        "weight gradient, float32": (
            functools.partial(pallas_gpu.weight_gradient, out_dtype=jnp.float32), (x, dy, sizes), narrow_store,
        ),
    }  # fmt: skip
    flops = 2 * GROUPS.value * ROWS.value * CONTRACTION.value * COLUMNS.value
    rows = []
    for name, (multiply, operands, base) in passes.items():
        tiles = {str(variant): dataclasses.replace(base, **variant) for variant in variants}
        contenders = {
            text: jax_contender(functools.partial(multiply, tile=tile), *operands) for text, tile in tiles.items()
        }
        seconds = burst_medians(contenders)
        rows += [
            {"case": name, "implementation": text, "ms": value * 1e3, "TFLOP/s": flops / value / 1e12}
            for text, value in sorted(seconds.items(), key=lambda item: item[1])
        ]
    report.show(f"{GROUPS.value} x {ROWS.value} rows, {CONTRACTION.value} -> {COLUMNS.value}", rows)
    if JSON.value:
        report.save(JSON.value, "tune", rows)


if __name__ == "__main__":
    config_flags.run(main)
