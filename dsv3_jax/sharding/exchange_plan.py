"""Which token goes to which expert device when: static room for what travels, and who may use it in a round.

A copy is a token on its way to one node, for all of the token's experts there. Every device gives its own copies to
rounds, so that nobody has to know what others send. In a round it may send, with fixed sizes:

| quota | of what | to every |
|---|---|---|
| `node_rows` | copies | node |
| `device_rows` | copies | device |
| `device_choices` | (token, expert) pairs | device |

Copies are taken in the order of their tokens, each if all its quotas hold for it and for those waiting before it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

QUOTA_MULTIPLE = 8  # to which a multiple of what is needed on average is rounded up
NEARLY_ALL = 0.9  # of the rows: to send all costs less than to arrange these
RARE = 3e-7  # chance that a uniformly routed destination finds no room for its load: five standard deviations of many


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The sizes of one round of the expert exchange, the same on every device."""

    num_tokens: int  # of one device
    top_k: int  # experts per token
    num_experts: int  # over all devices
    num_nodes: int
    devices_per_node: int
    node_rows: int
    device_rows: int
    device_choices: int
    mean_device_rows: float  # that uniform routing fills, at most

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def experts_per_device(self) -> int:
        return self.num_experts // self.num_devices

    @property
    def goes_to_every_node(self) -> bool:
        """Whether there is room for every token in every node; a token's slot is then its own index."""
        return self.node_rows >= self.num_tokens

    @property
    def goes_to_every_device(self) -> bool:
        """Whether there is room for every copy in each device of its node; its slot is then its own index."""
        return self.device_rows >= self.node_rows

    @property
    def received_rows(self) -> int:
        """Rows that a device's experts receive, empty ones included."""
        return self.num_devices * self.device_rows

    @property
    def max_choices(self) -> int:
        """Most (row, expert) pairs that a device's experts receive."""
        return min(self.num_devices * self.device_choices, self.received_rows * self._choices_per_row)

    @property
    def is_always_enough(self) -> bool:
        """Whether one round serves any routing, so that there is no second."""
        has_all_rows = self.goes_to_every_node and self.goes_to_every_device
        return has_all_rows and self.device_choices >= self.num_tokens * self._choices_per_row

    @property
    def _choices_per_row(self) -> int:
        return min(self.top_k, self.experts_per_device)

    def bytes_sent(self, row_bytes: int) -> dict[str, int]:
        """Returns what one device sends to others in one direction of one round, by hop, for rows of this size."""
        to_nodes = (self.num_nodes - 1) * self.node_rows
        to_devices = (self.devices_per_node - 1) * self.num_nodes * self.device_rows
        return {"node": to_nodes * row_bytes, "inner": to_devices * row_bytes}

    def buffer_bytes(self, row_bytes: int) -> int:
        """Returns the bytes of all send and receive buffers of one direction of one round, for rows of this size."""
        rows = 0
        if self.num_nodes > 1:
            received = self.num_nodes * self.node_rows
            rows += received + (self.num_tokens if self.goes_to_every_node else received)
        if self.devices_per_node > 1:
            sent = self.num_nodes * self.node_rows if self.goes_to_every_device else self.received_rows
            rows += self.received_rows + sent
        return rows * row_bytes


