"""The network: pure functions of (config, parameters, tokens). Parameters are a plain nested dict of arrays.

Shape suffixes, one alphabet: B batch, T query tokens, S cache tokens, D hidden, N heads, H position-free head dim,
R rope head dim, X = H + R, U value head dim, Q query latent, C key-value latent, Z = C + R, F feed-forward,
V vocabulary, L stacked layers, E routed experts, K experts per token, P = T·K choices, G expert groups,
M rows after dispatch. A capital is a logical dimension; lower case is the local part inside `shard_map`.
"""

from dsv3_jax.model.cache import Cache, init_cache
from dsv3_jax.model.deepseek_v3 import (
    Forward,
    cast_params,
    count_params,
    decode_step,
    document_starts,
    forward,
    init_params,
    logits,
    param_shardings,
    param_specs,
    param_splits,
    prefill,
    prepare_params,
    slot_specs,
    split_layers,
)
from dsv3_jax.model.params import (
    ParamSpec,
    compute_dtype,
    gather_params,
    masters_of,
    square_slots,
    with_masters,
    with_squares,
)
from dsv3_jax.model.weights import is_fp8

__all__ = [
    "Cache", "Forward", "ParamSpec", "cast_params", "compute_dtype", "count_params", "decode_step",
    "document_starts", "forward", "gather_params", "init_cache", "init_params", "is_fp8", "logits", "masters_of",
    "param_shardings", "param_specs", "param_splits", "prefill", "prepare_params", "slot_specs", "split_layers",
    "square_slots", "with_masters", "with_squares",
]  # fmt: skip
