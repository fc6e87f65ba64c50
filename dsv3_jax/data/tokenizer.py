"""Byte-level BPE with the pretokenization and the special tokens of DeepSeek-V3 (§4.1).

A document is encoded as `<bos> text <eos>`. Text never turns into a control token (those of `CONTROL_TOKENS`, and all
that a tokenizer marks as special): a document that spells one out gets its bytes. Every token of text stands for a
known number of bytes, so bits per byte can be counted exactly.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsv3_jax.config import ModelConfig, require
from dsv3_jax.data.control_tokens import (
    ASSISTANT_TOKEN,
    BOS_TOKEN,
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    EOS_TOKEN,
    FIM_BEGIN_TOKEN,
    FIM_END_TOKEN,
    FIM_HOLE_TOKEN,
    FIRST_TOKENS,
    LAST_TOKENS,
    PAD_TOKEN,
    USER_TOKEN,
)

MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + 256

# Applied one after the other; each match becomes a piece that no merge crosses.
PRETOKENIZATION = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"  # one ASCII punctuation mark opens a word
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # punctuation joined with the line breaks behind it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Tokenizer:
    """Turns text into token ids and back, losing nothing.

    Attributes:
      vocab_size: largest token id + 1.
      bos_token_id, eos_token_id: ids that open and close a document.
      token_bytes: bytes of text that each id stands for, a list of `bytes`; empty for special tokens.
      sha256: hash of the definition (tokenizer.json and tokenizer_config.json).
    """

    def __init__(self, definition: str, config: str, *, source: str):
        """Builds a tokenizer from the texts of tokenizer.json and tokenizer_config.json.

        Args:
          definition: text of tokenizer.json.
          config: text of tokenizer_config.json.
          source: where they came from; named in errors.

        Raises:
          ValueError: one of the texts is no such file, the model is not byte-level, or bos or eos is missing.
        """
        self._definition, self._config = definition, config
        try:
            self._backend = tokenizers.Tokenizer.from_str(_with_control_tokens_marked(definition))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{source}/tokenizer.json: not a tokenizer ({error}); train or copy it again") from error
        self._backend.encode_special_tokens = True
        self.token_bytes = _bytes_of_tokens(self._backend, source)
        self.vocab_size = len(self.token_bytes)
        try:
            names = json.loads(config)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}/tokenizer_config.json: not JSON ({error}); write it again") from error
        self.bos_token_id = _special_id(self._backend, names, "bos_token", source)
        self.eos_token_id = _special_id(self._backend, names, "eos_token", source)
        self.sha256 = hashlib.sha256(f"{definition}\0{config}".encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "Tokenizer":
        """Reads tokenizer.json and tokenizer_config.json of a directory, ours or a published one.

        Raises:
          ValueError: a file is missing or is not what its name says.
        """
        directory = pathlib.Path(directory)
        texts = []
        for name in ("tokenizer.json", "tokenizer_config.json"):
            require((directory / name).is_file(), "tokenizer", str(directory), f"has no {name}; name another directory")
            texts.append((directory / name).read_text("utf-8"))
        return cls(*texts, source=str(directory))

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._definition, "utf-8")
        (directory / "tokenizer_config.json").write_text(self._config, "utf-8")

    @functools.cached_property
    def fim_token_ids(self) -> tuple[int, int, int]:
        """Ids that stand before the prefix, before the suffix and before the middle of a cut document.

        Raises:
          ValueError: the tokenizer has no such tokens.
        """
        names = (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)
        ids = tuple(self._backend.token_to_id(name) for name in names)
        require(None not in ids, "fim_rate", "above 0", f"the tokenizer {self.sha256[:12]} lacks one of "
                f"{' '.join(names)}; set it to 0 or train a tokenizer with launch/tokenizer.py")  # fmt: skip
        return ids

    def special_tokens(self) -> dict[str, int]:
        """Gives the tokens that text never turns into, with their ids, in the order of these."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items()) if token.special}

    def encode(self, text: str) -> list[int]:
        """Encodes text, without bos and eos.

        Raises:
          ValueError: the text holds a lone surrogate, which no UTF-8 spells.
        """
        # The batch call alone skips the offsets into the text, which take a third of the time.
        return self._backend.encode_batch_fast([_encodable(text)], add_special_tokens=False)[0].ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encodes any bytes, without bos and eos: UTF-8 as its text, every other byte as that byte's token."""
        ids = []
        for text, stray in re.findall("([^\udc80-\udcff]+)|([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            ids += self.encode(text) if text else [self._token_of_byte[ord(stray) - 0xDC00]]
        return ids

    @functools.cached_property
    def _token_of_byte(self) -> dict[int, int]:
        return {token[0]: token_id for token_id, token in enumerate(self.token_bytes) if len(token) == 1}

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes the beginning of a document: bos, then the text. What a model is given to continue."""
        return [self.bos_token_id, *self.encode(text)]

    def encode_document(self, text: str) -> list[int]:
        """Encodes a whole document: bos, the text, eos."""
        return [self.bos_token_id, *self.encode(text), self.eos_token_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes a chat up to where the assistant's next answer begins, as transformers' `apply_chat_template` does.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text}, in order. What systems say comes first.

        Raises:
          ValueError: another role, or the tokenizer has no tokens for users and assistants.
        """
        marks = {"user": self._chat_token_id(USER_TOKEN), "assistant": self._chat_token_id(ASSISTANT_TOKEN)}
        systems = [message["content"] for message in messages if message["role"] == "system"]
        ids = [self.bos_token_id, *self.encode("\n\n".join(systems))]
        for position, message in enumerate(messages):
            role = message["role"]
            require(role in ("system", *marks), f"messages[{position}] role", role, "use system, user or assistant")
            if role in marks:
                ids += [marks[role], *self.encode(message["content"])]
            if role == "assistant":
                ids.append(self.eos_token_id)
        return [*ids, marks["assistant"]]

    def _chat_token_id(self, name: str) -> int:
        token_id = self._backend.token_to_id(name)
        require(token_id is not None, "tokenizer", self.sha256[:12], f"has no {name}; use a tokenizer for chat")
        return token_id

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes whole documents on all cores; each is an int64 array that begins with bos and ends with eos.

        Raises:
          ValueError: the tokens of a text do not stand for exactly its bytes (a tokenizer that normalizes text).
        """
        documents = []
        encodings = self._backend.encode_batch_fast([_encodable(t) for t in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            ids = np.array([self.bos_token_id, *encoding.ids, self.eos_token_id], np.int64)
            num_bytes, counted = len(text.encode()), int(self.num_bytes_of_token[ids].sum())
            require(counted == num_bytes, "tokenizer", self.sha256[:12], f"its tokens stand for {counted} of the "
                    f"{num_bytes} bytes of a document; use a byte-level BPE without a normalizer")  # fmt: skip
            documents.append(ids)
        return documents

    def decode(self, ids: Iterable[int]) -> str:
        """Gives the text of token ids. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Gives the exact bytes that token ids stand for; special tokens stand for none."""
        return b"".join([self.token_bytes[i] for i in ids])

    @functools.cached_property
    def num_bytes_of_token(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [vocab_size]; 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    def require_fits(self, model_config: ModelConfig) -> None:
        """Raises a ValueError unless every id has a row in the model's embedding and bos and eos are the model's.

        A vocabulary smaller than the embedding is fine: the rows above it are never looked up.
        """
        require(model_config.vocab_size >= self.vocab_size, "model.vocab_size", model_config.vocab_size,
                f"is below the tokenizer's {self.vocab_size}; raise it or train a smaller tokenizer")  # fmt: skip
        for name in ("bos_token_id", "eos_token_id"):
            own = getattr(self, name)
            require(getattr(model_config, name) == own, f"model.{name}", getattr(model_config, name),
                    f"the tokenizer's is {own}; set it to that")  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

    Memory grows with the number of different words, about 10 bytes per byte of text.

    Args:
      texts: documents, read once.
      vocab_size: tokens in all, control tokens and the 256 bytes included. Little text may yield fewer.
      show_progress: draw bars for counting words and for merging them.

    Raises:
      ValueError: vocab_size has no room for the control tokens and the bytes.
    """
    require(vocab_size >= MIN_VOCAB_SIZE, "vocab_size", vocab_size,
            f"must be at least {MIN_VOCAB_SIZE}: {len(CONTROL_TOKENS)} control tokens and 256 bytes")  # fmt: skip
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRETOKENIZATION]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_TOKENS),
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(LAST_TOKENS))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1",
        special_tokens=[(BOS_TOKEN, FIRST_TOKENS.index(BOS_TOKEN))],
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS_TOKEN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    config_text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return Tokenizer(backend.to_str(pretty=True), config_text, source="trained tokenizer")


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: lone surrogate at character {error.start} has no UTF-8; remove it") from error
    return text


