"""Parameters: declared once, as shape, logical axes and initializer beside each other.

A module declares `nnx.Param(ParamSpec(...))`; nothing is allocated. Everything outside `model/` sees parameters as a
plain nested dict, the module tree's attribute names as keys.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.weights import (
    Linear,
    compute_dtype,
    gather_weight,
    is_fp8,
    is_prepared,
    prepare_weight,
    quantize_whole,
    round_weight,
)
from dsv3_jax.sharding.zero import is_part

FLOAT32_PARAMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "norm", "enorm",
                  "hnorm", "gate", "e_score_correction_bias")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is before it exists."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of every dimension
    init: str = "normal"  # normal | ones | zeros
    linear: Linear | None = None  # None: no weight of a linear
    is_rounded: bool = False  # no linear, and yet read in the compute dtype alone, which is BF16 with FP8 linears

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    def unstacked(self) -> "ParamSpec":
        """Returns the declaration of one layer's parameter, given that of a stack of layers."""
        linear = self.linear and dataclasses.replace(self.linear, batch_dims=self.linear.batch_dims - 1)
        return ParamSpec(self.shape[1:], self.axes[1:], self.init, linear, self.is_rounded)


def declare(
    *dims: tuple[str | None, int], init: str = "normal", linear: Linear | None = None, is_rounded: bool = False
) -> nnx.Param:
    """Declares a parameter by its (logical axis, size) pairs."""
    axes, shape = zip(*dims)
    return nnx.Param(ParamSpec(shape, axes, init, linear, is_rounded))


def stacked(module: nnx.Module, num_layers: int) -> nnx.Module:
    """Returns the module with a leading `layers` dimension on every declared parameter."""
    graphdef, specs = nnx.split(module)

    def stack(spec: ParamSpec) -> ParamSpec:
        linear = spec.linear and dataclasses.replace(spec.linear, batch_dims=spec.linear.batch_dims + 1)
        return ParamSpec((num_layers, *spec.shape), ("layers", *spec.axes), spec.init, linear, spec.is_rounded)

    return nnx.merge(graphdef, jax.tree.map(stack, specs))


def init_from_specs(specs: dict, key: jax.Array, *, init_std: float) -> dict:
    """Draws float32 parameters; each depends on the key and its own path only."""

    def draw(path, spec: ParamSpec):
        if spec.init == "ones":
            return jnp.ones(spec.shape, jnp.float32)
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        path_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return init_std * jax.random.normal(path_key, spec.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs)


def cast_from_specs(config: ModelConfig, specs: dict, params: dict) -> dict:
    """Casts to the precision each parameter is computed in: norms, router and biases stay float32."""

    def cast(path, value):
        if is_prepared(value):
            return value
        return value.astype(jnp.float32 if path[-1].key in FLOAT32_PARAMS else compute_dtype(config))

    if config.precision == "fp8" and not has_prepared(params):
        quantize = functools.partial(quantize_whole, config, with_gradient=False)
        params = _map_weights(quantize, lambda weight: weight, specs, params)
    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_prepared)


def prepare_from_specs(config: ModelConfig, specs: dict, params: dict) -> dict:
    """Puts the weights of linears, and what else is rounded, in the form in which they are computed with.

    Of weights, arrays or parts, masters stay beside them for gradients.

    Args:
      params: tree of the specs; a stack of layers may be a tuple of layers.
    """
    if config.precision == "fp32" or has_prepared(params):
        return params
    prepare, round_ = functools.partial(prepare_weight, config), functools.partial(round_weight, config)
    return _map_weights(prepare, round_, specs, params)


def _map_weights(of_linear: Callable, of_rounded: Callable, specs: Any, params: Any) -> Any:
    """Puts of_linear(linear, weight) in the place of linears' weights, of_rounded(weight) in that of rounded ones."""
    if isinstance(params, tuple):
        specs = jax.tree.map(ParamSpec.unstacked, specs)
        return tuple(_map_weights(of_linear, of_rounded, specs, layer) for layer in params)
    if isinstance(params, dict):
        return {name: _map_weights(of_linear, of_rounded, specs[name], value) for name, value in params.items()}
    if specs.linear is not None:
        return of_linear(specs.linear, params)
    return of_rounded(params) if specs.is_rounded else params


def gather_params(params: dict) -> dict:
    """Returns the parameters ready to be computed with, where devices keep parts of them."""
    return jax.tree.map(gather_weight, params, is_leaf=_is_leaf)


def gather_layer(layer: nnx.State) -> nnx.State:
    """Returns the parameters of one layer ready to be computed with, where devices keep parts of them (FSDP)."""
    return nnx.State(gather_params(nnx.to_pure_dict(layer)))


def declared(module: nnx.Module) -> dict:
    """Returns the tree of `ParamSpec`s that a module declares."""
    return nnx.to_pure_dict(nnx.split(module)[1])


def has_prepared(params: dict) -> bool:
    """Tells whether a parameter tree holds weights in the form in which they are computed with."""
    return any(map(is_prepared, jax.tree.leaves(params, is_leaf=is_prepared)))


def masters_of(params: dict) -> dict:
    """Returns what gradients belong to: masters in the place of prepared weights, other leaves as they are."""
    return jax.tree.map(lambda leaf: leaf.master if is_prepared(leaf) else leaf, params, is_leaf=_is_leaf)


def with_masters(params: dict, masters: dict) -> dict:
    """Returns the parameters with every float array from the tree of masters, prepared values as they are.

    What is differentiated by the masters then has no gradient for those values, not even zeros.
    """

    def attach(value, master):
        return dataclasses.replace(value, master=master) if is_prepared(value) else master

    return jax.tree.map(attach, params, masters, is_leaf=_is_leaf)


def square_slots(params: dict) -> dict:
    """Returns zeros whose gradients are sums of squares of the gradients of FP8 weights, which lie in stacks.

    There is one per layer, float32, in the place of the weight; other parameters have None. Where gradients of a weight
    are added up, because it is multiplied twice or by several devices, they are not that sum's.
    """

    def slot(value):
        return jnp.zeros(len(value.backward.codes), jnp.float32) if is_fp8(value) else None

    return jax.tree.map(slot, params, is_leaf=_is_leaf)


def with_squares(params: dict, squares: dict) -> dict:
    """Returns the parameters with what `square_slots` made in the FP8 weights."""

    def attach(value, squares):
        return value if squares is None else dataclasses.replace(value, squares=squares)

    return jax.tree.map(attach, params, squares, is_leaf=_is_leaf)


def _is_leaf(value: Any) -> bool:
    return is_prepared(value) or is_part(value)


def num_elements(specs: dict) -> int:
    """Counts the numbers that the parameters hold."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
