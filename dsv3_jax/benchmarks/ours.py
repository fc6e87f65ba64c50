"""Measures this project: `python -m dsv3_jax.benchmarks.ours train_step WORKLOAD PRECISION`, or `decode WORKLOAD`.

A process of its own, so that its peak memory is its own; the last line on stdout is the result as JSON.
"""

import json
import resource
import sys
import time

import jax
import numpy as np

from dsv3_jax.benchmarks.networks import DECODE_BATCHES, NEW_TOKENS, PROMPT_LENGTH, WORKLOADS, Workload
from dsv3_jax.config import ModelConfig, override
from dsv3_jax.model import cast_params, init_params
from dsv3_jax.model.kept_activations import kept_bytes
from dsv3_jax.serve.engine import generate_tokens
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train import schedule
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import make_train_step, split_batch

WARMUP_STEPS, STEPS = 2, 6


def train_step(workload: Workload, precision: str) -> list[dict]:
    """Times optimizer steps on random tokens as a training loop runs them: one is started while another is computed."""
    config = override(workload.run_config, {"model.precision": precision})
    mesh = make_mesh(config.mesh)
    settings = schedule.at(config.train, step=0, tokens=0)
    rng = np.random.default_rng(0)
    shape = (workload.batch_size, workload.sequence_length + 1)
    with jax.set_mesh(mesh):
        step, state = make_train_step(config, mesh), init_state(config, mesh)

        def run(steps):
            nonlocal state
            metrics = {}
            for _ in range(steps):
                tokens_ABT = split_batch(config, rng.integers(0, config.model.vocab_size, shape).astype(np.int32))
                earlier = metrics
                state, metrics = step(state, tokens_ABT, settings)
                jax.block_until_ready(earlier)
            return jax.block_until_ready(metrics)

        run(WARMUP_STEPS)
        start = time.perf_counter()
        metrics = run(STEPS)
        step_s = (time.perf_counter() - start) / STEPS
    return [{
        "step_s": step_s, "loss": float(metrics["loss"]),
        "peak_gb": _peak_bytes() / 1e9, "activations_gb": _activation_bytes(config.model, workload) / 1e9,
    }]  # fmt: skip


def decode(workload: Workload) -> list[dict]:
    """Times greedy continuation of random prompts, one result per batch size."""
    config = workload.model
    params = cast_params(config, init_params(config, jax.random.key(0), init_std=config.initializer_range))
    rng = np.random.default_rng(0)

    def continue_prompts(prompts, new_tokens):
        start = time.perf_counter()
        added = generate_tokens(
            config, params, prompts, max_new_tokens=new_tokens, temperature=0.0, top_p=1.0, seed=0,
            num_token_ids=config.vocab_size,
        )  # fmt: skip
        return time.perf_counter() - start, sum(map(len, added))

    results = []
    for batch in DECODE_BATCHES:
        prompts = rng.integers(2, config.vocab_size, (batch, PROMPT_LENGTH)).tolist()
        for new_tokens in (1, NEW_TOKENS):
            continue_prompts(prompts, new_tokens)
        first_s, first_count = continue_prompts(prompts, 1)
        all_s, all_count = continue_prompts(prompts, NEW_TOKENS)
        tokens_per_s = (all_count - first_count) / (all_s - first_s)
        results.append({"batch": batch, "first_token_s": first_s, "decode_tokens_per_s": tokens_per_s})
    return results


def _activation_bytes(model: ModelConfig, workload: Workload) -> int:
    """Returns what all layers keep of one batch for the backward pass."""
    kept = kept_bytes(model, batch_size=workload.batch_size, length=workload.sequence_length)
    layers = {"dense": model.num_dense_layers, "moe": model.num_moe_layers + model.num_nextn_predict_layers}
    return sum(layers[kind] * sum(sizes.values()) for kind, sizes in kept.items())


def _peak_bytes() -> int:
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device is not None:
        return statistics_of_device["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    suite, workload_name, *precision = sys.argv[1:]
    print(json.dumps({"train_step": train_step, "decode": decode}[suite](WORKLOADS[workload_name], *precision)))
