"""Contests and replays on small arrays: what is timed computes what it should, and the table's arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.benchmarks import contests, fp8_products, quantizers, replays, timing
from dsv3_jax.benchmarks.contests import Contest, Entrant, geometric_means, hold
from dsv3_jax.benchmarks.replays import Program, copies

BF16_ROUNDING = 2e-3  # a relative 2^-9 at most, 1.7e-3 in the mean square


def _seconds_of_one(calls):
    """Stands in for `timing.single_medians`, which reads a GPU's trace: each call is made once."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, 1e-3)


@pytest.fixture
def briefly(monkeypatch):
    """Lets contests last milliseconds, on the reference implementations."""
    steady = functools.partial(timing.steady_medians, heat_s=1e-4, measure_s=1e-4, repeats=1)
    monkeypatch.setattr(contests, "MODES", {"burst": steady, "steady": steady, "single": _seconds_of_one})
    monkeypatch.setattr(replays, "START_S", 1e-9)
    monkeypatch.setattr(replays, "ROTATING_BYTES", 1)
    monkeypatch.setattr(replays, "ROUND_S", 1e-9)


def test_a_start_does_every_round_on_all_operands():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2))
    calls = []

    def multiply(x, y):
        out = jnp.matmul(x, y)
        jax.debug.callback(lambda: calls.append(1))
        return out

    program = Program(multiply, (x, y), num_sets=3, rounds=2)
    sets = [(x * scale, y) for scale in (1, 2, 3)]
    contender = program.contender(sets)
    contender.start()
    results = contender.start()  # into the memory of the first
    for result, (left, right) in zip(results, sets):
        np.testing.assert_array_equal(result, np.asarray(left) @ np.asarray(right))
    jax.effects_barrier()
    assert len(calls) == 2 * contender.operations == 12


def test_sets_exceed_the_cache_and_rounds_fill_a_start():
    assert replays.sets_and_rounds(int(300e6), 1e-3) == (1, 2)
    num_sets, rounds = replays.sets_and_rounds(int(16e6), 3e-6)
    assert num_sets * 16e6 >= 4 * 60e6 and num_sets * 3e-6 >= 1.5e-4 and num_sets * rounds * 3e-6 >= 2e-3


def test_copies_lie_in_different_memory():
    (first,), (second,) = copies((jnp.ones(3),), count=2)
    assert first.unsafe_buffer_pointer() != second.unsafe_buffer_pointer()


def test_rows_credit_operations_bytes_and_ratios(briefly, monkeypatch):
    monkeypatch.setitem(contests.MODES, "burst", lambda contenders: {"ours": 1e-3, "other": 2e-3})
    x = jnp.ones((64, 32), jnp.bfloat16)
    contest = Contest(
        case="double",
        flops=4e9,
        draw=lambda: {"x": (jnp.ones(x.shape, x.dtype),)},
        entrants=(Entrant("ours", "x", lambda x: 2 * x), Entrant("other", "x", lambda x: 3 * x)),
        exact_and_actual=lambda operands, result: (2.0 * operands[0].astype(jnp.float32), result.astype(jnp.float32)),
    )
    assert contest.num_bytes == 2 * 64 * 32 * 2
    assert contest.floor_s == 4e9 / contests.FP8_PEAK
    ours, other, *means = hold([contest], against="other", with_torch=False, modes=("burst",))
    assert ours["burst µs"] == pytest.approx(1000) and ours["burst TFLOP/s"] == pytest.approx(4)
    assert (ours["burst of other"], other["burst of other"]) == (2, 1)
    assert ours["error"] == 0 and other["error"] == pytest.approx(0.5)
    assert [row["case"] for row in means] == [contests.GEOMETRIC_MEAN] * 2


def test_geometric_mean_is_over_the_cases_of_an_implementation():
    rows = [{"case": str(i), "implementation": "ours", "burst of torch": ratio} for i, ratio in enumerate((0.5, 2, 8))]
    assert geometric_means(rows)[0]["burst of torch"] == pytest.approx(2)


def test_product_suites_measure_products(briefly, monkeypatch):
    monkeypatch.setattr(fp8_products, "DENSE_SHAPES", ((48, 144, 256),))
    monkeypatch.setattr(fp8_products, "DECODE_TOKENS", (16,))
    monkeypatch.setattr(fp8_products, "DECODE_SHAPES", ((32, 128),))
    for suite in (fp8_products.product_rows, fp8_products.decode_rows, fp8_products.weight_gradient_rows):
        assert 0 <= suite(with_torch=False)[0]["error"] < BF16_ROUNDING


def test_grouped_suite_measures_products_of_the_first_group(briefly, monkeypatch):
    monkeypatch.setattr(fp8_products, "GROUPS", ((2, 128),))
    monkeypatch.setattr(fp8_products, "GROUPED_SHAPES", ((128, 192),))
    rows = fp8_products.grouped_rows(with_torch=False)
    assert [row["implementation"] for row in rows] == [fp8_products.OURS_FP8, fp8_products.OURS_BF16] * 2
    assert all(0 <= row["error"] < BF16_ROUNDING for row in rows)


def test_quantizers_are_measured_beside_a_copy_of_as_many_bytes(briefly, monkeypatch):
    monkeypatch.setattr(quantizers, "SHAPES", ((16, 128),))
    monkeypatch.setattr(quantizers, "NORM_SHAPES", ())
    monkeypatch.setattr(quantizers, "SWIGLU_SHAPES", ())
    monkeypatch.setattr(quantizers, "ATTENTION_SHAPES", ())
    held = []
    monkeypatch.setattr(quantizers, "hold", lambda contests, **_: held.extend(contests))
    quantizers.quantizer_rows(with_torch=False)
    rows = held[0]
    assert rows.num_bytes == 16 * 128 * 3 + 16 * 4
    (copied,) = rows.types["copied"]
    assert 2 * copied.size * copied.dtype.itemsize == rows.num_bytes
    _, copy, _ = rows.entrants
    assert copy.name == quantizers.XLA_COPY and jax.eval_shape(copy.operation, copied).shape == copied.shape
