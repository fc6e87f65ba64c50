"""Several processes as one program: finding each other, agreeing, ending together."""

import atexit
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jaxlib
from jax._src import clusters  # JAX offers its detection of clusters through jax.distributed.initialize alone

from dsv3_jax.config import require
from dsv3_jax.sharding.roll_call import LAST_SECONDS, Member, Roll

CLUSTERS = {"SLURM_STEP_NUM_TASKS": clusters.SlurmCluster, "OMPI_COMM_WORLD_SIZE": clusters.OmpiCluster}
MISSING_PLACE = "give --coordinator_address, --num_processes and --process_id to every process"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which one of a run's processes this is."""

    coordinator_address: str  # host:port of process 0, where all meet
    num_processes: int
    process_id: int

    def __post_init__(self):
        host, _, port = self.coordinator_address.rpartition(":")
        require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, "coordinator_address",
                self.coordinator_address, "write HOST:PORT, a free port of the machine of process 0")  # fmt: skip
        require(self.num_processes > 0, "num_processes", self.num_processes, "must be greater than 0")
        require(0 <= self.process_id < self.num_processes, "process_id", self.process_id,
                f"number the processes from 0 to {self.num_processes - 1}")  # fmt: skip


def find_place(coordinator_address: str | None = None, num_processes: int | None = None,
               process_id: int | None = None) -> Place | None:  # fmt: skip
    """Returns this process's place, as given or as SLURM or Open MPI tell; None for a process by itself.

    Raises:
      ValueError: not all are given, and no cluster tells the rest.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    cluster = _cluster()
    if cluster is None and all(value is None for value in given.values()):
        return None
    told = {} if cluster is None or None not in given.values() else _ask(cluster)
    for name in given:
        given[name] = told.get(name) if given[name] is None else given[name]
        require(given[name] is not None, f"--{name}", None, f"{MISSING_PLACE}, or start them by srun or mpirun")
    place = Place(**given)
    return place if place.num_processes > 1 else None


def _cluster() -> type[clusters.ClusterEnv] | None:
    """Returns JAX's detection of what started this process as one of several."""
    for variable, cluster in CLUSTERS.items():
        if int(os.environ.get(variable, "1")) > 1:
            return cluster
    return None


def _ask(cluster: type[clusters.ClusterEnv]) -> dict[str, Any]:
    """Returns what a cluster tells of this process's place, nothing when JAX does not understand it."""
    if not cluster.is_env_present():
        return {}
    try:
        address = cluster.get_coordinator_address(
            timeout_secs=None, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        return {
            "coordinator_address": address,
            "num_processes": cluster.get_process_count(),
            "process_id": cluster.get_process_id(),
        }
    except RuntimeError as error:  # Open MPI 5 without mpi4py
        raise ValueError(f"{error} Or {MISSING_PLACE}") from error


class Processes:
    """All processes of a run, as one of them sees them; without a member, this one alone."""

    def __init__(self, member: Member | None = None):
        self._member = member

    def require_agreement(self, facts: dict[str, Any]) -> None:
        """Returns once every process has come here with the same facts.

        Args:
          facts: name -> plain value.

        Raises:
          ValueError: they differ; names each difference, the values and the processes.
          ChildProcessError: another process failed meanwhile.
        """
        if self._member is not None:
            self._member.require_agreement(facts)


ALONE = Processes()


def is_first() -> bool:
    """Returns whether this is the process that writes what is written once: logs, metrics, plots."""
    return jax.process_index() == 0


@contextlib.contextmanager
def join(place: Place | None, *, join_timeout_s: float, heartbeat_timeout_s: float,
         local_device_ids: Sequence[int] | None = None) -> Iterator[Processes]:  # fmt: skip
    """Meets the run's other processes, starts JAX on all of them, and leaves together with them.

    Inside, the end of any process ends all: within a second when one fails or is killed, within heartbeat_timeout_s
    when one hangs or its machine is lost. They end with exit code 1 and say on stderr which one was lost and why, or
    with JAX's abort.

    Args:
      place: of `find_place`; None: there are no others.
      join_timeout_s: for so long a process waits for the others at the start.
      heartbeat_timeout_s: after so long without a sign of life a process counts as lost.
      local_device_ids: which of this machine's GPUs this process takes; None: all that it sees.

    Raises:
      ValueError: the processes disagree about their number, numbering or software.
      OSError: the coordinator cannot be reached, a process did not come, or one was lost while this one waited.
    """
    if place is None:
        yield ALONE
        return
    numbers = (place.coordinator_address, place.num_processes)
    roll = Roll(*numbers, timeout_s=join_timeout_s) if place.process_id == 0 else None
    member = Member(*numbers, place.process_id, timeout_s=join_timeout_s, roll=roll)
    try:
        jax_address = member.start()
        member.require_agreement(_versions())
        jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the training loop's
        jax.distributed.initialize(
            jax_address, place.num_processes, place.process_id, local_device_ids=local_device_ids,
            cluster_detection_method="deactivate", initialization_timeout=int(join_timeout_s),
            heartbeat_timeout_seconds=int(heartbeat_timeout_s),
        )  # fmt: skip
        yield Processes(member)
        member.finish()
    except BaseException as error:
        member.fail(str(error) or type(error).__name__)
        _end_without_the_others(member)
        raise


def _end_without_the_others(member: Member) -> None:
    """Makes the end of this process wait for no collective, as the end of JAX and of a checkpoint's threads would."""
    atexit.register(member.leave)  # runs before what was registered earlier
    timer = threading.Timer(LAST_SECONDS, member.leave)
    timer.daemon = True
    timer.start()


def _versions() -> dict[str, str]:
    """Returns what names this process's software; of this package the hash of its code."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "dsv3_jax": digest.hexdigest()[:12]}
