"""What a run says about the activations that it keeps for the backward pass."""

from dsv3_jax.config import RunConfig
from dsv3_jax.model.kept_activations import kept_bytes


def activation_lines(config: RunConfig, *, num_batch_shards: int) -> list[str]:
    """Returns lines for the screen: bytes per token that a layer of each kind keeps, and all layers' of one pass.

    An MTP module counts as a MoE layer. What the loss and the ends of the network keep does not count.

    Args:
      num_batch_shards: devices that the sequences of a pass spread over.
    """
    model, length = config.model, config.data.sequence_length
    sequences = config.train.rows_per_pass // num_batch_shards
    layers = {"dense": model.num_dense_layers, "moe": model.num_moe_layers + model.num_nextn_predict_layers}
    lines, total = [], 0
    for kind, kept in kept_bytes(model, batch_size=sequences, length=length).items():
        per_token = {name: size / (sequences * length) for name, size in kept.items()}
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in per_token.items())
        lines.append(f"kept by a {kind} layer: {sum(per_token.values()):,.0f} bytes per token ({parts})")
        total += layers[kind] * sum(kept.values())
    return [*lines, f"kept by all layers: {total / 1e9:,.2f} GB per device for {sequences} x {length} tokens"]
