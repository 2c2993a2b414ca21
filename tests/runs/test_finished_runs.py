"""Every step leaves a finished run as it is, before torch is imported, or models and data are looked at."""

import pytest
from processes import ROOT, python

from dschat.arguments import parse_arguments
from dschat.runs.output_folder import read_summary, start_run, write_summary

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "rlhf": "step3_ppo/main.py",
}
SPY = """
import atexit, runpy, sys
atexit.register(lambda: print("torch is imported:", "torch" in sys.modules))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", PROGRAMS)
def test_a_finished_run_is_named_or_resumed_in_peace(step, tmp_path):
    names = ("actor_model", "critic_model") if step == "rlhf" else ("model",)
    output = tmp_path / "out"
    flags = [*(f"--{name}_name_or_path={tmp_path / 'gone'}" for name in names), f"--output_dir={output}"]
    output.mkdir()
    start_run(parse_arguments(step, flags).description)
    write_summary(str(output), {"step": step})
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    cases = (
        ([], 2, "holds a run that finished on"),
        (["--resume_from_checkpoint=latest"], 0, "there is nothing to go on with, and nothing is changed"),
    )
    for more, code, said in cases:
        result = python(spy, ROOT / PROGRAMS[step], *flags, *more, check=False, afresh=True)
        assert result.returncode == code, result.stderr
        assert said in result.stdout + result.stderr
        assert "torch is imported: False" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert read_summary(output) == {"step": step}
