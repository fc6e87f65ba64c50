"""Several real processes train as one: the same losses as one alone, and when one of them ends, all do."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_two_sources

from dsv3_jax.checkpoint.training import newest_step
from dsv3_jax.train.metrics import read_records

DEADLINE_SECONDS = 600
FOREVER = ("--config.train.num_steps=1000000", "--config.train.checkpoint_every_steps=1000000",
           "--config.train.eval_every_steps=0")  # fmt: skip
# Sums over devices are taken in another order, and Adam divides by the root of small moments.
FLOAT32_TRAINED = 1e-3


def wait_until(processes: list[subprocess.Popen], claim) -> None:
    """Polls until the claim holds; fails with the outputs when a process has ended before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not claim():
        has_ended = any(process.poll() is not None for process in processes) and not claim()
        if has_ended or time.monotonic() > deadline:
            kill_all(processes)
            pytest.fail("\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.01)


def kill_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def outcomes(processes: list[subprocess.Popen], *, timeout: float = DEADLINE_SECONDS) -> list[tuple[int, str]]:
    """Returns exit code and output of every process, once all have ended by themselves."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode)[::-1] for process in processes]
    finally:
        kill_all(processes)


def train_records(workdir: Path) -> list[dict]:
    return [record for record in read_records(workdir) if record["kind"] == "train"]


def assert_same_losses(workdir: Path, expected: Path) -> None:
    """Compares two runs of the same configuration, record by record."""
    names = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "bits_per_byte", "epochs/code", "epochs/words")
    tables = [
        [[record.get(name, 0.0) for name in names] for record in read_records(directory)]
        for directory in (workdir, expected)
    ]
    np.testing.assert_allclose(*tables, rtol=FLOAT32_TRAINED)


def assert_only_the_first_reports(results: list[tuple[int, str]]) -> None:
    assert "step 1" in results[0][1]
    assert all(line.startswith("[Gloo]") for _, output in results[1:] for line in output.splitlines()), results


def test_kill_9_of_one_process_ends_all_and_another_number_goes_on(launcher, uninterrupted, tmp_path):
    """Two processes until one is killed, then one: the losses of a run that was always one."""
    workdir = tmp_path / "run"
    processes = launcher.start_all(workdir, num_processes=2)
    wait_until(processes, lambda: (newest_step(workdir) or 0) >= 3)
    os.killpg(processes[1].pid, signal.SIGKILL)
    (code, output), _ = outcomes(processes, timeout=60)
    assert code == 1, output
    assert "error: process 1 on " in output and "is gone: it was killed" in output
    assert "Traceback" not in output

    code, output = launcher.finish(workdir)
    assert code == 0 and "resuming after step" in output, output
    assert_same_losses(workdir, uninterrupted)


def test_signals_to_one_process_are_obeyed_by_all_at_one_step(launcher, uninterrupted, tmp_path):
    """Two processes go on where one stopped. SIGUSR1 to the second saves, SIGTERM to it saves and ends both."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    processes = launcher.start_all(workdir, *FOREVER, num_processes=2)
    wait_until(processes, lambda: train_records(workdir)[-1]["step"] > 12)
    processes[1].send_signal(signal.SIGUSR1)
    wait_until(processes, lambda: newest_step(workdir) > 12)
    saved = newest_step(workdir)
    wait_until(processes, lambda: train_records(workdir)[-1]["step"] > saved)
    processes[1].send_signal(signal.SIGTERM)
    results = outcomes(processes)
    assert [code for code, _ in results] == [0, 0], results
    assert_only_the_first_reports(results)
    assert "resuming after step 9" in results[0][1]

    records = train_records(workdir)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert newest_step(workdir) == len(records) > saved
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {saved, len(records)}
    expected = [record["loss"] for record in train_records(uninterrupted)]
    np.testing.assert_allclose([record["loss"] for record in records[:12]], expected, rtol=FLOAT32_TRAINED)


def test_processes_that_disagree_touch_nothing(launcher, tmp_path):
    """The corpus may lie elsewhere, but not be another one."""
    other_corpus = tmp_path / "corpus"
    write_two_sources(other_corpus, num_words=5)
    arguments = ("--config.train.learning_rate=0.5", f"--config.data.corpus={other_corpus}")
    processes = launcher.start_all(tmp_path / "run", num_processes=2, own={1: arguments})
    for code, output in outcomes(processes):
        assert code == 1
        assert "error: the processes disagree, so none begins:" in output
        assert "train.learning_rate: 0.01 in process 0 on " in output and ", 0.5 in process 1 on " in output
        assert "identity of the corpus: " in output
        assert "data.corpus" not in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_what_one_process_cannot_do_is_told_by_all(launcher, tmp_path):
    processes = launcher.start_all(tmp_path / "run", num_processes=2, own={1: ("--config.data.corpus=/nowhere",)})
    (code, output), (own_code, own_output) = outcomes(processes)
    assert code == own_code == 1
    assert "/nowhere" in own_output and "Traceback" not in own_output
    assert "error: process 1 on " in output and "stopped: " in output and "/nowhere" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_train_as_one(launcher, uninterrupted, tmp_path):
    """Two pairs of processes hold the same sequences (tensor axis); from a checkpoint of one process to the end."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    processes = launcher.start_all(workdir, "--config.mesh.tensor=2", num_processes=4)
    results = outcomes(processes)
    assert [code for code, _ in results] == [0] * 4, results
    assert_only_the_first_reports(results)
    assert_same_losses(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_all(launcher, tmp_path, victim):
    """A stopped process breaks no connection; that it gives no sign of life must be enough."""
    workdir = tmp_path / "run"
    processes = launcher.start_all(workdir, *FOREVER, "--heartbeat_timeout_s=10", num_processes=2)
    wait_until(processes, lambda: workdir.exists() and len(train_records(workdir)) > 3)
    os.killpg(processes[victim].pid, signal.SIGSTOP)
    other = processes[1 - victim]
    try:
        output, _ = other.communicate(timeout=120)
    finally:
        kill_all(processes)
    assert other.returncode not in (0, None)
    assert "heartbeat" in output.lower() or "is gone" in output


@pytest.mark.slow
def test_the_end_of_the_first_process_ends_all(launcher, tmp_path):
    workdir = tmp_path / "run"
    processes = launcher.start_all(workdir, *FOREVER, num_processes=2)
    wait_until(processes, lambda: workdir.exists() and len(train_records(workdir)) > 3)
    os.killpg(processes[0].pid, signal.SIGKILL)
    _, (code, output) = outcomes(processes, timeout=60)
    assert code != 0
    assert "process 0 is gone" in output or "leader task" in output
