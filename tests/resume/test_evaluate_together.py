"""Several real processes evaluate as one; commands for one process refuse to be several."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsv3_jax import config_flags, model
from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.training import save_params

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 600
TEXTS = {"short.txt": "zwei Wörter", "long.txt": (ROOT / "dsv3_jax" / "train" / "ema.py").read_text()}
RESULT = re.compile(r"(\S+): ([\d.]+) bits per byte, perplexity ([\d.]+) per token \(([\d,]+) bytes, ([\d,]+) tokens\)")


@pytest.fixture(scope="module")
def run(launcher, tmp_path_factory) -> Path:
    """A directory with texts, an untrained model as a workdir, and the same as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("evaluated")
    for name, text in TEXTS.items():
        (directory / name).write_text(text)
    config = config_flags.load(str(launcher.config))
    params = model.init_params(config.model, jax.random.key(0), init_std=0.2)
    save_params(directory / "workdir", config, params)
    shutil.copytree(launcher.corpus / "tokenizer", directory / "workdir" / "tokenizer")
    hf.save(directory / "hf", config.model, params, dtype="float32", tokenizer_directory=launcher.corpus / "tokenizer")
    return directory


def scores(output: str) -> dict[str, list[float]]:
    found = {Path(match[0]).name: [float(number.replace(",", "")) for number in match[1:]]
             for match in RESULT.findall(output)}  # fmt: skip
    assert found.keys() == TEXTS.keys(), output
    return found


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    try:
        return [(process.communicate(timeout=DEADLINE_SECONDS)[0], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def command(run: Path, *weights: str) -> tuple[str, ...]:
    return "evaluate.py", *weights, "--batch_size=3", *(str(run / name) for name in TEXTS)


def assert_evaluate_alike(launcher, command: tuple[str, ...], *mesh: str, num_processes: int) -> None:
    (alone,) = finish([launcher.start_command(*command)])
    together = finish(launcher.start_commands(*command, *mesh, num_processes=num_processes))
    assert alone[0] == 0 and [code for code, _ in together] == [0] * num_processes, (alone, together)
    expected, actual = scores(alone[1]), scores(together[0][1])
    for name, (bits, perplexity, num_bytes, num_tokens) in expected.items():
        assert actual[name] == [pytest.approx(bits, abs=1.1e-4), pytest.approx(perplexity, rel=1e-4), num_bytes,
                                num_tokens]  # fmt: skip
        assert num_bytes == len(TEXTS[name].encode())
    for _, output in together[1:]:
        assert all(line.startswith("[Gloo]") for line in output.splitlines()), output


def test_two_processes_evaluate_as_one(launcher, run):
    """Each holds half of the experts and scores half of the windows."""
    assert_evaluate_alike(launcher, command(run, f"--workdir={run}/workdir"), num_processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--config.mesh.tensor=2",), ("--config.mesh.node=2",), ("--config.mesh.replica=4",)])
def test_four_processes_evaluate_a_hugging_face_directory_as_one(launcher, run, mesh):
    assert_evaluate_alike(
        launcher, command(run, f"--hf={run}/hf", "--dtype=float32", "--sequence_length=12"), *mesh, num_processes=4
    )


def test_processes_that_would_score_differently_do_not_begin(launcher, run):
    own = {1: ("--sequence_length=8",)}
    for code, output in finish(launcher.start_commands(*command(run, f"--workdir={run}/workdir"), num_processes=2,
                                                       own=own)):  # fmt: skip
        assert code == 1 and "the processes disagree" in output and "--sequence_length: 16 in process 0" in output
        assert "Traceback" not in output and "bits per byte" not in output


def test_commands_for_one_process_refuse_to_be_several(tmp_path):
    """By flags or by SLURM; nothing is read or written before."""
    place = ("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip
    arguments = {
        "generate.py": ("--workdir=nowhere", "--prompt=a"),
        "export_hf.py": ("--workdir=nowhere", "--output=out"),
        "import_hf.py": ("--hf=nowhere", "--workdir=out"),
    }
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "launch" / script, *own, *more], env=os.environ | environment, cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for (script, own), more, environment in zip(arguments.items(), (place, (), place), ({}, slurm, {}))
    ]  # fmt: skip
    for code, output in finish(started):
        assert code == 1 and output.splitlines()[-1].startswith(
            "error: --num_processes=2: this command runs in one process; start it once"
        ), output
    assert not list(tmp_path.iterdir())
