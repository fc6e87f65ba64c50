"""Where a process stands, as flags or the cluster's environment tell."""

import pytest

from dsv3_jax.sharding.processes import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "node[017-018,020]", "SLURM_NTASKS": "3", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*SLURM, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def enter(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_by_itself_has_no_place():
    assert find_place() is None
    assert find_place("localhost:1234", 1, 0) is None


def test_slurm_tells_all_tasks_the_same_coordinator(monkeypatch):
    places = []
    for task in range(3):
        enter(monkeypatch, **SLURM | {"SLURM_PROCID": str(task)})
        places.append(find_place())
    assert [place.process_id for place in places] == [0, 1, 2]
    assert {place.num_processes for place in places} == {3}
    (address,) = {place.coordinator_address for place in places}
    host, port = address.split(":")
    assert host == "node017" and 1024 < int(port) < 2**16


def test_a_batch_script_of_slurm_is_a_process_by_itself(monkeypatch):
    """Outside a step, as in the batch script, the job's variables are there but the step's are not."""
    enter(monkeypatch, SLURM_JOB_ID="7", SLURM_NTASKS="3", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert find_place() is None


def test_flags_go_before_the_cluster(monkeypatch):
    enter(monkeypatch, **SLURM)
    assert find_place("head:77") == Place("head:77", 3, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:1234", 2, None), "--process_id=None: give --coordinator_address, --num_processes and"),
        (("localhost:1234", 2, 2), "process_id=2: number the processes from 0 to 1"),
        (("localhost:1234", 2, -1), "process_id=-1: number"),
        (("localhost", 2, 0), "coordinator_address='localhost': write HOST:PORT"),
        (("localhost:99999", 2, 0), "coordinator_address='localhost:99999': write HOST:PORT"),
        (("localhost:1234", 0, 0), "num_processes=0: must be greater than 0"),
    ],
)
def test_half_a_place_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        find_place(*arguments)


def test_mpi_that_jax_does_not_understand_is_refused(monkeypatch):
    """Else each process would train by itself, all in one workdir."""
    enter(monkeypatch, OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(ValueError, match="give --coordinator_address, --num_processes and"):
        find_place()
