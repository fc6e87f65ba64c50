"""How the processes of a run know of each other: one TCP connection from each to process 0, kept for the whole run.

They meet here before JAX starts, which would answer a missing process with an abort and a stack trace, compare what
they are about to do, and hear at once when one of them fails or is killed: a collective would wait for it forever.
Messages are JSON objects, one per line.

| from a process | from process 0 to all |
|---|---|
| hello: who it is | start: all are here; where JAX's own service will be |
| facts: what it is about to do | agreed |
| done | end: all are done |
| failed: its last words | stop: in what they differ; who failed, or is gone |
"""

import asyncio
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, NoReturn

MAX_LINE_BYTES = 2**24
RETRY_SECONDS = 0.2
GRACE_SECONDS = 1.0  # a lost process breaks the collectives of all; for so long they wait to hear whose fault it was
LAST_SECONDS = 5.0  # a failed process has ended after these, whoever else has not
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine without power is noticed after 40 s


class Roll:
    """Keeps the roll, in a thread of process 0.

    Raises:
      OSError: the port is taken.
    """

    def __init__(self, coordinator_address: str, num_processes: int, *, timeout_s: float):
        self._address = coordinator_address
        self._num_processes = num_processes
        self._timeout_s = timeout_s
        self._members: dict[int, asyncio.StreamWriter] = {}
        self._names: dict[int, str] = {}
        self._facts: dict[int, dict] = {}
        self._done: set[int] = set()
        self._left: set[int] = set()
        self._last_words: dict | None = None
        self._is_alone = threading.Event()
        port = int(coordinator_address.rpartition(":")[2])
        try:
            self._socket = _open_port(port)
        except OSError as error:
            raise OSError(error.errno, f"coordinator_address={coordinator_address!r}: process 0 cannot listen on port "
                          f"{port} of this machine ({error.strerror}); choose another port") from error  # fmt: skip
        threading.Thread(target=asyncio.run, args=(self._serve(),), name="roll", daemon=True).start()

    def wait_until_alone(self, timeout_s: float) -> None:
        """Returns once the processes that came have left again, or after the timeout.

        Process 0 ends last: with it ends JAX's service, and whoever is still there is aborted before its last words.
        """
        self._is_alone.wait(timeout_s)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._attend, sock=self._socket, limit=MAX_LINE_BYTES)
        async with server:
            await asyncio.sleep(self._timeout_s)
            missing = sorted(set(range(self._num_processes)) - self._members.keys())
            if missing:
                self._stop(f"{in_words(missing)} of {self._num_processes} did not come to {self._address} within "
                           f"{self._timeout_s:g} seconds; see why in their own output")  # fmt: skip
            await server.serve_forever()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads one process's messages until it leaves."""
        _keep_alive(writer.get_extra_info("socket"))
        hello = _parse(await reader.readline())
        if hello.get("kind") != "hello":
            writer.close()  # not one of ours: a port scan, a health check
            return
        process, name = hello["process"], f"process {hello['process']} on {hello['host']}"
        if len(self._members) == self._num_processes and self._last_words is None:
            _send(writer, _stop_message(f"the {self._num_processes} processes of a run have met at {self._address} "
                                        "already; choose another port, or wait for its end"))  # fmt: skip
            return
        if refusal := self._refusal(hello):
            self._stop(refusal, is_disagreement=True)
        if self._last_words is not None:
            _send(writer, self._last_words)
            return
        self._members[process], self._names[process] = writer, name
        if len(self._members) == self._num_processes:
            host = self._address.rpartition(":")[0]
            self._tell_all({"kind": "start", "jax_address": f"{host}:{_free_port()}"})
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._hear(process, _parse(line))
        if process not in self._done:
            self._stop(f"{name} is gone: it was killed, or crashed; see its own output")
        self._left.add(process)
        if self._members.keys() - self._left <= {0}:
            self._is_alone.set()

    def _hear(self, process: int, message: dict) -> None:
        if message["kind"] == "facts":
            self._facts[process] = message["facts"]
            if len(self._facts) == self._num_processes:
                text = differences(self._facts, self._names)
                self._facts = {}
                if text:
                    self._stop(text, is_disagreement=True)
                else:
                    self._tell_all({"kind": "agreed"})
        elif message["kind"] == "failed":
            self._done.add(process)
            self._stop(f"{self._names[process]} stopped: {message['text']}")
        elif message["kind"] == "done":
            self._done.add(process)
            if len(self._done) == self._num_processes:
                self._tell_all({"kind": "end"})

    def _refusal(self, hello: dict) -> str:
        """Says why a process cannot join; empty when it can."""
        process, count = hello["process"], hello["num_processes"]
        if count != self._num_processes:
            return (f"process {process} on {hello['host']} was told num_processes={count}, process 0 "
                    f"{self._num_processes}; start all with the same number")  # fmt: skip
        if process in self._members:
            return (f"process_id={process} was given twice, on {self._names[process].rpartition(' ')[2]} and on "
                    f"{hello['host']}; number the processes from 0 to {count - 1}")  # fmt: skip
        return ""

    def _stop(self, text: str, *, is_disagreement: bool = False) -> None:
        if self._last_words is None:
            self._last_words = _stop_message(text, is_disagreement=is_disagreement)
            self._tell_all(self._last_words)

    def _tell_all(self, message: dict) -> None:
        for writer in self._members.values():
            _send(writer, message)


