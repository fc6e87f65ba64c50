"""The notebook face, against golden values made with transformers."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.checkpoint.training import save_params
from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
PROMPT_LENGTH = 32  # of golden.npz's greedy rows


@pytest.fixture(scope="module")
def lm():
    return dsv3_jax.load_hf(GOLDEN / "ckpt", dtype="float32")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


def test_logits_are_those_of_transformers(lm, golden):
    logits = lm.logits(golden["ids"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5)  # float32 noise at logits of order 10


def test_greedy_generation_is_that_of_transformers(lm, golden):
    prompts = golden["greedy"][:, :PROMPT_LENGTH].tolist()
    expected = golden["greedy"][:, PROMPT_LENGTH:]
    added = lm.generate(prompts, max_new_tokens=expected.shape[1], temperature=0)
    assert added == expected.tolist()


def test_prompts_of_different_lengths_continue_as_they_do_alone(lm, golden):
    row = golden["greedy"][0].tolist()
    prompts = [row[:5], row[:PROMPT_LENGTH], row[:17]]
    together = lm.generate(prompts, max_new_tokens=9, temperature=0)
    assert together == [lm.generate([prompt], max_new_tokens=9, temperature=0)[0] for prompt in prompts]


def test_generation_ends_after_the_end_of_the_document(lm, golden):
    prompt = golden["greedy"][:1, :PROMPT_LENGTH].tolist()
    expected = golden["greedy"][0, PROMPT_LENGTH:].tolist()
    stop = expected[3]
    ending = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_token_id=stop))
    assert ending.generate(prompt, max_new_tokens=20, temperature=0)[0] == expected[: expected.index(stop) + 1]


def test_sampling_repeats_with_its_seed_and_changes_with_another(lm):
    draw = lambda seed: lm.generate([[1, 2, 3], [4, 5]], max_new_tokens=12, top_p=0.95, seed=seed)  # noqa: E731
    assert draw(7) == draw(7) != draw(8)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], {}, r"prompts\[0\]=\[\]: is empty"),
        ([[1], [999]], {}, r"prompts\[1\]=999"),
        ([[1] * 1275], {"max_new_tokens": 6}, r"max_position_embeddings=1280"),
        ([[1]], {"temperature": -1.0}, r"temperature=-1.0"),
        ([[1]], {"top_p": 0.0}, r"top_p=0.0"),
        ("text", {}, r"came without a tokenizer"),
    ],
)
def test_what_cannot_be_generated_is_refused(lm, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, **{"max_new_tokens": 1} | settings)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[256]], [[-1]], [[0.5]]])
def test_tokens_that_are_none_are_refused(lm, tokens):
    with pytest.raises(ValueError, match="tokens="):
        lm.logits(tokens)


def test_saving_in_float32_and_loading_again_changes_no_bit(lm, tmp_path):
    lm.save_hf(tmp_path / "hf", dtype="float32")
    again = dsv3_jax.load_hf(tmp_path / "hf", dtype="float32")
    assert again.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


def test_a_workdir_with_a_tokenizer_continues_text(lm, tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat, the dog sat on the log. "] * 40, MIN_VOCAB_SIZE + 9)
    vocab_size = max(tokenizer.vocab_size, 300)
    model = dataclasses.replace(lm.config, vocab_size=vocab_size)
    rows = vocab_size - lm.config.vocab_size
    params = lm.params | {
        "embed_tokens": np.pad(lm.params["embed_tokens"], [(0, rows), (0, 0)]),
        "lm_head": np.pad(lm.params["lm_head"], [(0, 0), (0, rows)]),
    }
    save_params(tmp_path / "run", RunConfig(model=model, data=DataConfig(sequence_length=64)), params)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    loaded = dsv3_jax.load_checkpoint(tmp_path / "run")
    one = loaded.generate("the cat", max_new_tokens=5, temperature=0)
    assert loaded.generate(["the cat", "the dog sat"], max_new_tokens=5, temperature=0)[0] == one
    ids = loaded.generate([tokenizer.encode_prompt("the cat")], max_new_tokens=5, temperature=0)[0]
    assert one == tokenizer.decode(ids)
    assert max(ids) < tokenizer.vocab_size
