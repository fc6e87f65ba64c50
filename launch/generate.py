"""Continues prompts with a trained or imported model.

  python launch/generate.py --workdir=runs/tiny --prompt="def main(" --max_new_tokens=64
  python launch/generate.py --hf=exported/ --prompt="Once" --temperature=0
"""

import rich.console
from absl import flags

import dsv3_jax
from dsv3_jax import config_flags, process_flags

WORKDIR = flags.DEFINE_string("workdir", None, "training run to load")
STEP = flags.DEFINE_integer("step", None, "optimizer step of the checkpoint; not given: the newest", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "load the moving average of the weights")
HF = flags.DEFINE_string("hf", None, "Hugging Face directory to load instead")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "precision of a Hugging Face directory")
PROMPT = flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "most tokens added to a prompt", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the smallest set of tokens with this probability")
SEED = flags.DEFINE_integer("seed", 0, "seed of the draws")
flags.mark_flag_as_required("prompt")
flags.mark_flags_as_mutual_exclusive(["workdir", "hf"], required=True)


def main() -> None:
    process_flags.require_one_process()
    if WORKDIR.value:
        lm = dsv3_jax.load_checkpoint(WORKDIR.value, step=STEP.value, ema=EMA.value)
    else:
        lm = dsv3_jax.load_hf(HF.value, dtype=DTYPE.value)
    texts = lm.generate(
        PROMPT.value, max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value,
        seed=SEED.value,
    )  # fmt: skip
    console = rich.console.Console(highlight=False, soft_wrap=True)
    for prompt, text in zip(PROMPT.value, texts):
        console.print(prompt, style="bold", end="", markup=False)
        console.print(text, markup=False)


if __name__ == "__main__":
    process_flags.define_refused()
    config_flags.run(main)