def _with_control_tokens_marked(definition: str) -> str:
    """Marks the control tokens of a tokenizer.json as special: published files leave most of them unmarked."""
    parsed = json.loads(definition)
    for token in parsed.get("added_tokens", []):
        token["special"] = token["special"] or token["content"] in CONTROL_TOKENS
    return json.dumps(parsed, ensure_ascii=False)


def _special_id(backend: tokenizers.Tokenizer, config: dict, name: str, source: str) -> int:
    token = config.get(name)
    content = token["content"] if isinstance(token, dict) else token  # published files spell both
    token_id = None if content is None else backend.token_to_id(content)
    require(token_id is not None, f"{source}/tokenizer_config.json {name}", content, "name a token of tokenizer.json")
    return token_id


def _bytes_of_tokens(backend: tokenizers.Tokenizer, source: str) -> list[bytes]:
    added = backend.get_added_tokens_decoder()
    byte_of_character = _byte_of_character()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:
            token_bytes[token_id] = b"" if added[token_id].special else token.encode()
            continue
        unknown = set(token) - byte_of_character.keys()
        require(not unknown, f"{source}/tokenizer.json token", token, "is not spelled in bytes; use a byte-level BPE")
        token_bytes[token_id] = bytes([byte_of_character[character] for character in token])
    return token_bytes


def _byte_of_character() -> dict[str, int]:
    """Inverts GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
