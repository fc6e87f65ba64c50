"""The bench of expert-parallel steps: what it credits, and what it makes of a trace."""

import pytest
from test_traces import HAND_MADE

from dsv3_jax.benchmarks import expert_parallel, traces
from dsv3_jax.benchmarks.networks import SMALL


def measured(step_s: float, **more) -> dict:
    return {"step_s": step_s, "loss": 1.0, "peak_gb": 2.0} | more


def test_rows_credit_the_tokens_of_one_device_and_show_the_exchange():
    exchange, collectives = traces.Overlap(0.2, 0.5, 0.05, 0.1), traces.Overlap(0.3, 0.4, 0.05, 0.1)
    results = {
        "1 device": measured(1.0),
        "gpu=2": measured(
            1.25,
            exchange=list(exchange),
            collectives=list(collectives),
            by_collective=[["nccl", 3, *collectives]],
            by_part=[["attention, backward", 0.3]],
            beside=[["shared", 0.04]],
        ),
    }
    alone, spread, collective, part, beside = expert_parallel.step_rows(SMALL, "small fp32", results)
    assert alone["tokens/s a device"] == SMALL.tokens and alone["speed of 1 device"] == 1.0
    assert spread["speed of 1 device"] == pytest.approx(0.8)
    assert spread["TFLOP/s a device"] == pytest.approx(0.8 * alone["TFLOP/s a device"])
    assert (spread["ms exchange"], spread["hidden"]) == pytest.approx((200, 0.25))
    assert (spread["ms collectives"], spread["ms compute"], spread["ms idle"]) == pytest.approx((300, 400, 100))
    assert "ms exchange" not in alone
    assert collective["implementation"] == "nccl" and collective["times a step"] == 3
    assert (collective["ms a step"], collective["hidden"]) == pytest.approx((300, 1 / 6))
    assert part["implementation"] == "attention, backward" and part["ms a step"] == pytest.approx(300)
    assert beside["implementation"] == "shared" and beside["ms a step"] == pytest.approx(40)


def test_a_trace_is_averaged_over_devices_and_steps():
    # Device 0 exchanges for 18 µs, of which it computes during 9; for 4 of them it is not known which operation sends.
    # Device 1 gathers parameters for 6 µs, which is no exchange.
    names = {
        "all-to-all.2": "jit(step)/transpose(jvp(expert_exchange/combine))/all_to_all",
        "custom-call.1": "jit(step)/while/body/experts/matmul",
    }
    result = expert_parallel.summarize(traces.kernels_of(HAND_MADE), names, num_steps=2)
    assert result["exchange"] == pytest.approx([14e-6 / 4, 25e-6 / 4, 9e-6 / 4, 6e-6 / 4])
    assert result["collectives"] == pytest.approx([(18 + 6) * 1e-6 / 4, 25e-6 / 4, 9e-6 / 4, 6e-6 / 4])
    seconds_of = {name: (count, seconds) for name, count, seconds, *_ in result["by_collective"]}
    assert seconds_of == {
        "ncclDevKernel_SendRecv (expert_exchange/combine, backward: all_to_all)": pytest.approx((1 / 4, 14e-6 / 4)),
        "ncclDevKernel_AllGather_RING_LL (other: )": pytest.approx((1 / 4, 6e-6 / 4)),
        "ncclDevKernel_SendRecv (other: )": pytest.approx((1 / 4, 4e-6 / 4)),
    }
    assert dict(result["by_part"]) == {"experts": pytest.approx(10e-6 / 4), "other": pytest.approx(15e-6 / 4)}
    assert result["beside"] == [["shared", pytest.approx(7e-6 / 4)], ["gemm", pytest.approx(2e-6 / 4)]]
    nothing_known = expert_parallel.summarize(traces.kernels_of(HAND_MADE), {}, num_steps=2)
    assert nothing_known["exchange"][0] == 0 and nothing_known["collectives"] == result["collectives"]


def test_one_device_has_no_experts_elsewhere(monkeypatch):
    monkeypatch.setattr(expert_parallel.jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="needs several devices"):
        expert_parallel.expert_parallel_rows("small", precisions=None)
