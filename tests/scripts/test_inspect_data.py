"""What scripts/inspect_data.py tells of data whose faults are known."""

import json
import os
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_tiny_model

from dschat.data.comparisons import Comparison
from scripts.inspect_data import Counts, count_answers, warnings_of

PROGRAM = ROOT / "scripts" / "inspect_data.py"
SHARED = Path(os.environ.get("DSCHAT_SHARED", ROOT.parent / "shared")) / "data"

ROWS = [
    {"prompt": "Name <b>one</b> tea.", "chosen": "Assam it is.", "rejected": "No."},
    {"prompt": "Name <b>one</b> tea.", "chosen": "Darjeeling it is.", "rejected": "No."},
    {"prompt": "Two?", "chosen": "Two of them are here.", "rejected": "No."},
    {"prompt": "Two?", "chosen": "Two of them are here.", "rejected": "No."},
    {"prompt": "Equal?", "chosen": "same", "rejected": " same "},
    {"prompt": "Bad?", "chosen": 3, "rejected": "No."},
    {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": "yes", "rejected": "no"},
    {"prompt": "\n\nHuman: a\n\nAssistant: b", "chosen": "c", "rejected": "d"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture(scope="module")
def told(model) -> tuple[str, str]:
    """What is printed and what is on the page."""
    path = model.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    page = model.parent / "page.html"
    flags = [f"--data_path={path}", f"--model_name_or_path={model}", f"--html={page}", "--num_rows=8"]
    # A terminal wide enough that no line is broken.
    result = python(PROGRAM, *flags, "--max_seq_len=64", env={"COLUMNS": "200"}, check=False)
    assert result.returncode == 2, result.stderr  # training would stop
    return result.stdout, page.read_text()


def fact(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name + "  ")]
    return line.removeprefix(name).strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", "8, of which 6 could be used with --on_bad_row drop"),
        ("dropped: prompts that end inside an answer", "1"),
        ('cannot be read: "chosen" must be a string', "1"),
        ("pairs that are labelled both ways", "0 (0.0%)"),
        ("different prompts", "4"),
        ("repeated prompts", "2 (33.3%)"),
        ("repeated rows", "1 (16.7%)"),
        ("several turns", "1 (16.7%)"),
        ("pairs", "6"),
        ("pairs of equal answers", "1 (16.7%)"),
        ("the longer answer is the better one", "5 (100.0%)"),
        ("step 2 (reward), dropped: answers equal as tokens", "1 (16.7%)"),
    ],
)
def test_the_facts_are_those_of_the_rows(told, name, value):
    assert fact(told[0], name) == value


@pytest.mark.slow
def test_what_is_odd_is_said(told):
    text, page = told
    for warning in (
        'rows.jsonl:6: "chosen" must be a string, but is a number: 3',
        "length alone tells the better answer in 100% of the pairs",
        "1 pairs of equal answers",
        "1 of 8 rows cannot be read: training will stop at ",
    ):
        assert warning in text
    assert page.count('class="warning"') == 4
    assert "all 1 rows that cannot be read" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([(1, 1)] * 4, None),  # equal lengths tell nothing
        ([(2, 1)] * 4 + [(1, 1)] * 4, None),
        ([(1, 2)] * 6 + [(2, 1), (1, 1)], "75%"),
        ([(2, 1)] * 7 + [(1, 2)], "88%"),
    ],
)
def test_length_is_said_to_tell_the_better_answer_only_where_it_does(lengths, told):
    counts = Counts()
    for better, worse in lengths:
        count_answers(Comparison("Tea?", ("a" * better, "b" * worse)), counts)
    found = [warning for warning in warnings_of(counts, [], False) if "length alone" in warning]
    assert [told in warning for warning in found] == ([True] if told else [])


@pytest.mark.slow
def test_rows_are_shown_in_the_template_with_what_is_learned_marked(told):
    text, page = told
    assert "Human: Name <b>one</b> tea.\n\nAssistant:⟦ Darjeeling it is.<|endoftext|>⟧" in text
    shown = 'Assistant:</span><span class="learned"> Darjeeling it is.&lt;|endoftext|&gt;</span>'
    assert "Human: Name &lt;b&gt;one&lt;/b&gt; tea." in page
    assert shown in page


@pytest.mark.slow
def test_rows_that_are_left_out_are_all_told_of_and_the_others_count_as_used(model, tmp_path):
    template = tmp_path / "picky.jinja"
    refusal = "{% for m in messages %}{% if 'refused' in m['content'] %}{{ raise_exception('not that') }}"
    template.write_text(refusal + "{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    rows = [{"prompt": f"Q{n}", "chosen": "a", "rejected": "b", "mood": "x"} for n in range(12)]
    rows[4]["prompt"] = "refused"
    for number in range(6, 12):
        rows[number]["chosen"] = ""
    rows.append({**rows[0], "chosen": "b", "rejected": "a"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--data_path={tmp_path / 'rows.jsonl'}", f"--model_name_or_path={model}"]
    flags += [f"--chat_template={template}", "--on_bad_row=drop"]
    text = python(PROGRAM, *flags, cwd=tmp_path, env={"COLUMNS": "200"}).stdout
    assert fact(text, "rows") == "13, of which 6 can be used"
    assert fact(text, 'cannot be read: "chosen" is empty') == "6"
    assert fact(text, "pairs that are labelled both ways") == "1 (14.3%)"
    assert "7 of 13 rows cannot be read: training will leave them out (--on_bad_row drop)" in text
    assert "1 column is not read: `mood` (7 rows)" in text
    page = (tmp_path / "inspect_data.html").read_text()
    assert all(f"rows.jsonl:{line}: " in page for line in (5, 7, 8, 9, 10, 11, 12))
    assert "not that" in page


@pytest.mark.slow
def test_a_page_can_be_left_out_and_a_wrong_one_is_named(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "only a prompt"}) + "\n")
    flags = [f"--data_path={tmp_path / 'rows.jsonl'}", f"--model_name_or_path={model}"]
    result = python(PROGRAM, *flags, "--html=", cwd=tmp_path)
    assert "step 3, " in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    result = python(PROGRAM, *flags, f"--html={tmp_path / 'no' / 'page.html'}", check=False)
    assert (result.returncode, result.stderr.count("error: --html")) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("hh_rlhf_harmless/test.jsonl.gz", {"rows": "2312, of which 2303 can be used", "pairs": "2303"}),
        ("gsm8k/test.jsonl", {"rows": "1319, of which 1319 can be used", "pairs": "0"}),
        ("dpo_demo/dpo_en_demo.json", {"rows": "300, of which 300 can be used", "repeated rows": "5 (1.7%)"}),
    ],
)
def test_real_data_is_told(model, tmp_path, name, facts):
    if not (SHARED / name).exists():
        pytest.skip("needs the shared data")
    flags = [f"--data_path={SHARED / name}", f"--model_name_or_path={model}", "--num_sampled=100"]
    text = python(PROGRAM, *flags, cwd=tmp_path, env={"COLUMNS": "200"}).stdout
    assert {key: fact(text, key) for key in facts} == facts
    assert (tmp_path / "inspect_data.html").stat().st_size > 1000
