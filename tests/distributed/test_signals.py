import os
import signal
import time

import pytest

from dschat.distributed import signals
from dschat.distributed.signals import StopRequests


@pytest.fixture
def requests():
    # What nohup or a shell that starts the tests in the background ignores would stay ignored.
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals.STOPPING}
    listening = StopRequests()
    listening.listen()
    yield listening
    listening.release()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_the_first_signal_is_noted(number, requests):
    os.kill(os.getpid(), number)
    assert requests.received == number.name


def test_a_second_ctrl_c_stops_at_once_but_not_one_that_the_launcher_passes_on(requests, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun's, at the same moment
    now = time.monotonic()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now + 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_or_a_shell_ignores_stays_ignored():
    for number in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(number, signal.SIG_IGN)
        requests = StopRequests()
        requests.listen()
        os.kill(os.getpid(), number)
        assert requests.received is None
        requests.release()
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, before)


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    requests = StopRequests()
    requests.listen()
    assert signal.getsignal(signal.SIGTERM) != before
    requests.release()
    assert signal.getsignal(signal.SIGTERM) == before
