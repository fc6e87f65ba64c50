"""Plans a run on GPUs that are not here: memory, work, traffic and the least time of one device.

    python launch/plan.py --config=configs/deepseek_v3_671b.py --num_devices=64,512,2048 --output=plan
    python launch/plan.py --config=configs/tiny.py --config.mesh.gpu=4 --config.mesh.tensor=2 --hardware=h800

Compiles the real program for absent H200s, which takes XLA's GPU compiler (the `plan` extra), no GPU, and for a step of
the 671B network a few minutes and 2 GB of memory on two cores; decoding, whose layers are unrolled, takes longer. What
was compiled for H200s is then held against the memory and the rates of --hardware. What does not fit is told what would
change: FSDP, more devices, pipeline stages. --output=PATH writes PATH.json and the plot PATH.png. Exit code 2: a plan
does not fit.
"""

import dataclasses
import math
import os
import pathlib
import sys

from absl import flags

from dsv3_jax import config_flags
from dsv3_jax.config import MeshConfig, RunConfig, override, require

PROGRAM = flags.DEFINE_enum("program", "train", ["train", "prefill", "decode"], "what is compiled: an optimizer step, "
                            "reading prompts of data.sequence_length tokens, or one token after as many")  # fmt: skip
ROWS = flags.DEFINE_integer("rows", None, "sequences of a pass, prompts or decoded rows per device of replica x node x "
                            "gpu; not given: as the configuration's passes, or 1, and for decode one per tensor device",
                            lower_bound=1)  # fmt: skip
NUM_DEVICES = flags.DEFINE_list("num_devices", None, "devices in all, one plan for each; mesh.replica takes what the "
                                "other axes leave; not given: the mesh as configured")  # fmt: skip
HARDWARE = flags.DEFINE_enum("hardware", "h200", ["h100", "h200", "h800"], "what the devices are")
NUMBERS = flags.DEFINE_multi_string("hardware_number", [], "a number of the hardware to replace, NAME=VALUE, such "
                                    "as network_gb_per_s=25; may be repeated")  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "path, without ending, of the JSON file and the plot")


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU that is here is left alone
    from dsv3_jax.plan import absent_devices, hardware, planning, report

    config, chosen = config_flags.resolve(), hardware.find(HARDWARE.value, hardware_numbers())
    if OUTPUT.value:
        folder = pathlib.Path(OUTPUT.value).parent
        require(folder.is_dir(), "--output", OUTPUT.value, f"there is no directory {folder}; make it")
    plans = []
    for sized in [config] if NUM_DEVICES.value is None else [with_devices(config, text) for text in NUM_DEVICES.value]:
        plan = planning.make_plan(sized, absent_devices.absent_mesh(sized.mesh), chosen, program=PROGRAM.value,
                                  rows=ROWS.value)  # fmt: skip
        report.show(plan)
        plans.append(plan)
        if OUTPUT.value:  # after every plan: a later one may fail
            report.write_json(plans, f"{OUTPUT.value}.json")
            report.write_plot(plans, f"{OUTPUT.value}.png")
    if len(plans) > 1:
        report.show_all(plans)
    if not all(plan.fits for plan in plans):
        sys.exit(2)


def with_devices(config: RunConfig, text: str) -> RunConfig:
    """Returns the configuration with as many replicas as make up the given number of devices."""
    require(text.isdigit() and int(text) > 0, "--num_devices", text, "must be a number of devices")
    others = {axis.name: getattr(config.mesh, axis.name) for axis in dataclasses.fields(MeshConfig) if axis.type is int}
    del others["replica"]
    require(-1 not in others.values(), "mesh", others, "-1 leaves open how many; name every axis but replica")
    number = math.prod(others.values())
    require(
        int(text) % number == 0, "--num_devices", int(text), f"must be a multiple of {number}, the product of {others}"
    )
    return override(config, {"mesh.replica": int(text) // number})


def hardware_numbers() -> dict[str, float]:
    numbers = {}
    for text in NUMBERS.value:
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError as error:
            raise ValueError(f"--hardware_number={text}: must be NAME=NUMBER") from error
    return numbers


if __name__ == "__main__":
    config_flags.define()
    config_flags.run(main)
