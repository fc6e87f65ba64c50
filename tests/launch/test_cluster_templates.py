"""The templates for clusters start launch/train.py with arguments that it understands, in places that it finds."""

import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys

import pytest
import yaml

from dsv3_jax.sharding.processes import Place

ROOT = pathlib.Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"

# Stands for srun: starts a task as srun would, which says what it was started with and where it believes to be.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=node[07,11-12] SLURM_STEP_NUM_TASKS=3 SLURM_PROCID=1 SLURM_LOCALID=0
[[ $1 == .venv/bin/python && $2 == -u && $3 == launch/train.py ]] || exit 9
shift 3
exec "$TEST_PYTHON" -c 'import sys; from dsv3_jax.sharding.processes import find_place
print(find_place()); print(sys.argv[1:])' "$@"
"""


def run_sbatch(directory: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    srun = directory / "srun"
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "5000", "SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "4"}
    environment = os.environ | job | {
        "PATH": f"{directory}:{os.environ['PATH']}", "TEST_PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    return subprocess.run(["bash", SBATCH, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_batch_script_starts_tasks_that_find_their_place(tmp_path):
    arguments = ["--config=configs/tiny.py", "--workdir=a b", "--config.mesh.node=3"]
    process = run_sbatch(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr
    place, given = process.stdout.splitlines()
    assert re.fullmatch(r"Place\(coordinator_address='node07:\d+', num_processes=3, process_id=1\)", place)
    assert given == str(arguments)


def test_the_batch_script_asks_for_arguments(tmp_path):
    process = run_sbatch(tmp_path)
    assert process.returncode == 2 and "give the arguments of launch/train.py" in process.stderr


def test_the_batch_script_asks_for_one_process_per_node_and_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", SBATCH.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "8"
    assert options["signal"].startswith("TERM@"), "B: would tell the batch script alone"
    assert int(options["signal"].partition("@")[2]) >= 300
    assert options["dependency"] == "singleton" and "requeue" in options


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict]:
    documents = yaml.safe_load_all((ROOT / "launch" / "k8s" / "train.yaml").read_text())
    return {document["kind"]: document for document in documents}


def command_line(job: dict, index: int) -> list[str]:
    """Returns what the shell of a pod would run."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/bash", "-c"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": str(index)}
    words = shlex.split(container["args"][0])
    return [re.sub(r"\$(\w+)", lambda match: variables[match[1]], word) for word in words]


def test_the_pods_of_the_job_find_each_other(kubernetes):
    job, service = kubernetes["Job"], kubernetes["Service"]
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]

    num_pods = job["spec"]["completions"]
    assert num_pods == job["spec"]["parallelism"]
    places = []
    for index in range(num_pods):
        flags = dict(re.findall(r"--(\w+)=(\S+)", " ".join(command_line(job, index))))
        numbers = int(flags["num_processes"]), int(flags["process_id"])
        places.append(Place(flags["coordinator_address"], *numbers))
    assert [place.process_id for place in places] == list(range(num_pods))
    assert {place.num_processes for place in places} == {num_pods}
    (address,) = {place.coordinator_address for place in places}
    host, port = address.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    (container,) = pod["containers"]
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]


def test_the_job_starts_lost_pods_again_and_takes_no_stopped_run_for_a_finished_one(kubernetes):
    job = kubernetes["Job"]["spec"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what a podFailurePolicy asks for"
    stopped = [word for word in command_line(kubernetes["Job"], 0) if word.startswith("--stopped_exit_code=")]
    (rule,) = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert stopped == [f"--stopped_exit_code={rule['values'][0]}"]
    assert rule["containerName"] == pod["containers"][0]["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


def test_the_pods_run_a_command_that_exists_with_flags_that_it_has(kubernetes):
    words = command_line(kubernetes["Job"], 0)
    assert words[:4] == ["exec", ".venv/bin/python", "-u", "launch/train.py"]
    text = "".join((ROOT / file).read_text() for file in ("launch/train.py", "dsv3_jax/process_flags.py"))
    for word in words[4:]:
        name = word.removeprefix("--").partition("=")[0]
        assert name.startswith("config") or f'"{name}"' in text, word
