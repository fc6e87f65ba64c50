"""Measures kernels, training steps, decoding, the accuracy of FP8 sums and the data loader, peers in the same run.

  python launch/bench.py --suite=fp8_matmul --suite=fp8_decode --peer=all --json=products.json
  python launch/bench.py --suite=train_step --peer=transformers --precision=fp8,bf16
  python launch/bench.py --suite=loader --corpus=CORPUS
  python launch/bench.py --suite=all --peer=all --json=all.json

The kernel suites need a Hopper GPU. On CPU the whole-step suites run a 108M network; on a GPU three layers at
DeepSeek-V3's width, which needs 110 GB. accumulation runs everywhere, and measures its kernels on a GPU. "all" is every
suite but decode, loader, memory, exchange and expert_parallel, about 6 minutes on an H200; the last two need several
devices of one host. memory holds what launch/plan.py plans for a step against what it takes on the devices that are
here. The peers need the `parity` extra.
"""

import os

from absl import flags

from dsv3_jax import config_flags

PEERS = {
    "fp8_matmul": "torch", "fp8_decode": "torch", "fp8_weight_gradient": "torch", "fp8_grouped": "torch",
    "block_quantize": "torch", "grouped_matmul": "torch", "attention": "torch", "accumulation": "torch",
    "exchange": "torch", "expert_parallel": "none", "train_step": "transformers", "decode": "transformers",
    "memory": "none", "loader": "none",
}  # fmt: skip
SEVERAL_DEVICES = ("exchange", "expert_parallel")
ALL = [suite for suite in PEERS if suite not in (*SEVERAL_DEVICES, "decode", "loader", "memory")]
SUITES = flags.DEFINE_multi_enum("suite", None, [*PEERS, "all"], "what is measured; may be repeated", required=True)
PEER = flags.DEFINE_enum("peer", "none", ["torch", "transformers", "all", "none"], "what is measured beside it")
WORKLOAD = flags.DEFINE_enum("workload", None, ["small", "slice"], "network of a whole step; not given: by device")
PRECISIONS = flags.DEFINE_list("precision", None, "precisions of our training steps; not given: the workload's own")
CORPUS = flags.DEFINE_string("corpus", None, "prepared corpus that loader reads; not given: one of random tokens")
JSON = flags.DEFINE_string("json", None, "file that gets the results with the hardware and the versions")


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs the GPU's memory too
    import jax

    from dsv3_jax.benchmarks import report

    suites = list(dict.fromkeys(name for suite in SUITES.value for name in (ALL if suite == "all" else [suite])))
    for suite in suites:
        if PEER.value not in ("none", "all", PEERS[suite]):
            raise ValueError(f"--peer={PEER.value}: the peer of --suite={suite} is {PEERS[suite]}; use it or all")
    measured = {}
    for suite in suites:
        measure_suite = measure_several_devices if suite in SEVERAL_DEVICES else measure
        measured[suite] = rows = measure_suite(suite, with_peer=PEER.value != "none")
        report.show(f"{suite} on {jax.devices()[0].device_kind}", rows)
        if JSON.value:  # after every suite: a later one may fail
            report.save(JSON.value, measured)


def measure(suite: str, *, with_peer: bool) -> list[dict]:
    """Returns the rows of one suite.

    Raises:
      ValueError: the suite cannot run on this machine.
    """
    import jax

    from dsv3_jax.benchmarks import accumulation, fp8_products, kernels, quantizers
    from dsv3_jax.kernels import device

    of_kernels = {
        "fp8_matmul": fp8_products.product_rows, "fp8_decode": fp8_products.decode_rows,
        "fp8_weight_gradient": fp8_products.weight_gradient_rows, "fp8_grouped": fp8_products.grouped_rows,
        "block_quantize": quantizers.quantizer_rows, "grouped_matmul": kernels.grouped_matmul_rows,
        "attention": kernels.attention_rows,
    }  # fmt: skip
    platform = jax.default_backend()
    if suite in of_kernels:
        if not device.is_hopper():
            raise ValueError(f"--suite={suite}: needs a Hopper GPU, and JAX found {jax.devices()[0].device_kind}")
        return of_kernels[suite](with_torch=with_peer)
    if suite == "accumulation":
        if with_peer and platform != "gpu":
            raise ValueError("--suite=accumulation: torch's FP8 product needs a GPU; use --peer=none")
        return accumulation.error_rows(with_torch=with_peer)
    workload = chosen_workload()
    if suite == "loader":
        from dsv3_jax.benchmarks import loader

        return loader.loader_rows(workload, corpus_directory=CORPUS.value)
    if suite == "memory":
        from dsv3_jax.benchmarks import planned_memory

        return planned_memory.memory_rows(workload, precisions=PRECISIONS.value)
    peer = PEERS[suite] if with_peer else None
    from dsv3_jax.benchmarks import whole_steps

    if suite == "decode":
        return whole_steps.decode_rows(workload, peer=peer)
    return whole_steps.train_step_rows(workload, peer=peer, precisions=PRECISIONS.value)


def measure_several_devices(suite: str, *, with_peer: bool) -> list[dict]:
    """Returns the rows of one suite of `SEVERAL_DEVICES`.

    Raises:
      ValueError: there is one device only.
    """
    from dsv3_jax.benchmarks import expert_exchange, expert_parallel

    if suite == "exchange":
        return expert_exchange.exchange_rows(with_torch=with_peer)
    return expert_parallel.expert_parallel_rows(chosen_workload(), precisions=PRECISIONS.value)


def chosen_workload() -> str:
    """Returns the network of whole steps: the flag's, else what suits the device."""
    import jax

    return WORKLOAD.value or ("slice" if jax.default_backend() == "gpu" else "small")


if __name__ == "__main__":
    config_flags.run(main)
