"""DeepSeek-V3 as pure functions of (config, parameters, tokens)."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.fp8.weight import warn_without_kernels
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block, scan_blocks, scan_blocks_with_cache
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.layers import exact_if_float32, rms_norm
from dsv3_jax.model.mtp import MTPModule, scan_modules
from dsv3_jax.model.params import (
    cast_from_specs,
    compute_dtype,
    declare,
    declared,
    has_prepared,
    init_from_specs,
    num_elements,
    prepare_from_specs,
    stacked,
)
from dsv3_jax.model.weights import RoundedWeight, as_array, as_rounded, is_fp8
from dsv3_jax.sharding.collectives import gather_tokens, own_tokens, sum_over, take_token
from dsv3_jax.sharding.mesh import AXES
from dsv3_jax.sharding.rules import split_param


class Forward(typing.NamedTuple):
    """What training needs of one pass."""

    h_BTD: jax.Array  # after the final norm
    mtp_h: tuple[jax.Array, ...]  # one [B, T, D] per MTP depth, each after its own norm
    tokens_per_expert: dict[str, jax.Array]  # stack name -> int32 [layers, E]
    balance_loss: jax.Array  # float32 scalar, summed over layers, averaged over sequences, without alpha
    further_rounds: jax.Array  # int32 scalar, of the expert exchange beyond the first, summed over layers


class DeepseekV3(nnx.Module):
    """Declares the parameters and runs them. Outside `model/`, use the functions of this module instead."""

    def __init__(self, config: ModelConfig, *, with_layers: bool = True):
        self.config = config
        embed, vocab = ("embed", config.hidden_size), ("vocab", config.vocab_size)
        self.embed_tokens = declare(vocab, embed, is_rounded=True)
        self.norm = declare(embed, init="ones")
        self.lm_head = declare(embed, vocab, is_rounded=True)
        if with_layers and config.num_dense_layers:
            self.dense_layers = stacked(Block(config, is_moe=False), config.num_dense_layers)
        if with_layers and config.num_moe_layers:
            self.moe_layers = stacked(Block(config, is_moe=True), config.num_moe_layers)
        if with_layers and config.num_nextn_predict_layers:
            self.mtp_layers = stacked(MTPModule(config), config.num_nextn_predict_layers)

    def stacks(self) -> dict[str, Block]:
        """Returns the stacks of blocks that exist, in order."""
        return {name: getattr(self, name) for name in ("dense_layers", "moe_layers") if hasattr(self, name)}

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Looks up embeddings, [..., D] in the compute dtype."""
        return _lookup(as_rounded(self.embed_tokens[...]), tokens, compute_dtype(self.config))

    def final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def __call__(
        self, tokens_BT: jax.Array, next_tokens_BT: jax.Array | None, first_key_BT: jax.Array | None
    ) -> Forward:
        positions = jnp.arange(tokens_BT.shape[1])
        if first_key_BT is not None:
            positions = positions - first_key_BT
        cosines, sines = rope.rotation(self.config, positions)
        x_BTD = self.embed(own_tokens(tokens_BT, 1))
        routing = {}
        for name, blocks in self.stacks().items():
            x_BTD, statistics = scan_blocks(blocks, x_BTD, cosines, sines, first_key_BT)
            if statistics is not None:
                routing[name] = statistics
        h_BTD, mtp_h = self.final_norm(x_BTD), ()
        if next_tokens_BT is not None and self.config.num_nextn_predict_layers:
            embedded_BTD = self.embed(own_tokens(next_tokens_BT, 1))
            stacked_h, routing["mtp_layers"] = scan_modules(
                self.mtp_layers, h_BTD, embedded_BTD, cosines, sines, first_key_BT
            )
            mtp_h = tuple(stacked_h)
        return Forward(
            h_BTD,
            mtp_h,
            {name: statistics.tokens_per_expert_E for name, statistics in routing.items()},
            sum((statistics.balance_loss.sum() for statistics in routing.values()), jnp.float32(0)),
            sum((statistics.further_rounds.sum() for statistics in routing.values()), jnp.int32(0)),
        )

    def project_to_logits(self, h: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V]; no gradient flows to a head that was prepared."""
        head_DV = as_rounded(self.lm_head[...]).values.astype(h.dtype)
        return jnp.dot(h, head_DV, precision=exact_if_float32(h.dtype), preferred_element_type=jnp.float32)


def param_specs(config: ModelConfig) -> dict:
    """Returns the tree of `ParamSpec`s: what every parameter's shape, logical axes and initializer are."""
    return declared(DeepseekV3(dataclasses.replace(config, n_redundant_experts=0)))


