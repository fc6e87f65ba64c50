"""Exports a training checkpoint as a Hugging Face directory, or lists what such an export holds.

    python launch/export_hf.py --workdir=runs/tiny --output=exports/tiny --dtype=bfloat16
    python launch/export_hf.py --config=configs/deepseek_v3_671b.py --dtype=fp8 --dry_run

With --dry_run nothing is allocated or written: one JSON line per tensor (name, shape, dtype, file) goes to stdout.
"""

import dataclasses
import json
import pathlib

from absl import flags

from dsv3_jax import config_flags, process_flags
from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.stored_params import open_stored_params
from dsv3_jax.config import RunConfig, require

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the training run")
OUTPUT = flags.DEFINE_string("output", None, "Hugging Face directory to write; does not exist yet, or is empty")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(hf.LAYOUTS), "weights: fp8 is the published 128x128-block layout")
STEP = flags.DEFINE_integer("step", None, "optimizer step of the checkpoint; not given: the newest")
EMA = flags.DEFINE_bool("ema", False, "the moving average of the parameters instead of the last ones")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "directory whose tokenizer files are copied; not given: "
                                "tokenizer/ of the workdir or else of its corpus; empty: none")  # fmt: skip
DRY_RUN = flags.DEFINE_bool("dry_run", False, "list the tensors of an export of --config; write nothing")
config_flags.define()
process_flags.define_refused()


def main() -> None:
    process_flags.require_one_process()
    if DRY_RUN.value:
        for info in hf.tensor_table(config_flags.resolve().model, dtype=DTYPE.value):
            print(json.dumps(dataclasses.asdict(info)))
        return
    require(WORKDIR.value is not None, "--workdir", None, "name the run to export, or use --dry_run")
    require(OUTPUT.value is not None, "--output", None, "name the directory to write")
    given = sorted(config_flags.overrides())
    require(not given, "--config", given, "an export takes its configuration from the run; leave these out")
    config, params = open_stored_params(WORKDIR.value, step=STEP.value, ema=EMA.value)
    hf.save(OUTPUT.value, config.model, params, dtype=DTYPE.value, tokenizer_directory=tokenizer_directory(config))
    print(f"{OUTPUT.value}: {DTYPE.value}, {len(hf.tensor_table(config.model, dtype=DTYPE.value)):,} tensors")


def tokenizer_directory(config: RunConfig) -> pathlib.Path | None:
    if TOKENIZER.value is not None:
        return pathlib.Path(TOKENIZER.value) if TOKENIZER.value else None
    of_workdir = pathlib.Path(WORKDIR.value) / "tokenizer"
    if of_workdir.is_dir():
        return of_workdir
    return pathlib.Path(config.data.corpus) / "tokenizer" if config.data.corpus else None


if __name__ == "__main__":
    config_flags.run(main)
