"""The examples learn what they say."""

import json
import re
from pathlib import Path

import pytest
from processes import python

from examples import ppo_minimal


@pytest.mark.slow
def test_ppo_on_one_page_learns_to_count(monkeypatch, capsys):
    monkeypatch.setattr(ppo_minimal, "STEPS", 31)
    curve = ppo_minimal.train()
    assert curve[0] < 0.1
    assert curve[30] > 0.3
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("step   0  score 0.0")
    assert "KL per token 0.000" in first


def test_it_is_one_page():
    assert len(Path(ppo_minimal.__file__).read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("folder", ["step1_sft", "step2_reward", "step3_ppo"])
def test_every_recipe_stands_in_the_readme_of_its_step(folder):
    """The recipes run in tests/steps/test_launchers.py, those of the demo in tests/test_readme.py too."""
    path = Path(ppo_minimal.__file__).parents[1] / folder
    named = set(re.findall(r"`(run_\w[\w.]*\.sh)`", (path / "README.md").read_text(encoding="utf-8")))
    assert named == {recipe.name for recipe in path.glob("run_*.sh")}


def test_the_readme_shows_the_curve_that_the_page_says():
    """Score and KL of its table are those of the docstring, which the test above holds to what it learns."""
    shown = (Path(ppo_minimal.__file__).with_name("README.md")).read_text(encoding="utf-8")
    told = re.findall(r"step +(\d+)  score ([\d.]+)  KL per token ([\d.]+)", ppo_minimal.__doc__)
    for row, values in zip(("step", "score", "KL per token, nats"), zip(*told, strict=True), strict=True):
        assert f"| {row} | {' | '.join(values)} |" in shown


def cells() -> list[dict]:
    """The notebook's cells of code."""
    notebook = Path(ppo_minimal.__file__).with_name("quickstart.ipynb")
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path):
    """In a shortened setting, as one program."""
    code = "\n".join("".join(cell["source"]) for cell in cells())
    (tmp_path / "notebook.py").write_text(f"import matplotlib\nmatplotlib.use('agg')\n{code}\n")
    said = python(tmp_path / "notebook.py", cwd=tmp_path, env={"DSCHAT_NOTEBOOK_SHORT": "1"}).stdout
    assert "next, PPO:" in said
    assert "checked success" in said
    assert (tmp_path / "quickstart_notebook" / "ppo" / "actor" / "config.json").is_file()