def slot_specs(config: ModelConfig) -> dict:
    """Returns the tree of `ParamSpec`s of parameters whose experts lie in slots, redundant ones among them."""
    return declared(DeepseekV3(config))


def param_splits(config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    """Returns the tree of `Split`s: how every parameter lies on the mesh."""
    return jax.tree.map(lambda spec: split_param(mesh, spec.shape, spec.axes), param_specs(config))


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> dict:
    """Returns where every parameter's master copy lies: spread over the mesh, or without one on the default device."""
    if mesh is None:
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: whole, param_specs(config))
    return jax.tree.map(lambda split: jax.sharding.NamedSharding(mesh, split.master), param_splits(config, mesh))


def init_params(config: ModelConfig, key: jax.Array, *, init_std: float) -> dict:
    """Draws float32 parameters: normal with standard deviation init_std, norms 1, biases 0 (§4.2)."""
    return init_from_specs(param_specs(config), key, init_std=init_std)


def cast_params(config: ModelConfig, params: dict) -> dict:
    """Casts to the precision each parameter is computed in, for use without gradients.

    Norms, router and biases stay float32; with precision=fp8 the weights of linears become codes.
    """
    if config.precision == "fp8":
        warn_without_kernels()
    return cast_from_specs(config, param_specs(config), params)


def prepare_params(config: ModelConfig, params: dict) -> dict:
    """Rounds what is gathered of linears' weights, or with precision=fp8 quantizes them all, masters beside them.

    Embedding and head are rounded where they are gathered. The functions of this module do the same inside. A caller
    that runs several of them between two changes of the parameters does it once, before; devices that keep parts of
    them, before they gather them.
    """
    if config.precision == "fp8" and not has_prepared(params):
        warn_without_kernels()
    return prepare_from_specs(config, slot_specs(_declared_as(config, params)), params)


def count_params(config: ModelConfig, *, with_mtp: bool) -> int:
    """Counts the parameters, router biases included; MTP modules share embedding and head."""
    specs = param_specs(config)
    total = num_elements(specs)
    if not with_mtp and "mtp_layers" in specs:
        total -= num_elements(specs["mtp_layers"])
    return total


def forward(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, *, next_tokens_BT: jax.Array | None = None,
    first_key_BT: jax.Array | None = None,
) -> Forward:  # fmt: skip
    """Runs the network over whole sequences.

    In a program of `sharding.rules.per_device` every argument is this device's part: its sequences, its parts of the
    parameters. The result then speaks of the tokens that it owns: a piece of each of its sequences.

    Args:
      params: tree of `param_specs`, any float dtype; linears compute in the config's precision.
      tokens_BT: int32 token ids.
      next_tokens_BT: token i+1 at position i; given, the MTP modules run too.
      first_key_BT: int32 index where the document of every token begins, see `document_starts`; given, positions begin
        at 0 with every document and attention stays inside it.

    Raises:
      ValueError: a sequence longer than max_position_embeddings.
    """
    _require_fits(config, tokens_BT.shape[1])
    return _bind(config, params)(tokens_BT, next_tokens_BT, first_key_BT)


def document_starts(tokens_BT: jax.Array, bos_token_id: int) -> jax.Array:
    """Returns where the document of every token begins, int32 [B, T]: the last bos at or before it, else 0."""
    indices_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(tokens_BT == bos_token_id, indices_T, 0), axis=1)


