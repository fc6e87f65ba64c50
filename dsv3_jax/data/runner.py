"""Maps functions over shards: in this process, in processes of this machine, or on a Ray cluster.

Every runner keeps one promise: results come in the order of the items, whatever finishes first, so that what is made of
them does not depend on the runner or on the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Protocol

from dsv3_jax.config import require

RUNNERS = ("local", "ray")
CONNECT_SECONDS = 10
ITEMS_PER_WORKER = 2  # in flight: one that runs and one that waits


class Runner(Protocol):
    """Calls a function on many items."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yields function(item) in the order of the items.

        A few items are in flight at a time, the rest are not looked at yet. Closing the iterator early waits for those
        that run and drops those that wait.

        Args:
          function: picklable by name (defined in a module).
          items: picklable.

        Raises:
          Whatever the function raises, for the first item in order that fails.
          ValueError: a worker process died.
        """


@contextlib.contextmanager
def open_runner(name: str, *, num_workers: int, ray_address: str) -> Iterator[Runner]:
    """Gives a runner and ends its workers afterwards.

    Args:
      name: "local": processes of this machine; "ray": tasks of a Ray cluster, which must see the same files under the
        same paths and have dsv3_jax installed.
      num_workers: items worked on at a time. With local, 1 stands for this very process.
      ray_address: cluster to join; empty: one started here, with num_workers CPUs.

    Raises:
      ValueError: no such runner, num_workers below 1, an address without a cluster, or Ray is not installed.
    """
    require(name in RUNNERS, "runner", name, f"choose one of {', '.join(RUNNERS)}")
    require(num_workers >= 1, "workers", num_workers, "must be at least 1")
    require(name == "ray" or not ray_address, "ray_address", ray_address, "needs --runner=ray")
    if name == "ray":
        with _ray_cluster(num_workers, ray_address) as runner:
            yield runner
    elif num_workers == 1:
        yield SerialRunner()
    else:
        with ProcessRunner(num_workers) as runner:
            yield runner


class SerialRunner:
    """Works on one item after the other in this process."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Runner.map`."""
        for item in items:
            yield function(item)


class ProcessRunner:
    """Works in processes of this machine, which end with this one, however it ends. A context manager."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        # Spawned, not forked: forked children would inherit locks, those of threads and those on files.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
        )

    def __enter__(self) -> "ProcessRunner":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Runner.map`."""

        def drop(futures):
            concurrent.futures.wait([future for future in futures if not future.cancel()])

        start, finish = functools.partial(self._pool.submit, function), concurrent.futures.Future.result
        try:
            yield from _in_order(items, start=start, finish=finish, drop=drop, num_workers=self._num_workers)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ValueError(f"workers={self._num_workers}: one was killed, perhaps for want of memory; start again to "
                             "continue, with fewer workers if it recurs") from error  # fmt: skip


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent, one core to each worker, and ends the worker when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class RayRunner:
    """Works in tasks of the Ray cluster that this process has joined. Build it with `open_runner`."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Runner.map`. A task whose node is lost is repeated on another."""
        ray = importlib.import_module("ray")
        start = ray.remote(num_cpus=1)(function).remote

        def drop(references):
            for reference in references:
                ray.cancel(reference)
            if references:
                ray.wait(references, num_returns=len(references))

        try:
            yield from _in_order(items, start=start, finish=ray.get, drop=drop, num_workers=self._num_workers)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.WorkerCrashedError as error:
            raise ValueError(f"runner='ray': a worker was killed, perhaps for want of memory ({error}); start again to "
                             "continue") from error  # fmt: skip


def _in_order(
    items: Iterable[Any], *, start: Callable, finish: Callable, drop: Callable, num_workers: int
) -> Generator[Any, None, None]:
    """Yields the result of every item in their order, with few of them in flight.

    Args:
      items: what is worked on; looked at when there is room for another.
      start: item -> work that is under way.
      finish: such work -> its result, waited for.
      drop: list of such work that is not wanted any more, of which nothing must run afterwards.
      num_workers: items that can be worked on at a time.
    """
    in_flight = collections.deque()
    try:
        for item in items:
            in_flight.append(start(item))
            if len(in_flight) == ITEMS_PER_WORKER * num_workers:
                yield finish(in_flight.popleft())
        while in_flight:
            yield finish(in_flight.popleft())
    finally:
        drop(list(in_flight))


@contextlib.contextmanager
def _ray_cluster(num_workers: int, address: str) -> Iterator[RayRunner]:
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ValueError("runner='ray': Ray is not installed; pip install 'dsv3-jax[ray]'") from error
    start = {"address": address} if address else {"num_cpus": num_workers, "include_dashboard": False}
    try:
        if host_and_port := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
            # Ray itself tries for minutes.
            socket.create_connection((host_and_port[1], int(host_and_port[2])), timeout=CONNECT_SECONDS).close()
        ray.init(log_to_driver=False, logging_level="warning", **start)
    except OSError as error:
        raise ValueError(f"ray_address={address!r}: no cluster answers ({error}); check the address") from error
    try:
        yield RayRunner(num_workers)
    finally:
        ray.shutdown()
