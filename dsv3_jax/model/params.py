"""Parameters: declared once, as shape, logical axes and initializer beside each other.

A module declares `nnx.Param(ParamSpec(...))`; nothing is allocated. Everything outside `model/` sees parameters as a
plain nested dict, the module tree's attribute names as keys.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.weight import Fp8Weight, quantize_weight
from dsv3_jax.sharding.zero import gather_parts, is_part

FLOAT32_PARAMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "norm", "enorm",
                  "hnorm", "gate", "e_score_correction_bias")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Linear:
    """How a weight [*batch, *K, *N] multiplies: matrix by matrix of its batch it contracts K."""

    contracted_dims: int = 1
    batch_dims: int = 0
    cache_setting: str = "fp8_input_cache"  # the setting that says what is kept of its input for the backward pass


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is before it exists."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of every dimension
    init: str = "normal"  # normal | ones | zeros
    linear: Linear | None = None  # None: no weight of a linear

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    def unstacked(self) -> "ParamSpec":
        """Returns the declaration of one layer's parameter, given that of a stack of layers."""
        linear = self.linear and dataclasses.replace(self.linear, batch_dims=self.linear.batch_dims - 1)
        return ParamSpec(self.shape[1:], self.axes[1:], self.init, linear)


def declare(*dims: tuple[str | None, int], init: str = "normal", linear: Linear | None = None) -> nnx.Param:
    """Declares a parameter by its (logical axis, size) pairs."""
    axes, shape = zip(*dims)
    return nnx.Param(ParamSpec(shape, axes, init, linear))


def stacked(module: nnx.Module, num_layers: int) -> nnx.Module:
    """Returns the module with a leading `layers` dimension on every declared parameter."""
    graphdef, specs = nnx.split(module)

    def stack(spec: ParamSpec) -> ParamSpec:
        linear = spec.linear and dataclasses.replace(spec.linear, batch_dims=spec.linear.batch_dims + 1)
        return ParamSpec((num_layers, *spec.shape), ("layers", *spec.axes), spec.init, linear)

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


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of activations, and of the weights that are not in FP8."""
    return jnp.dtype(jnp.float32 if config.precision == "fp32" else jnp.bfloat16)


def cast_from_specs(config: ModelConfig, specs: dict, params: dict) -> dict:
    """Casts to the precision each parameter is computed in: norms, router and biases stay float32."""

    def cast(path, value):
        if isinstance(value, Fp8Weight):
            return value
        return value.astype(jnp.float32 if path[-1].key in FLOAT32_PARAMS else compute_dtype(config))

    if config.precision == "fp8" and not is_quantized(params):
        params = quantize_from_specs(config, specs, params, with_gradient=False)
    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_fp8)


def quantize_from_specs(config: ModelConfig, specs: dict, params: dict | tuple, *, with_gradient: bool) -> dict | tuple:
    """Puts `Fp8Weight`s in the place of the linears' weights.

    Args:
      params: tree of the specs; a stack of layers may be a tuple of layers.
      with_gradient: see `fp8.weight.quantize_weight`.
    """
    if isinstance(params, tuple):
        specs = jax.tree.map(ParamSpec.unstacked, specs)
        return tuple(quantize_from_specs(config, specs, layer, with_gradient=with_gradient) for layer in params)
    if isinstance(params, dict):
        return {
            name: quantize_from_specs(config, specs[name], value, with_gradient=with_gradient)
            for name, value in params.items()
        }
    if specs.linear is None or is_part(params):
        return params
    return quantize_weight(
        params, contracted_dims=specs.linear.contracted_dims, batch_dims=specs.linear.batch_dims,
        input_cache=getattr(config, specs.linear.cache_setting), with_gradient=with_gradient,
    )  # fmt: skip


def gather_layer(config: ModelConfig, module: nnx.Module, layer: nnx.State) -> nnx.State:
    """Returns the parameters of one layer ready to be computed with, where devices keep parts of them (FSDP).

    Args:
      module: declares the parameters of such a layer.
    """
    params = nnx.to_pure_dict(layer)
    if not any(map(is_part, jax.tree.leaves(params, is_leaf=is_part))):
        return layer
    params = gather_parts(params)
    if config.precision == "fp8":
        params = quantize_from_specs(config, declared(module), params, with_gradient=True)
    return nnx.State(params)


def declared(module: nnx.Module) -> dict:
    """Returns the tree of `ParamSpec`s that a module declares."""
    return nnx.to_pure_dict(nnx.split(module)[1])


def is_fp8(value: Any) -> bool:
    """Tells whether a leaf of a parameter tree is the weight of an FP8 linear."""
    return isinstance(value, Fp8Weight)


def is_quantized(params: dict) -> bool:
    """Tells whether a parameter tree holds weights of FP8 linears."""
    return any(map(is_fp8, jax.tree.leaves(params, is_leaf=is_fp8)))


def with_masters(params: dict, masters: dict) -> dict:
    """Returns the parameters with every float array from the tree of masters, codes as they are.

    What is differentiated by the masters then has no gradient for codes, not even zeros.
    """

    def attach(value, master):
        return dataclasses.replace(value, master=master) if is_fp8(value) else master

    return jax.tree.map(attach, params, masters, is_leaf=is_fp8)


def num_elements(specs: dict) -> int:
    """Counts the numbers that the parameters hold."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
