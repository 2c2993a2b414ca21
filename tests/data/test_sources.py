import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_rows import lines
from written_rows import read_part as read

from dschat.arguments import DataArguments
from dschat.data.cells import BadRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.findings import Findings
from dschat.data.known_sets import KNOWN_SETS
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError

ROWS = [
    {"prompt": "Grüße 😀", "chosen": "a\u2028b", "rejected": "c"},
    {"prompt": "p2", "chosen": "a2", "rejected": "r2"},
]
COMPARISONS = [Comparison(row["prompt"], (row["chosen"], row["rejected"])) for row in ROWS]


CONTENTS = {
    "lines.jsonl": lines(ROWS),
    "lines.json": lines(ROWS),
    "byte_order_mark.jsonl": "\ufeff" + lines(ROWS),
    "blank_lines.jsonl": "\n" + lines(ROWS).replace("\n", "\r\n\r\n"),
    "no_last_newline.jsonl": lines(ROWS).rstrip(),
    "list.json": json.dumps(ROWS),
    "pretty_list.json": "\ufeff \n" + json.dumps(ROWS, indent=2) + "\n",
    "list.jsonl": json.dumps(ROWS),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_files_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name].encode())
    assert read(tmp_path / name) == COMPARISONS


@pytest.mark.parametrize("name", ["lines.jsonl", "pretty_list.json"])
def test_gzipped_json_files_are_read(tmp_path, name):
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write(CONTENTS[name].encode())
    assert read(tmp_path / f"{name}.gz") == COMPARISONS


def test_parquet_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == COMPARISONS


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "list.json"])
def test_a_file_without_rows_gives_none(tmp_path, name):
    (tmp_path / name).write_text("[ ]" if name == "list.json" else "")
    assert read(tmp_path / name) == []


def test_a_saved_data_set_is_read_with_its_test_split_for_evaluation(tmp_path):
    saved = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == COMPARISONS
    assert read(tmp_path / "both", "evaluation") == COMPARISONS[:1]
    saved["train"].save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == COMPARISONS
    assert open_source(str(tmp_path / "one")).evaluation is None


