"""Imports a Hugging Face directory into a workdir, from which training starts at step 0 and generation runs.

    python launch/import_hf.py --hf=downloads/my-deepseek-v3 --workdir=runs/continued

The network is that of the directory; its tokenizer goes to tokenizer/ of the workdir. The recipe is the report's, or
that of --config, changed by --config.x.y=.
"""

import dataclasses
import pathlib
import shutil

import jax
from absl import flags

from dsv3_jax import config_flags, process_flags
from dsv3_jax.checkpoint import hf, training
from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, override

HF = flags.DEFINE_string("hf", None, "Hugging Face directory to read: float32, BF16 or FP8", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "workdir to make; does not exist yet, or is empty", required=True)
config_flags.define()
process_flags.define_refused()


def main() -> None:
    process_flags.require_one_process()
    config = run_config(hf.read_config(HF.value))
    params = hf.load_params(HF.value, config.model, dtype="float32")
    training.save_params(WORKDIR.value, config, jax.tree.map(jax.device_put, params))
    copy_tokenizer(pathlib.Path(HF.value), pathlib.Path(WORKDIR.value) / "tokenizer")
    print(f"{WORKDIR.value}: step 0, {config.model.num_hidden_layers} layers, "
          f"{config.model.num_nextn_predict_layers} MTP modules")  # fmt: skip


def run_config(model: ModelConfig) -> RunConfig:
    """Returns the recipe around an imported network; sequences are no longer than its positions."""
    path = flags.FLAGS["config"].value
    if path is None:
        length = min(DataConfig().sequence_length, model.max_position_embeddings)
        base = RunConfig(model=model, data=DataConfig(sequence_length=length))
    else:
        base = dataclasses.replace(config_flags.load(path), model=model)
    return override(base, config_flags.overrides())


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the tokenizer's files, if the directory has one."""
    if (source / "tokenizer.json").is_file():
        target.mkdir()
        for name in hf.TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    config_flags.run(main)
