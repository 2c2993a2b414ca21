"""Command lines of the steps, for tests: with the flags that a step requires, and what it refuses."""

from typing import Any

import pytest

from dschat.arguments import parse_arguments
from dschat.errors import UserError

MODEL = ["--model_name_or_path", "m"]
STEP3 = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]


def rlhf(*argv: str) -> Any:
    """Step 3's arguments with the models a and c."""
    return parse_arguments("rlhf", [*STEP3, *argv])


def refusal(step: str, *argv: str) -> str:
    """The message with which a step refuses a command line, given as it is."""
    with pytest.raises(UserError) as error:
        parse_arguments(step, argv)
    return str(error.value)


def assert_refused(argv: list[str], parts: list[str], step: str = "rlhf") -> None:
    """Step 3 (or another one) refuses these flags beside those that it requires, and names every part."""
    message = refusal(step, *(STEP3 if step == "rlhf" else MODEL), *argv)
    for part in parts:
        assert part in message
