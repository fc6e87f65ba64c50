"""The programs that can be planned: traced for a mesh, with what each does once."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.config import RunConfig, override
from dsv3_jax.model import compute_dtype, param_specs, param_splits
from dsv3_jax.plan import hlo
from dsv3_jax.sharding.mesh import Work, check_mesh, num_batch_shards
from dsv3_jax.train.flops import train_flops_per_token
from dsv3_jax.train.step import trace_train_step

_PACKAGE = str(pathlib.Path(__file__).parents[1])
_STEP_SOURCE, _ROUNDS_SOURCE = "train/step.py", "sharding/expert_exchange.py"


@dataclasses.dataclass(frozen=True)
class OutsideLayers:
    """One device's parameters that are in no stack of layers: embedding, head, final norm."""

    weight_bytes: int  # as computed with
    gradient_bytes: int  # of one copy, float32


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program and what its loops and weights amount to."""

    name: str
    traced: jax.stages.Traced
    work: str  # what one run does, in words
    tokens: int  # that one run computes, all devices together
    needed_flops: float | None  # of all devices, by the usual count; None where there is none
    expert_rows: int  # of one device's experts and pass when tokens spread evenly
    num_passes: int  # that the loop over passes runs
    weight_sizes: frozenset[int]  # elements of one device's part of every parameter, as stored and as computed with
    outside_layers: OutsideLayers
    is_differentiated: bool

    @property
    def gradient_copies(self) -> int:
        """Copies of the gradients that are alive at a time: of several passes their sum and the next one's."""
        return min(self.num_passes, 2) if self.is_differentiated else 0

    def trips_of_equation(self, equation: Any) -> int:
        """Returns how often a traced loop runs whose length depends on the data, when tokens spread evenly."""
        frames = equation.source_info.traceback.frames
        return self._trips(tuple(frame.file_name for frame in frames if frame.file_name.startswith(_PACKAGE)))

    def trips_of_instruction(self, program: hlo.Program) -> Callable[[hlo.Instruction], int]:
        """Returns the same for loops of the compiled program."""
        return lambda instruction: self._trips(program.files(instruction))

    def _trips(self, files: tuple[str, ...]) -> int:
        """The source tells the loops apart: the exchange's further rounds, which even loads never need, and passes."""
        if any(file.endswith(_ROUNDS_SOURCE) for file in files):
            return 0
        return self.num_passes if any(file.endswith(_STEP_SOURCE) for file in files[:1]) else 1


def train(config: RunConfig, mesh: jax.sharding.Mesh, *, rows: int | None) -> Program:
    """Traces one optimizer step on the whole batch; `rows` as for `with_whole_passes`."""
    if rows is not None or not config.train.microbatch_size:  # passes will fit any mesh
        check_mesh(Work(config.model, config.data.sequence_length), mesh)
    config = with_whole_passes(config, num_batch_shards(mesh), rows=rows)
    recipe, length = config.train, config.data.sequence_length
    own_tokens = recipe.rows_per_pass * length // (num_batch_shards(mesh) * mesh.shape["tensor"])
    tokens = recipe.batch_size * length
    return Program(
        name="train",
        traced=trace_train_step(config, mesh),
        work=f"one step: {recipe.batch_size:,} sequences of {length:,} tokens in {recipe.max_passes:,} passes",
        tokens=tokens,
        needed_flops=tokens * train_flops_per_token(config.model, sequence_length=length),
        expert_rows=own_tokens * config.model.num_experts_per_tok,
        num_passes=recipe.max_passes,
        weight_sizes=weight_sizes(config, mesh),
        outside_layers=outside_layers(config, mesh),
        is_differentiated=True,
    )


def with_whole_passes(config: RunConfig, num_shards: int, *, rows: int | None) -> RunConfig:
    """Returns the configuration with a batch that does not grow, of passes that the devices share evenly.

    Args:
      rows: sequences per batch shard and pass; the batch is rounded up to whole passes. None: what
        `train.microbatch_size` says, or one.
    """
    if config.train.microbatch_size and rows is None:
        return override(config, {"train.batch_ramp_tokens": 0})
    rows_per_pass = num_shards * (1 if rows is None else rows)
    num_passes = -(-config.train.batch_size // rows_per_pass)
    batch = {"train.microbatch_size": rows_per_pass, "train.batch_size": num_passes * rows_per_pass}
    return override(config, batch | {"train.batch_ramp_tokens": 0})


def outside_layers(config: RunConfig, mesh: jax.sharding.Mesh) -> OutsideLayers:
    """Returns the bytes of one device's parameters outside the stacks of layers."""
    weights, gradients, element = 0, 0, compute_dtype(config.model).itemsize
    for name, spec in param_specs(config.model).items():
        if not isinstance(spec, dict):
            compute = param_splits(config.model, mesh)[name].compute
            numbers = math.prod(jax.sharding.NamedSharding(mesh, compute).shard_shape(spec.shape))
            weights += numbers * (element if spec.is_rounded else 4)
            gradients += numbers * 4
    return OutsideLayers(weights, gradients)


def weight_sizes(config: RunConfig, mesh: jax.sharding.Mesh) -> frozenset[int]:
    """Returns the elements of one device's part of every parameter, as the master copy is kept and as computed with."""
    specs = jax.tree.leaves(param_specs(config.model))
    splits = jax.tree.leaves(param_splits(config.model, mesh))
    sizes = set()
    for spec, split in zip(specs, splits, strict=True):
        for partition in (split.compute, split.master):
            shape = jax.sharding.NamedSharding(mesh, partition).shard_shape(spec.shape)
            sizes.add(math.prod(shape))
    return frozenset(size for size in sizes if size > 1)
