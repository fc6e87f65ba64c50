"""Tokens travel to the devices of their experts and back: two hops, no token dropped, static shapes (§3.2.2).

Hop 1 crosses nodes between devices of the same place in their nodes, a token once per node whatever number of its
experts live there. Hop 2 spreads it inside the node, once per device. Results come back by the same ways: each device
sums its experts' results for a token, the device between the hops sums its node's, the source sums the nodes'; in
float32, rounded to the activations' dtype to travel.

A hop is one `all_to_all` of packed rows, which hold the payload, the token's experts and their gate weights, in buffers
whose sizes `exchange_plan.Capacity` fixes; where these have room for every row in every destination, an `all_gather`
brings the same bytes without arranging them first. What finds no room in the first round travels in further ones, as
many as the devices agree that they need. Only the first round's activations are kept for the backward pass, which sends
the tokens of further rounds again, so that memory does not depend on the routing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.sharding import collectives
from dsv3_jax.sharding.exchange_plan import (
    Capacity,
    admit,
    copies_to_send,
    devices_to_reach,
    only_sent,
    plan_capacity,
)
from dsv3_jax.sharding.mesh import EXPERT_AXES, INNER_AXES
from dsv3_jax.sharding.row_packing import pack, row_specs, unpack

__all__ = ["Capacity", "ExpertFunctions", "Hop", "Tokens", "combine", "dispatch", "plan_capacity", "send", "serve"]

NODE_AXES = ("node",)
# Checkpoint names. A policy that saves both spares the backward pass to send the tokens again.
ROUTES_NAME = "expert_routes"  # small: what sends gradients the same ways
ROWS_NAME = "expert_rows"  # what arrived: `Capacity.received_rows` rows of the payload
# Names of the parts in the metadata of compiled programs and in traces.
DISPATCH_SCOPE, COMBINE_SCOPE, EXPERTS_SCOPE = "expert_exchange/dispatch", "expert_exchange/combine", "experts"


class ExpertFunctions(NamedTuple):
    """What a device computes for the rows it receives; functions of modules, so that equal ones compile once.

    forward(payload, experts_RK, weights_RK, params, max_choices) -> (y_RD, kept): payload is a tree of arrays [R, ...];
      experts_RK are indices of this device's experts, their number for a choice that is not here; weights_RK float32.
      y_RD is the weighted sum over the row's choices that are here, in the activations' dtype, zero without any; at
      most max_choices (row, choice) pairs are.
    encode_gradient(dy_TD) -> payload: what travels of the gradient of y.
    backward(kept, gradient, params) -> (dx_RD, dweights_RK, dparams): dx in the activations' dtype, dweights float32
      and zero for choices that are not here, dx zero for rows without any; dparams as `jax.custom_vjp` wants them.
    """

    forward: Callable
    encode_gradient: Callable
    backward: Callable


class Tokens(NamedTuple):
    """Rows with what their experts must know."""

    experts_RK: jax.Array  # int32; the number of experts for a choice that is not here
    weights_RK: jax.Array  # float32
    payload: Any  # tree of arrays [R, ...] of 1, 2 or 4 bytes an element


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("row_of_slot_S", "slots_of_row_RC"), meta_fields=("axes",)
)
@dataclasses.dataclass(frozen=True)
class Hop:
    """The ways of one hop: which row goes in which slot of the buffer; None where all rows go to all destinations."""

    row_of_slot_S: jax.Array | None  # int32; the number of rows for an empty slot
    slots_of_row_RC: jax.Array | None  # int32; the number of slots for no copy
    axes: tuple[str, ...]


def serve(
    functions: ExpertFunctions,
    x_TD: jax.Array,
    payload: Any,
    experts_TK: jax.Array,
    weights_TK: jax.Array,
    params: Any,
    *,
    capacity: Capacity | None,
) -> tuple[jax.Array, jax.Array]:
    """Sums the results of each token's experts, wherever they live; differentiable in x, weights and params.

    With a capacity, to be called by all devices of the expert axes inside `rules.per_device`.

    Args:
      functions: what is computed.
      x_TD: this device's tokens, in the activations' dtype. Not read: the face to which the gradient belongs.
      payload: what travels of the tokens, a tree of arrays [T, ...] made from x_TD; no gradient flows through it.
      experts_TK: int32, over all devices; a token's are distinct. `num_experts` stands for no expert.
      weights_TK: float32 gate weights.
      params: weights of the experts on this device.
      capacity: from `plan_capacity`; None where every expert is on this device.

    Returns:
      [T, D] in the activations' dtype, and how many rounds this took beyond the first: int32, the same on all devices
      that exchanged. Those of the backward pass are as many and do not count.
    """
    assert capacity is None or capacity.num_tokens == len(experts_TK), (capacity, experts_TK.shape)
    return _serve(functions, capacity, x_TD, payload, experts_TK, weights_TK, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serve(functions, capacity, x_TD, payload, experts_TK, weights_TK, params) -> tuple[jax.Array, jax.Array]:
    return _serve_forward(functions, capacity, x_TD, payload, experts_TK, weights_TK, params)[0]


def _serve_forward(functions, capacity, x_TD, payload, experts_TK, weights_TK, params):
    tokens = Tokens(experts_TK, weights_TK, payload)
    if capacity is None:
        y_TD, kept = _run_experts(functions.forward, payload, experts_TK, weights_TK, params, experts_TK.size)
        return (y_TD, jnp.int32(0)), (kept, (), None, params)
    received, hops, waiting_TN = dispatch(tokens, copies_to_send(experts_TK, capacity), capacity)
    y_RD, kept = _run_experts(functions.forward, *_arguments(received), params, capacity.max_choices)
    y_TD = combine(y_RD, hops).astype(y_RD.dtype)

    def run_round(waiting_TN, y_TD):
        received, hops, waiting_TN = dispatch(tokens, waiting_TN, capacity)
        y_RD, _ = _run_experts(functions.forward, *_arguments(received), params, capacity.max_choices)
        return waiting_TN, _add(y_TD, combine(y_RD, hops))

    y_TD, further_rounds = _run_further_rounds(run_round, waiting_TN, y_TD, capacity)
    return (y_TD, further_rounds), (kept, hops, None if capacity.is_always_enough else tokens, params)


def _serve_backward(functions, capacity, residuals, cotangents):
    kept, hops, tokens, params = residuals
    dy_TD, _ = cotangents
    gradient = functions.encode_gradient(dy_TD)
    dx, dweights, dparams = _run_experts(functions.backward, kept, send(gradient, hops), params)
    if capacity is None:
        return dx, None, None, dweights, dparams
    dx_TD, dweights_TK = combine((dx, dweights), hops)
    gradients = dx_TD.astype(dx.dtype), dweights_TK, dparams

    def run_round(waiting_TN, gradients):
        both = tokens._replace(payload=(tokens.payload, gradient))
        received, hops, waiting_TN = dispatch(both, waiting_TN, capacity)
        payload, gradient_rows = received.payload
        arguments = _arguments(received._replace(payload=payload))
        _, kept = _run_experts(functions.forward, *arguments, params, capacity.max_choices)
        *dtokens, dparams = _run_experts(functions.backward, kept, gradient_rows, params)
        return waiting_TN, jax.tree.map(_add, gradients, (*combine(tuple(dtokens), hops), dparams))

    if not capacity.is_always_enough:
        waiting_TN = copies_to_send(tokens.experts_RK, capacity)
        waiting_TN &= ~admit(tokens.experts_RK, waiting_TN, capacity)
        gradients, _ = _run_further_rounds(run_round, waiting_TN, gradients, capacity)
    dx_TD, dweights_TK, dparams = gradients
    return dx_TD, None, None, dweights_TK, dparams


_serve.defvjp(_serve_forward, _serve_backward)


def _run_further_rounds(
    run_round: Callable, waiting_TN: jax.Array, totals: Any, capacity: Capacity
) -> tuple[Any, jax.Array]:
    """Runs `waiting_TN, totals = run_round(waiting_TN, totals)` until no device has a copy left.

    Returns:
      The last totals, and how often it ran, int32.
    """
    if capacity.is_always_enough:
        return totals, jnp.int32(0)

    @jax.named_scope(DISPATCH_SCOPE)
    def count(waiting_TN):
        return collectives.sum_over(jnp.sum(waiting_TN, dtype=jnp.int32), EXPERT_AXES)

    def run(carry):
        _, waiting_TN, totals, num_rounds = carry
        waiting_TN, totals = run_round(waiting_TN, totals)
        return count(waiting_TN), waiting_TN, totals, num_rounds + 1

    start = (count(waiting_TN), waiting_TN, totals, jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry[0] > 0, run, start)[2:]


@jax.named_scope(EXPERTS_SCOPE)
def _run_experts(function: Callable, *arguments) -> Any:
    return function(*arguments)


@jax.named_scope(DISPATCH_SCOPE)
def dispatch(tokens: Tokens, waiting_TN: jax.Array, capacity: Capacity) -> tuple[Tokens, tuple[Hop, ...], jax.Array]:
    """Sends the copies of one round.

    Args:
      tokens: of this device, with experts over all devices.
      waiting_TN: bool [T, nodes], the copies that have not been sent.

    Returns:
      What this device receives, with its own experts; the hops, for `send` and `combine`; the copies that still wait.
    """
    sent_TN = admit(tokens.experts_RK, waiting_TN, capacity)
    experts_TK = only_sent(tokens.experts_RK, sent_TN, capacity)
    rows = tokens._replace(experts_RK=_compress(experts_TK, capacity.num_experts))
    carrier, read = _load(rows, is_packed=not (capacity.goes_to_every_node and capacity.goes_to_every_device))
    hops, node = (), 0
    if capacity.num_nodes > 1:
        hop = Hop(None, None, NODE_AXES)
        if not capacity.goes_to_every_node:
            hop = _plan_hop(sent_TN[None], capacity.node_rows, capacity.top_k, NODE_AXES)
        carrier, hops, node = _travel(carrier, hop), (hop,), jax.lax.axis_index(NODE_AXES)
    if capacity.devices_per_node > 1:
        hop = Hop(None, None, INNER_AXES)
        if not capacity.goes_to_every_device:
            experts_RK = _expand(read(carrier).experts_RK, capacity.num_experts)
            is_sent_RI = devices_to_reach(experts_RK, node, capacity)
            is_sent_NRI = is_sent_RI.reshape(capacity.num_nodes, capacity.node_rows, -1)
            hop = _plan_hop(is_sent_NRI, capacity.device_rows, capacity.top_k, INNER_AXES)
        carrier, hops = _travel(carrier, hop), (*hops, hop)
    received = read(carrier)
    first_expert = jax.lax.axis_index(EXPERT_AXES) * capacity.experts_per_device
    experts_RK = _expand(received.experts_RK, capacity.num_experts) - first_expert
    is_here_RK = (experts_RK >= 0) & (experts_RK < capacity.experts_per_device)
    experts_RK = jnp.where(is_here_RK, experts_RK, capacity.experts_per_device)
    hops, experts_RK, weights_RK = checkpoint_name((hops, experts_RK, received.weights_RK), ROUTES_NAME)
    payload = checkpoint_name(received.payload, ROWS_NAME)
    return Tokens(experts_RK, weights_RK, payload), hops, waiting_TN & ~sent_TN


@jax.named_scope(DISPATCH_SCOPE)
def send(rows: Any, hops: tuple[Hop, ...]) -> Any:
    """Sends a tree of arrays [T, ...] the ways that `dispatch` found; returns [R, ...], zeros in empty rows."""
    carrier, read = _load(rows, is_packed=any(hop.row_of_slot_S is not None for hop in hops))
    for hop in hops:
        carrier = _travel(carrier, hop)
    return read(carrier)


@jax.named_scope(COMBINE_SCOPE)
def combine(rows: Any, hops: tuple[Hop, ...]) -> Any:
    """Sends a tree of arrays [R, ...] back and sums what belongs to one token: [T, ...] in float32.

    Between the hops sums are rounded to the dtype of the rows.
    """
    return jax.tree.map(lambda leaf: _combine_leaf(leaf, hops), rows)


def _combine_leaf(rows: jax.Array, hops: tuple[Hop, ...]) -> jax.Array:
    sums = rows
    for hop in reversed(hops):
        returned = jax.lax.all_to_all(sums.astype(rows.dtype), hop.axes, 0, 0, tiled=True)
        if hop.row_of_slot_S is None:
            copies = jnp.split(returned, collectives.size(hop.axes))
        else:
            copies = (returned.at[slots_R].get(mode="fill", fill_value=0) for slots_R in hop.slots_of_row_RC.T)
        sums = sum(copy.astype(jnp.float32) for copy in copies)
    return sums


def _load(rows: Any, *, is_packed: bool) -> tuple[Any, Callable]:
    """Returns what travels of a tree of arrays, and what reads the tree from what arrives."""
    if is_packed:
        return pack(rows), functools.partial(unpack, specs=row_specs(rows))
    return rows, lambda carrier: carrier


def _travel(carrier: Any, hop: Hop) -> Any:
    def travel(rows):
        if hop.row_of_slot_S is None:
            return jax.lax.all_gather(rows, hop.axes, tiled=True)
        rows = rows.at[hop.row_of_slot_S].get(mode="fill", fill_value=0)
        return jax.lax.all_to_all(rows, hop.axes, 0, 0, tiled=True)

    return jax.tree.map(travel, carrier)


def _plan_hop(is_sent_SRC: jax.Array, slots: int, top_k: int, axes: tuple[str, ...]) -> Hop:
    """Gives the rows of every source consecutive slots, of those for the source, in each destination's buffer.

    A row has at most `top_k` destinations.
    """
    num_sources, rows_of_source, num_destinations = is_sent_SRC.shape
    num_rows, num_slots = num_sources * rows_of_source, num_destinations * num_sources * slots
    position_SRC = jnp.cumsum(is_sent_SRC, axis=1, dtype=jnp.int32) - 1
    buffer_SC = jnp.arange(num_sources)[:, None] + jnp.arange(num_destinations) * num_sources
    slot_SRC = jnp.where(is_sent_SRC, buffer_SC[:, None] * slots + position_SRC, num_slots)
    slot_RC = slot_SRC.reshape(num_rows, num_destinations).astype(jnp.int32)
    row_RC = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[:, None], slot_RC.shape)
    row_of_slot_S = jnp.full(num_slots, num_rows, jnp.int32).at[slot_RC].set(row_RC, mode="drop")
    slots_RK = jnp.sort(slot_RC, axis=1)[:, :top_k] if num_destinations > top_k else slot_RC
    return Hop(row_of_slot_S, slots_RK, axes)


def _arguments(received: Tokens) -> tuple:
    return received.payload, received.experts_RK, received.weights_RK


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    """Adds in float32 and rounds once to the total's dtype."""
    return (total.astype(jnp.float32) + more.astype(jnp.float32)).astype(total.dtype)


def _compress(experts_RK: jax.Array, num_experts: int) -> jax.Array:
    """Returns expert ids as they travel: 0 for none, as in an empty row."""
    dtype = jnp.uint16 if num_experts < 2**16 else jnp.uint32
    return jnp.where(experts_RK < num_experts, experts_RK + 1, 0).astype(dtype)


def _expand(experts_RK: jax.Array, num_experts: int) -> jax.Array:
    return jnp.where(experts_RK == 0, num_experts, experts_RK.astype(jnp.int32) - 1)
