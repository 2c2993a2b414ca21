"""Which actor a run keeps, and in which folder it ends."""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.export.manifest import Manifest, changed_files
from dschat.export.provenance import step_provenance
from dschat.export.upstream import verify_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.monitoring.best_actor import OBJECTIVE, Exports
from dschat.rlhf.monitoring.gains import Answers
from dschat.rlhf.roles import engine_specs


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


def exports(base: Path, *flags: str) -> tuple[Exports, torch.nn.Module, Path]:
    """The exports of a run below the folder of `base`, its live actor, and its output folder."""
    output = base.parent / "out"
    argv = [f"--actor_model_name_or_path={base}", "--critic_model_name_or_path=reward", *flags]
    args = parse_arguments("rlhf", [*argv, f"--output_dir={output}"])
    rows = Rows.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    model = AutoModelForCausalLM.from_pretrained(base)
    engine = SimpleNamespace(actor=model, specs=engine_specs(args)[:1], ema=None)
    made = Exports(
        engine,
        load_tokenizer(str(base)),
        partial(step_provenance, args.description, data=SplitData(rows, rows, {}, "")),
        output_dir=args.run.output_dir,
        export_actor=args.guard.export_actor,
    )
    return made, model, output


def move_to(model: torch.nn.Module, value: float) -> None:
    """A mark that tells one actor from another."""
    with torch.no_grad():
        model.model.norm.weight.fill_(value)


def mark(folder: Path) -> float:
    return load_file(folder / "model.safetensors")["model.norm.weight"][0].item()


def offer(kept: Exports, step: int, objective: float, *, noise: float = 0.0, **more: bool) -> None:
    """An evaluation of three prompts whose objectives lie so far around their mean."""
    values = [objective - noise, objective, objective + noise]
    answers = Answers([3, 1, 2], [value + 1 for value in values], values)
    figures = {OBJECTIVE: objective, "eval_score": objective + 1, "seconds_evaluation": 1.0}
    kept.offer(step, figures, answers, **more)


def offer_three(kept: Exports, model: torch.nn.Module) -> None:
    for step, objective in enumerate((1.0, 3.0, 2.0)):
        move_to(model, step + 1)
        offer(kept, step, objective)


def test_the_best_so_far_is_on_disk_while_the_run_goes_on(base):
    kept, model, output = exports(base)
    offer_three(kept, model)
    assert kept.best_step == 1
    assert mark(output / "best") == 2
    assert "| ppo_step | 1 |" in (output / "best" / "README.md").read_text()


def test_an_equal_evaluation_replaces_nothing(base):
    kept, model, output = exports(base)
    offer_three(kept, model)
    offer(kept, 3, 3.0)
    offer(kept, 4, math.nan)
    assert kept.best_step == 1
    assert mark(output / "best") == 2


def test_an_evaluation_without_a_number_is_never_the_best(base):
    kept, _, output = exports(base)
    offer(kept, 0, math.nan)
    assert kept.best_step is None
    assert not (output / "best").exists()
    offer(kept, 1, -5.0)
    assert kept.best_step == 1


@pytest.mark.slow
def test_the_actor_is_the_best_by_default_moved_there_over_an_older_one(base):
    kept, model, output = exports(base)
    (output / "actor").mkdir(parents=True)
    (output / "actor" / "notes.txt").write_text("someone's own")
    offer_three(kept, model)
    summary = kept.finish(2, {"score": 1.0})
    assert (summary["actor_step"], summary["best_step"], summary[f"best_{OBJECTIVE}"]) == (1, 1, 3.0)
    assert (summary[f"initial_{OBJECTIVE}"], summary["score_gain"], summary["objective_gain_stderr"]) == (
        1,
        2,
        0,
    )
    assert summary["verdict"].startswith(
        "better than the start: score +2 +- 0, score - beta KL +2 +- 0 (3 ans"
    )
    card = (output / "actor" / "README.md").read_text()
    assert f"## Verdict\n\n{summary['verdict']}" in card
    assert "| ppo_step | 1 |" in card
    assert mark(output / "actor") == 2
    assert (output / "actor" / "notes.txt").exists()
    assert not (output / "best").exists()
    verify_model(str(output / "actor"), "--actor_model_name_or_path", "language_model")  # promises hold