def logits(config: ModelConfig, params: dict, h: jax.Array) -> jax.Array:
    """Projects hidden states [..., D] to float32 logits [..., V]."""
    return _bind(config, params).project_to_logits(h)


def prefill(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, jax.Array]:
    """Reads prompts into an empty cache.

    Args:
      params: as for `forward`, or with experts in slots, as `slot_specs` declares them.
      tokens_BT: prompts, padded on the right with any id.
      lengths_B: real tokens of each row, at least 1.
      cache: from `init_cache`, with room for T tokens.

    Returns:
      float32 logits [B, V] after the last real token; the filled cache; how many real tokens chose each expert of every
      MoE layer, int32 [L, E].

    In a program of `sharding.rules.per_device`, as in `decode_step`, rows are those of this device's batch shard; the
    devices of a tensor axis all have the same rows, caches and logits; the experts' tokens are those of all devices.
    """
    length = tokens_BT.shape[1]
    _require_fits(config, length)
    room = cache.latents[0].shape[1]
    require(length <= room, "prompt length", length, f"exceeds the cache's {room} tokens; make a longer cache")
    model = _bind(config, params)
    cosines, sines = rope.rotation(config, jnp.arange(length))
    is_live_BT = own_tokens(jnp.arange(length) < lengths_B[:, None], 1)
    x_BTD, new_latents, loads = model.embed(own_tokens(tokens_BT, 1)), [], []
    for blocks in model.stacks().values():
        x_BTD, new_LBTZ, tokens_per_expert_LE = scan_blocks_with_cache(blocks, x_BTD, cosines, sines, is_live_BT)
        new_latents += list(new_LBTZ)
        loads += [] if tokens_per_expert_LE is None else list(tokens_per_expert_LE)
    latents = tuple(
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), 0, axis=1)
        for old, new in zip(cache.latents, new_latents, strict=True)
    )
    last_BD = take_token(x_BTD, lengths_B - 1)
    logits_BV = model.project_to_logits(model.final_norm(last_BD))
    return logits_BV, Cache(latents, lengths_B), _sum_loads(config, loads)


def split_layers(params: dict) -> dict:
    """Returns the parameters with every stack of blocks as a tuple of layers, which `decode_step` takes as well.

    A decoded token reads every weight once. Out of a stack each layer would be copied first (measured on 2 CPU cores:
    3.5 times the work), so a decoding loop splits the stacks once, outside, and runs layer after layer. Quantized
    weights that decoding absorbs are dequantized here.
    """
    names = [name for name in ("dense_layers", "moe_layers") if name in params]
    return params | {name: tuple(map(_absorbable, _layers(params[name]))) for name in names}


def decode_step(
    config: ModelConfig, params: dict, tokens_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, jax.Array]:
    """Continues every row by one token.

    Args:
      params: as for `prefill`, or what `split_layers` made of them.
      tokens_B: int32; a negative one in a row that continues nothing, whose results mean nothing.
      cache: with room for one more token.

    Returns:
      float32 logits [B, V]; the longer cache; how many tokens that are not negative chose each expert of every MoE
      layer, int32 [L, E].
    """
    config, params = _declared_as(config, params), prepare_params(config, params)
    cosines, sines = rope.rotation(config, cache.lengths_B[:, None])
    layers = [(name, layer) for name in ("dense_layers", "moe_layers") for layer in _layers(params.get(name, ()))]
    ends = {name: value for name, value in params.items() if not name.endswith("_layers")}
    model = nnx.merge(_graphdef(config, with_layers=False), nnx.State(ends))
    is_live_BT = own_tokens(tokens_B, 0)[:, None] >= 0
    x_BTD, latents, loads = model.embed(own_tokens(jnp.maximum(tokens_B, 0), 0)[:, None]), [], []
    for (name, layer), cache_BSZ in zip(layers, cache.latents, strict=True):
        is_moe = name == "moe_layers"
        x_BTD, cache_BSZ, tokens_per_expert_E = _decode_block(
            config, layer, x_BTD, cosines, sines, cache_BSZ, cache.lengths_B, is_live_BT, is_moe=is_moe
        )
        latents.append(cache_BSZ)
        loads += [tokens_per_expert_E] if is_moe else []
    logits_BV = gather_tokens(model.project_to_logits(model.final_norm(x_BTD[:, 0])), 0)
    return logits_BV, Cache(tuple(latents), cache.lengths_B + 1), _sum_loads(config, loads)


