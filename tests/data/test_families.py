import os
from pathlib import Path

import numpy as np
import pytest

from dschat.data import splits
from dschat.data.comparisons import Comparison, Turn, write_comparisons
from dschat.data.families import Families
from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source

SHARED = Path(os.environ.get("DSCHAT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
HH = SHARED / "data" / "hh_rlhf_harmless" / "test.jsonl.gz"


def families_of(*dialogues):
    """The number of each dialogue's family; in "a b c" a and c are questions, b is the answer to a."""
    families = Families()
    for dialogue in dialogues:
        roles = ("user", "assistant") * 9
        families.add(list(zip(roles, dialogue.split(), strict=False)))
    keys = families.keys()
    return [keys.tolist().index(key) for key in keys]


@pytest.mark.parametrize(
    ("dialogues", "families"),
    [
        (["a", "b"], [0, 1]),
        (["a", "a b c"], [0, 0]),
        (["a b c", "a"], [0, 0]),
        (["a b c", "a b d"], [0, 1]),  # one question, but neither goes on from the other
        (["a", "a b c", "a b d", "a e f g h", "b"], [0, 0, 0, 0, 4]),
        (["a b c d e", "a b c", "a x c d e"], [0, 0, 2]),  # another answer is another dialogue
        (["a", "a"], [0, 0]),
    ],
)
def test_a_dialogue_is_of_the_family_of_the_shortest_it_goes_on_from(dialogues, families):
    assert families_of(*dialogues) == families


def test_a_dialogue_that_waits_for_an_answer_to_a_tool_begins_another():
    families = Families()
    shorter = [("system", "s"), ("user", "a"), ("assistant", "call"), ("tool", "3")]
    for dialogue in (
        shorter,
        [*shorter, ("assistant", "b"), ("user", "c")],
        [("system", "s"), ("user", "x")],
    ):
        families.add(dialogue)
    first, second, other = families.keys().tolist()
    assert first == second != other


def test_nothing_has_no_families():
    assert Families().keys().shape == (0,)
    assert Families().keys().dtype == np.uint64


def test_text_and_messages_and_a_system_message_are_told_apart_as_in_prompts(tmp_path):
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    prompts = [
        "a",
        asked,
        f"Be brief.{asked}",
        (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")),
    ]
    index = write_comparisons(((Comparison(prompt), 0, False) for prompt in prompts), tmp_path / "rows.arrow")
    assert [index.families.tolist().index(family) for family in index.families] == [0, 0, 2, 0]


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="needs the shared HH data")
def test_held_out_dialogues_of_real_data_neither_begin_nor_go_on_from_training_ones(tmp_path):
    source = open_source(str(HH))
    rows = list(read_comparisons(source, source.training, Format(), Findings()))
    index = write_comparisons(((row, 0, False) for row in rows), tmp_path / "rows.arrow")

    def leaks(families):
        part = splits.assign(
            index.keys,
            index.sources,
            index.in_evaluation,
            eval_fraction=0.05,
            shares=(2, 4, 4),
            seed=1234,
            families=families,
        )
        assert np.bincount(part[part >= 0]).tolist() == [437, 875, 874, 115]
        prompts = [
            [rows[n].prompt for n in np.flatnonzero(which)] for which in (part == 3, (part >= 0) & (part < 3))
        ]
        return sum(any(a.startswith(b) or b.startswith(a) for b in prompts[1]) for a in prompts[0])

    assert leaks(None) == 15
    assert leaks(index.families) == 0
