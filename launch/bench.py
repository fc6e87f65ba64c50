"""Measures kernels, training steps, decoding and the accuracy of FP8 sums, beside a peer in the same run.

  python launch/bench.py --suite=train_step --peer=transformers
  python launch/bench.py --suite=grouped_matmul --peer=torch --json=grouped_matmul.json

On CPU the whole-step suites run a 108M network; on a GPU three layers at DeepSeek-V3's width, which needs 110 GB.
The kernel suites need a Hopper GPU; accumulation runs everywhere, and measures its kernels on one. The peers need the
`parity` extra.
"""

import os

from absl import flags

from dsv3_jax import config_flags

PEERS = {
    "grouped_matmul": "torch", "attention": "torch", "accumulation": "torch", "train_step": "transformers",
    "decode": "transformers",
}  # fmt: skip
SUITE = flags.DEFINE_enum("suite", None, list(PEERS), "what is measured", required=True)
PEER = flags.DEFINE_enum("peer", "none", ["torch", "transformers", "none"], "what is measured beside it")
WORKLOAD = flags.DEFINE_enum("workload", None, ["small", "slice"], "network of a whole step; not given: by device")
JSON = flags.DEFINE_string("json", None, "file that gets the results with the hardware and the versions")


def main() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs the GPU's memory too
    import jax

    from dsv3_jax.benchmarks import accumulation, kernels, report, whole_steps

    suite, platform = SUITE.value, jax.default_backend()
    if PEER.value not in ("none", PEERS[suite]):
        raise ValueError(f"--peer={PEER.value}: the peer of --suite={suite} is {PEERS[suite]}")
    peer = None if PEER.value == "none" else PEER.value
    workload = WORKLOAD.value or ("slice" if platform == "gpu" else "small")
    if suite in ("grouped_matmul", "attention"):
        if platform != "gpu":
            raise ValueError(f"--suite={suite}: needs a Hopper GPU, and JAX found only {platform}")
        measure = kernels.grouped_matmul_rows if suite == "grouped_matmul" else kernels.attention_rows
        rows = measure(with_torch=peer is not None)
    elif suite == "accumulation":
        if peer is not None and platform != "gpu":
            raise ValueError("--suite=accumulation --peer=torch: torch's FP8 product needs a GPU; use --peer=none")
        rows = accumulation.error_rows(with_torch=peer is not None)
    else:
        measure = whole_steps.train_step_rows if suite == "train_step" else whole_steps.decode_rows
        rows = measure(workload, peer=peer)
    report.show(f"{suite} on {jax.devices()[0].device_kind}", rows)
    if JSON.value:
        report.save(JSON.value, suite, rows)


if __name__ == "__main__":
    config_flags.run(main)
