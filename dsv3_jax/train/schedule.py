"""What changes while training goes on: learning rate, batch size, λ and γ (§4.2), as the report gives them: in tokens.

Plain Python on plain numbers: tokens outgrow int32, and nothing here belongs on a device.
"""

import dataclasses
import math

from dsv3_jax.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What one optimizer step runs with."""

    learning_rate: float
    batch_size: int  # sequences, a multiple of train.rows_per_pass
    mtp_loss_weight: float  # lambda
    bias_update_speed: float  # gamma


def at(config: TrainConfig, *, step: int, tokens: int) -> StepSettings:
    """Returns the settings of the step that follows `step` finished ones and `tokens` trained tokens."""
    is_late_mtp = tokens >= config.mtp_loss_weight_tokens
    return StepSettings(
        learning_rate=learning_rate(config, step=step, tokens=tokens),
        batch_size=batch_size(config, tokens=tokens),
        mtp_loss_weight=config.mtp_loss_weight_last if is_late_mtp else config.mtp_loss_weight,
        bias_update_speed=config.bias_update_speed if tokens < config.bias_update_tokens else 0.0,
    )


def learning_rate(config: TrainConfig, *, step: int, tokens: int) -> float:
    """Returns the learning rate: warm-up in steps times constant, cosine, two constants in tokens.

    The n-th update of the warm-up gets n / warmup_steps of the phase's rate, so 0 belongs to the untrained model.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * _phase_learning_rate(config, tokens)


def batch_size(config: TrainConfig, *, tokens: int) -> int:
    """Returns the sequences of a step: linear in tokens along the ramp, rounded down to whole accumulation passes."""
    if tokens >= config.batch_ramp_tokens:
        return config.batch_size
    grown = (config.batch_size - config.batch_size_start) * tokens // config.batch_ramp_tokens
    return (config.batch_size_start + grown) // config.rows_per_pass * config.rows_per_pass


def _phase_learning_rate(config: TrainConfig, tokens: int) -> float:
    if tokens < config.constant_tokens:
        return config.learning_rate
    tokens -= config.constant_tokens
    if tokens < config.decay_tokens:
        cosine = 0.5 * (1 + math.cos(math.pi * tokens / config.decay_tokens))
        return config.learning_rate_decayed + (config.learning_rate - config.learning_rate_decayed) * cosine
    tokens -= config.decay_tokens
    return config.learning_rate_decayed if tokens < config.decayed_tokens else config.learning_rate_last
