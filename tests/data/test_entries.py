import pytest

from dschat.data.entries import Entry, parse_entry
from dschat.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("some/set", {}),
        ("some/set:0.3", {"weight": 0.3}),
        ("some/set:split=train_sft", {"split": "train_sft"}),
        ("some/set:config=main", {"config": "main"}),
        ("some/set:revision=refs/pr/1", {"revision": "refs/pr/1"}),
        (
            "some/set:config=main,split=a+b,revision=v1.0:2",
            {"config": "main", "split": "a+b", "revision": "v1.0", "weight": 2.0},
        ),
        ("some/set:split=test,config=main", {"config": "main", "split": "test"}),
        ("some/set:0.3:split=test", {"weight": 0.3, "split": "test"}),
    ],
)
def test_an_entry_is_a_name_with_options_and_a_weight(text, expected):
    assert parse_entry(text) == Entry("some/set", **expected)


def test_what_an_entry_prints_is_what_one_writes():
    for text in ("some/set:config=main,split=a+b:0.3", "~/rows.jsonl", "'a b.jsonl:split=x'", "'x/*.csv'"):
        entry = parse_entry(text.strip("'"), "--eval_data_path")
        assert str(entry) == f"--eval_data_path {text}"
    assert parse_entry("some/set:config=main:0.5").label == "some/set:config=main"


@pytest.mark.parametrize("name", ["rows:split=x", "rows:0.3", "rows:split=x:0.3", "rows:what"])
def test_a_file_or_folder_of_exactly_that_name_is_meant_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert parse_entry(name) == Entry(name)
    assert parse_entry(f"{name}:0.5") == Entry(name, weight=0.5)
    assert parse_entry(f"{name}:split=y") == Entry(name, split="y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some/set:splt=train", "splt is no option of a data set; config, split, revision are"),
        ("some/set:split=", "split has no value"),
        ("some/set:split=a,split=b", "an option is given twice; split=a.b joins"),
        ("some/set:train_sft", r"got 'train_sft'; 0.3 is one. A split .* as in some/set:split=train_sft"),
        ("some/set:split=a:-1", "the weight must be positive, got -1"),
        ("https://somewhere/rows.jsonl", "addresses are not read; download the file"),
        ("hf://datasets/some/set", "addresses are not read"),
        ("", "has an empty value"),
    ],
)
def test_what_is_no_entry_is_named_with_the_remedy(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_entry(text)
    assert str(error.value).startswith(f"--data_path {text}".rstrip())
