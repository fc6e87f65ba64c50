"""A language model as one object, for notebooks: load, score, generate, save."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import model
from dsv3_jax.checkpoint import hf, training
from dsv3_jax.config import ModelConfig, require
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.engine import generate_tokens

PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A network with its parameters and, where one came along, its tokenizer.

    Attributes:
      config: the network's settings.
      params: nested dict of arrays, the tree of `dsv3_jax.model.param_specs(config)`.
      tokenizer: None when the directory held none; prompts are then token ids.
      tokenizer_directory: where the tokenizer's files lie; `save_hf` copies them.
    """

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None = None
    tokenizer_directory: pathlib.Path | None = None

    def logits(self, tokens_BT: Any) -> jax.Array:
        """Computes the logits of every position.

        Args:
          tokens_BT: integers [B, T].

        Returns:
          float32 [B, T, V]; position t predicts token t + 1.

        Raises:
          ValueError: not two dimensions, an id outside the vocabulary, or a sequence longer than the positions.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        require(tokens_BT.ndim == 2 and tokens_BT.size > 0, "tokens", tokens_BT.shape, "must be [B, T], not empty")
        require(jnp.issubdtype(tokens_BT.dtype, jnp.integer), "tokens", str(tokens_BT.dtype), "must be integers")
        smallest, largest = int(tokens_BT.min()), int(tokens_BT.max())
        require(smallest >= 0 and largest < self.config.vocab_size, "tokens", [smallest, largest],
                f"must lie in [0, vocab_size={self.config.vocab_size})")  # fmt: skip
        return _logits(self.config, self.params, tokens_BT.astype(jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Continues prompts, up to the end of the document.

        Args:
          prompts: a text, a list of texts, or a list of token-id lists.
          max_new_tokens: most tokens added.
          temperature: 0 takes the most likely token.
          top_p: tokens outside the smallest set with this probability are never drawn.
          seed: of the draws.

        Returns:
          What was added, in the prompts' form: a text, a list of texts, or a list of token-id lists.

        Raises:
          ValueError: texts without a tokenizer, an empty prompt, or a setting out of range.
        """
        if isinstance(prompts, str):
            settings = {"temperature": temperature, "top_p": top_p, "seed": seed}
            return self.generate([prompts], max_new_tokens=max_new_tokens, **settings)[0]
        is_text = any(isinstance(prompt, str) for prompt in prompts)
        if is_text:
            require(self.tokenizer is not None, "prompts", "text", "the model came without a tokenizer; give token ids")
            prompts = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        added = generate_tokens(
            self.config, self.params, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            seed=seed, num_token_ids=self.tokenizer.vocab_size if self.tokenizer else self.config.vocab_size,
        )  # fmt: skip
        return [self.tokenizer.decode(tokens) for tokens in added] if is_text else added

    def save_hf(self, directory: str | os.PathLike, dtype: str = "bfloat16") -> None:
        """Writes a Hugging Face directory that transformers, vLLM and SGLang load.

        Args:
          directory: does not exist yet, or is empty.
          dtype: "float32", "bfloat16", or "fp8" for the published layout (E4M3 with 128 x 128 scales).
        """
        hf.save(directory, self.config, self.params, dtype=dtype, tokenizer_directory=self.tokenizer_directory)


def load_hf(directory: str | os.PathLike, *, dtype: str = "bfloat16",
            mesh: jax.sharding.Mesh | None = None) -> LanguageModel:  # fmt: skip
    """Loads a Hugging Face directory: BF16, float32 or FP8 weights (which are dequantized).

    Args:
      directory: config.json and safetensors, as published or as transformers saves them.
      dtype: "bfloat16" or "float32": precision that weights are held and computed in.
      mesh: over whose devices the weights spread, for `train.evaluate`; None: the default device.

    Raises:
      ValueError: a file or tensor that is missing, extra, damaged or of another architecture.
    """
    require(dtype in PRECISION_OF_DTYPE, "dtype", dtype, f"choose one of {tuple(PRECISION_OF_DTYPE)}")
    config = dataclasses.replace(hf.read_config(directory), precision=PRECISION_OF_DTYPE[dtype])
    params = hf.load_params(directory, config, dtype=dtype)
    params = jax.tree.map(_place, params, model.param_shardings(config, mesh))
    return LanguageModel(config, params, *_find_tokenizer(pathlib.Path(directory), config))


def load_checkpoint(workdir: str | os.PathLike, *, step: int | None = None, ema: bool = False,
                    mesh: jax.sharding.Mesh | None = None) -> LanguageModel:  # fmt: skip
    """Loads a training run's checkpoint.

    Args:
      workdir: of launch/train.py or launch/import_hf.py.
      step: optimizer step of the checkpoint; None: the newest.
      ema: the moving average of the weights instead of the last ones.
      mesh: over whose devices the weights spread, for `train.evaluate`; None: the default device.

    Raises:
      ValueError: no such checkpoint.
    """
    run, params = training.open_params(workdir, step=step, ema=ema, mesh=mesh)
    return LanguageModel(run.model, params, *_find_tokenizer(pathlib.Path(workdir) / "tokenizer", run.model))


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Moves what every process holds to the devices; each takes the parts of its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _find_tokenizer(directory: pathlib.Path, config: ModelConfig) -> tuple[Tokenizer | None, pathlib.Path | None]:
    if not (directory / "tokenizer.json").is_file():
        return None, None
    tokenizer = Tokenizer.load(directory)
    tokenizer.require_fits(config)
    return tokenizer, directory


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(config, params, model.forward(config, params, tokens_BT).h_BTD)
