"""What is asked of a running run: to stop (SIGTERM, SIGINT, the end of its time), or to save and go on (SIGUSR1)."""

import collections
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """Notes signals instead of dying of them, and tells all processes of them at the same step.

    A signal to one process is a request to all: after every step the processes exchange what they received, and read
    the exchange once the next step is under way, so that no device waits. By itself, a process obeys after the step
    that is running; one of several, after the next. A second SIGINT interrupts at once. The end of the time is a
    SIGTERM that comes by itself.
    """

    def __init__(self, mesh: jax.sharding.Mesh, *, time_limit_s: float = math.inf):
        self._mesh = mesh
        self._end = time.monotonic() + time_limit_s
        self._received: collections.Counter = collections.Counter()
        self._agreed: set[signal.Signals] = set()
        self._exchanges: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def stop(self) -> signal.Signals | None:
        """The signal that asked to stop, in all processes the same one."""
        return next((number for number in STOP_SIGNALS if number in self._agreed), None)

    def take_save(self) -> bool:
        """Returns whether a checkpoint was asked for since the last call."""
        is_asked = signal.SIGUSR1 in self._agreed
        self._agreed.discard(signal.SIGUSR1)
        return is_asked

    def exchange(self) -> None:
        """Tells the other processes what this one received, and hears what any had received a step ago."""
        received, self._received = self._received, collections.Counter()
        if time.monotonic() > self._end:
            received[signal.SIGTERM] += 1
        if jax.process_count() == 1:
            self._agreed |= set(received)
            return
        flags = np.array([[number in received for number in SIGNALS]])
        by_device = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        shape = (self._mesh.size, len(SIGNALS))
        self._exchanges.append(self._any(jax.make_array_from_callback(shape, by_device, lambda index: flags)))
        if len(self._exchanges) > 1:
            is_asked = np.asarray(self._exchanges.popleft())
            self._agreed |= {number for number, is_one in zip(SIGNALS, is_asked) if is_one}

    def __enter__(self) -> "Requests":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        received = signal.Signals(number)
        if received == signal.SIGINT and (self.stop == received or self._received[received]):
            raise KeyboardInterrupt
        self._received[received] += 1
