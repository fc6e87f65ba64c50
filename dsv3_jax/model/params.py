"""Parameters: declared once, as shape, logical axes and initializer beside each other.

A module declares `nnx.Param(ParamSpec(...))`; nothing is allocated. Everything outside `model/` sees parameters as a
plain nested dict, the module tree's attribute names as keys.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig

FLOAT32_PARAMS = ("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "norm", "enorm",
                  "hnorm", "gate", "e_score_correction_bias")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is before it exists."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of every dimension
    init: str = "normal"  # normal | ones | zeros

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


def declare(*dims: tuple[str | None, int], init: str = "normal") -> nnx.Param:
    """Declares a parameter by its (logical axis, size) pairs."""
    axes, shape = zip(*dims)
    return nnx.Param(ParamSpec(shape, axes, init))


def stacked(module: nnx.Module, num_layers: int) -> nnx.Module:
    """Returns the module with a leading `layers` dimension on every declared parameter."""
    graphdef, specs = nnx.split(module)

    def stack(spec: ParamSpec) -> ParamSpec:
        return ParamSpec((num_layers, *spec.shape), ("layers", *spec.axes), spec.init)

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
    """Returns the dtype of activations and of the weights of linears."""
    return jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16}[config.precision])


def cast_params(config: ModelConfig, params: dict) -> dict:
    """Casts to the precision each parameter is computed in: norms, router and biases stay float32."""

    def cast(path, value):
        return value.astype(jnp.float32 if path[-1].key in FLOAT32_PARAMS else compute_dtype(config))

    return jax.tree_util.tree_map_with_path(cast, params)


def num_elements(specs: dict) -> int:
    """Counts the numbers that the parameters hold."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))

