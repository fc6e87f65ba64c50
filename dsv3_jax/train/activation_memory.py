"""What a run says about the activations that it keeps for the backward pass."""

import jax

from dsv3_jax.config import RunConfig
from dsv3_jax.model.kept_activations import kept_bytes


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