def test_a_folder_of_train_and_test_files_is_read(tmp_path):
    (tmp_path / "train-00000-of-00002.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "train-00001-of-00002.jsonl").write_text(lines(ROWS[1:]))
    (tmp_path / "test.json").write_text(json.dumps(ROWS[1:]))
    (tmp_path / "extra.json").write_text("[]")
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path) == COMPARISONS
    assert read(tmp_path, "evaluation") == COMPARISONS[1:]
    assert open_source(str(tmp_path)).unused == ("extra",)


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    for name, rows in {"a.jsonl": ROWS, "b.jsonl": ROWS, "c.jsonl": ROWS[:1]}.items():
        (tmp_path / name).write_text(lines(rows))
    a, b, c = (open_source(str(tmp_path / name)).fingerprint for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b != c


def test_a_file_that_moves_from_training_to_evaluation_changes_the_fingerprint(tmp_path):
    for folder, names in {
        "one": ("train_a.json", "test_b.json"),
        "two": ("test_a.json", "train_b.json"),
    }.items():
        (tmp_path / folder).mkdir()
        for name, rows in zip(names, (ROWS[:1], ROWS[1:]), strict=True):
            (tmp_path / folder / name).write_text(json.dumps(rows))
    assert open_source(str(tmp_path / "one")).fingerprint != open_source(str(tmp_path / "two")).fingerprint


def test_dropped_rows_are_counted_by_reason(tmp_path):
    turns = ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d")
    (tmp_path / "hh.jsonl").write_text(lines([dict(zip(("chosen", "rejected"), turns, strict=True))]))
    findings = Findings()
    assert read(tmp_path / "hh.jsonl", findings=findings) == []
    assert findings.dropped == {"dialogues that part before their last answer": 1}


GOOD = json.dumps(ROWS[1])
BAD_FILES = {
    "malformed line": (
        "x.jsonl",
        f"{GOOD}\n{{oops\n",
        "x.jsonl:2: not a JSON object on one line (Expecting property",
    ),
    "cut line": ("x.jsonl", f"\n{GOOD}\n{GOOD[:20]}", "x.jsonl:3: not a JSON object on one line"),
    "pretty object": ("x.json", '{\n"data": []\n}', "x.json:1: not a JSON object on one line"),
    "malformed list": (
        "x.json",
        f"[{GOOD},\n{GOOD}\n{GOOD}]",
        "x.json:3: not a JSON list of objects (a comma or the closing bracket is missing",
    ),
    "list without end": (
        "x.json",
        f"[{GOOD}\n",
        "x.json:2: not a JSON list of objects (a comma or the closing",
    ),
    "trailing comma": (
        "x.json",
        f"[{GOOD},\n]",
        "x.json:2: not a JSON list of objects (there is a comma, but no",
    ),
    "text after a list": (
        "x.json",
        f"[{GOOD}]\nmore",
        "x.json:2: not a JSON list of objects (there is more text after the list",
    ),
    "no object": (
        "x.jsonl",
        f"{GOOD}\n[1, 2]\n",
        "x.jsonl:2: the row is no JSON object, but [1, 2]. Correct the row",
    ),
    "missing answer": (
        "x.jsonl",
        f'{GOOD}\n\n{{"prompt": "p", "chosen": "a"}}',
        'x.jsonl:3: the row has no "rejected"',
    ),
    "empty answer": ("x.json", f"[\n{GOOD},\n{GOOD.replace('a2', '')}]", 'x.json:3: "chosen" is empty'),
    "nested value": (
        "x.jsonl",
        GOOD.replace('"a2"', '{"a": 1}'),
        'x.jsonl:1: message 1 of "chosen" has no "role"',
    ),
    "unknown columns": ("x.jsonl", '{"text": "t"}', "x.jsonl:1: the row has no"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name):
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / file)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(("name", "bytes_"), [("x.jsonl", b"\xff\n"), ("x.json", b'[\n"\xff"]')])
def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path, name, bytes_):
    line = 1 if name == "x.jsonl" else 2
    (tmp_path / name).write_bytes(bytes_)
    with pytest.raises(UserError, match=f"{name}:{line}: the text is not UTF-8"):
        read(tmp_path / name)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"x\.parquet: the Parquet file cannot be read"):
        read(tmp_path / "x.parquet")


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path):
    pq.write_table(pa.Table.from_pylist([*ROWS, {**ROWS[0], "chosen": None}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r'x\.parquet, row 3: "chosen" must be a string, but is null'):
        read(tmp_path / "x.parquet")


BAD_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")]
)


@pytest.mark.parametrize(
    "column",
    [BAD_TEXT, pa.array([0, 2**50], pa.timestamp("ms")), pa.array([0, 2**62], pa.duration("s"))],
    ids=["text that is not UTF-8", "a year beyond 9999", "days beyond Python's"],
)
def test_a_value_of_parquet_that_python_cannot_hold_is_named_by_its_row(tmp_path, column):
    sound = pa.array([0] * 1100, pa.int64()).cast(column.type) if column is not BAD_TEXT else ["a"] * 1100
    table = pa.table({"prompt": ["a"] * 1102, "other": pa.chunked_array([sound, column], column.type)})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 1102: a value cannot be read"):
        read(tmp_path / "x.parquet")


def test_a_column_of_parquet_whose_name_is_no_text_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "zzzz": ["b"]}), tmp_path / "x.parquet", store_schema=False)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content.replace(b"zzzz", b"zz\xffz"))
    with pytest.raises(UserError, match=r"x\.parquet: a name of a column is not UTF-8"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("entry", ["x" * 5000, "x" * 5000 + ":0.5"])
def test_a_name_too_long_for_a_path_is_named(entry):
    with pytest.raises(UserError, match=r"x: it cannot be read \(File name too long\)|x:0.5: it cannot"):
        open_source(entry)


def test_a_home_folder_of_nobody_is_a_missing_path():
    with pytest.raises(UserError, match=r"~nobody-of-this-name/rows\.jsonl: there is no such file"):
        open_source("~nobody-of-this-name/rows.jsonl")


def test_long_names_of_columns_and_roles_are_cut_in_messages(tmp_path):
    for row in ({"c" * 5000: 1}, {"messages": [{"role": "r" * 5000, "content": "a"}]}):
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"x\.jsonl:1: .*Correct the row or remove it") as error:
            read(tmp_path / "x.jsonl")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("entry", ["/nowhere/rows.jsonl", "./rows", "rows.jsonl", "a/b/c"])
def test_a_missing_path_names_the_flag(entry):
    with pytest.raises(UserError, match=f"--sft_only_data_path {entry}: there is no such file or folder"):
        open_source(entry, "--sft_only_data_path")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.jsonl.zip", "rows.parquet.gz", "rows.txt"])
def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("a,b")
    with pytest.raises(
        UserError, match=rf"--data_path .*{name}: files of this kind are not read; give one of \.json"
    ):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize(("name", "text"), [("state.json", "{}"), ("dataset_dict.json", '[{"splits": 1}]')])
