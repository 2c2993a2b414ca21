import json
import sys
import time

import pytest

from dschat.arguments import RunArguments
from dschat.errors import UserError
from dschat.export import eval_command
from dschat.export.eval_command import EvalCommand, numbers_of


def command(tmp_path, script, seconds=60.0):
    (tmp_path / "measure.py").write_text(script)
    return EvalCommand(f"{sys.executable} {tmp_path}/measure.py {{model}}", seconds, tmp_path)


def test_numbers_are_those_of_the_last_line_that_is_an_object():
    row = '{"acc": 0.5, "n": 3, "ok": true, "name": "x", "bad": NaN, "by task": {"x y": 2}}'
    assert numbers_of(['{"a": 1}', row, "[1]", "done"]) == {
        "eval/acc": 0.5,
        "eval/n": 3,
        "eval/by_task/x_y": 2,
    }
    assert numbers_of(["x", "1", "[]"]) == {}


def test_a_command_measures_a_folder_and_adds_a_line_to_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(eval_command, "LOOK", 0.05)  # several looks
    script = """
import json, os, sys, time
time.sleep(0.3)
print("loading")
group = [name for name in os.environ if name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
print(json.dumps({"length": len(sys.argv[1]), "arguments": len(sys.argv), "group": len(group)}))
"""
    folder = tmp_path / "a model's; $folder"
    found = command(tmp_path, script).run(folder, 7)
    assert found == {"eval/length": len(str(folder)), "eval/arguments": 2, "eval/group": 0}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 7, **found}


@pytest.mark.parametrize(
    ("script", "seconds", "message"),
    [
        ("print('out of memory'); raise SystemExit(3)", 60.0, "ended with exit code 3"),
        ("print('no numbers')", 60.0, "printed no line of JSON with numbers"),
        ("import time; print('slow', flush=True); time.sleep(60)", 1.0, "ran longer than"),
    ],
)  # fmt: skip
def test_a_command_that_fails_is_a_warning_with_its_last_lines(tmp_path, script, seconds, message, capsys):
    start = time.monotonic()
    assert command(tmp_path, script, seconds).run(tmp_path, 7) == {}
    out = capsys.readouterr().out
    assert f"WARNING: --eval_command {message}" in out
    assert any(word in out for word in ("out of memory", "no numbers", "slow"))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert time.monotonic() - start < 30


def test_flags_that_cannot_work_are_refused():
    for settings, message in (
        ({"eval_command": "measure"}, "has no .model. for the folder"),
        ({"eval_command": "measure {model}"}, "--eval_command needs --output_dir"),
        ({"eval_command_timeout": 0.0}, "--eval_command_timeout must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            RunArguments(**settings)
    assert EvalCommand.of(RunArguments(output_dir="x")) is None
