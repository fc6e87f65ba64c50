"""Trains a model, or goes on training it.

    python launch/train.py --config=configs/tiny.py --config.data.corpus=DIR --workdir=runs/tiny

The same command continues from the newest checkpoint. SIGTERM saves and exits 0, or as --stopped_exit_code says; Ctrl-C
saves and exits 130; SIGUSR1 saves and goes on.

Several processes train as one: start the same command in each, by srun or mpirun, which say who is who, or with

    --coordinator_address=HOST:PORT --num_processes=4 --process_id=0   (1, 2, 3)

where HOST runs process 0. The number of processes may change from one start to the next.
"""

import math
import signal
import sys

from absl import flags

from dsv3_jax import config_flags, process_flags
from dsv3_jax.train.loop import train

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints, metrics and plots, seen by all processes",
                               required=True)  # fmt: skip
_TIME_LIMIT_MINUTES = flags.DEFINE_float("time_limit_minutes", math.inf, "after so long the run ends as by SIGTERM",
                                         lower_bound=0)  # fmt: skip
_STOPPED_EXIT_CODE = flags.DEFINE_integer("stopped_exit_code", 0, "exit code after SIGTERM, for a scheduler that would "
                                          "take 0 for the end of the run")  # fmt: skip


def main() -> None:
    try:
        with process_flags.join() as all_processes:
            stopped_by = train(config_flags.resolve(), _WORKDIR.value, processes=all_processes,
                               time_limit_s=60 * _TIME_LIMIT_MINUTES.value)  # fmt: skip
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    if stopped_by == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)
    if stopped_by == signal.SIGTERM:
        sys.exit(_STOPPED_EXIT_CODE.value)


if __name__ == "__main__":
    config_flags.define()
    process_flags.define()
    config_flags.run(main)
