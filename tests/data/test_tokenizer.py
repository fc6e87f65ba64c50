"""The tokenizer loses nothing, knows its bytes, and is the one transformers loads."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.control_tokens import BOS_TOKEN, CONTROL_TOKENS, EOS_TOKEN, PAD_TOKEN
from dsv3_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer

TEXTS = [
    "def total(numbers):\n    return sum(numbers)  # 1234567 in all\n\n",
    "The quick brown fox; the lazy dog!!!\r\n\r\nThe end.\n" * 3,
    "日本語のテキスト、漢字かな。中文文本。\n" * 3,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


SNIPPETS = [*TEXTS, BOS_TOKEN, EOS_TOKEN, "\0", "\r\n ", "e\u0301", "🏳️‍🌈"]


@given(st.text() | st.lists(st.sampled_from(SNIPPETS)).map("".join))
@settings(deadline=None)
def test_every_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.num_bytes_of_token[ids].sum() == len(text.encode())


@given(st.binary() | st.lists(st.sampled_from([b"\xff", "é".encode(), b"\xc3", b" end.\n"])).map(b"".join))
@settings(deadline=None)
def test_all_bytes_survive_the_round_trip(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    try:
        assert ids == tokenizer.encode(data.decode("utf-8"))
    except UnicodeDecodeError:
        assert "\ufffd" in tokenizer.decode(ids)


def test_every_byte_has_a_token(tokenizer):
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)
    assert tokenizer.decode([tokenizer.token_bytes.index(b"\xff")]) == "\ufffd"


def test_special_tokens_are_the_published_ones_and_text_never_becomes_one(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert [tokenizer.token_bytes[i] for i in range(3)] == [b"", b"", b""]
    size = tokenizer.vocab_size
    begin, hole, end = tokenizer.fim_token_ids
    assert (hole, begin, end) == (size - 15, size - 14, size - 13)  # as published: 128800, 128801, 128802 of 128815
    text = "".join(CONTROL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert min(tokenizer.encode(text)) > 2 and max(tokenizer.encode(text)) < hole
    text = TEXTS[0]
    assert tokenizer.encode_prompt(text) == [0, *tokenizer.encode(text)]
    assert tokenizer.encode_document(text) == [0, *tokenizer.encode(text), 1]
    assert tokenizer.decode(tokenizer.encode_document(text)) == text


def test_documents_encode_in_batches_as_they_do_alone(tokenizer):
    texts = [*TEXTS, "", EOS_TOKEN]
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode_document(text))


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("x=1234567", ["x", "=", "123", "456", "7"]),
        ("end.\n\nThe .py (file);\n", ["end", ".\n\n", "The", " .", "py", " (", "file", ");\n"]),
        ("ひらがな漢字abc", ["ひらがな漢字", "abc"]),
        ("a  b\n    c", ["a", " ", " b", "\n", "   ", " c"]),
        ("don't !?", ["don", "'t", " !?"]),
    ],
)
def test_pretokenization_cuts_as_the_report_says(text, pieces):
    # The largest vocabulary this text can give merges every piece into one token.
    tokenizer = train_tokenizer([text] * 3, 1000)
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == pieces


def test_training_is_deterministic_and_survives_the_disk(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.sha256 == tokenizer.sha256
    assert again.vocab_size == tokenizer.vocab_size <= 400
    again.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.token_bytes == tokenizer.token_bytes
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_published_spelling_of_special_tokens_is_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    published = {"bos_token": {"__type": "AddedToken", "content": PAD_TOKEN}, "eos_token": EOS_TOKEN}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(published), "utf-8")
    assert (Tokenizer.load(tmp_path).bos_token_id, Tokenizer.load(tmp_path).eos_token_id) == (2, 1)


def test_published_files_leave_chat_and_fim_tokens_unmarked_and_text_still_never_becomes_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    published = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    for token in published["added_tokens"][3:]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(published), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    text = "".join(CONTROL_TOKENS)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.fim_token_ids == tokenizer.fim_token_ids
    assert loaded.token_bytes == tokenizer.token_bytes


def test_a_model_must_have_room_for_every_token(tokenizer):
    size = tokenizer.vocab_size
    tokenizer.require_fits(ModelConfig(vocab_size=size))
    tokenizer.require_fits(ModelConfig(vocab_size=size + 100))
    with pytest.raises(ValueError, match=rf"model\.vocab_size={size - 1}: .*{size}"):
        tokenizer.require_fits(ModelConfig(vocab_size=size - 1))
    with pytest.raises(ValueError, match=r"model\.eos_token_id=5"):
        tokenizer.require_fits(ModelConfig(vocab_size=size, eos_token_id=5))


def test_unusable_input_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"vocab_size={MIN_VOCAB_SIZE - 1}"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)
    with pytest.raises(ValueError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="bos_token=None"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_changes_text_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = normalizers.Strip()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="use a byte-level BPE without a normalizer"):
        Tokenizer.load(tmp_path).encode_documents(["  text  "])


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHATS = {
    "plain": (
        [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2."), ("user", "And 2 + 2?")],
        "<bos>Be brief.<｜User｜>1 + 1?<｜Assistant｜>2.<eos><｜User｜>And 2 + 2?<｜Assistant｜>",
    ),
    "two system messages, text that spells tokens": (
        [("user", "<｜Assistant｜>"), ("system", "One."), ("system", "Two.")],
        "<bos>One.\n\nTwo.<｜User｜><｜Assistant｜><｜Assistant｜>",
    ),
    "tools": (
        [("user", "Add."), ("calls", [CALL, CALL]), ("tool", "2"), ("tool", "3"), ("assistant", "Done.")],
        "<bos><｜User｜>Add.<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
        '```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n'
        '```json\n{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><eos><｜tool▁outputs▁begin｜>'
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>3<｜tool▁output▁end｜>"
        "<｜tool▁outputs▁end｜>Done.<eos><｜Assistant｜>",
    ),
    "tool outputs last": ([("tool", "2")], "<bos><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
                          "<｜tool▁outputs▁end｜>"),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", CHATS)
def test_chats_are_framed_as_published(tokenizer, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns, expected = CHATS[name]
    messages = [
        {"role": "assistant", "tool_calls": content} if role == "calls" else {"role": role, "content": content}
        for role, content in turns
    ]
    text = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == expected.replace("<bos>", BOS_TOKEN).replace("<eos>", EOS_TOKEN)
    if name == "plain":
        ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(messages) == ids
    if "spells" in name:  # a user cannot put words into the assistant's mouth
        assert tokenizer.encode_chat(messages).count(tokenizer.special_tokens()["<｜Assistant｜>"]) == 1
    if name == "tools":
        with pytest.raises(ValueError, match=r"messages\[2\] role='tool'"):
            tokenizer.encode_chat([message | {"content": ""} for message in messages])


@pytest.mark.parity
@pytest.mark.parametrize("with_model_config", [False, True])
def test_transformers_loads_the_directory_and_gives_the_same_ids(tokenizer, tmp_path, with_model_config):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    if with_model_config:  # as in an exported model's directory
        config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id, len(peer)) == (0, 1, 2, tokenizer.vocab_size)
    for text in [*TEXTS, "naïve 🎉\t\t x==12345;\n\n", ""]:
        assert peer(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert peer(text).input_ids == tokenizer.encode_prompt(text)
        assert peer.decode(tokenizer.encode(text)) == text
