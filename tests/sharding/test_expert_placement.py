"""Where copies of busy experts lie, and how tokens share them."""

import itertools
import re

import numpy as np
import pytest

from dsv3_jax.sharding.expert_placement import (
    choose_slots,
    count_copies,
    deal_evenly,
    place_experts,
    slots_of_experts,
)


def loads_of(seed: int, *shape: int) -> np.ndarray:
    """Returns loads of which few experts carry most."""
    return np.random.default_rng(seed).gamma(0.4, size=shape) * 1000


@pytest.mark.parametrize("seed", range(6))
def test_no_other_number_of_copies_has_a_smaller_largest_share(seed):
    loads_E = np.floor(loads_of(seed, 5))
    for num_slots in (5, 6, 8, 11):
        found = count_copies(loads_E, num_slots)
        assert found.sum() == num_slots and found.min() >= 1
        most = num_slots - len(loads_E) + 1
        every = [c for c in itertools.product(range(1, most + 1), repeat=len(loads_E)) if sum(c) == num_slots]
        assert np.max(loads_E / found) == min(np.max(loads_E / np.array(copies)) for copies in every)


def test_experts_without_load_share_the_copies():
    np.testing.assert_array_equal(np.sort(count_copies(np.zeros(8), 20)), [2, 2, 2, 2, 3, 3, 3, 3])


@pytest.mark.parametrize("seed", range(6))
def test_hands_have_as_many_items_and_loads_apart_by_the_largest_item_at_most(seed):
    for num_hands, rounds in ((1, 5), (3, 4), (8, 9), (5, 1)):
        loads_I = loads_of(seed, num_hands * rounds)
        hands = deal_evenly(loads_I, num_hands)
        assert hands.shape == (num_hands, rounds)
        np.testing.assert_array_equal(np.sort(hands, axis=None), np.arange(len(loads_I)))
        totals = loads_I[hands].sum(axis=1)
        assert totals.max() - totals.min() <= loads_I.max() * (1 + 1e-12)


@pytest.mark.parametrize(
    ("num_nodes", "devices_per_node", "redundant"), [(4, 8, 32), (40, 8, 64), (1, 3, 2), (8, 4, 0)]
)
def test_placements_hold_every_expert_and_even_the_devices_loads(num_nodes, devices_per_node, redundant):
    loads_LE = loads_of(0, 3, 256)
    found = place_experts(loads_LE, num_redundant=redundant, n_group=8, num_nodes=num_nodes,
                          devices_per_node=devices_per_node)  # fmt: skip
    assert found.shape == (3, 256 + redundant) and found.dtype == np.int32
    for loads_E, expert_of_slot_S in zip(loads_LE, found, strict=True):
        copies_E = np.bincount(expert_of_slot_S, minlength=256)
        assert copies_E.min() >= 1
        share_S = (loads_E / copies_E)[expert_of_slot_S]
        num_pools = num_nodes if 8 % num_nodes == 0 else 1
        totals = share_S.reshape(num_pools, num_nodes * devices_per_node // num_pools, -1).sum(axis=-1)
        assert np.all(totals.max(axis=1) - totals.min(axis=1) <= share_S.reshape(num_pools, -1).max(axis=1) + 1e-9)
        groups = [set(pool // 32) for pool in expert_of_slot_S.reshape(num_pools, -1)]
        assert all(len(of_pool) == 8 // num_pools for of_pool in groups), "a group of experts is in two nodes"


def test_balancing_takes_load_off_the_busiest_device():
    """With the report's 32 redundant experts on 32 devices, the busiest has 1.3 times the mean at most; it had 2.5."""
    loads_LE = loads_of(1, 4, 256)
    before = loads_LE.reshape(4, 32, 8).sum(axis=-1)
    assert np.all(before.max(axis=1) > 2 * before.mean(axis=1))
    for loads_E, expert_of_slot_S in zip(
        loads_LE, place_experts(loads_LE, num_redundant=32, n_group=8, num_nodes=4, devices_per_node=8), strict=True
    ):
        copies_E = np.bincount(expert_of_slot_S, minlength=256)
        after = (loads_E / copies_E)[expert_of_slot_S].reshape(32, 9).sum(axis=-1)
        assert after.max() <= 1.3 * after.mean()


@pytest.mark.parametrize(
    ("loads", "redundant", "message"),
    [
        (np.ones((1, 8)), 3, r"mesh.node·gpu·tensor=4: does not divide 11 slots"),
        (-np.ones((1, 8)), 4, "tokens_per_expert=.*must be finite and 0 or more"),
        (np.full((1, 8), np.nan), 4, "tokens_per_expert=.*must be finite and 0 or more"),
    ],
)
def test_what_cannot_be_placed_is_refused(loads, redundant, message):
    with pytest.raises(ValueError, match=message):
        place_experts(loads, num_redundant=redundant, n_group=2, num_nodes=2, devices_per_node=2)


def test_slots_of_experts_inverts_a_placement():
    found = slots_of_experts(np.array([[2, 0, 1, 0, 0], [0, 1, 2, 2, 1]]), 3)
    expected = [[[1, 3, 4], [2, -1, -1], [0, -1, -1]], [[0, -1, -1], [1, 4, -1], [2, 3, -1]]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("expert_of_slot", "wrong"), [([0, 1, 1, 1], "[2]"), ([0, 1, 2, 3], "[3]")])
def test_a_placement_without_every_expert_is_refused(expert_of_slot, wrong):
    with pytest.raises(ValueError, match=re.escape(f"expert_of_slot[1]={wrong}")):
        slots_of_experts(np.array([[0, 1, 2, 0], expert_of_slot]), 3)


@pytest.mark.parametrize("first_token", [0, 7])
def test_copies_of_an_expert_take_turns(first_token):
    expert_of_slot_S = np.array([0, 3, 1, 0, 2, 0, 3, 0])
    slots_EC = slots_of_experts(expert_of_slot_S[None], 4)[0]
    experts_TK = np.stack([np.zeros(10, int), np.tile([3, 1], 5), np.full(10, 2)], axis=1)
    slots_TK = np.asarray(choose_slots(slots_EC, experts_TK, first_token))
    np.testing.assert_array_equal(expert_of_slot_S[slots_TK], experts_TK)
    tokens_S = np.bincount(slots_TK[:, 0], minlength=8)[[0, 3, 5, 7]]
    np.testing.assert_array_equal(np.sort(tokens_S), [2, 2, 3, 3])
