import json
import os
import shlex
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from written_folders import read, saved, write

from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError

SHARED = Path(os.environ.get("DSCHAT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))


@pytest.mark.parametrize(
    ("names", "training", "evaluation", "unused"),
    [
        (["0000.parquet", "0001.parquet"], [0, 1], [], ()),
        (["2.jsonl", "10.jsonl"], [0, 1], [], ()),  # in the order of the numbers
        (["part-00000.jsonl", "part-00001.jsonl"], [0, 1], [], ()),
        (["data_0.jsonl", "data_1.jsonl", "test.jsonl"], [0, 1], [2], ()),
        (["train_0.jsonl", "train_1.jsonl", "test_0.jsonl", "other.jsonl"], [0, 1], [2], ("other",)),
        (
            ["train-00000-of-00002-ab12cd34ef.parquet", "train-00001-of-00002-12ab34cdef.parquet"],
            [0, 1],
            [],
            (),
        ),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], [0, 1], [2], ()),
        (["train/a.jsonl", "train/b.jsonl", "validation/x/y.jsonl"], [0, 1], [2], ()),
        (["data/train/0000.parquet", "data/test/0000.parquet"], [0], [1], ()),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0], [1], ()),
        (["dataset_infos.json", "data/train.jsonl", ".cache/x.jsonl", "_tmp.jsonl"], [1], [], ()),
        (["main/train.jsonl", "main/test.jsonl"], [0], [1], ()),
        (["shard_0/x.jsonl", "shard_1/x.jsonl"], [0, 1], [], ()),
        (["train.jsonl", "archive/old.jsonl"], [0], [], ("archive/",)),
        (["train.jsonl", "eval_results/all.json", "test/0.jsonl"], [0], [2], ("eval_results/",)),
        (["train_sft.jsonl", "test_sft.jsonl"], [0], [1], ()),
        (["train_a.json", "test_b.json"], [0], [1], ()),
        (["default.jsonl", "test.jsonl"], [0], [1], ()),
        (["gsm8k-train.jsonl", "gsm8k-test.jsonl"], [0], [1], ()),
        (["training.jsonl", "validation.jsonl", "test.jsonl"], [0], [2, 1], ()),
    ],
)
def test_files_and_folders_are_splits(tmp_path, names, training, evaluation, unused):
    found = read(write(tmp_path, *names))
    assert found == ([names[n] for n in training], sorted(names[n] for n in evaluation), unused)


UC = ["train_sft.jsonl", "train_gen.jsonl", "test_sft.jsonl", "test_gen.jsonl"]


@pytest.fixture(params=["files", "folders", "saved", "hub"])
def uc(request, tmp_path, monkeypatch):
    """The splits of UltraChat in each form that a data set may have."""
    if request.param == "files":
        return write(tmp_path, *UC)
    if request.param == "folders":
        names = [f"data/{name.removesuffix('.jsonl')}/0000.jsonl" for name in UC]
        folder = write(tmp_path, *names)
        for name in names:
            row = {"prompt": f"{Path(name).parent.name}.jsonl", "completion": "a"}
            (tmp_path / name).write_text(json.dumps(row))
        return folder
    folder = saved(tmp_path / "saved", UC)
    if request.param == "saved":
        return folder
    loaded = datasets.load_from_disk(folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda path: loaded)
    return "some/uc"


def test_several_splits_end_the_run_with_what_to_write(uc):
    with pytest.raises(UserError, match="several splits to train on: train_gen, train_sft") as error:
        open_source(f"{uc}:0.3")
    assert f"Write --data_path {uc}:split=train_gen:0.3 or --data_path {uc}:split=train_sft:0.3;" in str(
        error.value
    )
    with pytest.raises(UserError, match=r"several splits to evaluate on: test_gen, test_sft\. Write --eval_"):
        open_source(uc, "--eval_data_path", evaluates=True)


def test_a_named_split_takes_its_own_evaluation_split_along(uc):
    assert read(f"{uc}:split=train_sft") == (
        ["train_sft.jsonl"],
        ["test_sft.jsonl"],
        ("test_gen", "train_gen"),
    )
    training, evaluation, unused = read(f"{uc}:split=train_sft+train_gen")
    assert training == ["train_sft.jsonl", "train_gen.jsonl"]
    assert (sorted(evaluation), unused) == (["test_gen.jsonl", "test_sft.jsonl"], ())
    assert read(f"{uc}:split=train_sft+train_sft")[0] == ["train_sft.jsonl"]
    assert read(f"{uc}:split=test_sft", "--eval_data_path")[:2] == (["test_sft.jsonl"], [])
    assert read(f"{uc}:split=test_sft:2")[0] == ["test_sft.jsonl"]
    source = open_source(f"{uc}:split=train_sft:2")
    assert (source.name, source.weight) == (f"{uc}:split=train_sft", 2)
    assert source.splits == "train_sft, evaluation on test_sft"


def test_a_split_that_is_not_there_names_those_that_are(uc):
    with pytest.raises(
        UserError, match=r"no split train_prefs \(found: test_gen, test_sft, train_gen"
    ) as error:
        open_source(f"{uc}:split=train_prefs")
    assert f"write --data_path {uc}:split=test_gen or" in str(error.value)