def test_a_damaged_saved_data_set_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="the saved data set cannot be read"):
        open_source(str(tmp_path))


def test_a_hub_data_set_is_read_by_its_splits(tmp_path, monkeypatch):
    folder = str(tmp_path / "hub")
    splits = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda path: datasets.load_from_disk(folder))
    assert read("some/set") == COMPARISONS
    assert read("some/set", "evaluation") == COMPARISONS[:1]


def hub(monkeypatch, tmp_path, **splits):
    """Let `load_dataset` give these splits, from files as the real one does; return what it is asked for."""
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "hub"))
    asked = []

    def load(**options):
        asked.append(options)
        return datasets.load_from_disk(str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


HH_ROWS = [
    {"prompt": f"\n\nHuman: {p}?\n\nAssistant:", "response": " a", "chosen": " a", "rejected": " b"}
    for p in range(4)
]
HH_COMPARISONS = [Comparison(row["prompt"], (" a", " b")) for row in HH_ROWS]


def test_a_known_set_is_read_by_its_own_splits_and_columns(tmp_path, monkeypatch):
    asked = hub(monkeypatch, tmp_path, train=HH_ROWS[:3], test=HH_ROWS[3:], extra=HH_ROWS)
    source = open_source("Dahoas/rm-static:0.5")
    assert asked == [{"path": "Dahoas/rm-static"}]
    assert (source.name, source.weight, source.unused) == ("Dahoas/rm-static", 0.5, ("extra",))
    assert list(read_comparisons(source, source.training, Format(), Findings())) == HH_COMPARISONS[:3]
    assert list(read_comparisons(source, source.evaluation, Format(), Findings())) == HH_COMPARISONS[3:]


def test_a_known_set_may_have_splits_of_other_names_and_none_for_evaluation(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"prompt": "Tea?", "chosen": turns, "rejected": [turns[0], {**turns[1], "content": "No."}]}]
    hub(monkeypatch, tmp_path, train_prefs=rows, train_sft=rows, test_gen=rows)
    name = "HuggingFaceH4/ultrafeedback_binarized"
    source = open_source(name)
    assert source.evaluation is None
    assert source.unused == ("test_gen", "train_sft")
    assert read(name) == [Comparison((Turn("user", "Tea?"),), ("Yes.", "No."))]


def test_a_known_set_uses_all_its_evaluation_splits(tmp_path, monkeypatch):
    row = {"question": "Q", "sentence": "S"}
    splits = {name: [{**row, "question": name}] for name in ("train", "validation", "test")}
    asked = hub(monkeypatch, tmp_path, **splits)
    found = read("lmqg/qg_jaquad", "evaluation")
    assert [comparison.prompt[0].content for comparison in found] == ["test", "validation"]
    assert asked == [{"path": "lmqg/qg_jaquad", "revision": "refs/convert/parquet", "data_dir": "qg_jaquad"}]


def test_a_known_set_that_lost_its_split_says_what_is_there(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, default=HH_ROWS, test=HH_ROWS)
    with pytest.raises(
        UserError, match=r"Dahoas/rm-static: .* no split train any more \(found: default, test"
    ):
        open_source("Dahoas/rm-static")


def test_empty_rows_of_a_known_set_are_dropped_and_other_columns_are_named_by_row(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, train=[*HH_ROWS, {**HH_ROWS[0], "chosen": " "}])
    findings = Findings()
    assert read("Dahoas/full-hh-rlhf", findings=findings) == HH_COMPARISONS
    assert findings.dropped == {'rows with an empty "chosen"': 1}
    hub(monkeypatch, tmp_path / "more", train=[*HH_ROWS, {**HH_ROWS[0], "prompt": None}])
    assert len(read("Dahoas/rm-static")) == 4
    hub(monkeypatch, tmp_path / "other", train=[{"prompt": "p", "chosen": "c"}])
    with pytest.raises(UserError, match='Dahoas/rm-static train, row 1: the row has no "rejected"'):
        read("Dahoas/rm-static")


def test_the_fingerprint_of_a_hub_set_follows_its_files(tmp_path, monkeypatch):
    prints = []
    for number, rows in enumerate((HH_ROWS, HH_ROWS, HH_ROWS[:2])):
        hub(monkeypatch, tmp_path / str(number), train=rows)
        prints.append(open_source("Dahoas/rm-static").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_local_jsonfile_reads_two_files_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"reads data/train\.json and, if it is there, data/eval\.json, seen"):
        open_source("local/jsonfile")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(lines(ROWS))
    assert read("local/jsonfile") == COMPARISONS
    assert open_source("local/jsonfile").evaluation is None
    without = open_source("local/jsonfile").fingerprint
    (tmp_path / "data" / "eval.json").write_text(json.dumps([{**ROWS[0], "rejected": None}]))
    assert read("local/jsonfile", "evaluation") == [Comparison("Grüße 😀", ("a\u2028b",))]
    assert open_source("local/jsonfile").fingerprint != without


