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

from dsv3_jax import config_flags
from dsv3_jax.sharding import processes
from dsv3_jax.train.loop import train

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints, metrics and plots, seen by all processes",
                               required=True)  # fmt: skip
_COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT where process 0 meets the others")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes that train as one")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0")
_LOCAL_DEVICE_IDS = flags.DEFINE_list("local_device_ids", None, "GPUs that this process takes; not given: all it sees")
_JOIN_TIMEOUT_S = flags.DEFINE_float("join_timeout_s", 600, "how long processes wait for one another at the start")
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_float("heartbeat_timeout_s", 100, "after so long without a sign of life a process "
                                          "counts as lost", lower_bound=1)  # fmt: skip
_TIME_LIMIT_MINUTES = flags.DEFINE_float("time_limit_minutes", math.inf, "after so long the run ends as by SIGTERM",
                                         lower_bound=0)  # fmt: skip
_STOPPED_EXIT_CODE = flags.DEFINE_integer("stopped_exit_code", 0, "exit code after SIGTERM, for a scheduler that would "
                                          "take 0 for the end of the run")  # fmt: skip


def main() -> None:
    place = processes.find_place(_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    device_ids = None if _LOCAL_DEVICE_IDS.value is None else [int(number) for number in _LOCAL_DEVICE_IDS.value]
    joined = processes.join(place, join_timeout_s=_JOIN_TIMEOUT_S.value, heartbeat_timeout_s=_HEARTBEAT_TIMEOUT_S.value,
                            local_device_ids=device_ids)  # fmt: skip
    try:
        with joined as all_processes:
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
    config_flags.run(main)
