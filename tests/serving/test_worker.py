import queue
import threading

import pytest

from dschat.rlhf.rollout.backend import Sampling
from dschat.serving.speaker import SpokenAnswer
from dschat.serving.worker import Busy, Failed, Job, Worker


class Gated:
    """A speaker that answers once a gate is open."""

    def __init__(self):
        self.gate, self.asked = threading.Event(), []

    def answer(self, ids, sampling, on_text, **options):
        self.asked.append(ids)
        self.gate.wait(10)
        if ids == [13]:
            raise RuntimeError("no\nmemory")
        on_text("tea")
        return SpokenAnswer("tea", [1], "stop")


def job(*ids, seconds=60.0, **options):
    return Job(list(ids), Sampling(max_answer_length=4), seconds, **options)


def test_jobs_are_answered_in_turn_into_events_that_they_may_share(capsys):
    speaker, events = Gated(), queue.SimpleQueue()
    speaker.gate.set()
    worker = Worker("a", speaker, most_waiting=9)
    for number, side in ((1, "left"), (13, "right")):
        worker.submit(job(number, side=side, events=events))
    worker.close()
    assert [events.get_nowait() for _ in range(2)] == [
        ("left", "tea"),
        ("left", SpokenAnswer("tea", [1], "stop")),
    ]
    side, failure = events.get_nowait()
    assert side == "right"
    assert isinstance(failure, Failed)
    assert "a could not answer a prompt of 1 tokens: RuntimeError: no memory" in capsys.readouterr().out


def test_what_waits_is_bounded_and_what_is_over_is_passed_over():
    speaker = Gated()
    worker = Worker("a", speaker, most_waiting=2)
    worker.submit(job(1))
    while not speaker.asked:
        pass
    cancelled, late = job(2), job(3, seconds=0)
    worker.submit(cancelled)
    worker.submit(late)
    with pytest.raises(Busy):
        worker.submit(job(4))
    cancelled.cancel()
    speaker.gate.set()
    worker.close()
    assert speaker.asked == [[1]]
    assert cancelled.events.empty()
    assert late.events.empty()
