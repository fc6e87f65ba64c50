"""Real processes, really killed. What counts is the record of losses, which must be as if nothing had happened."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.training import newest_step, open_params
from dsv3_jax.data import open_corpus
from dsv3_jax.train.metrics import read_records

DEADLINE_SECONDS = 600


def losses(workdir: Path) -> list[tuple]:
    names = ("kind", "step", "tokens", "loss", "mtp_loss", "grad_norm", "batch_size", "learning_rate", "bits_per_byte",
             "bits_per_byte/code", "bits_per_byte/words", "epochs/code", "epochs/words")  # fmt: skip
    return [tuple(record.get(name) for name in names) for record in read_records(workdir)]


def wait_until(process, claim) -> None:
    """Polls every millisecond until the claim holds or the process has ended by itself."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not claim() and process.poll() is None:
        assert time.monotonic() < deadline, "the run neither ended nor got there"
        time.sleep(0.001)


def kill(process) -> str:
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    return output


def num_steps_recorded(workdir: Path) -> int:
    return sum(record["kind"] == "train" for record in read_records(workdir))


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def params_equal(first: Path, second: Path, *, ema: bool) -> bool:
    trees = [open_params(workdir, ema=ema)[1] for workdir in (first, second)]
    first_bits, second_bits = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in trees)
    return first_bits == second_bits


def test_kills_and_preemption_leave_no_trace(launcher, uninterrupted, tmp_path):
    """kill -9 while a checkpoint is being written, SIGTERM, kill -9 anywhere: then bit for bit the same run.

    Every start reads its data with another number of threads.
    """
    workdir = tmp_path / "run"

    process = launcher.start(workdir)
    wait_until(process, lambda: (newest_step(workdir) or 0) >= 3 and is_saving(workdir))
    kill(process)
    assert newest_step(workdir) in (3, 6, 9)

    process = launcher.start(workdir, "--config.data.reader_threads=0")
    start = num_steps_recorded(workdir)
    wait_until(process, lambda: num_steps_recorded(workdir) > start)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert newest_step(workdir) == num_steps_recorded(workdir), output

    process = launcher.start(workdir, "--config.data.reader_threads=3", "--config.data.prefetch_windows=1")
    wait_until(process, lambda: num_steps_recorded(workdir) > newest_step(workdir))
    time.sleep(random.uniform(0, 0.2))
    kill(process)

    code, output = launcher.finish(workdir)
    assert code == 0, output
    assert losses(workdir) == losses(uninterrupted)
    assert params_equal(workdir, uninterrupted, ema=False)
    assert params_equal(workdir, uninterrupted, ema=True)
    assert not is_saving(workdir)


def test_ctrl_c_saves_and_says_so(launcher, tmp_path):
    process = launcher.start(tmp_path / "run")
    wait_until(process, lambda: num_steps_recorded(tmp_path / "run") > 0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, output
    assert newest_step(tmp_path / "run") == num_steps_recorded(tmp_path / "run")


def test_a_run_says_how_often_it_read_each_source(launcher, uninterrupted):
    sources = open_corpus(launcher.corpus).sources
    windows_per_epoch = {name: (source.num_tokens("train") - 1) // 16 for name, source in sources.items()}
    num_read = dict.fromkeys(sources, 0)
    for record in read_records(uninterrupted):
        if record["kind"] == "train":
            now = {name: record[f"epochs/{name}"] * num_windows for name, num_windows in windows_per_epoch.items()}
            assert sum(now.values()) * 16 == pytest.approx(record["tokens"])
            assert all(now[name] > num_read[name] - 1e-6 for name in sources)
            num_read = now
    assert num_read["words"] > windows_per_epoch["words"], "read more than once"


def test_the_held_out_text_is_scored_source_by_source(uninterrupted):
    heldout = [record for record in read_records(uninterrupted) if record["kind"] == "heldout"]
    assert len(heldout) == 2
    for record in heldout:
        by_source = [record["bits_per_byte/code"], record["bits_per_byte/words"]]
        assert min(by_source) < record["bits_per_byte"] < max(by_source)


def test_a_finished_run_does_nothing_but_can_be_prolonged_elsewhere(launcher, uninterrupted, tmp_path):
    """On two devices instead of one, from a checkpoint in the middle, the losses are the same up to rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    code, output = launcher.finish(workdir, num_devices=2)
    assert code == 0 and "resuming after step 9" in output, output
    expected, actual = losses(uninterrupted), losses(workdir)
    assert [line[:3] for line in actual] == [line[:3] for line in expected]
    np.testing.assert_allclose([line[3] for line in actual if line[0] == "train"],
                               [line[3] for line in expected if line[0] == "train"], rtol=1e-3)  # fmt: skip


def test_another_configuration_is_refused_before_anything_is_touched(launcher, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    changes = ("train.learning_rate=0.5", "model.kv_lora_rank=4", "train.num_steps=99")
    code, output = launcher.finish(uninterrupted, *(f"--config.{change}" for change in changes))
    assert code == 1
    assert "train.learning_rate: 0.01 in the workdir, 0.5 here" in output
    assert "model.kv_lora_rank: 8 in the workdir, 4 here" in output
    assert "num_steps" not in output and "Traceback" not in output
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


@pytest.mark.slow
def test_many_kills_at_random_moments_leave_no_trace(launcher, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for attempt in range(12):
        process = launcher.start(workdir)
        steps = num_steps_recorded(workdir)
        if attempt % 4 != 3:
            wait_until(process, lambda steps=steps: num_steps_recorded(workdir) != steps)
        time.sleep(random.uniform(0, 1.0))
        kill(process)
    code, output = launcher.finish(workdir)
    assert code == 0, output
    assert losses(workdir) == losses(uninterrupted)
    assert params_equal(workdir, uninterrupted, ema=True)
