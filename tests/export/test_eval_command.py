import json
import multiprocessing
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dschat.arguments import RunArguments, parse_arguments
from dschat.errors import UserError
from dschat.export import eval_command
from dschat.export.best_model import BestModel
from dschat.export.eval_command import EvalCommand, numbers_of
from dschat.runs.metrics import MetricsLogger


def command(tmp_path, script, seconds=60.0):
    (tmp_path / "measure.py").write_text(script)
    return EvalCommand(f"{sys.executable} {tmp_path}/measure.py {{model}}", seconds)


def test_numbers_are_those_of_the_last_line_that_is_an_object():
    row = '{"acc": 0.5, "n": 3, "ok": true, "name": "x", "bad": NaN, "by task": {"x y": 2}}'
    assert numbers_of(['{"a": 1}', row, "[1]", "done"]) == {
        "eval/acc": 0.5,
        "eval/n": 3,
        "eval/by_task/x_y": 2,
    }
    assert numbers_of(["x", "1", "[]"]) == {}


def test_a_command_measures_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(eval_command, "LOOK", 0.05)  # several looks
    script = """
import json, os, sys, time
time.sleep(0.3)
print("loading", sys.stdin.read())
group = [name for name in os.environ if name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
print(json.dumps({"length": len(sys.argv[1]), "arguments": len(sys.argv), "group": len(group)}))
"""
    folder = tmp_path / "a model's; $folder"
    found = command(tmp_path, script).run(folder, 7)
    assert found == {"eval/length": len(str(folder)), "eval/arguments": 2, "eval/group": 0}
    # The watcher is no job of the command's shell, which would wait for it.
    assert EvalCommand("true & wait; echo '{\"a\": 1}' # {model}", 60.0).run(folder, 7)


def test_the_numbers_are_in_metrics_and_trackers_at_the_step_of_the_model_as_docs_show_it(
    tmp_path, monkeypatch
):
    """The files and the command of docs/chat.md, with a stand-in for lm_eval that writes what 0.4.13 does."""
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    section = page.partition("## Measure models")[2]
    rows, task, script = re.findall(r"^```(?:json|yaml|sh)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for name, text in (("rivers.jsonl", rows), ("tasks/rivers.yaml", task), ("measure.sh", script)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [sorted(json.loads(row)) for row in rows.splitlines()] == [["answer", "choices", "question"]] * 2
    stand_in = tmp_path / "bin" / "lm_eval"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"""#!{sys.executable}
import json, sys
from pathlib import Path
sys.argv.remove("--apply_chat_template")
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "run" and flags["--model"] == "hf" and flags["--tasks"] == "rivers", sys.argv
assert Path(flags["--include_path"], "rivers.yaml").is_file() and Path("rivers.jsonl").is_file()
model = flags["--model_args"].removeprefix("pretrained=")
folder = Path(flags["--output_path"], model.replace("/", "__"))
folder.mkdir(parents=True)
numbers = {{"name": "rivers", "alias": "rivers", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.25}}
results = json.dumps({{"results": {{"rivers": numbers}}}})
(folder / "results_2026-11-27T10-46-33.313328.json").write_text(results)
print("|Tasks |Version|")
"""
    )
    stand_in.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    [shown] = re.findall(r"`--eval_command '(bash .*?)'`", section)
    flags = ["--model_name_or_path=m", "--output_dir=out", "--eval_command", shown]
    description = parse_arguments("sft", flags).description
    (tmp_path / "out").mkdir()
    logger = MetricsLogger(description, total_steps=9, title="SFT", is_main_process=True)
    best = BestModel("out", target="", unit="step", command=EvalCommand.of(description.run))
    best.log = logger.log
    logger.log(5, {"loss": 1.0})
    found = best.measured(3, takes_best=False)
    logger.close()
    assert found == {
        "eval/rivers/sample_len": 2,
        "eval/rivers/acc,none": 0.5,
        "eval/rivers/acc_stderr,none": 0.25,
    }
    assert set(re.findall(r"`(eval/\S*)`", section)) == {"eval/", *list(found)[1:]}
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 3, **found}
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    [tag] = [tag for tag in events.Tags()["scalars"] if "acc" in tag and "stderr" not in tag]
    assert tag.startswith("eval_command/rivers/acc")
    assert [(event.step, event.value) for event in events.Scalars(tag)] == [(3, 0.5)]


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
    assert time.monotonic() - start < 30


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended without a parent that took notice."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="reads /proc")
def test_a_command_and_what_it_started_end_with_a_run_that_is_killed(tmp_path):
    """As by SIGKILL, which no run can answer."""
    pids = tmp_path / "pids"
    line = f"sh -c 'echo $$ >> {pids}; sleep 60; true' & echo $$ >> {pids}; wait # {{model}}"
    run = multiprocessing.get_context("fork").Process(target=EvalCommand(line, 60.0).run, args=(tmp_path, 1))
    run.start()

    def until(is_true) -> None:
        end = time.monotonic() + 20
        while not is_true():
            assert time.monotonic() < end
            time.sleep(0.02)

    until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    started = list(map(int, pids.read_text().split()))
    assert all(map(is_running, started))
    run.kill()
    run.join()
    until(lambda: not any(map(is_running, started)))


def test_flags_that_cannot_work_are_refused():
    for settings, message in (
        ({"eval_command": "measure"}, "has no .model. for the folder"),
        ({"eval_command": "measure {model}"}, "--eval_command needs --output_dir"),
        ({"eval_command_timeout": 0.0}, "--eval_command_timeout must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            RunArguments(**settings)
    assert EvalCommand.of(RunArguments(output_dir="x")) is None
