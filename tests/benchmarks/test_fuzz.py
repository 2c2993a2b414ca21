"""benchmarks/fuzz.py in small: whatever is given to it is accepted, or refused in one readable line."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from dschat.errors import UserError

EXAMPLES = {
    "data: rows": 300,
    "data: bytes": 300,
    "data: entries": 100,
    "chat templates": 30,
    "manifests": 150,
    "model names": 20,
    "model folders": 5,
    "adapter files": 150,
    "arguments": 100,
    "programs' arguments": 150,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_every_target_is_tried_here():
    assert set(EXAMPLES) == set(fuzz.TARGETS)
    assert sum(share for share, _ in fuzz.TARGETS.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_input_is_accepted_or_refused_in_one_readable_line(name, folder, monkeypatch):
    monkeypatch.setattr(fuzz, "BOMBS", [])  # tests/data/test_templates.py has them

    @settings(max_examples=EXAMPLES[name], database=None, suppress_health_check=list(HealthCheck))
    @given(chance=st.randoms(use_true_random=False))
    def attempt(chance):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            fuzz.attempt(fuzz.TARGETS[name][1], chance, folder)

    attempt()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (KeyError("x"), "KeyError"),
        (UserError(""), "it is empty"),
        (UserError("it failed: OSError('x')"), "it shows 'SError('"),
        (SystemExit(2), "exit code 2"),
        (RecursionError("deep"), "RecursionError"),
    ],
)
def test_what_is_neither_counts_as_a_crash(error, problem, folder, monkeypatch):
    def target(chance, folder):
        raise error

    monkeypatch.setitem(fuzz.TARGETS, "broken", (1.0, target))
    result = fuzz.fuzz("broken", 3, seed=1, folder=folder, limit=60)
    assert (result.crashes, result.accepted, result.refused) == (3, 0, 0)
    assert problem in f"{result.examples[0]['kind']} {result.examples[0]['message']}"
    assert result.examples[0]["times"] == "3"


@pytest.mark.slow
def test_a_refusal_is_counted_and_the_same_seed_makes_the_same_inputs(folder):
    one, two = (fuzz.fuzz("data: rows", 60, seed=3, folder=folder, limit=60) for _ in range(2))
    assert (one.accepted, one.refused) == (two.accepted, two.refused)
    assert one.accepted + one.refused == 60
    assert min(one.accepted, one.refused) > 5


def test_every_row_that_inputs_are_made_of_is_sound(folder):
    for name, row in fuzz.ROWS.items():
        path = folder / "sound.jsonl"
        path.write_text(json.dumps(row) + "\n")
        fuzz.read_all(str(path), fuzz.Format(name), folder, row_named=True)
