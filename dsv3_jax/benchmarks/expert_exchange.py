"""The exchange of tokens between expert devices, beside plain all_to_alls of as many bytes in the same run.

A device's rate counts what leaves it for others in one direction: the copies of its tokens that routing sends to other
devices, each with its payload, its expert ids and its gate weights. Padding, what stays on the device, and all that is
done to arrange rows are no credit. "speed of NCCL" is the time of torch's all_to_all_single (of JAX's own where torch
does not take part) for as many bytes over one's own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.benchmarks.mesh_programs import OWN, MeshProgram, calls_per_start, draw
from dsv3_jax.benchmarks.nccl_peer import all_to_all_seconds
from dsv3_jax.benchmarks.replays import compile_all
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.benchmarks.timing import steady_medians
from dsv3_jax.config import MeshConfig, ModelConfig, require
from dsv3_jax.fp8.formats import TILE
from dsv3_jax.model.router import route
from dsv3_jax.sharding import expert_exchange
from dsv3_jax.sharding.exchange_plan import Capacity, copies_to_send, plan_capacity
from dsv3_jax.sharding.expert_exchange import ExpertFunctions, Tokens
from dsv3_jax.sharding.mesh import EXPERT_AXES, make_mesh
from dsv3_jax.sharding.rules import per_device

FACTOR = 1.25  # as model.exchange_capacity
UNIFORM, ONE_DEVICE = "uniform", "all to one device"
NCCL, ALL_TO_ALL = "NCCL (torch)", "all_to_all"
WHOLE = "exchange"
OPTIONS = {
    "": {},
    ", synchronous": {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"},
    ", registered buffers": {"xla_gpu_enable_nccl_user_buffers": True},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What is exchanged between which devices."""

    tokens: int  # of one device
    nodes: int
    devices_per_node: int
    hidden_size: int = 7168
    experts_per_device: int = 32
    top_k: int = 8
    n_group: int = 8
    topk_group: int = 4
    routing: str = UNIFORM

    @property
    def case(self) -> str:
        axes = f"node={self.nodes} gpu={self.devices_per_node}"
        return f"{self.tokens} tokens of {self.top_k} experts, {axes}, {self.routing}"

    @property
    def num_experts(self) -> int:
        return self.experts_per_device * self.nodes * self.devices_per_node

    @property
    def mesh(self) -> MeshConfig:
        return MeshConfig(node=self.nodes, gpu=self.devices_per_node)

    @property
    def capacity(self) -> Capacity:
        return plan_capacity(
            num_tokens=self.tokens, top_k=self.top_k, num_experts=self.num_experts, n_group=self.n_group,
            topk_group=self.topk_group, num_nodes=self.nodes, devices_per_node=self.devices_per_node, factor=FACTOR,
        )  # fmt: skip

    def draw_tokens(self, make_payload: Callable[[jax.Array], Any], device: jax.Array) -> Tokens:
        """Draws the tokens of one device."""
        of_scores, of_payload = jax.random.split(jax.random.fold_in(jax.random.key(0), device))
        scores_TE = jax.random.normal(of_scores, (self.tokens, self.num_experts))
        bias_E = jnp.zeros(self.num_experts)
        if self.routing == ONE_DEVICE:
            bias_E = bias_E.at[-self.experts_per_device :].set(1.0)  # no sigmoid is larger
        config = ModelConfig(
            n_routed_experts=self.num_experts, num_experts_per_tok=self.top_k, n_group=self.n_group,
            topk_group=self.topk_group,
        )  # fmt: skip
        routing = route(config, jnp.eye(self.num_experts), bias_E, scores_TE)
        x_TD = jax.random.normal(of_payload, (self.tokens, self.hidden_size), jnp.bfloat16)
        return Tokens(routing.experts_TK, routing.weights_TK, make_payload(x_TD))


def as_bf16(x_TD: jax.Array) -> jax.Array:
    """Returns the payload of BF16 experts: the tokens as they are."""
    return x_TD


