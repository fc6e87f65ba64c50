"""Training steps and decoding of the whole network, each implementation in a process of its own."""

from collections.abc import Sequence

from dsv3_jax.benchmarks import own_process
from dsv3_jax.benchmarks.networks import WORKLOADS
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.train.flops import train_flops_per_token

MODULES = {"dsv3_jax": "dsv3_jax.benchmarks.ours", "transformers": "dsv3_jax.benchmarks.transformers_peer"}


def train_step_rows(workload_name: str, *, peer: str | None, precisions: Sequence[str] | None) -> list[Row]:
    """Measures optimizer steps; all sides are credited with the same floating-point operations per token.

    Args:
      workload_name: of `networks.WORKLOADS`.
      peer: what is measured beside ours, in BF16 or float32.
      precisions: of our steps, a row each, the first also compared with the others; None for the workload's own.
    """
    workload = WORKLOADS[workload_name]
    precisions = workload.precisions if precisions is None else precisions
    flops = workload.tokens * train_flops_per_token(workload.model, sequence_length=workload.sequence_length)
    measured = {f"dsv3_jax {name}": _measure("dsv3_jax", "train_step", workload_name, name)[0] for name in precisions}
    if peer:
        measured[peer] = _measure(peer, "train_step", workload_name)[0]
    rows = []
    for name, result in measured.items():
        row = {"case": f"train_step {workload_name}", "implementation": name, "s per step": result["step_s"],
               "tokens/s": workload.tokens / result["step_s"], "TFLOP/s": flops / result["step_s"] / 1e12,
               "peak GB": result["peak_gb"], "activations GB": result.get("activations_gb"),
               "loss": result["loss"]}  # fmt: skip
        others = list(measured)[1:]
        row |= {f"speed of {other}": measured[other]["step_s"] / result["step_s"] for other in others}
        rows.append(row)
    return rows


def decode_rows(workload_name: str, *, peer: str | None) -> list[Row]:
    """Measures greedy generation after the first token."""
    names = ["dsv3_jax", peer] if peer else ["dsv3_jax"]
    measured = {name: _measure(name, "decode", workload_name) for name in names}
    return [
        {"case": f"decode {workload_name}, batch {result['batch']}", "implementation": name,
         "first token s": result["first_token_s"], "tokens/s": result["decode_tokens_per_s"],
         "speed-up": result["decode_tokens_per_s"] / measured[peer][i]["decode_tokens_per_s"] if peer else None}
        for i in range(len(measured["dsv3_jax"]))
        for name, results in measured.items()
        for result in [results[i]]
    ]  # fmt: skip


def _measure(name: str, suite: str, *arguments: str) -> list[dict]:
    return own_process.run(MODULES[name], suite, *arguments)
