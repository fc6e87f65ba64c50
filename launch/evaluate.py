"""Prints bits per byte and perplexity of text files under a trained or imported model.

    python launch/evaluate.py --workdir=runs/tiny notes.txt book.txt
    python launch/evaluate.py --hf=exported/ --sequence_length=4096 notes.txt

Every file is one document. Each of its tokens and its closing end-of-sentence token is predicted exactly once, in
windows half a window apart, so that all but the first window's have at least half a window of text before them.

The model spreads over all devices, as --config.mesh.* says. Several processes evaluate as one, started as for
launch/train.py; the first alone prints.
"""

import dataclasses
import hashlib
import pathlib

import jax
from absl import flags

import dsv3_jax
from dsv3_jax import config_flags, process_flags
from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.training import find_step, read_run
from dsv3_jax.config import ModelConfig, require
from dsv3_jax.sharding.mesh import Work, check_mesh, make_mesh, num_batch_shards
from dsv3_jax.sharding.processes import Processes, is_first
from dsv3_jax.train.evaluate import make_score_tokens, score_text

WORKDIR = flags.DEFINE_string("workdir", None, "training run to load")
STEP = flags.DEFINE_integer("step", None, "optimizer step of the checkpoint; not given: the newest", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "load the moving average of the weights")
HF = flags.DEFINE_string("hf", None, "Hugging Face directory to load instead")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "precision of a Hugging Face directory")
SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", None, "tokens per window; not given: as trained, or as many "
                                       "as the model has positions, at most 4096", lower_bound=1)  # fmt: skip
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "windows scored at a time, rounded up to as many for every device "
                                  "of replica x node x gpu", lower_bound=1)  # fmt: skip
flags.mark_flags_as_mutual_exclusive(["workdir", "hf"], required=True)

LOSS_CHUNK_TOKENS = 2048


def main(files: list[str]) -> None:
    require(bool(files), "FILES", files, "name at least one text file")
    with process_flags.join() as processes:
        evaluate(files, processes)


def evaluate(files: list[str], processes: Processes) -> None:
    texts = {file: read_text(file) for file in files}
    step = find_step(WORKDIR.value, STEP.value) if WORKDIR.value else None
    model, length = find_model(step)
    work = Work(model, sequence_length=length)
    mesh = make_mesh(config_flags.mesh(), work=work)
    check_mesh(work, mesh)
    processes.require_agreement(facts(texts, model, length, step, mesh))
    if WORKDIR.value:
        lm = dsv3_jax.load_checkpoint(WORKDIR.value, step=step, ema=EMA.value, mesh=mesh)
    else:
        lm = dsv3_jax.load_hf(HF.value, dtype=DTYPE.value, mesh=mesh)
    require(lm.tokenizer is not None, "tokenizer", None, "none lies beside the weights, and text needs one")
    score_tokens = make_score_tokens(lm.config, mesh, chunk_tokens=LOSS_CHUNK_TOKENS)
    shards = num_batch_shards(mesh)
    with jax.set_mesh(mesh):
        for file, text in texts.items():
            score = score_text(score_tokens, lm.params, text, tokenizer=lm.tokenizer, sequence_length=length,
                               batch_size=-(-BATCH_SIZE.value // shards) * shards)  # fmt: skip
            if is_first():
                print(f"{file}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f} per token "
                      f"({score.num_bytes:,} bytes, {score.num_tokens:,} tokens)", flush=True)  # fmt: skip


def find_model(step: int | None) -> tuple[ModelConfig, int]:
    """Returns the network that is loaded, and the tokens of a window."""
    run = None if step is None else read_run(WORKDIR.value, step)[0]
    model = hf.read_config(HF.value) if run is None else run.model
    limit, length = model.max_position_embeddings, SEQUENCE_LENGTH.value
    if length is not None:
        require(length <= limit, "--sequence_length", length, f"the model has {limit} positions; shorten it")
        return model, length
    return model, min(limit, 4096) if run is None else run.data.sequence_length


def facts(texts: dict[str, str], model: ModelConfig, length: int, step: int | None, mesh: jax.sharding.Mesh) -> dict:
    """Returns what must be the same in all processes, wherever each finds its copy of weights and texts."""
    given = {"--step": step, "--ema": EMA.value, "--dtype": DTYPE.value, "--sequence_length": length,
             "--batch_size": BATCH_SIZE.value, "devices of the process": jax.local_device_count()}  # fmt: skip
    given |= {f"mesh.{axis}": size for axis, size in mesh.shape.items()}
    given |= {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    given |= {f"text {i}": hashlib.sha256(text.encode()).hexdigest() for i, text in enumerate(texts.values())}
    if HF.value is not None:
        sizes = {path.name: path.stat().st_size for path in pathlib.Path(HF.value).glob("*.safetensors")}
        given["bytes of the weights' files"] = dict(sorted(sizes.items()))
    return given


def read_text(file: str) -> str:
    """Reads a text file; raises a ValueError that names it when it is not UTF-8 or empty."""
    try:
        text = pathlib.Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    require(bool(text), "FILES", file, "is empty; there is nothing to score")
    return text


if __name__ == "__main__":
    config_flags.define_mesh()
    process_flags.define()
    config_flags.run(main, takes_arguments=True)
