"""docs/hardware_table.md says what the planner says."""

import pytest

from scripts import write_hardware


@pytest.mark.parametrize(("step", "model"), [("sft", "OPT-13b"), ("rlhf", "Llama-3-8B")])
def test_a_row_of_the_page_is_what_the_planner_says(step, model):
    lines = write_hardware.PAGE.read_text(encoding="utf-8").splitlines()
    assert write_hardware.row(step, model) in lines, "stale: run python scripts/write_hardware.py"


def test_the_rows_of_ppo_and_of_one_gpu_are_what_the_planner_says():
    lines = write_hardware.PAGE.read_text(encoding="utf-8").splitlines()
    assert write_hardware.ppo_row("Llama-3.2-1B", "LoRA") in lines, (
        "stale: run python scripts/write_hardware.py"
    )
    assert write_hardware.recipe("dschat sft") in lines


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        *[("OPT-350m", 0.331), ("OPT-1.3b", 1.316), ("OPT-6.7b", 6.658), ("OPT-175b", 174.6)],
        *[("Llama-3.2-1B", 1.236), ("Llama-2-7B", 6.738), ("Llama-3-8B", 8.030), ("Llama-3-70B", 70.55)],
    ],
)
def test_configurations_have_the_sizes_that_their_makers_state(model, billions):
    plan = write_hardware.plan(write_hardware.arguments("sft", model), 1)
    weights = next(part for part in plan.phases["train"] if part.kind == "weights")
    assert weights.bytes / 2e9 == pytest.approx(billions, rel=0.005)