def _sum_loads(config: ModelConfig, loads: list[jax.Array]) -> jax.Array:
    """Returns the tokens of every expert over all devices, int32 [L, E], given those of this device by layer."""
    own_LE = jnp.stack(loads) if loads else jnp.zeros((0, config.n_routed_experts), jnp.int32)
    return sum_over(own_LE, AXES)


@functools.partial(jax.jit, static_argnums=0, static_argnames="is_moe")  # traced, kernels lowered, once for all layers
def _decode_block(
    config, layer, x_BTD, cosines, sines, cache_BSZ, lengths_B, is_live_BT, *, is_moe
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Runs one layer on new tokens; returns its output, the cache with them in it, and if a MoE the experts' tokens."""
    block = nnx.merge(_block_graphdef(config, is_moe=is_moe), nnx.State(layer))
    x_BTD, cache_BSZ, statistics = block.decode(x_BTD, cosines, sines, cache_BSZ, lengths_B, is_live_BT)
    return x_BTD, cache_BSZ, statistics and statistics.tokens_per_expert_E


def _layers(stack: dict | tuple) -> tuple:
    """Splits a stack of layers, unless it is split already."""
    if isinstance(stack, tuple):
        return stack
    num_layers = len(jax.tree.leaves(stack)[0])
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], stack) for index in range(num_layers))


def _absorbable(layer: dict) -> dict:
    """Returns a layer whose key-value up-projection, which decoding absorbs into its neighbours, is an array."""
    weight = layer["self_attn"]["kv_b_proj"]
    if not is_fp8(weight):
        return layer
    contraction = weight.forward.codes.shape[-1]
    attention = layer["self_attn"] | {"kv_b_proj": as_array(weight, (contraction,), jnp.bfloat16)}
    return layer | {"self_attn": attention}


@functools.lru_cache
def _graphdef(config: ModelConfig, *, with_layers: bool = True) -> nnx.GraphDef:
    return nnx.split(DeepseekV3(config, with_layers=with_layers))[0]


@functools.lru_cache
def _block_graphdef(config: ModelConfig, *, is_moe: bool) -> nnx.GraphDef:
    return nnx.split(Block(config, is_moe=is_moe))[0]


def _bind(config: ModelConfig, params: dict) -> DeepseekV3:
    return nnx.merge(_graphdef(_declared_as(config, params)), nnx.State(prepare_params(config, params)))


def _declared_as(config: ModelConfig, params: dict) -> ModelConfig:
    """Returns the configuration that declares these parameters: with redundant experts only if experts lie in slots."""
    layers = params.get("moe_layers")
    first = layers[0] if isinstance(layers, tuple) else layers
    if first and "slots_of_expert" in first["mlp"]["experts"]:
        return config
    return dataclasses.replace(config, n_redundant_experts=0)


def _require_fits(config: ModelConfig, length: int) -> None:
    require(length <= config.max_position_embeddings, "sequence length", length,
            f"exceeds model.max_position_embeddings={config.max_position_embeddings}")  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: RoundedWeight, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Looks up rows of a table [V, D]; the gradient of a frequent token is summed in float32."""
    return table.values[tokens].astype(dtype)


def _lookup_forward(table, tokens, dtype):
    return _lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype, residuals, dx):
    del dtype
    table, tokens = residuals
    dtable_VD = jnp.zeros(table.values.shape, jnp.float32).at[tokens].add(dx.astype(jnp.float32))
    return table.gradient(dtable_VD.astype(table.master.dtype)), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
