"""Updates that are not finite are skipped, alike in every precision, at every stage and on every rank."""

import json
from types import SimpleNamespace

import pytest
from processes import ROOT, python

from dschat.arguments import RunArguments
from dschat.engines.skipped_steps import SkippedSteps
from dschat.errors import UserError
from dschat.runs.atomic_folder import put_in_place


@pytest.fixture(scope="module", params=[1, 2])
def seen(request, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("skipped") / "seen.json"
    python(ROOT / "tests" / "workers" / "skipped_steps.py", output, ranks=request.param)
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_skipped_step_changes_no_weight_no_moment_and_no_learning_rate(seen):
    assert len(seen) == 8
    for setting, run in seen.items():
        first, loss, gradient, last = run["steps"]
        assert [s["because"] for s in run["steps"]] == [None, "loss", "gradient", None], setting
        assert loss["change"] == gradient["change"] == 0, setting
        assert first["change"] > 5e-3, setting
        assert last["change"] > 5e-3, setting
        assert first["rate"] == loss["rate"] == gradient["rate"] > last["rate"], setting
        # The moments show in the step after: it is that of a run which met nothing else.
        assert run["apart"] == 0, setting


def engine(reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(skip_reason=reason)


def test_it_is_counted_and_said_sparingly(capsys):
    skipped = SkippedSteps(RunArguments(max_skipped_steps=0))
    counts = [skipped.note(engine("loss"), step=n, model="critic") for n in range(1, 10)]
    counts.append(skipped.note(engine(None), step=10, model="critic"))
    assert counts == [1] * 9 + [0]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in said] == [" step 1", " step 2", " step 4", " step 8"]
    assert "the loss of the critic is not finite" in said[0]


def test_only_too_many_in_a_row_of_one_model_end_the_run(tmp_path):
    run = RunArguments(max_skipped_steps=2, output_dir=str(tmp_path))
    skipped = SkippedSteps(run)
    for reason in ("loss", "loss", None, "gradient", "gradient"):
        skipped.note(engine(reason), step=1, model="actor")
        skipped.note(engine(None), step=1, model="critic")
    with pytest.raises(
        UserError, match=r"gradient of the actor was not finite in 3 .* No checkpoint was made"
    ):
        skipped.note(engine("gradient"), step=1, model="actor")


def test_a_run_that_goes_on_goes_on_counting():
    run = RunArguments(max_skipped_steps=2)
    skipped, resumed = SkippedSteps(run), SkippedSteps(run)
    for _ in range(2):
        skipped.note(engine("loss"), step=1, model="actor")
    resumed.load_state_dict(json.loads(json.dumps(skipped.state_dict())))
    with pytest.raises(UserError, match="in 3 optimiser steps in a row"):
        resumed.note(engine("loss"), step=2, model="actor")


def test_the_end_names_the_newest_whole_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)  # never finished
    for serial, name in enumerate(("step_00000012", "step_00000004")):  # the run went back
        (tmp_path / name).mkdir()
        put_in_place(tmp_path / name, tmp_path / "checkpoints" / name, {}, serial=serial)
    skipped = SkippedSteps(RunArguments(max_skipped_steps=1, output_dir=str(tmp_path)))
    skipped.note(engine("loss"), step=1)
    with pytest.raises(
        UserError, match=r"checkpoint is .*step_00000004: go on .*--resume_from_checkpoint latest"
    ):
        skipped.note(engine("loss"), step=2)
