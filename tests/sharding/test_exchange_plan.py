"""Rounds send every copy once, within their quotas, and come to an end."""

import dataclasses
import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.sharding.exchange_plan import admit, copies_to_send, devices_to_reach, only_sent, plan_capacity
from dsv3_jax.sharding.expert_exchange import _plan_hop

REPORT = {"top_k": 8, "num_experts": 256, "n_group": 8, "topk_group": 4}  # and 8 nodes of 8 devices in training


def plan(num_tokens, num_experts, top_k, num_nodes, devices_per_node, factor):
    return plan_capacity(
        num_tokens=num_tokens, top_k=top_k, num_experts=num_experts, n_group=num_nodes, topk_group=1,
        num_nodes=num_nodes, devices_per_node=devices_per_node, factor=factor,
    )  # fmt: skip


# (tokens, experts, top_k, nodes, devices per node, factor): few, so that few programs are compiled
CAPACITIES = [
    plan(13, 16, 4, 2, 2, 0.1),
    plan(13, 16, 4, 2, 2, 0.8),
    plan(40, 16, 4, 1, 4, 0.3),
    plan(40, 16, 4, 4, 1, 0.3),
    plan(40, 8, 4, 2, 4, 0.2),  # one expert a device
    plan(1, 8, 4, 2, 2, 1.25),
    dataclasses.replace(plan(40, 16, 4, 1, 4, 0.3), device_rows=4, device_choices=13),
]


@st.composite
def routings(draw, capacity):
    """Draws the experts of every token, distinct within a token, often skewed; some tokens have fewer than top_k."""
    seed = draw(st.integers(0, 2**31))
    skew = draw(st.sampled_from([0.0, 1.0, 20.0]))
    absent = draw(st.sampled_from([0.0, 0.5, 1.0]))
    rng = np.random.default_rng(seed)
    favour_E = skew * rng.normal(size=capacity.num_experts)
    scores_TE = favour_E + rng.gumbel(size=(capacity.num_tokens, capacity.num_experts))
    experts_TK = np.argsort(-scores_TE, axis=1)[:, : capacity.top_k]
    return np.where(rng.random(experts_TK.shape) < absent, capacity.num_experts, experts_TK).astype(np.int32)


