"""The rows that the models of step 3 read together."""

from typing import Any

import pytest
from tiny import save_tiny_model

from dschat.arguments import parse_arguments
from dschat.data.packing import RowLayout
from dschat.data.rows import Rows
from dschat.rlhf.layout import choose_ways_and_layout
from dschat.rlhf.roles import engine_specs
from dschat.runs.measured_choices import MeasuredChoices

PROMPTS = Rows.from_dict({"length": [5, 9, 7]})


def layout_and_widths(
    tmp_path, actor: str, reward: str, *flags: str, prompts: Rows = PROMPTS
) -> tuple[RowLayout, int, float]:
    """`choose_ways_and_layout` for an actor and a critic of these families.

    Only their configurations are read.
    """
    paths = [save_tiny_model(tmp_path / "actor", actor), save_tiny_model(tmp_path / "reward", reward)]
    models = (f"--actor_model_name_or_path={paths[0]}", f"--critic_model_name_or_path={paths[1]}")
    args = parse_arguments("rlhf", [*models, "--max_answer_seq_len=8", "--dtype=fp32", *flags])
    choices = MeasuredChoices(folder=tmp_path / "choices")
    return choose_ways_and_layout(args, engine_specs(args), prompts, choices, longest=17)


def layout_of(*args: Any) -> RowLayout:
    """The layout alone."""
    return layout_and_widths(*args)[0]


def test_rows_are_padded_to_the_multiple_that_is_asked_for(tmp_path):
    layout, widest, mean = layout_and_widths(
        tmp_path, "llama", "llama", "--packing=off", "--pad_to_multiple_of=8"
    )
    assert layout == RowLayout(multiple_of=8)
    longest = max(PROMPTS.column("length"))
    assert mean == layout.rounded(longest + 8)
    assert widest == layout.rounded(17)


def test_the_fewest_learned_positions_of_all_models_bound_the_width(tmp_path):
    layout = layout_of(tmp_path, "llama", "opt", "--packing=off", "--pad_to_multiple_of=8")
    assert layout.limit is not None
    assert layout.width_of(layout.limit - 1) == layout.limit


def test_rows_are_packed_where_every_model_tells_sequences_apart(tmp_path):
    layout = layout_of(tmp_path, "llama", "opt", "--packing=on")
    assert (layout.separated_by, layout.in_one_row) == ("mask", True)


@pytest.mark.parametrize(("actor", "reward"), [("bloom", "llama"), ("llama", "bloom")])
def test_one_model_that_cannot_be_packed_has_all_padded_and_the_run_says_so(tmp_path, capsys, actor, reward):
    assert layout_of(tmp_path, actor, reward, "--packing=on").separated_by is None
    assert "pack" in capsys.readouterr().out


def test_rows_of_a_reward_model_with_other_tokens_may_be_longer_than_its_window(tmp_path):
    reread = Rows.from_dict({"length": [5, 9, 7], "reader_ids": [[1], [2], [3]]})
    models = (tmp_path, "llama", "mistral", "--packing=on")  # Mistral's window has 256 tokens
    found = [layout_and_widths(*models, prompts=prompts)[0].separated_by for prompts in (PROMPTS, reread)]
    assert found == ["mask", "positions"]
