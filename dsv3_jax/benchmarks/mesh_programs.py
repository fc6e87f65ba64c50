"""Operations in which all devices of a mesh take part, done many times per start, as in `replays`."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.benchmarks.timing import Contender
from dsv3_jax.sharding.mesh import AXES
from dsv3_jax.sharding.rules import per_device

LINK_RATE = 450e9  # bytes/s that leave an H200 in one direction (data sheet)
START_S = 4e-3  # a start lasts at least about this long
OWN = PartitionSpec(AXES)  # the first dimension has every device's part in turn


def draw(function: Callable[[jax.Array], Any], mesh: jax.sharding.Mesh) -> Any:
    """Returns what function(number of the device) gives on every device: arrays whose first dimension joins them."""
    drawn = per_device(lambda: function(jax.lax.axis_index(AXES)), mesh=mesh, in_specs=(), out_specs=OWN)
    return jax.jit(drawn)()


class MeshProgram:
    """An operation of all devices, compiled to run a number of times in a row."""

    def __init__(
        self,
        operation: Callable[..., Any],
        operands: tuple,
        mesh: jax.sharding.Mesh,
        *,
        calls: int,
        options: Mapping[str, Any],
    ):
        """Compiles.

        Args:
          operation: maps a device's parts of the operands to arrays; every device runs it at the same time.
          operands: as `draw` returns them, or `jax.ShapeDtypeStruct`s of that.
          mesh: the devices, which need not exist.
          calls: how often a start runs the operation.
          options: of XLA's compiler.
        """

        def call_all(results, *operands):
            def call(_, results):
                # Without the barrier a call that repeats another would be left out.
                own, _ = jax.lax.optimization_barrier((operands, results))
                return operation(*own)

            return jax.lax.fori_loop(0, calls, call, results)

        on_mesh = functools.partial(per_device, mesh=mesh, out_specs=OWN)
        types = jax.tree.map(self._place(mesh), operands)
        result_types = jax.eval_shape(on_mesh(operation, in_specs=(OWN,) * len(types)), *types)
        self._result_types = jax.tree.map(self._place(mesh), result_types)
        jitted = jax.jit(on_mesh(call_all, in_specs=(OWN,) * (1 + len(types))), donate_argnums=0)
        self.compiled = jitted.lower(self._result_types, *types).compile(compiler_options=dict(options))
        self._calls = calls

    def contender(self, operands: tuple) -> Contender:
        """Returns what starts all calls on the operands; a start yields the last call's results."""
        results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self._result_types)

        def start():
            nonlocal results
            results = self.compiled(results, *operands)
            return results

        return Contender(start, jax.block_until_ready, self._calls)

    @staticmethod
    def _place(mesh: jax.sharding.Mesh) -> Callable[[Any], jax.ShapeDtypeStruct]:
        sharding = NamedSharding(mesh, OWN)
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def calls_per_start(num_bytes: float) -> int:
    """Returns how often a start repeats what sends so many bytes from every device."""
    return max(2, math.ceil(START_S * LINK_RATE / num_bytes))
