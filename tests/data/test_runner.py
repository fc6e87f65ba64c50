"""Runners give results in order, pass errors on, and end with the process that started them."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv3_jax.data.runner import open_runner


def doubled(number):
    time.sleep(0.02 * (number % 3))  # later items finish first
    if number == 7:
        raise OSError(28, "No space left on device", "some/file")
    return 2 * number


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def written(path):
    time.sleep(0.3)
    path.touch()


def local(num_workers):
    return open_runner("local", num_workers=num_workers, ray_address="")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_items_until_one_fails(num_workers):
    with local(num_workers) as runner:
        assert list(runner.map(doubled, range(7))) == [0, 2, 4, 6, 8, 10, 12]
        results = []
        with pytest.raises(OSError, match="some/file"):
            for result in runner.map(doubled, range(100)):
                results.append(result)
        assert results == [0, 2, 4, 6, 8, 10, 12]


def test_items_are_looked_at_when_a_worker_is_near():
    looked_at = []

    def items():
        for number in range(1000):
            looked_at.append(number)
            yield 3 * number

    with local(2) as runner:
        results = runner.map(doubled, items())
        assert next(results) == 0
        results.close()
        assert len(looked_at) == 4  # two items for each of two workers
        assert list(runner.map(doubled, [1])) == [2]


def test_closing_early_waits_for_what_runs(tmp_path):
    with local(2) as runner:
        results = runner.map(written, (tmp_path / str(number) for number in range(100)))
        next(results)
        results.close()
        found = set(tmp_path.iterdir())
        time.sleep(0.7)
        assert set(tmp_path.iterdir()) == found and 1 <= len(found) <= 5


def test_a_killed_worker_is_an_error_that_says_what_to_do():
    with local(2) as runner, pytest.raises(ValueError, match=r"workers=2: one was killed.*start again"):
        list(runner.map(killed, range(3)))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from dsv3_jax.data.runner import open_runner\n"
        "def work(path):\n"
        "    open(f'{path}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(1000)\n"
        "if __name__ == '__main__':\n"
        "    with open_runner('local', num_workers=2, ray_address='') as runner:\n"
        "        list(runner.map(work, [sys.argv[1]] * 2))\n"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(pids)])
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_running(path.name) for path in pids.iterdir()))


def is_running(pid: str) -> bool:
    status = pathlib.Path("/proc", pid, "stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "slurm"}, "runner='slurm': choose one of local, ray"),
        ({"num_workers": 0}, "workers=0: must be at least 1"),
        ({"ray_address": "auto"}, "ray_address='auto': needs --runner=ray"),
    ],
)
def test_runners_that_cannot_be_are_refused_by_name(arguments, message):
    arguments = {"name": "local", "num_workers": 1, "ray_address": ""} | arguments
    with pytest.raises(ValueError, match=message), open_runner(arguments.pop("name"), **arguments):
        pass


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_a_missing_ray_names_its_extra():
    with (
        pytest.raises(ValueError, match=r"pip install 'dsv3-jax\[ray\]'"),
        open_runner("ray", num_workers=1, ray_address=""),
    ):
        pass
