"""Processes meet, agree and hear of each other's end. Here they are threads: nothing but the roll is involved."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3_jax.sharding import roll_call
from dsv3_jax.sharding.roll_call import Member, Roll, differences, in_words


@pytest.fixture
def address():
    with socket.create_server(("localhost", 0)) as probe:
        return f"localhost:{probe.getsockname()[1]}"


@pytest.fixture
def ended(monkeypatch):
    """Collects what processes say when they end, in place of their ending."""
    texts = []
    monkeypatch.setattr(Member, "_end", lambda member, text: texts.append(text))
    monkeypatch.setattr(roll_call, "GRACE_SECONDS", 0.2)
    return texts


def of_all(num_processes, act):
    """Calls act(process) in a thread per process; returns what they return or raise."""

    def result(process):
        try:
            return act(process)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(num_processes) as threads:
        return list(threads.map(result, range(num_processes)))


def meet(address, num_processes) -> list[Member]:
    Roll(address, num_processes, timeout_s=20)
    members = of_all(num_processes, lambda process: Member(address, num_processes, process, timeout_s=20))
    assert len(set(of_all(num_processes, lambda p: members[p].start()))) == 1
    return members


def wait_for(texts, count):
    deadline = time.monotonic() + 20
    while len(texts) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(texts) == count, texts


def test_processes_that_agree_go_on_and_leave_together(address, ended):
    members = meet(address, 3)
    for step in range(3):
        assert of_all(3, lambda p, step=step: members[p].require_agreement({"step": step})) == [None] * 3
    assert of_all(3, lambda p: members[p].finish()) == [None] * 3
    assert ended == []


def test_nobody_goes_on_before_the_last_has_come(address, ended):
    members, passed = meet(address, 2), []
    early = threading.Thread(target=lambda: passed.append(members[1].require_agreement({})))
    early.start()
    time.sleep(0.2)
    assert not passed
    members[0].require_agreement({})
    early.join(timeout=20)
    assert passed == [None]


def test_a_disagreement_is_told_to_all_by_fact_value_and_process(address, ended):
    members = meet(address, 4)
    errors = of_all(4, lambda p: members[p].require_agreement({"lr": 0.5 if p == 2 else 0.1, "same": None, "seed": p}))
    assert {type(error) for error in errors} == {ValueError}
    (text,) = {str(error) for error in errors}
    assert "lr: 0.1 in processes 0-1, 3, 0.5 in process 2 on " in text
    assert "seed: 0 in process 0 on " in text and "3 in process 3 on " in text
    assert "same" not in text
    for process, member in enumerate(members):
        member.fail(f"{process}: as all know")
    assert ended == [], "one voice: nobody is told of the failures that follow from it"


def test_an_answer_may_come_before_it_is_waited_for(address, ended, monkeypatch):
    members, say = meet(address, 2), Member._say

    def say_and_dawdle(member, message):
        say(member, message)
        time.sleep(0.2)

    monkeypatch.setattr(Member, "_say", say_and_dawdle)
    errors = of_all(2, lambda p: members[p].require_agreement({"seed": p}))
    assert ended == [] and {type(error) for error in errors} == {ValueError}


def test_a_missing_process_is_named(address):
    Roll(address, 4, timeout_s=0.5)
    members = {p: Member(address, 4, p, timeout_s=20) for p in (0, 2)}
    for member in members.values():
        with pytest.raises(ChildProcessError, match=rf"processes 1, 3 of 4 did not come to {address} within 0.5 sec"):
            member.start()
    with pytest.raises(ChildProcessError, match="processes 1, 3 of 4 did not come"):
        Member(address, 4, 1, timeout_s=20).start()  # too late


def test_a_missing_coordinator_is_named(address):
    with pytest.raises(TimeoutError, match=rf"coordinator_address='{address}': process 1 cannot reach process 0"):
        Member(address, 2, 1, timeout_s=0.3)


def test_a_taken_port_is_named(address):
    port = int(address.rpartition(":")[2])
    words = rf"cannot listen on port {port} .*another port"
    with socket.create_server(("", port)), pytest.raises(OSError, match=words):
        Roll(address, 2, timeout_s=1)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([(2, 0), (3, 1)], "process 1 on .* was told num_processes=3, process 0 2"),
        ([(3, 0), (3, 1), (3, 1)], "process_id=1 was given twice"),
    ],
)
def test_wrong_numbers_are_refused(address, numbers, words):
    Roll(address, numbers[0][0], timeout_s=20)
    members = [Member(address, count, process, timeout_s=20) for count, process in numbers]
    for member in members:
        with pytest.raises(ValueError, match=words):
            member.start()


def test_who_is_killed_is_told_to_all_at_once(address, ended):
    members = meet(address, 3)
    members[1]._socket.shutdown(socket.SHUT_RDWR)  # as the system does for a killed process
    wait_for(ended, 3)
    assert sum("process 1 on" in text and "is gone" in text for text in ended) == 2
    assert sum("process 0 is gone" in text for text in ended) == 1, "the cut connection itself"


def test_who_fails_is_told_to_all_with_its_words(address, ended):
    members = meet(address, 3)
    members[2].fail("the disk is full")
    wait_for(ended, 2)
    assert all(text.startswith("process 2 on ") and text.endswith("stopped: the disk is full") for text in ended)


def test_a_failure_that_follows_from_another_is_reported_as_that_one(address, ended):
    members = meet(address, 2)
    follower = threading.Thread(target=members[0].fail, args=("a collective broke",))
    follower.start()
    members[1]._socket.shutdown(socket.SHUT_RDWR)
    follower.join(timeout=20)
    assert any("process 1 on" in text and "is gone" in text for text in ended)
    assert not any("a collective broke" in text for text in ended)


def test_process_0_waits_for_the_others_last_words(address, ended):
    roll = Roll(address, 2, timeout_s=20)
    members = of_all(2, lambda process: Member(address, 2, process, timeout_s=20))
    members[1].fail("full")
    start = time.monotonic()
    roll.wait_until_alone(0.3)
    assert time.monotonic() - start > 0.2, "process 1 is still there"
    members[1]._socket.shutdown(socket.SHUT_RDWR)
    roll.wait_until_alone(20)
    assert time.monotonic() - start < 10


def test_strangers_do_not_disturb(address, ended):
    Roll(address, 1, timeout_s=20)
    host, port = address.split(":")
    for line in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"kind": "done"}).encode() + b"\n", b""):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(line)
    member = Member(address, 1, 0, timeout_s=20)
    assert member.start()
    member.finish()


def test_a_run_is_not_ended_by_who_comes_to_it_by_mistake(address, ended):
    members = meet(address, 2)
    for numbers in ((2, 1), (3, 2)):  # the same command once more; a process of another run
        with pytest.raises(ChildProcessError, match=f"have met at {address} already; choose another port"):
            Member(address, *numbers, timeout_s=20).start()
    assert of_all(2, lambda p: members[p].finish()) == [None] * 2
    assert ended == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not process 0 but says b'HTTP/1.1 400"), (b"", "said nothing for")],
)
def test_another_service_at_the_address_is_no_process_0(address, monkeypatch, answer, words):
    monkeypatch.setattr(roll_call, "LAST_SECONDS", 0.1)
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as service:
        member = Member(address, 2, 1, timeout_s=0.3)
        connection, _ = service.accept()
        with connection:
            connection.sendall(answer)
            with pytest.raises(OSError, match=words) as error:
                member.start()
    assert f"coordinator_address='{address}'" in str(error.value)


@pytest.mark.parametrize(
    ("processes", "words"),
    [([3], "process 3"), ([0, 1, 2, 5], "processes 0-2, 5"), ([1, 3, 4], "processes 1, 3-4")],
)
def test_processes_in_words(processes, words):
    assert in_words(processes) == words


def test_a_fact_that_one_lacks_is_a_difference():
    text = differences({0: {"a": 1}, 1: {}}, {0: "process 0 on x", 1: "process 1 on y"})
    assert "a: 1 in process 0 on x, None in process 1 on y" in text
