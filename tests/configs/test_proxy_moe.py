"""The configuration that precisions are compared with."""

import pathlib

from dsv3_jax.config import override
from dsv3_jax.config_flags import load
from dsv3_jax.model import count_params
from dsv3_jax.train.flops import active_matmul_params

CONFIG = load(str(pathlib.Path(__file__).parents[2] / "configs/proxy_moe_110m.py"))


def test_more_than_100m_parameters_besides_embedding_and_head():
    embedding_and_head = 2 * CONFIG.model.vocab_size * CONFIG.model.hidden_size
    assert count_params(CONFIG.model, with_mtp=False) - embedding_and_head == 113_972_896
    assert active_matmul_params(CONFIG.model) == 56_549_376


def test_more_than_200m_tokens_in_every_precision():
    for precision in ("fp32", "bf16", "fp8"):
        run = override(CONFIG, {"model.precision": precision})
        assert run.train.num_steps * run.train.batch_size * run.data.sequence_length >= 200e6
    assert CONFIG.train.schedule_tokens == CONFIG.train.num_steps * CONFIG.train.batch_size * 1024
