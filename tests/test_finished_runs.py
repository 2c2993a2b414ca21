"""Every step leaves a finished run as it is, before it looks at models and data, which may be gone."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from dschat.run_folder import read_summary, start_run, write_summary

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "rlhf": "step3_ppo/main.py",
}


def program(step: str) -> ModuleType:
    """A step's program as a module."""
    spec = importlib.util.spec_from_file_location(f"{step}_program", ROOT / PROGRAMS[step])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("step", PROGRAMS)
def test_a_finished_run_is_named_resumed_in_peace_or_overwritten(step, tmp_path, capsys):
    names = ("actor_model", "critic_model") if step == "rlhf" else ("model",)
    flags = [*(f"--{name}_name_or_path={tmp_path / 'gone'}" for name in names), f"--output_dir={tmp_path}"]
    start_run(parse_arguments(step, flags))
    write_summary(str(tmp_path), {"step": step})
    main = program(step).main
    with pytest.raises(UserError, match=r"holds a run that finished on .*, or give --overwrite_output_dir\."):
        main(parse_arguments(step, flags))
    for asked in ("latest", str(Path(tmp_path, "checkpoints", "step_00000001"))):
        with pytest.raises(SystemExit, match="0"):
            main(parse_arguments(step, [*flags, f"--resume_from_checkpoint={asked}"]))
        assert "there is nothing to go on with, and nothing is changed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--(actor_)?model_name_or_path .*gone"):  # which comes next
        main(parse_arguments(step, [*flags, "--overwrite_output_dir"]))
    assert read_summary(tmp_path) == {"step": step}
