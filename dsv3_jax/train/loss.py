"""Cross-entropy over chunks of tokens, and the training loss made of it.

The logits of a whole batch never exist: at V = 129,280 one sequence of 4096 tokens would take 2 GB in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.model import document_starts, forward
from dsv3_jax.model.layers import exact_if_float32
from dsv3_jax.model.weights import RoundedWeight, as_rounded
from dsv3_jax.sharding.collectives import own_tokens, size
from dsv3_jax.sharding.mesh import BATCH_AXES


class Routing(NamedTuple):
    """Where the tokens of one pass went, and what that took."""

    tokens_per_expert: dict[str, jax.Array]  # stack name -> int32 [layers, E]
    further_rounds: jax.Array  # int32, of the expert exchange beyond the first of every layer, summed over layers


class Losses(NamedTuple):
    """The parts of the training loss, float32 scalars of one pass."""

    total: jax.Array
    main: jax.Array  # mean cross-entropy of the next token, nats
    mtp: jax.Array  # mean over the D depths of the MTP cross-entropy, nats; 0 without MTP
    balance: jax.Array  # sequence-wise balance loss without alpha


def training_loss(
    config: RunConfig, params: dict, tokens_BT1: jax.Array, *, mtp_loss_weight: jax.Array
) -> tuple[jax.Array, tuple[Losses, Routing]]:
    """Returns the loss to differentiate, and (its parts, the routing).

    total = main + λ/D · Σ_k L_k + α · balance (§2.1.2, §2.2 equations 24 and 25).

    With `data.segment_masks` documents packed into one sequence do not see each other, and no prediction crosses from
    one to the next; the divisor of the losses counts these positions all the same.

    Args:
      params: float32 master weights; they are rounded where they are used, and their gradients are float32 (§3.3.2).
      tokens_BT1: int32 [B, T+1]; the last T are the targets.
      mtp_loss_weight: λ.

    In a program of `sharding.rules.per_device` all of this is one device's share: the losses of the batch, and its
    tokens per expert, are the sums over all devices. Rounds are the same on all devices that exchange with each other.
    """
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    depth = config.model.num_nextn_predict_layers
    starts_BT1 = document_starts(tokens_BT1, config.model.bos_token_id) if config.data.segment_masks else None
    first_key_BT = None if starts_BT1 is None else starts_BT1[:, :-1]
    next_tokens_BT = targets_BT if depth else None
    output = forward(config.model, params, inputs_BT, next_tokens_BT=next_tokens_BT, first_key_BT=first_key_BT)
    cross_entropy = functools.partial(
        mean_cross_entropy, head_DV=params["lm_head"], targets_BT=targets_BT,
        chunk_tokens=config.train.loss_chunk_tokens, starts_BT1=starts_BT1,
    )  # fmt: skip

    main = cross_entropy(output.h_BTD)
    mtp = jnp.zeros((), jnp.float32)
    for k, h_BTD in enumerate(output.mtp_h, start=1):
        mtp += cross_entropy(h_BTD, offset=k) / depth
    balance = output.balance_loss / size(BATCH_AXES)
    total = main + mtp_loss_weight * mtp + config.train.balance_loss_alpha * balance
    return total, (Losses(total, main, mtp, balance), Routing(output.tokens_per_expert, output.further_rounds))


@jax.named_scope("loss")
def mean_cross_entropy(h_BtD: jax.Array, *, head_DV: jax.Array, targets_BT: jax.Array, chunk_tokens: int,
                       offset: int = 0, starts_BT1: jax.Array | None = None) -> jax.Array:  # fmt: skip
    """Returns -1/(B·T) · Σ log P(target), where position i predicts targets[i + offset].

    On a mesh, B counts the sequences of all devices and the sum runs over the tokens h that this device owns.

    The last `offset` positions predict nothing and add nothing; the divisor stays B·T, as in equation 24. The same
    holds for positions whose target belongs to another document, by the starts of all T + 1 tokens' documents.
    """
    batch, length = targets_BT.shape
    has_target_BT = jnp.broadcast_to(jnp.arange(length) < length - offset, (batch, length))
    if starts_BT1 is not None:
        has_target_BT &= jnp.roll(starts_BT1[:, 1:], -offset, axis=1) == starts_BT1[:, :-1]
    shifted_BT = jnp.roll(targets_BT, -offset, axis=1)
    weights_BT = jnp.where(has_target_BT, 1 / (batch * size(BATCH_AXES) * length), 0.0)
    shifted_Bt, weights_Bt = own_tokens(shifted_BT, 1), own_tokens(weights_BT, 1)
    return weighted_cross_entropy(h_BtD, head_DV, shifted_Bt, weights_Bt, chunk_columns(shifted_Bt.shape, chunk_tokens))


def chunk_columns(shape_BT: tuple[int, int], chunk_tokens: int) -> int:
    """Returns how many positions of every sequence form a chunk of about chunk_tokens logits.

    At least one position, at most all. Among the sizes that need equally many chunks the smallest is taken.
    """
    batch, length = shape_BT
    num_chunks = -(-length // min(length, max(1, chunk_tokens // batch)))
    return -(-length // num_chunks)


def token_cross_entropy(
    h_BTD: jax.Array, head_DV: jax.Array | RoundedWeight, targets_BT: jax.Array, num_columns: int
) -> jax.Array:
    """Returns -log P(target) of every position, float32 [B, T] nats; logits exist chunk by chunk."""
    head_DV = as_rounded(head_DV).values.astype(h_BTD.dtype)

    def losses(_, chunk):
        h_BtD, targets_Bt = chunk
        return None, _target_losses(_logits(h_BtD, head_DV), targets_Bt)[0]

    _, losses_nBt = jax.lax.scan(losses, None, _split((h_BTD, targets_BT), num_columns))
    return _join(losses_nBt, targets_BT.shape[1])


def weighted_cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, num_columns):
    """Returns Σ weight · -log P(target) in nats, float32.

    Under differentiation the gradients of h and of the head are computed with the loss, while a chunk's logits exist:
    three matrix products in all, where recomputation in the backward pass takes four. Products are of h's dtype with
    float32 accumulation; the head's gradient sums over chunks in float32.

    Args:
      h_BTD: compute dtype. head_DV: any float dtype, cast to h's, or rounded beside its master. targets_BT: int32.
      weights_BT: float32, constant. num_columns: positions of every sequence per chunk, see `chunk_columns`.
    """
    return _weighted_cross_entropy(h_BTD, as_rounded(head_DV), targets_BT, weights_BT, num_columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_cross_entropy(h_BTD, head: RoundedWeight, targets_BT, weights_BT, num_columns):
    return jnp.sum(weights_BT * token_cross_entropy(h_BTD, head, targets_BT, num_columns))


def _weighted_cross_entropy_fwd(h_BTD, head, targets_BT, weights_BT, num_columns):
    compute_head_DV = head.values.astype(h_BTD.dtype)

    def chunk_gradients(carry, chunk):
        loss, head_grad_DV = carry
        h_BtD, targets_Bt, weights_Bt = chunk
        logits_BtV = _logits(h_BtD, compute_head_DV)
        losses_Bt, log_normalizer_Bt = _target_losses(logits_BtV, targets_Bt)
        is_target_BtV = jax.lax.broadcasted_iota(jnp.int32, logits_BtV.shape, 2) == targets_Bt[..., None]
        probability_BtV = jnp.exp(logits_BtV - log_normalizer_Bt[..., None])
        logits_grad_BtV = ((probability_BtV - is_target_BtV) * weights_Bt[..., None]).astype(h_BtD.dtype)
        precision = exact_if_float32(h_BtD.dtype)
        h_grad_BtD = jnp.einsum("btv,dv->btd", logits_grad_BtV, compute_head_DV, precision=precision)
        head_grad_DV += jnp.einsum(
            "btd,btv->dv", h_BtD, logits_grad_BtV, precision=precision, preferred_element_type=jnp.float32
        )
        return (loss + jnp.sum(weights_Bt * losses_Bt), head_grad_DV), h_grad_BtD

    start = (jnp.zeros((), jnp.float32), jnp.zeros(compute_head_DV.shape, jnp.float32))
    (loss, head_grad_DV), h_grad_nBtD = jax.lax.scan(
        chunk_gradients, start, _split((h_BTD, targets_BT, weights_BT), num_columns)
    )
    return loss, (_join(h_grad_nBtD, targets_BT.shape[1]), head.gradient(head_grad_DV.astype(head.master.dtype)))


def _weighted_cross_entropy_bwd(num_columns, gradients, loss_grad):
    h_grad_BTD, head_grad = jax.tree.map(
        lambda gradient: (gradient.astype(jnp.float32) * loss_grad).astype(gradient.dtype), gradients
    )
    return h_grad_BTD, head_grad, None, None


_weighted_cross_entropy.defvjp(_weighted_cross_entropy_fwd, _weighted_cross_entropy_bwd)


def _logits(h_BtD: jax.Array, head_DV: jax.Array) -> jax.Array:
    precision = exact_if_float32(h_BtD.dtype)
    return jnp.einsum("btd,dv->btv", h_BtD, head_DV, precision=precision, preferred_element_type=jnp.float32)


def _target_losses(logits_BtV: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns -log P(target) and the log of the normalizer, both [B, t]."""
    log_normalizer_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    target_logits_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return log_normalizer_Bt - target_logits_Bt, log_normalizer_Bt


def _split(arrays: tuple[jax.Array, ...], num_columns: int) -> tuple[jax.Array, ...]:
    """Cuts [B, T, ...] into [n, B, t, ...] along the sequence, the last chunk filled up with zeros."""

    def split(x):
        num_chunks = -(-x.shape[1] // num_columns)
        x = jnp.pad(x, [(0, 0), (0, num_chunks * num_columns - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, num_columns, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _join(x_nBt: jax.Array, length: int) -> jax.Array:
    """Undoes `_split`: [n, B, t, ...] to [B, T, ...]."""
    x_Bnt = jnp.moveaxis(x_nBt, 0, 1)
    return x_Bnt.reshape(x_Bnt.shape[0], -1, *x_Bnt.shape[3:])[:, :length]