def test_a_split_for_evaluation_alone_is_used_by_its_flag_only(tmp_path):
    folder = write(tmp_path, "test.jsonl", "validation.jsonl")
    assert sorted(read(folder, "--eval_data_path")[0]) == ["test.jsonl", "validation.jsonl"]
    with pytest.raises(
        UserError, match=r"no split to train on \(found: test, validation\)\. To train on what"
    ):
        open_source(folder)
    assert read(f"{folder}:split=test")[:2] == (["test.jsonl"], ["validation.jsonl"])


def test_configurations_of_a_folder_are_named(tmp_path):
    names = [f"{config}/{split}.jsonl" for config in ("main", "socratic") for split in ("train", "test")]
    folder = write(tmp_path, *names)
    with pytest.raises(UserError, match="several configurations: main, socratic") as error:
        open_source(folder)
    assert f"--data_path {folder}:config=main or --data_path {folder}:config=socratic" in str(error.value)
    assert read(f"{folder}:config=socratic")[:2] == (["socratic/train.jsonl"], ["socratic/test.jsonl"])
    assert read(f"{folder}:config=main,split=test")[0] == ["main/test.jsonl"]
    with pytest.raises(UserError, match=r"no configuration other \(found: main, socratic\)"):
        open_source(f"{folder}:config=other")


@pytest.mark.parametrize("option", ["split=train", "config=main", "revision=v1"])
def test_an_option_that_means_nothing_there_is_refused(tmp_path, option):
    folder = write(tmp_path, "train.jsonl")
    name = option.split("=")[0]
    with pytest.raises(UserError, match=f"a file has no {name}; leave {name}= out"):
        open_source(f"{folder}/train.jsonl:{option}")
    if name == "revision":
        with pytest.raises(UserError, match="a folder has no revision"):
            open_source(f"{folder}:{option}")


@pytest.mark.parametrize("names", [[], ["README.md"], [".hidden/train.jsonl"]])
def test_a_folder_without_data_says_what_is_read(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"the folder holds no data \(\.json, \.jsonl, \.csv"):
        open_source(str(tmp_path))


def test_unrelated_files_are_not_mixed_in_silence(tmp_path):
    with pytest.raises(UserError, match=r"several splits to train on: left, right.*split=left\+right"):
        open_source(write(tmp_path, "left.json", "right.json"))


def test_one_file_in_two_forms_is_not_read_twice(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl and train\.parquet seem to be one file in two forms"):
        open_source(write(tmp_path, "train.jsonl", "train.parquet"))
    with pytest.raises(UserError, match="train is the name of a file and of a folder"):
        open_source(write(tmp_path / "x", "train.jsonl", "train/0.jsonl"))


@pytest.mark.parametrize(
    ("pattern", "training", "evaluation"),
    [
        ("shards/*.jsonl", ["shards/a.jsonl", "shards/b.jsonl"], ["shards/test.jsonl"]),
        ("shards/[ab].jsonl", ["shards/a.jsonl", "shards/b.jsonl"], []),
        ("shards/t*.jsonl", ["shards/test.jsonl"], []),
        ("**/*.jsonl", ["more/c.jsonl", "shards/a.jsonl", "shards/b.jsonl"], ["shards/test.jsonl"]),
        ("**/*.jsonl:split=a+test", ["shards/a.jsonl", "shards/test.jsonl"], []),
    ],
)
def test_a_pattern_is_all_files_that_match_but_names_for_evaluation_stay_so(
    tmp_path, monkeypatch, pattern, training, evaluation
):
    monkeypatch.chdir(tmp_path)
    names = ("shards/a.jsonl", "shards/b.jsonl", "shards/test.jsonl", "shards/README.md", "more/c.jsonl")
    write(tmp_path, *names)
    assert read(f"{pattern}:0.5")[:2] == (training, evaluation)
    source = open_source(f"{pattern}:0.5")
    assert (source.name, source.weight) == (pattern, 0.5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("*.jsonl", "the pattern matches no file"), ("*.md", "matches 1 names, none a file that is read")],
)
def test_a_pattern_without_files_is_named(tmp_path, pattern, message):
    (tmp_path / "README.md").write_text("")
    entry = f"{tmp_path}/{pattern}"
    with pytest.raises(UserError, match=message) as error:
        open_source(entry)
    assert str(error.value).startswith(f"--data_path {shlex.quote(entry)}: ")


def test_a_file_that_cannot_be_opened_is_named_and_not_its_folder(tmp_path):
    folder = write(tmp_path, "train_0.jsonl")
    (tmp_path / "train_1.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train_1\.jsonl: it cannot be read \(No such file"):
        open_source(folder)


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="needs the shared cases")
@pytest.mark.parametrize("folder", ["shards", "nested"])
def test_the_case_of_numbered_shards_is_read(folder):
    path = SHARED / "cases" / "numbered_parquet_shards" / folder
    source = open_source(str(path))
    rows = list(read_comparisons(source, source.training, Format(), Findings()))
    files = [file for file in path.rglob("*.parquet") if "test" not in str(file)]
    assert len(rows) == sum(pq.read_metadata(file).num_rows for file in files)
