"""benchmarks/planner.py: a row of its table, from a plan.json."""

from benchmarks import planner

PLAN = {
    "device_peak": 900e6,
    "phases": {"load": {"device": 300e6}, "train": {"device": 900e6}},
    "seconds": {"forward_backward": 2.0, "optimizer": 0.5},
    "measured": {"device_peak": 1000e6, "seconds": {"forward_backward": 1.5, "optimizer": 0.25, "data": 9.0}},
}


def test_a_row_has_what_was_planned_beside_what_was_measured_and_names_what_is_far_off():
    line, off = planner.row(planner.Case("sft", "6m", "--zero_stage 2"), PLAN, "cpu")
    assert line.startswith("|  | sft | 6m | 1 | 4 x 128 | `--zero_stage 2` |")
    assert "| train | 900 | 1,000 | -10% | 2.5 | 1.75 | +43% |" in line
    assert off == ["seconds of sft 6m 1 4 x 128 --zero_stage 2: +43%"]


def test_seconds_stand_only_where_they_were_planned_and_runs_that_were_held_out_say_so():
    line, off = planner.row(
        planner.Case("rlhf", "6m", answer=32, is_held_out=True), PLAN | {"seconds": None}, "cpu"
    )
    assert line.startswith("| held out | rlhf | 6m | 1 | 4 x 96 + 32 |  |")
    assert line.endswith("| -10% |  |  |  |  |")
    assert off == []


def test_a_run_that_failed_is_a_row_too():
    line, off = planner.row(planner.Case("sft", "6m"), {"failed": "it ended with 1"}, "cpu")
    assert "it ended with 1" in line
    assert len(off) == 1


def test_every_case_is_one_of_its_own():
    for device in planner.SIZES:
        found = [case.folder for case in planner.cases(device)]
        assert len(found) == len(set(found))


def test_a_run_of_a_gpu_that_fails_leaves_its_reason_and_the_table_of_those_before(tmp_path, monkeypatch):
    whole, broken, third = planner.Case("sft", "a"), planner.Case("sft", "b"), planner.Case("sft", "c")
    monkeypatch.setattr(planner, "cases", lambda _: [whole, broken, third])
    monkeypatch.setattr(planner, "import_libraries", lambda _: None)
    monkeypatch.setattr(planner, "prepare", lambda *_: None)
    output, seen = tmp_path / "table.md", []

    def run(case, *_, **__):
        seen.append(output.read_text() if output.exists() else "")
        return PLAN if case is whole else {"failed": f"{case.size} ended with [-14]: Alarm clock"}

    monkeypatch.setattr(planner, "run", run)
    planner.main(["--device", "cuda", "--folder", str(tmp_path), "--output", str(output)])
    assert "| 900 | 1,000 | -10% |" in seen[1]
    assert "Alarm clock" in seen[2]
    assert output.read_text().count("Alarm clock") == 2


def test_a_program_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(planner.LIMIT, "cpu", 1)
    monkeypatch.setattr(planner.runpy, "run_path", lambda *_, **__: planner.time.sleep(60))
    child = planner.forked(["scripts/plan.py"], tmp_path / "log.txt", "cpu", {})
    assert planner.os.waitstatus_to_exitcode(planner.os.waitpid(child, 0)[1]) == -planner.signal.SIGALRM
