"""What a plan says of itself."""

import dataclasses
import json

import pytest

from dsv3_jax.plan import hardware, memory, report
from dsv3_jax.plan.planning import Plan
from dsv3_jax.plan.programs import OutsideLayers
from dsv3_jax.plan.traffic import Collective

GB = 10**9
PLAN = Plan(
    program="train",
    work="one step",
    mesh={"pipe": 1, "replica": 1, "node": 8, "gpu": 8, "tensor": 1},
    is_fsdp=False,
    hardware=hardware.HARDWARE["h200"],
    tokens=64_000,
    memory={memory.MASTERS: 20 * GB, memory.WEIGHTS: 30 * GB, memory.GRADIENTS: 50 * GB, memory.TEMPORARIES: 10 * GB},
    gradient_copies=1,
    outside_layers=OutsideLayers(weight_bytes=0, gradient_bytes=0),
    largest_buffers=(
        memory.Buffer("w", memory.GRADIENTS, 27 * GB, "f32[58,4,7168]", "jit(step)/transpose(jvp())", "model/moe.py"),
    ),
    usable_memory=146 * GB,
    flops={"bf16": 1e15},
    needed_flops=8e14,
    memory_traffic=4800 * GB,
    collectives=(Collective("all-to-all", ("node",), 58, 7 * GB, 8, 8),),
    busy_seconds={"bf16 products": 1.01, "memory": 1.0, "nvlink": 0.0, "network": 0.14},
    compile_seconds=60.0,
)
TOO_LARGE = dataclasses.replace(PLAN, usable_memory=70 * GB)


def test_plan_that_fits_says_of_how_much_and_what_takes_longest():
    fits, slowest, needed = report.verdict(PLAN)
    assert fits == "fits: 110 GB of 146 GB"
    assert "dominated by products" in slowest and "1.01 s" in slowest and "990 tokens/s" in slowest
    assert "800 TFLOP needed" in needed and "1.00 PFLOP executed" in needed


def test_plan_that_does_not_fit_says_by_how_much_what_is_largest_and_what_a_pipeline_must_save():
    over, _, pipeline, *_ = report.verdict(TOO_LARGE)
    assert "110 GB, 40.0 GB more than 70.0 GB" in over and "gradients 50.0 GB, weights as computed with 30.0 GB" in over
    assert "save 40.0 GB" in pipeline and "2 or more stages" in pipeline


@pytest.mark.parametrize(("usable", "stages"), [(110, None), (109, 2), (70, 2), (50, 4), (31, 80), (30, None)])
def test_stages_leave_room_for_what_they_do_not_divide(usable, stages):
    """30 GB are not divided: 80 GB over the stages must fit into what they leave."""
    assert dataclasses.replace(PLAN, usable_memory=usable * GB).stages_to_fit == stages


@pytest.mark.parametrize(
    ("usable", "devices"), [(110, None), (109, 128), (100, 128), (99, 192), (91, 1280), (90, None)]
)
def test_further_replicas_leave_room_for_what_zero_does_not_divide(usable, devices):
    """90 GB are not divided; 20 GB on each of 64 devices are."""
    assert dataclasses.replace(PLAN, usable_memory=usable * GB).devices_to_fit == devices


def test_fsdp_is_said_to_keep_parts_of_gradients_for_weights_and_gradients():
    """30 and 50 GB become 20 GB, as much as the master weights, which are float32 as well."""
    assert PLAN.least_with_fsdp == 50 * GB
    assert "would need at least 50.0 GB and room for a layer's weights: plan it" in report.verdict(TOO_LARGE)[1]
    assert "it would not fit either" in report.verdict(dataclasses.replace(PLAN, usable_memory=49 * GB))[1]


def test_fsdp_is_said_to_keep_what_is_in_no_layer_whole_and_a_sum_of_gradients_beside_the_next():
    """2 GB of weights instead of 30; of 4 GB of gradients and the 20 GB of the device's parts two copies, not 50."""
    plan = dataclasses.replace(PLAN, gradient_copies=2, outside_layers=OutsideLayers(2 * GB, 4 * GB))
    assert plan.least_with_fsdp == (110 - 30 - 50 + 2 + 2 * (4 + 20)) * GB


@pytest.mark.parametrize(("copies", "usable", "devices"), [(1, 109, 128), (1, 79, 320), (2, 80, 128), (2, 51, 3840)])
def test_with_fsdp_further_replicas_divide_gradients_too(copies, usable, devices):
    """20 GB of state on each of 64 devices are divided, and as much for every copy of the gradients."""
    plan = dataclasses.replace(PLAN, is_fsdp=True, gradient_copies=copies, usable_memory=usable * GB)
    assert plan.devices_to_fit == devices
    assert any("moments and gradients enough" in line for line in report.verdict(plan))


@pytest.mark.parametrize("changed", [{"is_fsdp": True}, {"program": "decode"}])
def test_fsdp_is_proposed_only_where_it_changes_something(changed):
    assert not any("fsdp" in line for line in report.verdict(dataclasses.replace(TOO_LARGE, **changed)))


def test_json_and_plot_hold_every_plan(tmp_path):
    report.write_json([PLAN, TOO_LARGE], str(tmp_path / "plan.json"))
    report.write_plot([PLAN, TOO_LARGE], str(tmp_path / "plan.png"))
    first, second = json.loads((tmp_path / "plan.json").read_text())
    assert (first["fits"], second["fits"], second["stages_to_fit"]) == (True, False, 2)
    assert first["collectives"][0]["axes"] == ["node"] and first["peak_memory"] == 110 * GB
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_several_plans_end_in_a_line_for_each(capsys):
    report.show_all([PLAN, dataclasses.replace(TOO_LARGE, is_fsdp=True)])
    first, second = [line for line in capsys.readouterr().out.splitlines() if "8 node x 8 gpu" in line]
    assert "yes" in first and "146 GB" in first and "990" in first
    assert "no" in second and "FSDP" in second


def test_table_shows_kinds_resources_and_collectives(capsys):
    report.show(TOO_LARGE)
    shown = capsys.readouterr().out
    for text in (
        "64 x H200",
        "gradients",
        "45%",
        "all-to-all",
        "7.00 GB",
        "does not fit",
        "f32[58,4,7168]",
        "model/moe.py",
        "data sheet",
    ):
        assert text in shown, text