@functools.cache
def compiled(capacity):
    return jax.jit(functools.partial(admit, capacity=capacity)), jax.jit(
        functools.partial(copies_to_send, capacity=capacity)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rounds_send_every_copy_once_within_quotas(data):
    capacity = data.draw(st.sampled_from(CAPACITIES))
    experts_TK = data.draw(routings(capacity))
    choose, find_copies = compiled(capacity)
    experts_of_node = capacity.num_experts // capacity.num_nodes
    wanted = {
        (token, expert // experts_of_node)
        for token, experts_K in enumerate(experts_TK)
        for expert in experts_K
        if expert < capacity.num_experts
    }
    waiting_TN = np.asarray(find_copies(experts_TK))
    assert set(zip(*np.nonzero(waiting_TN))) == wanted
    while waiting_TN.any():
        sent_TN = np.asarray(choose(experts_TK, waiting_TN))
        assert not (sent_TN & ~waiting_TN).any(), "sent twice"
        first_N = waiting_TN.argmax(axis=0)
        for node in np.nonzero(waiting_TN.any(axis=0))[0]:
            assert sent_TN[first_N[node], node], "the first that waits must go, or the rounds might never end"
        assert sent_TN.sum(axis=0).max() <= capacity.node_rows
        rows, choices = np.zeros(capacity.num_devices, int), np.zeros(capacity.num_devices, int)
        for token, node in zip(*np.nonzero(sent_TN)):
            devices = [e // capacity.experts_per_device for e in experts_TK[token] if e // experts_of_node == node]
            rows[list(set(devices))] += 1
            np.add.at(choices, devices, 1)
        assert rows.max() <= capacity.device_rows and choices.max() <= capacity.device_choices
        waiting_TN = waiting_TN & ~sent_TN


def test_one_round_takes_what_has_room():
    """Nothing waits that would fit: with quotas of all tokens the whole routing goes at once."""
    capacity = plan(40, 16, 4, 2, 2, 100.0)
    assert capacity.is_always_enough and capacity.device_choices == 40 * 4
    experts_TK = np.argsort(np.random.default_rng(0).random((40, 16)), axis=1)[:, :4].astype(np.int32)
    waiting_TN = copies_to_send(experts_TK, capacity)
    np.testing.assert_array_equal(admit(experts_TK, waiting_TN, capacity), waiting_TN)
    almost = plan(40, 16, 4, 2, 2, 0.99)  # 39.6 choices a device on average
    experts_TK = np.tile(np.arange(4, dtype=np.int32), (40, 1))  # all on device 0
    sent_TN = admit(experts_TK, copies_to_send(experts_TK, almost), almost)
    np.testing.assert_array_equal(np.nonzero(sent_TN)[0], np.arange(almost.device_choices // 4))


def test_experts_of_copies_that_wait_do_not_travel():
    capacity = plan(2, 8, 3, 2, 1, 1.25)
    experts_TK = jnp.array([[0, 5, 3], [7, 4, 8]], jnp.int32)
    sent_TN = jnp.array([[False, True], [True, True]])
    np.testing.assert_array_equal(only_sent(experts_TK, sent_TN, capacity), [[8, 5, 8], [7, 4, 8]])


def test_rows_reach_the_devices_of_their_experts_in_this_node():
    capacity = plan(3, 16, 3, 2, 4, 1.25)
    experts_RK = jnp.array([[0, 1, 15], [8, 14, 2], [16, 16, 16]], jnp.int32)
    expected = [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]]]
    for node in range(2):
        np.testing.assert_array_equal(devices_to_reach(experts_RK, node, capacity), np.array(expected[node], bool))


@pytest.mark.parametrize("top_k", [2, 5])
def test_slots_of_a_hop_are_distinct_and_lie_in_their_buffers(top_k):
    """Three sources of seven rows, five destinations, four slots for each source."""
    rng = np.random.default_rng(0)
    is_sent_SRC = np.zeros((3, 7, 5), bool)
    for source, destination in np.ndindex(3, 5):  # at most four rows from a source, at most top_k copies of a row
        for row in rng.permutation(7)[:4]:
            is_sent_SRC[source, row, destination] = is_sent_SRC[source, row].sum() < top_k
    hop = _plan_hop(jnp.asarray(is_sent_SRC), 4, top_k, ("gpu",))
    assert hop.row_of_slot_S.shape == (5 * 3 * 4,) and hop.slots_of_row_RC.shape == (21, top_k)
    found = set()
    for slot, row in enumerate(np.asarray(hop.row_of_slot_S)):
        if row < 21:
            destination, source = slot // 12, slot % 12 // 4
            assert source == row // 7
            found.add((source, row % 7, destination))
            assert slot in np.asarray(hop.slots_of_row_RC)[row]
    assert found == set(zip(*np.nonzero(is_sent_SRC)))
    assert np.sum(np.asarray(hop.slots_of_row_RC) < 60) == is_sent_SRC.sum()


def test_capacity_of_the_report_training_layout():
    """64 devices, 4096 tokens each: half of the tokens for every node, 512 choices for every device, a quarter more.

    Half of the groups are chosen, and two of the 32 experts of each; four of them are on one device: it is reached by
    0.5 · (1 - 28·27/(32·31)) = 11.9% of the tokens.
    """
    capacity = plan_capacity(num_tokens=4096, num_nodes=8, devices_per_node=8, factor=1.25, **REPORT)
    assert (capacity.node_rows, capacity.device_rows, capacity.device_choices) == (2560, 616, 640)
    assert capacity.received_rows == 64 * 616 and capacity.max_choices == 64 * 640
    assert not capacity.is_always_enough
    sent = capacity.bytes_sent(7312)
    assert sent == {"node": 7 * 2560 * 7312, "inner": 7 * 8 * 616 * 7312}
    assert capacity.buffer_bytes(7312) == 2 * (8 * 2560 + 64 * 616) * 7312
    assert capacity.mean_device_rows == pytest.approx(4096 * 0.5 * (1 - 28 * 27 / (32 * 31)))


def chance_of_more(room: int, number: int, share: float) -> float:
    """Returns the chance that more than `room` of so many independent trials succeed, in exact arithmetic."""
    share = fractions.Fraction(share)
    return float(
        sum(math.comb(number, k) * share**k * (1 - share) ** (number - k) for k in range(room + 1, number + 1))
    )


def test_capacity_has_room_for_the_fluctuations_of_few_tokens():
    """128 tokens in training: 15.2 rows and 16 choices a device on average, where 1.25 times that is too little."""
    capacity = plan_capacity(num_tokens=128, num_nodes=8, devices_per_node=8, factor=1.25, **REPORT)
    assert (capacity.device_rows, capacity.device_choices) == (36, 39)
    for room, number, mean in ((36, 128, capacity.mean_device_rows), (39, 1024, 16)):
        assert chance_of_more(room, number, mean / number) <= 3e-7 < chance_of_more(room - 1, number, mean / number)


def test_capacity_of_the_report_decoding_layout():
    """320 devices with one expert each, 32 tokens: room for 18 in every node and 8 on every device, not for all.

    Of a group's 40 slots two are chosen, half of the groups: a node, 8 slots of a group, is reached by
    0.5 · (1 - 32·31/(40·39)) = 18.2% of the tokens, a device by 2.5%.
    """
    shape = {"num_tokens": 32, "num_nodes": 40, "devices_per_node": 8} | REPORT | {"num_experts": 320}
    capacity = plan_capacity(factor=1.25, **shape)
    assert (capacity.node_rows, capacity.device_rows, capacity.device_choices) == (18, 8, 8)
    for room, share in ((18, 0.5 * (1 - 32 * 31 / (40 * 39))), (8, 0.5 * 2 / 40)):
        assert chance_of_more(room, 32, share) <= 3e-7
    everything = plan_capacity(factor=40.0, **shape)
    assert everything.is_always_enough and everything.received_rows == 4 * capacity.received_rows
    sent, most = capacity.bytes_sent(1), everything.bytes_sent(1)
    assert (sent["node"] / most["node"], sent["inner"] / most["inner"]) == (18 / 32, 8 / 32)


def test_tokens_go_everywhere_where_uniform_routing_nearly_does():
    capacity = plan_capacity(num_tokens=4096, num_nodes=1, devices_per_node=2, factor=1.25, **REPORT)
    assert capacity.goes_to_every_node and capacity.goes_to_every_device and not capacity.is_always_enough
    assert capacity.device_choices == 5 * 4096
    capacity = plan_capacity(num_tokens=4096, num_nodes=1, devices_per_node=8, factor=1.25, **REPORT)
    assert capacity.goes_to_every_node and capacity.device_rows == 2560


def test_one_device_needs_no_exchange():
    assert plan_capacity(num_tokens=4096, num_nodes=1, devices_per_node=1, factor=1.25, **REPORT) is None
