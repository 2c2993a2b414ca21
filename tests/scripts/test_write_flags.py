"""docs/flags.md says what the code does."""

from dschat.arguments import STEPS, flags_of
from scripts import write_flags


def test_the_page_is_what_the_declarations_say():
    written = write_flags.PAGE.read_text(encoding="utf-8")
    assert written == write_flags.page() + "\n", "stale: run python scripts/write_flags.py"


def test_every_flag_is_on_the_page_with_its_default():
    text = write_flags.page()
    for step in STEPS:
        for name in flags_of(step):
            bare = name.removeprefix("actor_").removeprefix("critic_")
            assert f"| `--{bare}" in text or f"| `--{name}" in text
    assert (
        "| `--learning_rate X` | `1e-05` (sft); `9e-06` (reward, critic); `5e-07` (dpo); `1e-06` (actor) |"
        in text
    )
    assert "| `--on_bad_row stop\\|drop` | `stop` | same |" in text
    assert "| `--whiten_advantages` | on |" in text
