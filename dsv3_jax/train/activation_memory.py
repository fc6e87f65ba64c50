"""What a run says about memory: activations kept for the backward pass, buffers of the expert exchange."""

import functools

import jax

from dsv3_jax.config import RunConfig
from dsv3_jax.fp8.formats import num_tiles
from dsv3_jax.model import compute_dtype
from dsv3_jax.model.kept_activations import kept_bytes
from dsv3_jax.model.moe import exchange_capacity
from dsv3_jax.sharding.mesh import num_devices


def activation_lines(config: RunConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns lines for the screen: bytes per token that a layer of each kind keeps, and all layers' of one pass.

    Tokens are those that a device owns; with several in the tensor axis it also keeps its heads' part of the others'.
    An MTP module counts as a MoE layer. What the loss and the ends of the network keep does not count.
    """
    model, length, sequences = config.model, config.data.sequence_length, config.train.rows_per_pass
    layers = {"dense": model.num_dense_layers, "moe": model.num_moe_layers + model.num_nextn_predict_layers}
    own_tokens = sequences * length // mesh.size
    lines, total = [], 0
    for kind, kept in kept_bytes(model, batch_size=sequences, length=length, mesh=mesh).items():
        per_token = {name: size / own_tokens for name, size in kept.items()}
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in per_token.items())
        lines.append(f"kept by a {kind} layer: {sum(per_token.values()):,.0f} bytes per token ({parts})")
        total += layers[kind] * sum(kept.values())
    return [*lines, f"kept by all layers: {total / 1e9:,.2f} GB per device for {own_tokens:,} tokens"]


def exchange_lines(config: RunConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns a line on the room that tokens have on their way to experts; none where no token travels."""
    model, num_tokens = config.model, config.train.rows_per_pass * config.data.sequence_length // mesh.size
    if not model.num_moe_layers + model.num_nextn_predict_layers:
        return []
    capacity = exchange_capacity(model, num_tokens, functools.partial(num_devices, mesh))
    if capacity is None:
        return []
    is_fp8 = model.precision == "fp8"
    payload_bytes = model.hidden_size * (1 if is_fp8 else compute_dtype(model).itemsize) + is_fp8 * num_tiles(
        model.hidden_size
    )
    row_bytes = payload_bytes + 6 * model.num_experts_per_tok  # an expert and its gate weight
    sent, buffers = capacity.bytes_sent(row_bytes), capacity.buffer_bytes(row_bytes)
    return [
        f"expert exchange: room for {capacity.device_rows:,} of {num_tokens:,} tokens per device and round, uniform "
        f"routing needs {capacity.mean_device_rows:,.0f}; out it sends {sent['node'] / 1e6:,.1f} MB to other nodes and "
        f"{sent['inner'] / 1e6:,.1f} MB inside the node, through {buffers / 1e9:,.3f} GB of buffers"
    ]