class Member:
    """One process's connection to the roll, which process 0 itself keeps.

    Raises:
      OSError: process 0 cannot be reached.
    """

    def __init__(self, coordinator_address: str, num_processes: int, process_id: int, *, timeout_s: float,
                 roll: Roll | None = None):  # fmt: skip
        self._roll = roll
        self._address = coordinator_address
        self._start_timeout_s = timeout_s + LAST_SECONDS  # process 0 names who is missing before that
        self._messages: queue.Queue[dict] = queue.Queue()
        self._is_waiting = True  # for the start
        self._is_stopped = False
        self._lock = threading.Lock()
        self._socket = _connect(coordinator_address, process_id, timeout_s=timeout_s)
        self._say({"kind": "hello", "process": process_id, "num_processes": num_processes,
                   "host": socket.gethostname()})  # fmt: skip
        threading.Thread(target=self._listen, name="roll call", daemon=True).start()

    def start(self) -> str:
        """Waits until all processes are here; returns the address for JAX's service.

        Raises:
          ValueError: one of them was started with other numbers.
          ChildProcessError: one of them is missing.
          TimeoutError: what listens at the address says nothing.
        """
        try:
            return self._await("start", timeout_s=self._start_timeout_s)["jax_address"]
        except queue.Empty:
            raise TimeoutError(f"coordinator_address={self._address!r}: what listens there has said nothing for "
                               f"{self._start_timeout_s:g} seconds; is it process 0?") from None  # fmt: skip

    def require_agreement(self, facts: dict[str, Any]) -> None:
        """Waits until every process has given its facts.

        Raises:
          ValueError: they differ; names each difference, the values and the processes.
          ChildProcessError: one of them failed meanwhile.
        """
        self._ask({"kind": "facts", "facts": facts}, answer="agreed")

    def finish(self) -> None:
        """Waits until all processes have finished.

        Raises:
          ChildProcessError: one of them failed meanwhile.
        """
        self._ask({"kind": "done"}, answer="end")

    def fail(self, text: str) -> None:
        """Tells the others why this process ends. If another one failed first, ends with that one's words instead."""
        with self._lock:
            if self._is_stopped:
                return
            self._is_waiting = True
        if (cause := self._wait_for_stop()) is not None:
            self._end(cause)
        with contextlib.suppress(OSError):  # without process 0, all end by themselves
            self._say({"kind": "failed", "text": text})
            self._wait_for_stop()  # so that the others have been told

    def leave(self) -> NoReturn:
        """Ends this process with exit code 1, whatever its other threads are doing: they may wait forever."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._roll is not None:
            self._roll.wait_until_alone(LAST_SECONDS)
        os._exit(1)

    def _end(self, text: str) -> NoReturn:
        print(f"error: {text}", file=sys.stderr, flush=True)
        self.leave()

    def _ask(self, message: dict, *, answer: str) -> None:
        with self._lock:
            self._is_waiting = True  # before an answer can come
        with contextlib.suppress(OSError):  # without process 0, the answer is that it is gone
            self._say(message)
        self._await(answer)

    def _await(self, kind: str, *, timeout_s: float | None = None) -> dict:
        message = self._messages.get(timeout=timeout_s)
        with self._lock:
            self._is_waiting = False
            self._is_stopped = message["kind"] == "stop"
        if message["kind"] == "stop":
            raise (ValueError if message["is_disagreement"] else ChildProcessError)(message["text"])
        assert message["kind"] == kind, message
        return message

    def _wait_for_stop(self) -> str | None:
        """Returns the words with which all are stopped, None when nobody stops them for a while."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
                if message["kind"] == "stop":
                    return message["text"]
        return None

    def _say(self, message: dict) -> None:
        self._socket.sendall(_line(message))

    def _listen(self) -> None:
        """Hands messages to who waits for them; when a process is lost and nobody waits, ends this one."""
        with self._socket.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                message = _parse(line)
                if "kind" not in message:
                    message = _stop_message(f"coordinator_address={self._address!r}: what listens there is not process "
                                            f"0 but says {line[:60]!r}; choose another port")  # fmt: skip
                self._take(message)
                if message["kind"] in ("stop", "end"):
                    return
        self._take(_stop_message("process 0 is gone: it was killed, or crashed; see its own output"))

    def _take(self, message: dict) -> None:
        with self._lock:
            if self._is_waiting or message["kind"] != "stop":
                self._messages.put(message)
                return
        self._end(message["text"])


