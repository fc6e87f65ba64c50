"""The command line of one process among several: `--coordinator_address=HOST:PORT --num_processes=4 --process_id=0`.

Under srun or mpirun, which say who is who, none of these flags is needed.
"""

import contextlib
import sys

from absl import flags

from dsv3_jax.config import require
from dsv3_jax.sharding import processes

_PLACE = ("coordinator_address", "num_processes", "process_id")
_OTHERS = ("local_device_ids", "join_timeout_s", "heartbeat_timeout_s")


def define() -> None:
    """Registers the flags of a command that several processes can run together. Call once, before absl parses."""
    _define_place("HOST:PORT where process 0 meets the others", "processes that work as one",
                  "number of this process, from 0")  # fmt: skip
    flags.DEFINE_list("local_device_ids", None, "GPUs that this process takes; not given: all it sees")
    flags.DEFINE_float("join_timeout_s", 600, "how long processes wait for one another at the start")
    flags.DEFINE_float("heartbeat_timeout_s", 100, "after so long without a sign of life a process counts as lost",
                       lower_bound=1)  # fmt: skip
    for name in (*_PLACE, *_OTHERS):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help lists it


def define_refused() -> None:
    """Registers the flags that say who is who for a command that runs in one process, for `require_one_process`."""
    _define_place(*["refused: this command runs in one process"] * len(_PLACE))


def join() -> contextlib.AbstractContextManager[processes.Processes]:
    """Meets the other processes that the flags or the cluster tell of; see `sharding.processes.join`."""
    values = {name: flags.FLAGS[name].value for name in (*_PLACE, *_OTHERS)}
    place = processes.find_place(*(values[name] for name in _PLACE))
    ids = values["local_device_ids"]
    return processes.join(
        place, join_timeout_s=values["join_timeout_s"], heartbeat_timeout_s=values["heartbeat_timeout_s"],
        local_device_ids=None if ids is None else [int(number) for number in ids],
    )  # fmt: skip


def require_one_process() -> None:
    """Raises a ValueError when the flags, srun or mpirun make this one of several processes."""
    place = processes.find_place(*(flags.FLAGS[name].value for name in _PLACE))
    number = 1 if place is None else place.num_processes
    require(number == 1, "--num_processes", number, "this command runs in one process; start it once, without "
            "--coordinator_address, and neither by srun with several tasks nor by mpirun")  # fmt: skip


def _define_place(coordinator_address: str, num_processes: str, process_id: str) -> None:
    flags.DEFINE_string("coordinator_address", None, coordinator_address)
    flags.DEFINE_integer("num_processes", None, num_processes)
    flags.DEFINE_integer("process_id", None, process_id)
