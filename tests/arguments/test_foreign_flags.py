"""The table of other programs' flags."""

import re

import pytest
from step_flags import refusal

from dschat.arguments import FOREIGN, PROGRAMS, STEPS, flags_of


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_what_is_suggested_exists_where_it_is_said_to(step):
    names = {*FOREIGN, "actor_lr", "critic_lora_rank", "critic_bf16", "ddp_timeout", "vllm_mode"} - flags_of(
        step
    )
    lines = refusal(step, *(f"--{name}" for name in names)).splitlines()[1:]
    assert len(lines) == len(names)
    for line in lines:
        told = re.fullmatch(
            r"  --\w+ \((here: .*--.*|not there\b.*|not of this program; in (\S+): .+)\)", line
        )
        assert told, line
        of_step = next((s for s, program in PROGRAMS.items() if program == told[2]), step)
        assert set(re.findall(r"--(\w+)", told[1])) <= flags_of(of_step), line


def test_a_flag_of_the_trainer_of_transformers_that_is_not_here_is_explained():
    """Those that matter; what steers its own machinery is at least not taken for another flag."""
    asked = ["hub_strategy", "dataloader_drop_last", "ddp_find_unused_parameters", "fsdp_config", "optim"]
    asked += ["bf16_full_eval", "logging_nan_inf_filter", "log_on_each_node", "use_cpu", "eval_on_start"]
    told = refusal("sft", *(f"--{name}" for name in asked))
    assert told.count("(not there") + told.count("(here: ") == len(asked)
    assert "did you mean" not in refusal("sft", "--ignore_data_skip", "--label_names", "--use_cache")
