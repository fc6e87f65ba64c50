import dataclasses

import pytest

from dsv3_jax.config import TrainConfig
from dsv3_jax.train import schedule

REPORT = TrainConfig()
T, B = 10**12, 10**9

# §4.2, computed by hand: finished steps, trained tokens, learning rate.
LEARNING_RATES = [
    (0, 0, 2.2e-4 / 2000),
    (999, 12 * B, 1.1e-4),
    (1999, 25 * B, 2.2e-4),
    (2000, 25 * B, 2.2e-4),
    (160_000, 10 * T - 1, 2.2e-4),
    (160_000, 10 * T + 1_075 * B, 2.2e-5 + 1.98e-4 * 0.8535533905932737),  # a quarter of the cosine
    (190_000, 10 * T + 2_150 * B, 1.21e-4),  # its middle
    (220_000, 14_300 * B, 2.2e-5),
    (230_000, 14_633 * B - 1, 2.2e-5),
    (230_000, 14_633 * B, 7.3e-6),
    (235_000, 14_800 * B - 1, 7.3e-6),
]
GAMMA_TOKENS = (0, 14_300 * B - 1, 14_300 * B)
LAMBDA_TOKENS = (0, 10 * T - 1, 10 * T)


@pytest.mark.parametrize(("step", "tokens", "expected"), LEARNING_RATES)
def test_learning_rate_follows_the_report(step, tokens, expected):
    assert schedule.at(REPORT, step=step, tokens=tokens).learning_rate == pytest.approx(expected, rel=1e-12)


def test_schedule_takes_the_reports_tokens():
    assert REPORT.schedule_tokens == 14_800 * B


@pytest.mark.parametrize(
    ("microbatch_size", "tokens", "expected"),
    [
        (0, 0, 3072),
        (64, 0, 3072),
        (64, 234_500 * 10**6, 9216),  # half of 469B: 3072 + 12288 / 2
        (64, 234_500 * 10**6 - 1, 9152),  # 9215 sequences, rounded down to whole passes of 64
        (1, 234_500 * 10**6 - 1, 9215),
        (64, 469 * B - 1, 15296),
        (64, 469 * B, 15360),
        (64, 14 * T, 15360),
    ],
)
def test_batch_grows_linearly_in_tokens(microbatch_size, tokens, expected):
    config = dataclasses.replace(REPORT, microbatch_size=microbatch_size)
    assert schedule.batch_size(config, tokens=tokens) == expected


def test_batch_without_a_ramp_is_whole_from_the_start():
    config = TrainConfig(batch_size=10, batch_size_start=3072, batch_ramp_tokens=0)
    assert schedule.batch_size(config, tokens=0) == 10


def test_gamma_and_lambda_change_where_the_report_says():
    gammas = {tokens: schedule.at(REPORT, step=10_000, tokens=tokens).bias_update_speed for tokens in GAMMA_TOKENS}
    lambdas = {tokens: schedule.at(REPORT, step=10_000, tokens=tokens).mtp_loss_weight for tokens in LAMBDA_TOKENS}
    assert gammas == dict(zip(GAMMA_TOKENS, (0.001, 0.001, 0.0)))
    assert lambdas == dict(zip(LAMBDA_TOKENS, (0.3, 0.3, 0.1)))


def test_no_warmup_starts_at_the_peak():
    config = dataclasses.replace(REPORT, warmup_steps=0)
    assert schedule.at(config, step=0, tokens=0).learning_rate == 2.2e-4
