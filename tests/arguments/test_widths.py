import pytest
from step_flags import MODEL, STEP3, assert_refused

from dschat.arguments import STEPS, parse_arguments
from dschat.arguments.widths import CPU_MULTIPLE, GPU_MULTIPLE


@pytest.mark.parametrize("step", ["sft", "reward", "dpo", "rlhf"])
def test_widths_are_multiples_of_a_number_of_the_device_or_of_the_flag(step):
    models = STEP3 if step == "rlhf" else MODEL
    widths = parse_arguments(step, models).widths
    assert [widths.multiple_of(device) for device in ("cpu", "cuda")] == [CPU_MULTIPLE, GPU_MULTIPLE]
    widths = parse_arguments(step, [*models, "--pad_to_multiple_of=5"]).widths
    assert [widths.multiple_of(device) for device in ("cpu", "cuda")] == [5, 5]


def test_a_multiple_below_one_is_refused():
    assert_refused(["--pad_to_multiple_of=0"], ["--pad_to_multiple_of", "at least 1", "0"])


def test_programs_that_pass_nothing_through_a_model_have_no_widths():
    assert "widths" not in STEPS["inspect"].__dataclass_fields__