def differences(facts: dict[int, dict], names: dict[int, str]) -> str:
    """Says in what the facts of processes differ: a line per value and processes; empty when they agree.

    Args:
      facts: process -> name of a fact -> value.
      names: process -> what it is called.
    """
    lines = []
    for fact in sorted({fact for own in facts.values() for fact in own}):
        processes_with = {}
        for process in sorted(facts):
            processes_with.setdefault(repr(facts[process].get(fact)), []).append(process)
        if len(processes_with) > 1:
            parts = [
                f"{value} in {names[who[0]] if len(who) == 1 else in_words(who)}"
                for value, who in processes_with.items()
            ]
            lines.append(f"  {fact}: {', '.join(parts)}")
    if not lines:
        return ""
    return "the processes disagree, so none begins:\n" + "\n".join(lines) + "\nstart all of them alike"


def in_words(processes: list[int]) -> str:
    """Returns e.g. "processes 0-3, 5" for sorted numbers."""
    runs: list[list[int]] = []
    for process in processes:
        if runs and process == runs[-1][-1] + 1:
            runs[-1].append(process)
        else:
            runs.append([process])
    numbers = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{'process' if len(processes) == 1 else 'processes'} {numbers}"


def _connect(address: str, process_id: int, *, timeout_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = "localhost" if process_id == 0 else host
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
            connection.settimeout(None)
            _keep_alive(connection)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"coordinator_address={address!r}: process {process_id} cannot reach process 0 there since "
                    f"{timeout_s:g} seconds ({error.strerror or error}); is it running, and is the port open?"
                ) from error
            time.sleep(RETRY_SECONDS)


def _open_port(port: int) -> socket.socket:
    backlog = socket.SOMAXCONN
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _free_port() -> int:
    with _open_port(0) as probe:
        return probe.getsockname()[1]


def _stop_message(text: str, *, is_disagreement: bool = False) -> dict:
    return {"kind": "stop", "text": text, "is_disagreement": is_disagreement}


def _send(writer: asyncio.StreamWriter, message: dict) -> None:
    if not writer.is_closing():
        writer.write(_line(message))


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> dict:
    """Returns the message of a line; an empty one when it is none."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
