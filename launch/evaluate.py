"""Prints bits per byte and perplexity of text files under a trained or imported model.

    python launch/evaluate.py --workdir=runs/tiny notes.txt book.txt
    python launch/evaluate.py --hf=exported/ --sequence_length=4096 notes.txt

Every file is one document. Each of its tokens and its closing end-of-sentence token is predicted exactly once, in
windows half a window apart, so that all but the first window's have at least half a window of text before them.
"""

import pathlib

import jax
from absl import flags

import dsv3_jax
from dsv3_jax import config_flags
from dsv3_jax.checkpoint.training import newest_step, read_run
from dsv3_jax.config import MeshConfig, ModelConfig, require
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train.evaluate import make_score_tokens, score_text

WORKDIR = flags.DEFINE_string("workdir", None, "training run to load")
STEP = flags.DEFINE_integer("step", None, "optimizer step of the checkpoint; not given: the newest", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "load the moving average of the weights")
HF = flags.DEFINE_string("hf", None, "Hugging Face directory to load instead")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "precision of a Hugging Face directory")
SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", None, "tokens per window; not given: as trained, or as many "
                                       "as the model has positions, at most 4096", lower_bound=1)  # fmt: skip
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "windows scored at a time", lower_bound=1)
flags.mark_flags_as_mutual_exclusive(["workdir", "hf"], required=True)

LOSS_CHUNK_TOKENS = 2048


def main(files: list[str]) -> None:
    require(bool(files), "FILES", files, "name at least one text file")
    texts = {file: read_text(file) for file in files}
    if WORKDIR.value:
        lm = dsv3_jax.load_checkpoint(WORKDIR.value, step=STEP.value, ema=EMA.value)
    else:
        lm = dsv3_jax.load_hf(HF.value, dtype=DTYPE.value)
    require(lm.tokenizer is not None, "tokenizer", None, "none lies beside the weights, and text needs one")
    length = sequence_length(lm.config)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    score_tokens = make_score_tokens(lm.config, mesh, chunk_tokens=LOSS_CHUNK_TOKENS)
    with jax.set_mesh(mesh):
        for file, text in texts.items():
            score = score_text(score_tokens, lm.params, text, tokenizer=lm.tokenizer, sequence_length=length,
                               batch_size=BATCH_SIZE.value)  # fmt: skip
            print(f"{file}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f} per token "
                  f"({score.num_bytes:,} bytes, {score.num_tokens:,} tokens)", flush=True)  # fmt: skip


def sequence_length(config: ModelConfig) -> int:
    """Returns the tokens of a window."""
    limit, length = config.max_position_embeddings, SEQUENCE_LENGTH.value
    if length is not None:
        require(length <= limit, "--sequence_length", length, f"the model has {limit} positions; shorten it")
        return length
    if WORKDIR.value is None:
        return min(limit, 4096)
    step = newest_step(WORKDIR.value) if STEP.value is None else STEP.value
    return read_run(WORKDIR.value, step)[0].data.sequence_length


def read_text(file: str) -> str:
    """Reads a text file; raises a ValueError that names it when it is not UTF-8 or empty."""
    try:
        text = pathlib.Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    require(bool(text), "FILES", file, "is empty; there is nothing to score")
    return text


if __name__ == "__main__":
    config_flags.run(main, takes_arguments=True)
