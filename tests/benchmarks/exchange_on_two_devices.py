"""Run by test_exchange_bench.py in a process of its own, which sees two CPU devices; prints the rows as JSON."""

import dataclasses
import functools
import json

import jax
import numpy as np

from dsv3_jax.benchmarks import expert_exchange, expert_parallel, mesh_programs, timing
from dsv3_jax.benchmarks.expert_exchange import ONE_DEVICE, Exchange
from dsv3_jax.benchmarks.mesh_programs import MeshProgram, draw
from dsv3_jax.benchmarks.networks import SMALL
from dsv3_jax.config import override
from dsv3_jax.testing.networks import small_config

SIZES = {"hidden_size": 128, "experts_per_device": 4, "top_k": 4, "n_group": 4, "topk_group": 2}
CASES = [
    Exchange(32, 1, 2, **SIZES),
    Exchange(32, 2, 1, routing=ONE_DEVICE, **SIZES),
    Exchange(32, 1, 2, **(SIZES | {"top_k": 1, "topk_group": 1})),
]


def main() -> None:
    check_programs()
    for case in CASES:
        check_bytes(case)
    check_steps()
    expert_exchange.steady_medians = functools.partial(timing.steady_medians, heat_s=1e-4, measure_s=1e-4, repeats=1)
    expert_exchange.OPTIONS = {"": {}}  # the others are not for CPUs
    mesh_programs.START_S = 1e-9
    print(json.dumps(expert_exchange.measure(CASES[:2], with_torch=False)))


def check_programs() -> None:
    """A start does the operation on every device's own operands; the plain exchanges agree with one another."""
    mesh = expert_exchange.make_mesh(CASES[0].mesh)
    parts = draw(functools.partial(expert_exchange._draw_bytes, (2, 64)), mesh)
    sent = np.asarray(parts).reshape(2, 2, 64)
    assert not np.array_equal(sent[0], sent[1]), "the devices' bytes must differ"
    for name, operation in expert_exchange.PLAIN.items():
        contender = MeshProgram(operation, (parts,), mesh, calls=3, options={}).contender((parts,))
        contender.start()
        received = np.asarray(contender.start()).reshape(2, 2, 64)
        np.testing.assert_array_equal(received, sent.swapaxes(0, 1), err_msg=name)
        assert contender.operations == 3


def check_steps() -> None:
    """Steps of a small network are timed with its experts on both devices."""
    model = override(small_config(num_hidden_layers=2), {"num_nextn_predict_layers": 0})
    workload = dataclasses.replace(SMALL, model=model, batch_size=1, sequence_length=8)
    (result,) = expert_parallel.time_steps(workload, "fp32", num_devices=2).values()
    assert result.keys() == {"step_s", "loss", "peak_gb"} and result["step_s"] > 0 and result["loss"] > 0, result


def check_bytes(case: Exchange) -> None:
    """What must leave a device is counted from its routing, device by device and expert by expert."""
    drawn = expert_exchange._draw(case)
    experts = np.asarray(drawn.tokens["BF16"].experts_RK).reshape(2, case.tokens, case.top_k)
    leaving = [sum(any(e // case.experts_per_device != own for e in token) for token in experts[own]) for own in (0, 1)]
    if case.routing == ONE_DEVICE:
        assert leaving == [case.tokens, 0]
    row_bytes = {"BF16": 2 * 128 + 8 * case.top_k, "FP8": 128 + 1 + 8 * case.top_k}
    assert drawn.bytes_sent == {name: max(leaving) * size for name, size in row_bytes.items()}
    for name, size in drawn.bytes_per_destination.items():
        assert size % 16 == 0 and 0 <= size - drawn.bytes_sent[name] < 16


if __name__ == "__main__":
    assert jax.device_count() == 2
    main()
