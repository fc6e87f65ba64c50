"""Signals become requests, which the loop sees after the next exchange."""

import os
import signal
import time

import jax
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train.requests import SIGNALS, Requests


@pytest.fixture
def requests():
    with Requests(make_mesh(MeshConfig(), devices=jax.devices()[:1])) as requests:
        yield requests


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_is_a_request(requests, number):
    requests.exchange()
    assert requests.stop is None
    send(number)
    requests.exchange()
    assert requests.stop is number
    requests.exchange()
    assert requests.stop is number, "it stands"


def test_the_end_of_the_time_is_a_request_to_stop():
    with Requests(make_mesh(MeshConfig(), devices=jax.devices()[:1]), time_limit_s=0.2) as requests:
        requests.exchange()
        assert requests.stop is None
        time.sleep(0.25)
        requests.exchange()
        assert requests.stop is signal.SIGTERM


def test_a_signal_to_save_is_granted_once(requests):
    assert not requests.take_save()
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    requests.exchange()
    assert requests.stop is None
    assert requests.take_save()
    requests.exchange()
    assert not requests.take_save()


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_a_second_ctrl_c_interrupts_at_once(requests, is_exchanged):
    send(signal.SIGINT)
    if is_exchanged:
        requests.exchange()
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_signals_do_again_what_they_did_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Requests(make_mesh(MeshConfig(), devices=jax.devices()[:1])):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
