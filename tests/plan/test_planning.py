"""Plans of small training steps on eight host devices, against arithmetic on shapes and partitions."""

import json
import pathlib
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.config import RunConfig, override
from dsv3_jax.plan import memory, programs, serving
from dsv3_jax.sharding.mesh import AXES

SCRIPT = pathlib.Path(__file__).with_name("plan_on_host_devices.py")
LAYERS, LENGTH, PASSES, BYTES = 2, 32, 2, 4


@pytest.fixture(scope="module")
def plans() -> dict[str, dict]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def sent(plan: dict, kind: str, *axes: str) -> int:
    return sum(c["sent_bytes"] for c in plan["collectives"] if (c["kind"], c["axes"]) == (kind, list(axes)))


@pytest.mark.parametrize("name", ["zero", "tensor", "experts"])
def test_state_takes_the_bytes_of_its_partitions(plans, name):
    plan = plans[name]
    assert plan["memory"][memory.MASTERS] == plan["stored"]["master"]
    count_of_steps = 4
    assert plan["memory"][memory.MOMENTS] == plan["stored"]["master"] + count_of_steps, "two moments of 2 bytes"


@pytest.mark.parametrize(("name", "shards"), [("zero", 8), ("tensor", 4)])
def test_weights_are_gathered_and_gradients_scattered_once_a_step(plans, name, shards):
    """To the byte: every device lacks all but its share of what it computes with."""
    whole = plans[name]["stored"]["compute"]
    assert sent(plans[name], "all-gather", "gpu") == whole * (shards - 1) // shards
    assert sent(plans[name], "reduce-scatter", "gpu") == whole * (shards - 1) // shards


def test_tensor_parallel_layers_send_latents_and_tokens_in_every_pass(plans):
    """To the byte. Forward: the latents of queries (32) and of keys and values (16 + 16), and the feed-forward's input
    (64) are gathered, two outputs (64) scattered; backward the other way round."""
    half_of_width_one = LENGTH * BYTES // 2
    one_way = (32 + 32 + 64 + 2 * 64) * half_of_width_one
    assert sent(plans["tensor"], "all-gather", "tensor") == PASSES * LAYERS * one_way
    assert sent(plans["tensor"], "reduce-scatter", "tensor") == PASSES * LAYERS * one_way


def test_experts_send_tokens_within_and_between_nodes(plans):
    """Between the bytes of rows that uniform routing needs, there and back in both directions, and twice as many."""
    width, choices, nodes = 64, 2, 2
    row = width * BYTES
    to_other_node = LENGTH * (1 - 1 / nodes) * row  # a token goes once, to a node with one of its experts
    least = PASSES * LAYERS * 4 * to_other_node / choices
    assert least <= sent(plans["experts"], "all-to-all", "node") <= 4 * least
    assert plans["experts"]["memory"][memory.EXCHANGE] > 0


@pytest.mark.parametrize("name", ["zero", "tensor"])
def test_products_are_those_that_the_usual_count_needs(plans, name):
    """Besides, the reference attention computes the upper triangle of the scores."""
    executed = sum(plans[name]["flops"].values())
    assert 1 <= executed / plans[name]["needed_flops"] <= 1.1


@pytest.mark.parametrize("name", ["zero", "tensor", "experts"])
def test_small_network_fits_and_says_what_takes_longest(plans, name):
    plan = plans[name]
    assert plan["fits"] and plan["verdict"][0].startswith("fits")
    assert plan["least_seconds"] <= sum(plan["busy_seconds"].values())


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_serving_holds_the_parts_of_weights_it_computes_with(plans, name):
    assert plans[name]["memory"][memory.WEIGHTS] == plans[name]["stored"]["compute"]


def test_decoding_holds_the_latents_of_its_rows(plans):
    """16 + 16 numbers per token and layer, with room for every token, and every row's length."""
    rows = 4
    assert plans["decode"]["memory"][memory.CACHE] == rows * LENGTH * LAYERS * 32 * BYTES + rows * BYTES
    assert plans["decode"]["tokens"] == 4 * rows and plans["prefill"]["tokens"] == 4 * rows * LENGTH


def test_batch_that_devices_cannot_share_is_rounded_up_to_whole_passes():
    config = override(RunConfig(), {"train.batch_size": 15360, "train.batch_ramp_tokens": 0})
    whole = programs.with_whole_passes(config, 2048, rows=None)
    assert (whole.train.batch_size, whole.train.rows_per_pass, whole.train.max_passes) == (16384, 2048, 8)


def test_chosen_microbatch_is_kept():
    config = override(RunConfig(), {"train.microbatch_size": 512})
    whole = programs.with_whole_passes(config, 2048, rows=None)
    assert (whole.train.batch_size, whole.train.microbatch_size) == (config.train.batch_size, 512)


@pytest.mark.parametrize(
    ("program", "axes", "rows", "message"),
    [
        (programs.train, {"gpu": 8, "tensor": 3}, None, "tensor=3: .*; of 24 devices use replica=3, node=1, gpu=4"),
        (serving.prefill, {"gpu": 2, "tensor": 3}, 1, "mesh.tensor=3: .*; of 6 devices use replica=3"),
        (serving.decode, {"gpu": 2, "tensor": 3}, 4, "mesh.tensor=3: .*; of 6 devices use replica=3"),
        (serving.decode, {"gpu": 2, "tensor": 4}, 3, "--rows=3: must be a multiple of mesh.tensor=4"),
    ],
)
def test_proposed_meshes_get_as_many_sequences_as_they_have_shards(program, axes, rows, message):
    mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with pytest.raises(ValueError, match=message):
        program(RunConfig(), mesh, rows=rows)


@pytest.mark.parametrize(
    ("num_passes", "is_differentiated", "copies"), [(1, True, 1), (2, True, 2), (30, True, 2), (1, False, 0)]
)
def test_several_passes_hold_the_sum_of_gradients_and_the_next_ones(num_passes, is_differentiated, copies):
    program = programs.Program(
        name="", traced=None, work="", tokens=0, needed_flops=None, expert_rows=0, num_passes=num_passes,
        weight_sizes=frozenset(), outside_layers=programs.OutsideLayers(0, 0), is_differentiated=is_differentiated,
    )  # fmt: skip
    assert program.gradient_copies == copies
