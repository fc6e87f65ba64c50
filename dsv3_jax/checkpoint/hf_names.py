"""Published tensor names and our parameter paths: one table, which import and export both read.

A published linear weight is [out, in] and named per layer and per expert; ours is [in, out...], stacked over layers
and experts, gate and up fused. Shapes come from `param_specs`; this file knows names and orientation only. MTP module
k is published as layer num_hidden_layers + k, with copies of the embedding and the head.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import param_specs


@dataclasses.dataclass(frozen=True)
class Row:
    """How one published tensor of a layer is cut from one of our parameters."""

    path: str  # below the layer's stack, "/" between keys
    name: str  # below "model.layers.N."; {e} is the expert
    in_dims: int = 1  # leading dimensions that are the input of a linear; 0: stored as published, not transposed
    part: int | None = None  # index of the dimension before the last: 0 gate, 1 up
    is_fp8: bool = False  # E4M3 with block scales in the FP8 layout
    is_float32: bool = False  # float32 in every layout


# In the order of the published checkpoint.
BLOCK_ROWS = (
    Row("self_attn/q_proj", "self_attn.q_proj.weight", is_fp8=True),
    Row("self_attn/q_a_proj", "self_attn.q_a_proj.weight", is_fp8=True),
    Row("self_attn/q_a_layernorm", "self_attn.q_a_layernorm.weight", in_dims=0),
    Row("self_attn/q_b_proj", "self_attn.q_b_proj.weight", is_fp8=True),
    Row("self_attn/kv_a_proj_with_mqa", "self_attn.kv_a_proj_with_mqa.weight", is_fp8=True),
    Row("self_attn/kv_a_layernorm", "self_attn.kv_a_layernorm.weight", in_dims=0),
    Row("self_attn/kv_b_proj", "self_attn.kv_b_proj.weight", is_fp8=True),
    Row("self_attn/o_proj", "self_attn.o_proj.weight", in_dims=2, is_fp8=True),
    Row("mlp/gate_up_proj", "mlp.gate_proj.weight", part=0, is_fp8=True),
    Row("mlp/gate_up_proj", "mlp.up_proj.weight", part=1, is_fp8=True),
    Row("mlp/down_proj", "mlp.down_proj.weight", is_fp8=True),
    Row("mlp/gate", "mlp.gate.weight"),
    Row("mlp/e_score_correction_bias", "mlp.gate.e_score_correction_bias", in_dims=0, is_float32=True),
    Row("mlp/shared_experts/gate_up_proj", "mlp.shared_experts.gate_proj.weight", part=0, is_fp8=True),
    Row("mlp/shared_experts/gate_up_proj", "mlp.shared_experts.up_proj.weight", part=1, is_fp8=True),
    Row("mlp/shared_experts/down_proj", "mlp.shared_experts.down_proj.weight", is_fp8=True),
    Row("mlp/experts/gate_up_proj", "mlp.experts.{e}.gate_proj.weight", part=0, is_fp8=True),
    Row("mlp/experts/gate_up_proj", "mlp.experts.{e}.up_proj.weight", part=1, is_fp8=True),
    Row("mlp/experts/down_proj", "mlp.experts.{e}.down_proj.weight", is_fp8=True),
    Row("input_layernorm", "input_layernorm.weight", in_dims=0),
    Row("post_attention_layernorm", "post_attention_layernorm.weight", in_dims=0),
)
MTP_ROWS = (
    Row("enorm", "enorm.weight", in_dims=0),
    Row("hnorm", "hnorm.weight", in_dims=0),
    Row("eh_proj", "eh_proj.weight"),  # input: the embedding's half first, as published
    Row("norm", "shared_head.norm.weight", in_dims=0),
)
EMBEDDING = Row("embed_tokens", "model.embed_tokens.weight", in_dims=0)
FINAL_NORM = Row("norm", "model.norm.weight", in_dims=0)
HEAD = Row("lm_head", "lm_head.weight")
MTP_COPIES = (
    dataclasses.replace(EMBEDDING, name="embed_tokens.weight"),
    dataclasses.replace(HEAD, name="shared_head.head.weight"),
)


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """One tensor of a published checkpoint and the block of a parameter that it holds."""

    name: str
    shape: tuple[int, ...]
    row: Row
    path: tuple[str, ...]  # keys of the parameter
    index: tuple[int, ...]  # leading indices of the block in the parameter: (), (layer,) or (layer, expert)
    layer: int | None  # N of model.layers.N; none outside the layers
    is_copy: bool = False  # repeats a tensor that another name holds

    def publish(self, block: np.ndarray) -> np.ndarray:
        """Turns the parameter's block at `index` into the published tensor; contiguous."""
        block = self._part(block)
        if self.row.in_dims:
            block = block.reshape(self.shape[::-1]).T
        return np.ascontiguousarray(block)

    def place(self, weight: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the published tensor into its place in the stacked parameter, cast to the parameter's dtype."""
        block = self._part(parameter[self.index] if self.index else parameter)
        block[...] = (weight.T if self.row.in_dims else weight).reshape(block.shape)

    def _part(self, block: np.ndarray) -> np.ndarray:
        return block if self.row.part is None else block[..., self.row.part, :]


def published_tensors(config: ModelConfig) -> Iterator[PublishedTensor]:
    """Yields every tensor of the published checkpoint of this configuration, in the published order."""
    specs = param_specs(config)
    yield _whole(EMBEDDING, specs)
    yield from _layers(("dense_layers",), specs, first_layer=0)
    yield from _layers(("moe_layers",), specs, first_layer=config.num_dense_layers)
    yield _whole(FINAL_NORM, specs)
    yield _whole(HEAD, specs)
    for module in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + module
        yield from _block(("mtp_layers", "block"), specs, stack_index=module, layer=layer)
        for row in MTP_ROWS:
            yield _stacked(row, ("mtp_layers",), specs, (module,), layer)
        for row in MTP_COPIES:
            name = f"model.layers.{layer}.{row.name}"
            yield dataclasses.replace(_whole(row, specs), name=name, layer=layer, is_copy=True)


def leaf(tree: dict, path: tuple[str, ...]):
    """Returns the parameter (or its spec) at a path, or None where the configuration has none."""
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _layers(stack: tuple[str, ...], specs: dict, *, first_layer: int) -> Iterator[PublishedTensor]:
    norm = leaf(specs, (*stack, "input_layernorm"))
    for stack_index in range(norm.shape[0] if norm is not None else 0):
        yield from _block(stack, specs, stack_index=stack_index, layer=first_layer + stack_index)


def _block(stack: tuple[str, ...], specs: dict, *, stack_index: int, layer: int) -> Iterator[PublishedTensor]:
    rows = [row for row in BLOCK_ROWS if leaf(specs, (*stack, *row.path.split("/"))) is not None]
    expert_rows = [row for row in rows if "{e}" in row.name]
    for row in rows:
        if row not in expert_rows:
            yield _stacked(row, stack, specs, (stack_index,), layer)
        elif row is expert_rows[0]:
            num_experts = leaf(specs, (*stack, *row.path.split("/"))).shape[1]
            for expert in range(num_experts):
                for expert_row in expert_rows:
                    yield _stacked(expert_row, stack, specs, (stack_index, expert), layer)


def _stacked(row: Row, stack: tuple, specs: dict, index: tuple[int, ...], layer: int) -> PublishedTensor:
    path = (*stack, *row.path.split("/"))
    name = f"model.layers.{layer}.{row.name.format(e=index[-1])}"
    return PublishedTensor(name, _published_shape(row, leaf(specs, path).shape[len(index) :]), row, path, index, layer)


def _whole(row: Row, specs: dict) -> PublishedTensor:
    return PublishedTensor(row.name, _published_shape(row, specs[row.path].shape), row, (row.path,), (), None)


def _published_shape(row: Row, block_shape: tuple[int, ...]) -> tuple[int, ...]:
    if row.part is not None:
        block_shape = block_shape[:-2] + block_shape[-1:]
    if not row.in_dims:
        return block_shape
    return math.prod(block_shape[row.in_dims :]), math.prod(block_shape[: row.in_dims])