def test_a_file_of_the_same_name_goes_before_a_known_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tatsu-lab").mkdir()
    (tmp_path / "tatsu-lab" / "alpaca").mkdir()
    (tmp_path / "tatsu-lab" / "alpaca" / "train.jsonl").write_text(lines(ROWS))
    assert read("tatsu-lab/alpaca") == COMPARISONS


@pytest.mark.parametrize(
    ("entry", "name", "weight"),
    [
        ("rows.jsonl:0.3", "rows.jsonl", 0.3),
        ("rows.jsonl:2", "rows.jsonl", 2.0),
        ("rows.jsonl:.5", "rows.jsonl", 0.5),
        ("rows.jsonl:1e-3", "rows.jsonl", 0.001),
        ("rows.jsonl:1E-3", "rows.jsonl", 0.001),
        ("rows.jsonl", "rows.jsonl", None),
        ("odd:7", "odd:7", None),  # the name of a folder that is there
    ],
)
def test_an_entry_may_end_with_a_weight(tmp_path, monkeypatch, entry, name, weight):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    (tmp_path / "odd:7").mkdir()
    (tmp_path / "odd:7" / "train.jsonl").write_text(lines(ROWS))
    source = open_source(entry)
    assert (source.name, source.weight) == (name, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "1e999"])
def test_a_weight_that_is_no_share_is_named(weight):
    with pytest.raises(UserError, match=f"rows.jsonl:{weight}: the weight must be positive, got {weight}"):
        open_source(f"rows.jsonl:{weight}")


def test_answers_after_a_first_row_without_are_not_lost_in_silence(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines([{"prompt": "Q"}, {"prompt": "R", "label": 1}, *ROWS]))
    with pytest.raises(
        UserError, match=r"rows\.jsonl:3: the row has prompt, chosen, rejected, but the first"
    ):
        read(tmp_path / "rows.jsonl")
    prompts = read(tmp_path / "rows.jsonl", form=Format("prompt_only"))
    assert prompts == [Comparison(text) for text in ("Q", "R", "Grüße 😀", "p2")]


@pytest.mark.parametrize("weight", ["0,3", "half", "nan", "inf", "0.3x", ""])
def test_a_weight_that_is_no_number_is_named_where_the_rest_is_a_file(tmp_path, weight):
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    with pytest.raises(UserError, match=f"rows.jsonl:{weight}: the weight must be a number, got '{weight}'"):
        open_source(f"{tmp_path / 'rows.jsonl'}:{weight}")


def form(**settings):
    return Format.of(DataArguments(**settings))


def test_a_format_is_a_layout_or_a_known_set_and_renames_columns():
    assert form() == Format()
    assert form().read_function() is None
    for name in ("ranked", "openai/gsm8k"):
        assert form(data_format=name).name == name
        assert callable(form(data_format=name).read_function())
    assert form(data_format="openai/gsm8k").read_function() is KNOWN_SETS["openai/gsm8k"].read
    renamed = form(prompt_key="q", chosen_key="prompt").renamed({"q": "1", "prompt": "2", "x": "3"})
    assert renamed == {"q": "1", "prompt": "1", "chosen": "2", "x": "3"}
    with pytest.raises(BadRow, match=r'no "m" \(--messages_key\)'):
        form(messages_key="m").renamed({"messages": []})
    with pytest.raises(UserError, match=r"--data_format 'hh2' is unknown; choose a layout .*known data set"):
        form(data_format="hh2")


def test_a_format_reads_every_source(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path, train=[{"question": "1+1?", "answer": "2"}])
    found = read("Dahoas/rm-static", form=form(data_format="question_answer"))
    assert found == [Comparison((Turn("user", "1+1?"),), ("2",))]


def test_a_folder_of_saved_parts_is_one_data_set(tmp_path):
    for number, row in enumerate(ROWS):
        datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / f"part-0000{number}"))
    assert read(tmp_path) == COMPARISONS
    assert open_source(str(tmp_path)).evaluation is None
    datasets.Dataset.from_list(ROWS[1:]).save_to_disk(str(tmp_path / "test"))
    assert read(tmp_path) == COMPARISONS
    assert read(tmp_path, "evaluation") == COMPARISONS[1:]
