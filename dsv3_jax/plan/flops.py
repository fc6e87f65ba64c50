"""Counts the floating-point operations of matrix products in a traced program, by the precision of their operands.

Only products count: what else a program computes is bound by memory, not by arithmetic.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

# The kernels that multiply; others of ours quantize, gather or add.
_PRODUCTS = ("fp8_matmul_kernel", "few_rows_kernel", "grouped_matmul_kernel")
_ATTENTION = {  # products over X, and over U, of every pair of a query and a key
    "attention_forward": (1, 1),
    "attention_key_value_gradients": (2, 2),
    "attention_query_gradient": (2, 1),
}
_KERNEL_PRIMITIVES = ("mpmd_map", "pallas_call", "core_map")
_PRECISIONS = {1: "fp8", 2: "bf16", 4: "fp32", 8: "fp64"}  # by bytes of an operand's element
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")  # where a primitive that calls once keeps what it calls

Equation = Any  # jax.extend.core.JaxprEqn
DynamicTrips = Callable[[Equation], int]
Work = dict[str, float]  # FLOPs by precision of the operands: "fp8", "bf16", "fp32"


def count(
    traced: jax.stages.Traced, *, num_devices: int, dynamic_trips: DynamicTrips, expert_rows: int | None = None
) -> Work:
    """Returns the FLOPs of one device: 2 per multiplication and addition, scans at their length.

    Within `shard_map` arrays are those of one device; work outside is taken to spread evenly. Of a `cond` the costliest
    branch counts. Attention kernels count the lower triangle of the scores.

    Args:
      num_devices: of the mesh that the program was traced for.
      dynamic_trips: how often a while loop runs whose trip count depends on the data.
      expert_rows: rows of all local experts together that hold tokens; the kernels skip the rest. None: all rows.

    Raises:
      ValueError: a kernel that multiplies and whose work is not known here.
    """
    total: Work = {}
    for equation, times, is_local in _products(traced.jaxpr.jaxpr, dynamic_trips):
        precision, flops = _work(equation, expert_rows)
        if flops:
            total[precision] = total.get(precision, 0) + times * flops / (1 if is_local else num_devices)
    return total


def _products(
    jaxpr: Any, dynamic_trips: DynamicTrips, times: int = 1, is_local: bool = False
) -> Iterator[tuple[Equation, int, bool]]:
    """Yields every product and kernel, how often it runs, and whether its arrays are those of one device."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general" or name in _KERNEL_PRIMITIVES:
            yield equation, times, is_local
        elif name == "while":
            trips = times * dynamic_trips(equation)
            yield from _products(params["body_jaxpr"].jaxpr, dynamic_trips, trips, is_local)
        elif name == "cond":
            branches = [list(_products(branch.jaxpr, dynamic_trips, times, is_local)) for branch in params["branches"]]
            yield from max(branches, key=lambda found: sum(n * _work(product, None)[1] for product, n, _ in found))
        else:
            body = next((params[key] for key in _BODIES if key in params), None)
            runs = times * params["length"] if name == "scan" else times
            if body is not None:
                body = getattr(body, "jaxpr", body)
                yield from _products(body, dynamic_trips, runs, is_local or name == "shard_map")


def _work(equation: Equation, expert_rows: int | None) -> tuple[str, float]:
    """Returns the precision and the FLOPs of one product or kernel."""
    arrays = [variable.aval for variable in equation.invars]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(arrays[0].shape[dim] for dim in contracted)
        return _precision(arrays[:2]), 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    name = equation.params["name"]
    matrices = [array for array in arrays if array.ndim >= 2 and array.dtype.itemsize < 4]
    if name in _PRODUCTS:
        is_of_experts = any(array.ndim == 1 and array.dtype == jnp.int32 for array in arrays)  # whose rows are which
        rows = expert_rows if is_of_experts else None
        return _precision(matrices[:2]), _product_flops(*matrices[:2], equation.outvars[0].aval, rows)
    if name in _ATTENTION:
        return _precision(matrices[:3]), _attention_flops(name, *matrices[:3])
    if any(_multiplies(jaxpr) for jaxpr in _kernel_bodies(equation)):
        raise ValueError(f"kernel {name} multiplies: dsv3_jax/plan/flops.py must say how much; add it there")
    return "fp32", 0.0


def _product_flops(left: Any, right: Any, result: Any, expert_rows: int | None) -> float:
    """Returns the FLOPs of a product, plain or of rows with the weights of their experts.

    Both operands end in the dimension that is contracted, or are [M, K] and [M, N] for a weight gradient [E, K, N]. The
    result may also be parts of a sum over that dimension, [parts, M, N].
    """
    is_grouped = max(left.ndim, right.ndim, result.ndim) > 2
    rows_first = is_grouped and result.ndim > 2 and result.shape[-2:] == (left.shape[-1], right.shape[-1])
    depth = left.shape[0] if rows_first else left.shape[-1]
    rows, columns = result.shape[-2:]
    if expert_rows is not None:
        depth, rows = (min(depth, expert_rows), rows) if result.ndim > 2 else (depth, min(rows, expert_rows))
    return 2.0 * depth * rows * columns


def _attention_flops(name: str, query: Any, key_value: Any, rope_key: Any) -> float:
    batch, num_queries, heads, key_dim = query.shape
    num_keys, value_dim = key_value.shape[1], key_value.shape[-1] - (key_dim - rope_key.shape[-1])
    pairs = num_queries * (2 * num_keys - num_queries + 1) / 2  # the last query sees all keys
    over_key_dim, over_value_dim = _ATTENTION[name]
    return 2.0 * batch * heads * pairs * (over_key_dim * key_dim + over_value_dim * value_dim)


def _precision(operands: list[Any]) -> str:
    return _PRECISIONS[max(operand.dtype.itemsize for operand in operands)]


def _kernel_bodies(equation: Equation) -> list[Any]:
    bodies = equation.params.get("jaxprs", (equation.params.get("jaxpr"),))
    return [getattr(body, "jaxpr", body) for body in bodies if body is not None]


def _multiplies(jaxpr: Any) -> bool:
    """Tells whether a kernel's body uses the tensor cores."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general" or "mma" in name:
            return True
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns") and _multiplies(body):
                return True
    return False
