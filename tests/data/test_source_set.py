"""Data sets are one stream of comparisons, whose numbers say where each comes from."""

import json
from collections import Counter

import pytest

from dschat.arguments import DataArguments
from dschat.data.comparisons import write_comparisons
from dschat.data.findings import Findings
from dschat.data.reading import Format
from dschat.data.source_set import SourceSet
from dschat.errors import UserError


@pytest.fixture
def open_set(tmp_path):
    """Opens a set of files, each of prompts; what is no prompt is a row that is dropped."""

    def write(name, prompts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return str(tmp_path / name)

    def open_set(shared, evaluation=(), own=()):
        paths = [
            [write(f"{kind}{number}.jsonl", prompts) for number, prompts in enumerate(files)]
            for kind, files in (("shared", shared), ("evaluation", evaluation), ("own", own))
        ]
        data = DataArguments(data_path=paths[0], eval_data_path=paths[1], data_output_path=str(tmp_path))
        return SourceSet.open(data, paths[2])

    return open_set


EMPTY = "\n\nHuman: \n\nAssistant:"
"""A prompt without a question, which is dropped."""


def test_comparisons_come_in_order_with_the_number_and_the_use_of_their_source(open_set):
    sources = open_set([["a", EMPTY], ["b"]], evaluation=[["c"]], own=[["d"]])
    findings = [Findings() for _ in sources.all]
    found = [(c.prompt, number, use) for c, number, use in sources.comparisons(Format(), findings)]
    assert found == [("a", 0, False), ("b", 1, False), ("c", 2, True), ("d", 3, False)]
    assert [sources.are_for_evaluation(number) for number in range(4)] == [False, False, True, False]
    assert findings[0].dropped == Counter({"prompts with an empty question": 1})


def test_a_comparisons_place_is_found_by_its_number_past_rows_that_were_dropped(open_set):
    sources = open_set([[EMPTY, "a"], ["b", EMPTY, "c"]])
    places = [sources.place_of(number, Format()).rpartition("/")[2] for number in range(3)]
    assert places == ["shared0.jsonl:2", "shared1.jsonl:1", "shared1.jsonl:3"]


def test_the_same_content_has_the_same_identity_and_another_use_another(open_set):
    one, same, other = open_set([["a"]]), open_set([["a"]]), open_set([["a"], ["b"]], own=[["b"]])
    assert one.identities == same.identities
    assert one.identities["own"] == []
    assert other.identities["sources"][1] == other.identities["own"][0]
    assert other.identities["sources"][0] == one.identities["sources"][0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"shared": [["a"], [EMPTY]]}, r"--data_path .*shared1.jsonl holds no rows to train on: dropped 1 "),
        ({"shared": [["a"]], "evaluation": [[EMPTY]]}, r"--eval_data_path .* holds no rows to evaluate on"),
    ],
)
def test_a_source_without_rows_is_named_with_what_it_dropped(open_set, tmp_path, files, message):
    sources = open_set(**files)
    findings = [Findings() for _ in sources.all]
    index = write_comparisons(sources.comparisons(Format(), findings), tmp_path / "comparisons.arrow")
    with pytest.raises(UserError, match=message):
        sources.check(index, findings)
