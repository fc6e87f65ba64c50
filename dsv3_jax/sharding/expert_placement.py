"""Which slot holds which expert: where serving keeps copies of busy experts besides (§3.4.1, §3.4.2).

The experts of a layer lie in slots, as many on every device; slot s is on device s · devices / slots. A placement names
the expert of every slot, each at least once. It is data: another placement is served by the same program.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import require


def place_experts(
    tokens_per_expert_LE: np.ndarray, *, num_redundant: int, n_group: int, num_nodes: int, devices_per_node: int
) -> np.ndarray:
    """Places the experts of every layer so that devices share the tokens evenly.

    The busiest experts get the redundant slots. Where nodes divide the groups of experts, groups are dealt to nodes
    first and copies stay in their group's node, so that no token has to reach further nodes for them.

    Args:
      tokens_per_expert_LE: observed loads, such as `model.forward` counts.
      num_redundant: slots besides one for every expert.
      n_group: groups that the experts form.
      num_nodes: size of the mesh axis `node`.
      devices_per_node: sizes of `gpu` and `tensor` multiplied.

    Returns:
      The expert of every slot, int32 [L, E + num_redundant].

    Raises:
      ValueError: slots that do not spread evenly over the devices, or loads that are not finite and 0 or more.
    """
    loads_LE = np.asarray(tokens_per_expert_LE, np.float64)
    num_slots, num_devices = loads_LE.shape[1] + num_redundant, num_nodes * devices_per_node
    require(num_slots % num_devices == 0, "mesh.node·gpu·tensor", num_devices,
            f"does not divide {num_slots} slots: model.n_routed_experts + n_redundant_experts")  # fmt: skip
    require(bool(np.all(np.isfinite(loads_LE) & (loads_LE >= 0))), "tokens_per_expert", loads_LE.tolist(),
            "must be finite and 0 or more")  # fmt: skip
    num_pools = num_nodes if n_group % num_nodes == 0 else 1
    return np.stack([_place_layer(loads_E, num_redundant, n_group, num_pools, num_devices) for loads_E in loads_LE])


def _place_layer(loads_E: np.ndarray, num_redundant: int, n_group: int, num_pools: int, num_devices: int) -> np.ndarray:
    """Returns the expert of every slot [S]; the slots of each pool of devices hold the experts of its groups."""
    experts_GE = np.arange(len(loads_E)).reshape(n_group, -1)
    groups_of_pool = deal_evenly(loads_E.reshape(n_group, -1).sum(axis=1), num_pools)
    expert_of_slot = []
    for groups in groups_of_pool:
        experts = experts_GE[np.sort(groups)].reshape(-1)
        copies = count_copies(loads_E[experts], len(experts) + num_redundant // num_pools)
        slots = np.repeat(experts, copies)
        share = loads_E[slots] / np.repeat(copies, copies)
        for places in deal_evenly(share, num_devices // num_pools):
            expert_of_slot.extend(np.sort(slots[places]))
    return np.array(expert_of_slot, np.int32)


def count_copies(loads_E: np.ndarray, num_slots: int) -> np.ndarray:
    """Returns how many slots each expert gets, int [E], such that the largest load of a copy is as small as can be.

    Every further slot goes to the expert whose copies have most to do; of equals to one with the fewest copies.
    """
    copies_E = np.ones(len(loads_E), int)
    for _ in range(num_slots - len(loads_E)):
        share_E = loads_E / copies_E
        busiest = np.flatnonzero(share_E == share_E.max())
        copies_E[busiest[np.argmin(copies_E[busiest])]] += 1
    return copies_E


def deal_evenly(loads_I: np.ndarray, num_hands: int) -> np.ndarray:
    """Deals items to hands, as many to each; no two hands' loads differ by more than the largest item.

    Largest items first, in rounds of one item for every hand: in each the hand with least so far gets the largest.

    Returns:
      The items of every hand, int [hands, items / hands].
    """
    rounds_RH = np.argsort(-loads_I, kind="stable").reshape(-1, num_hands)
    hands_HR = np.empty(rounds_RH.T.shape, int)
    totals_H = np.zeros(num_hands)
    for index, items_H in enumerate(rounds_RH):
        lightest_first = np.argsort(totals_H, kind="stable")
        hands_HR[lightest_first, index] = items_H
        totals_H[lightest_first] += loads_I[items_H]
    return hands_HR


def slots_of_experts(expert_of_slot_LS: np.ndarray, num_experts: int) -> np.ndarray:
    """Inverts a placement: the slots of every expert, int32 [L, E, 1 + redundant slots], then -1.

    Raises:
      ValueError: an expert without a slot, or a slot for an expert that does not exist.
    """
    num_layers, num_slots = expert_of_slot_LS.shape
    slots_LEC = np.full((num_layers, num_experts, 1 + num_slots - num_experts), -1, np.int32)
    for layer, expert_of_slot_S in enumerate(expert_of_slot_LS):
        missing = sorted(set(range(num_experts)) ^ set(expert_of_slot_S.tolist()))
        require(not missing, f"expert_of_slot[{layer}]", missing,
                f"every expert from 0 to {num_experts - 1} must have a slot, and no other")  # fmt: skip
        for expert in range(num_experts):
            slots = np.flatnonzero(expert_of_slot_S == expert)
            slots_LEC[layer, expert, : len(slots)] = slots
    return slots_LEC


def choose_slots(slots_EC: jax.Array, experts_TK: jax.Array, first_token: jax.Array | int) -> jax.Array:
    """Returns the slots that serve each token's experts, int32 [T, K]: the copies of an expert take turns.

    Args:
      slots_EC: int32, the slots of every expert, then -1.
      experts_TK: int32.
      first_token: where the turns begin, so that devices with few tokens begin at different copies.
    """
    copies_E = jnp.sum(slots_EC >= 0, axis=1, dtype=jnp.int32)
    turn_T1 = (jnp.arange(len(experts_TK), dtype=jnp.int32) + first_token)[:, None]
    return slots_EC[experts_TK, turn_T1 % copies_E[experts_TK]]
