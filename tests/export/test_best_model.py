"""The best model of a run: kept in best/, moved at the end, and found again by a resumed run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exported_models import provenance, with_random_head

from dschat.errors import UserError
from dschat.export.best_model import BestModel
from dschat.export.eval_command import EvalCommand
from dschat.export.manifest import MANIFEST


def copied(model: Path, step: str = "reward") -> Callable[[Path], None]:
    """An export that copies this model, with the name of a step that tells one copy from another."""

    def export(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))

    return export


def kept(output: Path, model: Path, step: int = 3) -> BestModel:
    output.mkdir(exist_ok=True)
    best = BestModel(str(output), target="actor", unit="PPO step")
    best.keep(step, {"loss": 0.5}, copied(model))
    return best


def test_before_the_first_there_is_no_best_model(tmp_path):
    best = BestModel(str(tmp_path), target="", unit="step")
    assert not best.is_there()
    assert best.state_dict() == {"manifest": None, "step": None, "facts": {}}


def test_without_an_output_folder_the_step_alone_is_kept(tmp_path):
    best = BestModel(None, target="", unit="step")
    best.keep(3, {"loss": 0.5}, lambda folder: pytest.fail("nothing is to be written"))
    assert (best.step, best.facts) == (3, {"loss": 0.5})
    assert best.is_there()
    best.forget(weights=True)


def test_the_best_model_is_moved_to_its_place_at_the_end(reward, tmp_path):
    output = tmp_path / "out"
    best = kept(output, reward)
    assert json.loads((output / "best.json").read_text())["step"] == 3
    assert best.is_there()
    best.move(provenance("reward"))
    assert (output / "actor" / "model.safetensors").read_bytes() == (
        reward / "model.safetensors"
    ).read_bytes()
    assert not (output / "best").exists()
    assert best.is_there()  # in its place now, as a run that was killed here finds it
    best.forget(weights=True)
    assert sorted(path.name for path in output.iterdir()) == ["actor"]


def test_a_model_that_cannot_be_written_leaves_the_earlier_one_the_best(reward, tmp_path, capsys):
    def full(folder: Path) -> None:
        raise UserError("the disk is full.")

    best = kept(tmp_path / "out", reward)
    best.keep(5, {"loss": 0.1}, full)
    assert (best.step, best.facts) == (3, {"loss": 0.5})
    assert best.is_there()
    warning = "PPO step 5 has the best model so far, but the disk is full. Kept is that of PPO step 3."
    assert warning in capsys.readouterr().out


def test_weights_that_are_gone_or_changed_are_warned_of(reward, tmp_path, capsys):
    best = kept(tmp_path / "out", reward)
    with_random_head(tmp_path / "out" / "best")
    assert not best.is_there()
    assert "the best model, that after PPO step 3, is not in" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "best")
    assert not best.is_there()


def test_a_resumed_run_goes_on_with_the_later_model_that_best_holds(reward, tmp_path):
    best = kept(tmp_path / "out", reward)
    of_checkpoint = best.state_dict()
    best.keep(5, {"loss": 0.1}, copied(reward, "dpo"))
    resumed = BestModel(str(tmp_path / "out"), target="actor", unit="PPO step")
    resumed.load_state_dict(of_checkpoint)
    assert (resumed.step, resumed.facts) == (5, {"loss": 0.1})


def test_a_run_that_was_killed_before_it_wrote_best_json_knows_no_best_model(reward, tmp_path, capsys):
    best = kept(tmp_path / "out", reward)
    of_checkpoint = best.state_dict()
    copied(reward, "dpo")(tmp_path / "out" / "best")  # a later export, and killed
    resumed = BestModel(str(tmp_path / "out"), target="actor", unit="PPO step")
    resumed.load_state_dict(of_checkpoint)
    assert resumed.step is None
    assert "which model best/ holds is not known" in capsys.readouterr().out


def test_without_best_json_the_state_of_the_checkpoint_counts(reward, tmp_path):
    best = kept(tmp_path / "out", reward)
    (tmp_path / "out" / "best.json").unlink()
    resumed = BestModel(str(tmp_path / "out"), target="actor", unit="PPO step")
    resumed.load_state_dict(best.state_dict())
    assert (resumed.step, resumed.facts) == (3, {"loss": 0.5})


class Counting(EvalCommand):
    """A command that finds how often it was run, and notes where."""

    folders: list[str] = []  # noqa: RUF012

    def run(self, folder, step):
        self.folders.append(f"{folder.name} {step}")
        return {"eval/runs": len(self.folders)}


def test_a_command_measures_each_best_model_once_and_that_of_the_end(reward, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    command, logged = Counting("", 1.0), []
    command.folders = []
    best = BestModel(str(output), target="actor", unit="PPO step", command=command)
    best.log = lambda step, numbers: logged.append((step, numbers))
    phases = []
    best.end_of = lambda phase: phases.append((phase, len(command.folders)))
    best.keep(3, {"loss": 0.5}, copied(reward))
    assert phases == [("saving", 0), ("evaluation", 1)]  # the command's time is none of saving
    assert json.loads((output / "best.json").read_text())["facts"]["eval_command"] == {"eval/runs": 1}
    assert best.measured(3, takes_best=True) == {"eval/runs": 1}
    assert best.measured(9, takes_best=False) == {"eval/runs": 2}
    assert command.folders == ["best 3", "actor 9"]
    assert logged == [(3, {"eval/runs": 1}), (9, {"eval/runs": 2})]
    # A run that was killed while the command ran on the best model.
    again = BestModel(str(output), target="actor", unit="PPO step", command=command)
    again.load_state_dict(best.state_dict() | {"facts": {"loss": 0.5}})
    del again.facts["eval_command"]
    assert again.measured(3, takes_best=True) == {"eval/runs": 3}
    assert BestModel(None, target="", unit="step", command=command).measured(3, takes_best=True) == {}
