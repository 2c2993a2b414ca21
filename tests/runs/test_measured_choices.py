"""Choices by timing: what decides them, and that a machine and a checkpoint keep them."""

import json
import os
import time

import pytest

from dschat.runs import measured_choices
from dschat.runs.measured_choices import MeasuredChoices


def ways(calls: list[str], **seconds: float):
    """Ways that sleep so long and note that they were called."""

    def run(way: str, pause: float):
        def call() -> None:
            calls.append(way)
            time.sleep(pause)

        return call

    return {way: run(way, pause) for way, pause in seconds.items()}


def test_the_fastest_way_is_chosen_and_said(tmp_path, capsys):
    calls: list[str] = []
    choices = MeasuredChoices(folder=tmp_path)
    assert choices.choose("attention", ways(calls, sdpa=0.03, eager=0.001)) == "eager"
    assert calls == ["sdpa", "eager"] * 4  # one round to warm up and three that count, in turn
    assert choices.made == {"attention": "eager"}
    said = capsys.readouterr().out
    assert said.startswith("attention: eager (measured on this machine: sdpa 3")
    assert "; eager 1" in said


def test_a_way_that_is_hardly_faster_does_not_replace_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(measured_choices, "_times", lambda *_: {"first": 1.0, "second": 0.97})
    assert MeasuredChoices(folder=tmp_path).choose("width", ways([], first=0, second=0)) == "first"
    monkeypatch.setattr(measured_choices, "_times", lambda *_: {"first": 1.0, "third": 0.9})
    assert MeasuredChoices(folder=tmp_path).choose("width", ways([], first=0, third=0)) == "third"


def test_the_machine_remembers_a_choice_by_what_it_depends_on(tmp_path):
    first, again, other = [], [], []
    MeasuredChoices(folder=tmp_path).choose("a", ways(first, x=0.02, y=0), key={"hidden": 8})
    chosen = MeasuredChoices(folder=tmp_path).choose("a", ways(again, x=0, y=0.02), key={"hidden": 8})
    assert (chosen, again) == ("y", [])
    MeasuredChoices(folder=tmp_path).choose("a", ways(other, x=0, y=0), key={"hidden": 16})
    assert other


def test_of_two_runs_that_measure_at_once_the_first_decides(tmp_path):
    def meanwhile() -> None:
        assert MeasuredChoices(folder=tmp_path).choose("a", ways([], x=0, y=0.02)) == "x"

    second = MeasuredChoices(folder=tmp_path)
    assert second.choose("a", {"x": meanwhile, "y": lambda: None}) == "x"  # alone it would choose y
    assert [json.loads(path.read_text())["way"] for path in tmp_path.iterdir()] == ["x"]


def test_a_choice_of_the_checkpoint_is_kept_and_said(tmp_path, capsys):
    calls: list[str] = []
    choices = MeasuredChoices({"a": "x"}, folder=tmp_path)
    assert choices.choose("a", ways(calls, y=0, x=0.02)) == "x"
    assert not calls
    assert capsys.readouterr().out == "a: x (as the checkpoint has it)\n"
    assert choices.choose("a", ways(calls, y=0, x=0.02)) == "x"
    assert not capsys.readouterr().out
    assert MeasuredChoices({"a": "gone"}, folder=tmp_path).choose("a", ways(calls, y=0, x=0.02)) == "y"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"way": "x"}'])
def test_a_file_that_cannot_be_read_is_measured_anew(tmp_path, content):
    MeasuredChoices(folder=tmp_path).choose("a", ways([], x=0.02, y=0))
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    calls: list[str] = []
    assert MeasuredChoices(folder=tmp_path).choose("a", ways(calls, x=0, y=0.02)) == "x"
    assert calls
    assert json.loads(path.read_text())["way"] == "x"


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(tmp_path):
    (tmp_path / "file").touch()
    choices = MeasuredChoices(folder=tmp_path / "file" / "choices")
    assert choices.choose("a", ways([], x=0.02, y=0)) == "y"


def test_without_measuring_and_with_one_way_it_is_the_first(tmp_path):
    calls: list[str] = []
    assert MeasuredChoices(folder=tmp_path, measures=False).choose("a", ways(calls, x=0.02, y=0)) == "x"
    assert MeasuredChoices(folder=tmp_path).choose("a", ways(calls, y=0)) == "y"
    assert not calls
    assert not list(tmp_path.iterdir())


def test_on_one_thread_the_clock_is_the_processor_s(tmp_path, monkeypatch):
    clock = iter([0, 5, 5, 6, 6, 7, 7, 9]).__next__  # the first way takes 5 and 1, the second 1 and 2
    monkeypatch.setattr(measured_choices.time, "process_time", clock)
    choices = MeasuredChoices(folder=tmp_path)
    assert choices.choose("a", ways([], x=0, y=0), rounds=2, on_one_thread=True) == "x"


def test_the_time_of_one_thing_is_measured_once_per_machine(tmp_path):
    calls: list[str] = []
    run = ways(calls, product=0.01)["product"]
    first = MeasuredChoices(folder=tmp_path).seconds_of("product", run, key={"rows": 4})
    assert first >= 0.01
    assert len(calls) > 1
    calls.clear()
    # Another run finds the figure, also where it may not choose; other sizes are measured anew.
    later = MeasuredChoices(folder=tmp_path, measures=False)
    assert later.seconds_of("product", run, key={"rows": 4}) == first
    assert not calls
    # A rank may time it alone, and after a week it is timed again: the least is kept.
    slower = ways(calls, product=0.02)["product"]
    assert later.seconds_of("product", slower, key={"rows": 4}, alone=True) == first
    assert calls
    calls.clear()
    (written,) = tmp_path.iterdir()
    os.utime(written, (0, 0))
    assert later.seconds_of("product", lambda: calls.append("fast"), key={"rows": 4}) < first
    assert calls
    assert written.stat().st_mtime > 0
    later.seconds_of("product", run, key={"rows": 8})
    assert calls
    assert later.made == {}