def test_the_actor_is_the_last_where_that_is_asked_for_and_the_best_stays_beside_it(base):
    kept, model, output = exports(base, "--export_actor=last")
    offer_three(kept, model)
    assert kept.finish(2, {"score": 1.0})["actor_step"] == 2
    assert mark(output / "actor") == 3
    assert mark(output / "best") == 2


# Each around its mean by so much in the first and the last prompt: against a start without noise the mean of
# the differences has the error noise / sqrt(3), so 2 is 1.2.
@pytest.mark.slow
def test_an_actor_that_is_better_within_noise_is_no_best_one(base):
    kept, model, output = exports(base)
    offer(kept, 0, 1.0)
    move_to(model, 5)
    offer(kept, 1, 2.0, noise=2.0)
    assert kept.best_step == 0
    offer(kept, 2, 2.3, noise=2.0)
    assert kept.best_step == 2
    move_to(model, 6)
    offer(kept, 3, 2.4, noise=2.0)  # against the best so far: all answers are better by 0.1
    assert (kept.best_step, mark(output / "best")) == (3, 6)


def finished(base: Path, last: float, **more: float) -> tuple[dict, float]:
    """The summary and the actor of a run whose start has 1.0, and whose last PPO step, 7, has `last`."""
    kept, model, output = exports(base)
    move_to(model, 4)
    offer(kept, 0, 1.0)
    move_to(model, 5)
    offer(kept, 7, last, **more)
    return kept.finish(7, {}), mark(output / "actor")


def test_where_nothing_is_better_the_actor_is_the_last_unless_that_is_worse(base, capsys):
    summary, marked = finished(base, 0.9, noise=2.0)  # within noise
    assert (summary["actor_step"], summary["best_step"], marked) == (7, 0, 5)
    assert summary["verdict"].startswith("no different from the start by more than noise: score -0.1 +- 1.2")
    assert not (base.parent / "out" / "best").exists()
    told = capsys.readouterr().out
    assert "no actor of which the guard did not warn is better than the start by more than noise" in told
    assert told.rstrip().splitlines()[-1] == f"did PPO help? actor/ is {summary['verdict']}"


def test_where_the_last_is_worse_the_actor_is_the_start(base):
    summary, marked = finished(base, 0.9)
    assert (summary["actor_step"], summary["best_step"], marked) == (0, 0, 4)
    assert summary["verdict"].startswith(
        "the start itself: the last actor is worse than the start: score -0.1"
    )
    assert (summary["score_gain"], summary["objective_gain"]) == (0, 0)


def test_where_the_guard_warned_of_the_last_the_actor_is_the_start(base):
    summary, marked = finished(base, 0.9, noise=2.0, is_warned_of=True)
    assert (summary["actor_step"], marked) == (0, 4)
    assert summary["verdict"].startswith(
        "the start itself, as no evaluation before the guard's warnings was better by more than noise: give "
        "a smaller --eval_interval or a larger --kl_coef. The last actor, of which the guard warned, is no d"
    )


def test_without_an_evaluation_the_actor_is_the_last(base):
    kept, model, output = exports(base)
    move_to(model, 7)
    assert kept.finish(5, {"score": 1.0}) == {"actor_step": 5}
    assert mark(output / "actor") == 7


def test_it_goes_on_from_its_state_as_json(base):
    kept, model, _ = exports(base)
    offer_three(kept, model)
    again, other, output = exports(base)
    again.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    move_to(other, 9)
    offer(again, 3, 2.5)
    assert again.finish(3, {})["actor_step"] == 1
    assert mark(output / "actor") == 2


def test_a_run_that_goes_back_knows_the_later_actor_in_best(base):
    kept, model, _ = exports(base)
    offer(kept, 0, 1.0)
    saved = kept.state_dict()
    move_to(model, 5)
    offer(kept, 1, 3.0)
    again, other, output = exports(base)
    again.load_state_dict(saved)
    assert again.best_step == 1
    move_to(other, 6)
    offer(again, 2, 2.0)
    assert mark(output / "best") == 5
    assert again.finish(2, {})["best_step"] == 1
    assert not (output / "best.json").exists()


