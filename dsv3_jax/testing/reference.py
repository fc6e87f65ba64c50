"""Pieces of the model in straight-line numpy float64, token by token, written from the report's equations."""

import numpy as np

from dsv3_jax.config import ModelConfig


def route(config: ModelConfig, gate_DE, bias_E, x_TD) -> tuple[np.ndarray, np.ndarray, float]:
    """Chooses experts token by token (equations 12 to 16 with node-limited routing).

    Returns:
      The experts of every token sorted by number [T, K], their weights [T, K], and the smallest lead that any choice
      (of a group or an expert) had over the best one left out: below about 1e-5, float32 may choose otherwise.
    """
    group_size = config.n_routed_experts // config.n_group
    experts_TK, weights_TK, margin = [], [], np.inf
    for x_D in np.asarray(x_TD, np.float64):
        scores = 1 / (1 + np.exp(-(x_D @ np.asarray(gate_DE, np.float64))))
        biased = scores + np.asarray(bias_E, np.float64)
        group_scores = [sum(sorted(biased[g * group_size : (g + 1) * group_size])[-2:]) for g in range(config.n_group)]
        groups, lead = _best(group_scores, config.topk_group)
        margin = min(margin, lead)
        candidates = [e for e in range(config.n_routed_experts) if e // group_size in groups]
        best, lead = _best(biased[candidates], config.num_experts_per_tok)
        margin = min(margin, lead)
        experts = sorted(candidates[i] for i in best)
        weights = scores[experts]
        if config.norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
        experts_TK.append(experts)
        weights_TK.append(weights * config.routed_scaling_factor)
    return np.array(experts_TK), np.array(weights_TK), margin


def mixture_of_experts(config: ModelConfig, moe: dict, x_TD) -> np.ndarray:
    """Computes a MoE layer's output token by token (equation 12), shared experts included; float64 [T, D]."""
    moe = _float64(moe)
    x_TD = np.asarray(x_TD, np.float64)
    experts_TK, weights_TK, _ = route(config, moe["gate"], moe["e_score_correction_bias"], x_TD)
    outputs = []
    for x_D, experts, weights in zip(x_TD, experts_TK, weights_TK, strict=True):
        y_D = np.zeros_like(x_D)
        for expert, weight in zip(experts, weights, strict=True):
            chosen = {name: value[expert] for name, value in moe["experts"].items()}
            y_D += weight * feed_forward(chosen, x_D)
        if config.n_shared_experts:
            y_D += feed_forward(moe["shared_experts"], x_D)
        outputs.append(y_D)
    return np.array(outputs)


def feed_forward(weights: dict, x_D) -> np.ndarray:
    """Computes down(silu(gate x) · up x) of one token."""
    gate, up = np.einsum("d,dgf->gf", x_D, weights["gate_up_proj"])
    return (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"]


def balance_loss(scores_BTE, num_experts_per_tok: int) -> float:
    """Returns the sequence-wise balance loss without alpha, averaged over sequences (equations 17 to 20)."""
    losses = []
    for scores_TE in np.asarray(scores_BTE, np.float64):
        length, num_experts = scores_TE.shape
        f, P = np.zeros(num_experts), np.zeros(num_experts)
        for scores in scores_TE:
            for expert in np.argsort(-scores)[:num_experts_per_tok]:
                f[expert] += num_experts / (num_experts_per_tok * length)
            P += scores / scores.sum() / length
        losses.append((f * P).sum())
    return float(np.mean(losses))


def tokens_per_expert(experts_TK, num_experts: int) -> np.ndarray:
    """Counts the tokens that chose each expert."""
    counts = np.zeros(num_experts, np.int64)
    for experts in experts_TK:
        for expert in experts:
            counts[expert] += 1
    return counts


def _best(values, count: int) -> tuple[list[int], float]:
    """Returns the indices of the largest values and by how much the last of them leads the best one left out."""
    order = np.argsort(-np.asarray(values))
    lead = values[order[count - 1]] - values[order[count]] if count < len(order) else np.inf
    return [int(i) for i in order[:count]], float(lead)


def _float64(tree: dict) -> dict:
    return {key: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for key, v in tree.items()}
