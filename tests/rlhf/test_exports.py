"""Which actor a run keeps, and in which folder it ends."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.manifest import Manifest, changed_files, receive_model
from dschat.models.tokenizer import load_tokenizer
from dschat.rlhf.exports import OBJECTIVE, Exports
from dschat.rlhf.guard import Guard
from dschat.rlhf.training import Watch


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


def exports(base: Path, *flags: str) -> tuple[Exports, torch.nn.Module, Path]:
    """The exports of a run below the folder of `base`, its live actor, and its output folder."""
    output = base.parent / "out"
    argv = [f"--actor_model_name_or_path={base}", "--critic_model_name_or_path=reward", *flags]
    args = parse_arguments("rlhf", [*argv, f"--output_dir={output}"])
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    model = AutoModelForCausalLM.from_pretrained(base)
    engine = SimpleNamespace(actor=model, critic=None, ema=None)
    data = SplitData(rows, rows, {}, "")
    return Exports(args, engine, load_tokenizer(str(base)), data), model, output


def move_to(model: torch.nn.Module, value: float) -> None:
    """A mark that tells one actor from another."""
    with torch.no_grad():
        model.model.norm.weight.fill_(value)


def mark(folder: Path) -> float:
    return load_file(folder / "model.safetensors")["model.norm.weight"][0].item()


def offer_three(kept: Exports, model: torch.nn.Module) -> None:
    for step, objective in enumerate((1.0, 3.0, 2.0)):
        move_to(model, step + 1)
        kept.offer(step, {OBJECTIVE: objective, "seconds_evaluation": 1.0})


def test_the_best_so_far_is_on_disk_while_the_run_goes_on(base):
    kept, model, output = exports(base)
    offer_three(kept, model)
    assert kept.best_step == 1
    assert mark(output / "best") == 2
    assert "| ppo_step | 1 |" in (output / "best" / "README.md").read_text()


def test_an_equal_evaluation_replaces_nothing(base):
    kept, model, output = exports(base)
    offer_three(kept, model)
    kept.offer(3, {OBJECTIVE: 3.0})
    kept.offer(4, {OBJECTIVE: math.nan})
    assert kept.best_step == 1
    assert mark(output / "best") == 2


def test_an_evaluation_without_a_number_is_never_the_best(base):
    kept, _, output = exports(base)
    kept.offer(0, {OBJECTIVE: math.nan})
    assert kept.best_step is None
    assert not (output / "best").exists()
    kept.offer(1, {OBJECTIVE: -5.0})
    assert kept.best_step == 1


def test_the_actor_is_the_best_by_default_moved_there_over_an_older_one(base):
    kept, model, output = exports(base)
    (output / "actor").mkdir(parents=True)
    (output / "actor" / "notes.txt").write_text("someone's own")
    offer_three(kept, model)
    summary = kept.finish(2, {"score": 1.0})
    assert summary == {"actor_step": 1, "best_step": 1, f"best_{OBJECTIVE}": 3.0}
    assert mark(output / "actor") == 2
    assert (output / "actor" / "notes.txt").exists()
    assert not (output / "best").exists()
    receive_model(str(output / "actor"), "--actor_model_name_or_path", "language_model")  # promises hold


def test_the_actor_is_the_last_where_that_is_asked_for_and_the_best_stays_beside_it(base):
    kept, model, output = exports(base, "--export_actor=last")
    offer_three(kept, model)
    assert kept.finish(2, {"score": 1.0})["actor_step"] == 2
    assert mark(output / "actor") == 3
    assert mark(output / "best") == 2


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
    again.offer(3, {OBJECTIVE: 2.5})
    assert again.finish(3, {})["actor_step"] == 1
    assert mark(output / "actor") == 2


def test_a_run_that_goes_back_knows_the_later_actor_in_best(base):
    kept, model, _ = exports(base)
    kept.offer(0, {OBJECTIVE: 1.0})
    saved = kept.state_dict()
    move_to(model, 5)
    kept.offer(1, {OBJECTIVE: 3.0})
    again, other, output = exports(base)
    again.load_state_dict(saved)
    assert again.best_step == 1
    move_to(other, 6)
    again.offer(2, {OBJECTIVE: 2.0})
    assert mark(output / "best") == 5
    assert again.finish(2, {})["best_step"] == 1
    assert not (output / "best.json").exists()


def test_an_actor_in_best_that_nothing_is_known_of_is_replaced(base, capsys):
    kept, model, output = exports(base)
    kept.offer(0, {OBJECTIVE: 1.0})
    said, saved = (output / "best.json").read_text(), kept.state_dict()
    move_to(model, 5)
    kept.offer(1, {OBJECTIVE: 3.0})
    (output / "best.json").write_text(said)  # killed between the model and the note about it
    again, other, _ = exports(base)
    again.load_state_dict(saved)
    assert "which actor best/ holds is not known" in capsys.readouterr().out
    move_to(other, 6)
    again.offer(2, {OBJECTIVE: 0.5})
    assert (again.best_step, mark(output / "best")) == (2, 6)


def test_a_best_actor_that_finds_no_room_leaves_the_earlier_one(base, monkeypatch, capsys):
    kept, model, output = exports(base)
    kept.offer(0, {OBJECTIVE: 1.0})
    marked = mark(output / "best")

    def full(*_, **__) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        move_to(model, 5)
        kept.offer(1, {OBJECTIVE: 3.0})
    told = capsys.readouterr().out
    for part in ("WARNING: PPO step 1", "No space left", "Make room", "Kept is that of PPO step 0"):
        assert part in told
    assert (kept.best_step, mark(output / "best")) == (0, marked)
    kept.offer(2, {OBJECTIVE: 2.0})
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


def test_a_kill_at_any_moment_of_the_end_loses_no_best_actor(base, monkeypatch):
    """The next run has the state that was saved before the end, and the same last actor."""
    kept, model, output = exports(base)
    (output / "actor").mkdir(parents=True)
    offer_three(kept, model)
    saved, before = json.loads(json.dumps(kept.state_dict())), base.parent / "before"
    output.rename(before)

    def resumed() -> Exports:
        run = Exports(kept._args, kept._engine, kept._tokenizer, kept._data)
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
    assert "which actor best/ holds is not known" in told
    assert told.count("actor/ is that after PPO step 1 (--export_actor best)") == 2


def test_a_best_actor_whose_weights_were_replaced_is_not_exported_as_such(base, capsys):
    kept, model, output = exports(base)
    offer_three(kept, model)
    move_to(model, 9)
    model.save_pretrained(output / "best")
    assert kept.finish(2, {})["actor_step"] == 2
    assert mark(output / "actor") == 9
    assert "the best actor, that after PPO step 1, is not in" in capsys.readouterr().out


class Recorded:
    """An evaluator of prepared figures and an exporter that remembers."""

    def __init__(self) -> None:
        self.num_evaluations, self.offered = 0, []

    def figures(self) -> dict[str, float]:
        self.num_evaluations += 1
        return {"eval_score": 1.0}

    def offer(self, step: int, evaluation: dict[str, float]) -> None:
        self.offered.append(step)


def watched(kls: list[float], *, interval: int, patience: int = 2) -> tuple[Recorded, Watch, list[bool]]:
    """What a watch does over PPO steps of these KLs, and in which there was an evaluation."""
    recorded = Recorded()
    args = parse_arguments("rlhf", ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b",
                                    f"--patience={patience}", "--max_kl=1"])  # fmt: skip
    watch = Watch(recorded, Guard(args.guard), recorded, interval)
    figures = [watch.after(0, {})[0]]
    for step, kl in enumerate(kls, 1):
        figures.append(watch.after(step, {"kl": kl}, is_last=step == len(kls))[0])
        if watch.guard.stopped_by:
            break
    return recorded, watch, ["eval_score" in values for values in figures]


def test_evaluations_stand_at_the_ends_and_at_the_interval():
    _, _, evaluated = watched([0.1] * 5, interval=2)
    assert evaluated == [True, False, True, False, True, True]


def test_what_the_guard_warns_of_is_no_best_actor():
    recorded, _, _ = watched([0.1, 5.0, 0.1, 0.1], interval=1)
    assert recorded.offered == [0, 1, 3, 4]


def test_a_stopped_run_ends_with_an_evaluation():
    recorded, watch, evaluated = watched([0.1, 5.0, 5.0, 5.0], interval=10)
    assert watch.guard.stopped_by == "kl"
    assert evaluated == [True, False, False, True]
    assert recorded.offered == [0]