def plan_capacity(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    n_group: int,
    topk_group: int,
    num_nodes: int,
    devices_per_node: int,
    factor: float,
) -> Capacity | None:
    """Sizes the rounds so that uniform routing needs one; returns None where one device holds every expert.

    A quota is what uniform routing needs on average times the factor, rounded up to a multiple of 8; if the factor is 1
    or more at least so much that few loads in ten million are larger, where tokens choose independently; never more
    than the worst routing needs, and as much where it is nearly that.

    Args:
      num_tokens: tokens that one device owns.
      top_k: experts per token.
      num_experts: over all devices, which divide them; device d holds the experts from d · num_experts / devices on.
      n_group: groups that the experts form.
      topk_group: groups that a token's experts come from.
      num_nodes: size of the mesh axis `node`.
      devices_per_node: sizes of `gpu` and `tensor` multiplied.
      factor: `model.exchange_capacity`. Smaller: fewer bytes and less memory, more rounds.
    """
    num_devices = num_nodes * devices_per_node
    assert num_experts % num_devices == 0, f"{num_devices} devices do not divide {num_experts} experts: see check_mesh"
    if num_devices == 1:
        return None
    choices_per_row = min(top_k, num_experts // num_devices)
    hit_rate = functools.partial(_hit_rate, top_k, num_experts, n_group, topk_group)
    node_rows = num_tokens
    if num_nodes > 1:
        node_rows = _rows_or_all(_quota(num_tokens, hit_rate(num_nodes), factor), num_tokens)
    device_rows = _rows_or_all(_quota(num_tokens, hit_rate(num_devices), factor), node_rows)
    if devices_per_node == 1:
        device_rows = node_rows
    device_choices = _quota(num_tokens * top_k, 1 / num_devices, factor)
    device_choices = min(max(device_choices, choices_per_row), device_rows * choices_per_row)
    return Capacity(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        node_rows=node_rows,
        device_rows=device_rows,
        device_choices=device_choices,
        mean_device_rows=num_tokens * hit_rate(num_devices),
    )


def _quota(number: int, share: float, factor: float) -> int:
    """Returns for how many of a number of tokens or choices, of which a share comes on average, to make room."""
    needed = math.ceil(number * share * factor / QUOTA_MULTIPLE) * QUOTA_MULTIPLE
    return max(needed, _rarely_exceeded(number, share)) if factor >= 1 else needed


@functools.lru_cache
def _rarely_exceeded(number: int, share: float) -> int:
    """Returns the least that so many independent trials, each a success with chance `share`, exceed `RARE`ly."""
    if share >= 1:
        return number
    mean, chance = number * share, 0.0
    successes = min(number, math.ceil(mean + 12 * math.sqrt(mean) + 30))  # more than these do not count
    while True:
        ways = math.lgamma(number + 1) - math.lgamma(successes + 1) - math.lgamma(number - successes + 1)
        chance += math.exp(ways + successes * math.log(share) + (number - successes) * math.log1p(-share))
        if chance > RARE:
            return successes
        successes -= 1


def _rows_or_all(rows: int, most: int) -> int:
    """Returns how many of at most `most` rows to make room for; nearly all is all, which need not be arranged."""
    return most if rows >= NEARLY_ALL * most else rows


def _hit_rate(top_k: int, num_experts: int, n_group: int, topk_group: int, num_parts: int) -> float:
    """Estimates the share of tokens with experts in one of so many equal parts of the experts, if routing is uniform.

    Each chosen group counts as one with an even share of the chosen experts: groups are chosen for their best experts
    (§2.1.2, node-limited routing). For the report's 256 experts that is up to 6% more than random affinities give.
    """
    most = min(1.0, top_k / num_parts)
    if n_group % num_parts == 0:
        elsewhere = n_group - n_group // num_parts
        return min(most, 1 - math.comb(elsewhere, topk_group) / math.comb(n_group, topk_group))
    if num_parts % n_group == 0:
        group, chosen = num_experts // n_group, math.ceil(top_k / topk_group)
        is_missed = math.comb(group - num_experts // num_parts, chosen) / math.comb(group, chosen)
        return min(most, topk_group / n_group * (1 - is_missed))
    return most


def copies_to_send(experts_TK: jax.Array, capacity: Capacity) -> jax.Array:
    """Tells which nodes a token must reach: bool [T, nodes]."""
    return jnp.any(_destinations(_nodes(experts_TK, capacity), capacity.num_nodes), axis=1)


def admit(experts_TK: jax.Array, waiting_TN: jax.Array, capacity: Capacity) -> jax.Array:
    """Chooses the copies of the next round among those that wait; the first that waits for a node is always chosen.

    Args:
      experts_TK: int32, over all devices, those of a token distinct; `num_experts` or more chooses none.
      waiting_TN: bool, the copies that have not been sent.

    Returns:
      Which copies go, bool [T, nodes].
    """
    if capacity.is_always_enough:
        return waiting_TN
    num_tokens, num_nodes = waiting_TN.shape
    devices_TKR = _destinations(experts_TK // capacity.experts_per_device, capacity.num_devices)
    choices_TR = jnp.sum(devices_TKR, axis=1, dtype=jnp.int32)
    choices_TR = jnp.where(jnp.repeat(waiting_TN, capacity.devices_per_node, axis=1), choices_TR, 0)
    used = jnp.concatenate([waiting_TN.astype(jnp.int32), (choices_TR > 0).astype(jnp.int32), choices_TR], axis=1)
    used = jnp.cumsum(used, axis=0)  # by the copies up to and with this one
    rows_TN, rows_TR, used_TR = jnp.split(used, [num_nodes, num_nodes + capacity.num_devices], axis=1)
    fits_TR = (rows_TR <= capacity.device_rows) & (used_TR <= capacity.device_choices) | (choices_TR == 0)
    fits_TN = jnp.all(fits_TR.reshape(num_tokens, num_nodes, capacity.devices_per_node), axis=-1)
    return waiting_TN & fits_TN & (rows_TN <= capacity.node_rows)


def only_sent(experts_TK: jax.Array, sent_TN: jax.Array, capacity: Capacity) -> jax.Array:
    """Replaces the experts of nodes that a token does not go to by `num_experts`."""
    nodes_TKN = _destinations(_nodes(experts_TK, capacity), capacity.num_nodes)
    return jnp.where(jnp.any(nodes_TKN & sent_TN[:, None], axis=-1), experts_TK, capacity.num_experts)


def devices_to_reach(experts_RK: jax.Array, node: jax.Array | int, capacity: Capacity) -> jax.Array:
    """Tells which devices of a node each row must reach: bool [R, devices_per_node]."""
    device_RK = experts_RK // capacity.experts_per_device - node * capacity.devices_per_node
    return jnp.any(_destinations(device_RK, capacity.devices_per_node), axis=1)


def _nodes(experts_TK: jax.Array, capacity: Capacity) -> jax.Array:
    return experts_TK // (capacity.num_experts // capacity.num_nodes)


def _destinations(destination_RK: jax.Array, num_destinations: int) -> jax.Array:
    """Returns bool [R, K, destinations]; what lies outside [0, num_destinations) has none."""
    return destination_RK[:, :, None] == jnp.arange(num_destinations, dtype=destination_RK.dtype)