def as_fp8(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns bytes of the shapes that FP8 experts exchange: codes, and the exponents of 1x128 scales."""
    codes_TD = jax.lax.bitcast_convert_type(x_TD.astype(jnp.float8_e4m3fn), jnp.uint8)
    return codes_TD, codes_TD[:, : x_TD.shape[1] // TILE]


PAYLOADS = {"BF16": as_bf16, "FP8": as_fp8}


def exchange_rows(*, with_torch: bool) -> list[Row]:
    """Measures dispatch, combine and the whole exchange, forward and backward, of BF16 and FP8 tokens.

    Raises:
      ValueError: there is one device only.
    """
    num_devices = jax.device_count()
    require(num_devices > 1, "suite", "exchange", "needs several devices of one host, and JAX found one")
    cases = [Exchange(4096, 1, num_devices), Exchange(8192, 1, num_devices)]
    cases.append(Exchange(8192, 1, num_devices, routing=ONE_DEVICE))
    cases.append(Exchange(8192, 1, num_devices, top_k=1, topk_group=1))  # most copies stay away from most devices
    if num_devices % 2 == 0:
        cases.append(Exchange(8192, 2, num_devices // 2))
    return measure(cases, with_torch=with_torch)


def measure(cases: list[Exchange], *, with_torch: bool) -> list[Row]:
    """Returns a row per case and implementation; see `exchange_rows`."""
    drawn = {case: _draw(case) for case in cases}
    sizes = sorted({size for tokens in drawn.values() for size in tokens.bytes_per_destination.values()})
    nccl_s = dict(zip(sizes, all_to_all_seconds(sizes, num_devices=jax.device_count()))) if with_torch else {}
    return [row for case in cases for row in _measure_case(case, drawn[case], nccl_s)]


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A case's mesh, its tokens by payload, and what the busiest device must send."""

    mesh: jax.sharding.Mesh
    tokens: dict[str, Tokens]
    bytes_sent: dict[str, int]
    bytes_per_destination: dict[str, int]  # of an all_to_all that sends as much, a multiple of 16


def _draw(case: Exchange) -> _Drawn:
    mesh = make_mesh(case.mesh)
    tokens = {name: draw(functools.partial(case.draw_tokens, payload), mesh) for name, payload in PAYLOADS.items()}
    copies = int(jnp.max(draw(functools.partial(_count_leaving, case), mesh)))
    row_bytes = {name: sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(of)) for name, of in tokens.items()}
    bytes_sent = {name: copies * size for name, size in row_bytes.items()}
    others = mesh.size - 1
    return _Drawn(mesh, tokens, bytes_sent, {name: -(-size // others // 16) * 16 for name, size in bytes_sent.items()})


def _count_leaving(case: Exchange, device: jax.Array) -> jax.Array:
    """Counts the copies of a device's tokens that must reach other devices, int32 [1]."""
    experts_TK = case.draw_tokens(as_bf16, device).experts_RK
    one_node = dataclasses.replace(case.capacity, num_nodes=case.capacity.num_devices, devices_per_node=1)
    reached_TR = copies_to_send(experts_TK, one_node)
    return jnp.sum(reached_TR & (jnp.arange(one_node.num_devices) != device), dtype=jnp.int32)[None]


def _measure_case(case: Exchange, drawn: _Drawn, nccl_s: dict[int, float]) -> list[Row]:
    makers, operands_of, payload_of = {}, {}, {}
    for payload, tokens in drawn.tokens.items():
        calls = calls_per_start(drawn.bytes_sent[payload])
        for short_name, (operation, operands, options) in _entrants(case, drawn, payload, tokens).items():
            name = f"{short_name} {payload}"
            makers[name] = functools.partial(MeshProgram, operation, operands, drawn.mesh, calls=calls, options=options)
            operands_of[name], payload_of[name] = operands, payload
    programs = compile_all(makers)
    seconds = steady_medians({name: program.contender(operands_of[name]) for name, program in programs.items()})
    for payload, size in drawn.bytes_per_destination.items():
        if size in nccl_s:
            seconds[f"{NCCL} {payload}"], payload_of[f"{NCCL} {payload}"] = nccl_s[size], payload
    rows = []
    for name, time_s in seconds.items():
        payload = payload_of[name]
        bytes_sent, bytes_per_destination = drawn.bytes_sent[payload], drawn.bytes_per_destination[payload]
        row = {"case": case.case, "implementation": name, "µs": time_s * 1e6}
        peer_s = nccl_s.get(bytes_per_destination, seconds.get(f"{ALL_TO_ALL} {payload}"))
        if not name.startswith(WHOLE):
            row |= {"MB sent": bytes_sent / 1e6, "GB/s": bytes_sent / time_s / 1e9}
            row["speed of NCCL"] = None if peer_s is None else peer_s / time_s
        if payload == "FP8" and (bf16_s := seconds.get(name.replace("FP8", "BF16"))) is not None:
            row["speed of BF16"] = bf16_s / time_s
        rows.append(row)
    return rows


def _entrants(case: Exchange, drawn: _Drawn, payload: str, tokens: Tokens) -> dict[str, tuple]:
    """Returns operation, operands and compiler options by name."""
    serve = functools.partial(_serve, FUNCTIONS[payload], case.capacity)
    whole = {
        WHOLE: (serve, (tokens,), {}),
        f"{WHOLE}, forward and backward": (functools.partial(_serve_and_return, serve), (tokens,), {}),
    }
    if case.routing != UNIFORM:
        return whole
    dispatch = functools.partial(_dispatch, case.capacity)
    received, hops = jax.jit(per_device(dispatch, mesh=drawn.mesh, in_specs=OWN, out_specs=OWN))(tokens)
    parts = {f"dispatch{name}": (dispatch, (tokens,), options) for name, options in OPTIONS.items()}
    parts["dispatch of the gradient"] = (expert_exchange.send, (tokens.payload, hops), {})
    if payload == "BF16":
        parts["combine"] = (_combine, (received.payload, hops), {})
    buffer = draw(functools.partial(_draw_bytes, (drawn.mesh.size, drawn.bytes_per_destination[payload])), drawn.mesh)
    plain = PLAIN if drawn.mesh.size == 2 else {name: PLAIN[name] for name in PLAIN if name != OF_TWO}
    return parts | whole | {name: (operation, (buffer,), {}) for name, operation in plain.items()}


def _dispatch(capacity: Capacity, tokens: Tokens) -> tuple[Tokens, tuple]:
    received, hops, _ = expert_exchange.dispatch(tokens, copies_to_send(tokens.experts_RK, capacity), capacity)
    return received, hops


def _combine(rows_RD: jax.Array, hops: tuple) -> jax.Array:
    return expert_exchange.combine(rows_RD, hops).astype(rows_RD.dtype)


def _serve(functions: ExpertFunctions, capacity: Capacity, tokens: Tokens, x_TD: jax.Array | None = None) -> jax.Array:
    """Sends tokens to experts that do next to nothing, and back."""
    if x_TD is None:
        x_TD = jnp.zeros((capacity.num_tokens, jax.tree.leaves(tokens.payload)[0].shape[1]), jnp.bfloat16)
    params_E = jnp.ones(capacity.experts_per_device)
    y_TD, _ = expert_exchange.serve(
        functions, x_TD, tokens.payload, tokens.experts_RK, tokens.weights_RK, params_E, capacity=capacity
    )
    return y_TD


def _serve_and_return(serve: Callable, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the output and, with the output as its own gradient, those of the tokens and of their gate weights."""
    x_TD = jnp.zeros((len(tokens.experts_RK), jax.tree.leaves(tokens.payload)[0].shape[1]), jnp.bfloat16)
    y_TD, pull_back = jax.vjp(
        lambda x_TD, weights_TK: serve(tokens._replace(weights_RK=weights_TK), x_TD), x_TD, tokens.weights_RK
    )
    return y_TD, *pull_back(y_TD)


def _scale(decode: Callable, payload: Any, experts_RK: jax.Array, weights_RK: jax.Array, params_E: jax.Array,
           max_choices: int) -> tuple[jax.Array, tuple]:  # fmt: skip
    """Is an expert that returns the token itself."""
    del max_choices
    is_here_RK = experts_RK < len(params_E)
    weight_R1 = jnp.sum(jnp.where(is_here_RK, weights_RK, 0.0), axis=1, keepdims=True)
    return (decode(payload) * weight_R1).astype(jnp.bfloat16), (is_here_RK, weight_R1)


def _scale_gradient(decode: Callable, kept: tuple, gradient: Any, params_E: jax.Array) -> tuple:
    is_here_RK, weight_R1 = kept
    dy_RD = decode(gradient)
    dweights_RK = jnp.where(is_here_RK, dy_RD[:, :1].astype(jnp.float32), 0.0)
    return (dy_RD * weight_R1).astype(jnp.bfloat16), dweights_RK, jnp.zeros_like(params_E)


def _decode_fp8(payload: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jax.lax.bitcast_convert_type(payload[0], jnp.float8_e4m3fn).astype(jnp.float32)


def _functions(encode: Callable, decode: Callable) -> ExpertFunctions:
    return ExpertFunctions(functools.partial(_scale, decode), encode, functools.partial(_scale_gradient, decode))


FUNCTIONS = {"BF16": _functions(as_bf16, as_bf16), "FP8": _functions(as_fp8, _decode_fp8)}


# Plain ways for a device's bytes, a row for each device, to be handed out.


def _draw_bytes(shape: tuple[int, int], device: jax.Array) -> jax.Array:
    return jax.random.bits(jax.random.fold_in(jax.random.key(1), device), shape, jnp.uint8)


def _all_to_all(parts_RB: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(parts_RB, EXPERT_AXES, 0, 0, tiled=True)


def _all_to_all_of_words(parts_RB: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(parts_RB.reshape(len(parts_RB), -1, 4), jnp.uint32)
    words = jax.lax.all_to_all(words, EXPERT_AXES, 0, 0, tiled=True)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(parts_RB.shape)


def _permute_of_two(parts_RB: jax.Array) -> jax.Array:
    """Lets two devices swap the row that leaves each; the other stays where it is."""
    other = 1 - jax.lax.axis_index(EXPERT_AXES)
    received = jax.lax.ppermute(jnp.take(parts_RB, other, axis=0), EXPERT_AXES, [(0, 1), (1, 0)])
    return jax.lax.dynamic_update_index_in_dim(parts_RB, received, other, 0)


OF_TWO = "ppermute"
PLAIN = {ALL_TO_ALL: _all_to_all, "all_to_all of uint32": _all_to_all_of_words, OF_TWO: _permute_of_two}