def test_an_actor_in_best_that_nothing_is_known_of_is_replaced(base, capsys):
    kept, model, output = exports(base)
    offer(kept, 0, 1.0)
    said, saved = (output / "best.json").read_text(), kept.state_dict()
    move_to(model, 5)
    offer(kept, 1, 3.0)
    (output / "best.json").write_text(said)  # killed between the model and the note about it
    again, other, _ = exports(base)
    again.load_state_dict(saved)
    assert "which model best/ holds is not known" in capsys.readouterr().out
    move_to(other, 6)
    offer(again, 2, 0.5)
    assert (again.best_step, mark(output / "best")) == (2, 6)


def test_a_best_actor_that_finds_no_room_leaves_the_earlier_one(base, monkeypatch, capsys):
    kept, model, output = exports(base)
    offer(kept, 0, 1.0)
    marked = mark(output / "best")

    def full(*_, **__) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        move_to(model, 5)
        offer(kept, 1, 3.0)
    told = capsys.readouterr().out
    for part in ("WARNING: PPO step 1", "No space left", "Make room", "Kept is that of PPO step 0"):
        assert part in told
    assert (kept.best_step, mark(output / "best")) == (0, marked)
    offer(kept, 2, 2.0)
    assert (kept.best_step, mark(output / "best")) == (2, 5)


def killed_at(number: int, monkeypatch, work) -> bool:
    """Do the work, but die of the file operation with that number; whether it came to that."""
    done = []

    def dying(operation):
        def operate(*args, **options):
            done.append(operation)
            if len(done) == number:
                raise KeyboardInterrupt
            return operation(*args, **options)

        return operate

    with monkeypatch.context() as patched:
        for place, name in ((Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (os, "link")):
            patched.setattr(place, name, dying(getattr(place, name)))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_end_loses_no_best_actor(base, monkeypatch):
    """The next run has the state that was saved before the end, and the same last actor."""
    kept, model, output = exports(base)
    (output / "actor").mkdir(parents=True)
    offer_three(kept, model)
    saved, before = json.loads(json.dumps(kept.state_dict())), base.parent / "before"
    output.rename(before)

    def resumed() -> Exports:
        run, *_ = exports(base)
        run.load_state_dict(saved)
        return run

    number = 1  # of the first operation: one without a kill in between ends the loop
    while True:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(before, output)
        run = resumed()
        if not killed_at(number, monkeypatch, lambda run=run: run.finish(2, {"score": 1.0})):
            break
        whole = [name for name in ("best", "actor") if (output / name / "config.json").is_file()]
        assert whole, f"operation {number} leaves no best actor"
        assert resumed().finish(2, {"score": 1.0})["actor_step"] == 1
        assert mark(output / "actor") == 2
        assert not list(output.glob("best/*"))
        assert not changed_files(Manifest.read(output / "actor"), output / "actor")
        number += 1
    assert number > 15


@pytest.mark.slow
def test_an_actor_is_named_for_the_weights_that_are_there(base, capsys):
    """Finished with the best, again with the last, and again with the best, which is gone by then."""
    kept, model, output = exports(base)
    offer_three(kept, model)
    saved = kept.state_dict()
    assert kept.finish(2, {})["actor_step"] == 1
    for flag, step in (("best", 1), ("last", 2), ("best", 2)):
        again, other, _ = exports(base, f"--export_actor={flag}")
        move_to(other, 3)
        again.load_state_dict(saved)
        assert again.finish(2, {})["actor_step"] == step
        assert mark(output / "actor") == {1: 2, 2: 3}[step]
    told = capsys.readouterr().out
    assert "which model best/ holds is not known" in told
    assert told.count("actor/ is that after PPO step 1 (--export_actor best)") == 2


def test_a_best_actor_whose_weights_were_replaced_is_not_exported_as_such(base, capsys):
    kept, model, output = exports(base)
    offer_three(kept, model)
    move_to(model, 9)
    model.save_pretrained(output / "best")
    assert kept.finish(2, {})["actor_step"] == 2
    assert mark(output / "actor") == 9
    assert "the best model, that after PPO step 1, is not in" in capsys.readouterr().out
