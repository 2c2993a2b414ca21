import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.known_sets import KNOWN_SETS

DIALOGUE = "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: Milk?\n\nAssistant:"


def asked(question, *answers):
    return Comparison((Turn("user", question),), answers)


HH = {"prompt": DIALOGUE, "response": " A drop.", "chosen": " A drop.", "rejected": " No idea."}
PASSAGE = {"docid": "1#0", "text": "富士山高3776米。", "title": "富士山"}
MKQA = {
    "query": "how high is mount fuji",
    "queries": {"en": "how high is mount fuji", "ja": "富士山の高さは", "zh_cn": "富士山有多高"},
    "answers": {
        "ja": [{"type": 5, "entity": None, "text": "3776メートル", "aliases": ["3776m"]}],
        "zh_cn": [{"type": 5, "entity": None, "text": "3776米", "aliases": []}],
    },
}
MIRACL = {
    "query_id": "1",
    "query": "富士山有多高?",
    "positive_passages": [PASSAGE, {**PASSAGE, "text": "另一段"}],
    "negative_passages": [{**PASSAGE, "text": "富士山很美。"}],
    "emb": [0.5, -0.5],
}
SAMPLES = {
    "Dahoas/rm-static": (HH, Comparison(DIALOGUE, (" A drop.", " No idea."))),
    "Dahoas/full-hh-rlhf": (HH, Comparison(DIALOGUE, (" A drop.", " No idea."))),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "Name a tea.", "chosen": "Assam.", "rejected": "Coffee."},
        asked("Name a tea.", "Assam.", "Coffee."),
    ),
    "yitingxie/rlhf-reward-datasets": (
        {
            "prompt": DIALOGUE.removesuffix("Assistant:"),
            "chosen": "Assistant: A drop.",
            "rejected": "Assistant: No idea.",
        },
        Comparison(DIALOGUE, (" A drop.", " No idea.")),
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "a1", "full_text": "Why is the sky blue?"},
            "quotes_0": {"title": ["Sky"], "extract": ["Blue light scatters."]},
            "answer_0": "It is a mirror [1].",
            "tokens_0": {"prefix": [1], "completion": [2]},
            "score_0": -0.25,
            "quotes_1": {"title": [], "extract": []},
            "answer_1": "Air scatters blue [1, 2] light (more than red) [3].",
            "tokens_1": {"prefix": [1], "completion": [3]},
            "score_1": 0.25,
        },
        asked("Why is the sky blue?", "Air scatters blue light (more than red).", "It is a mirror."),
    ),
    "stanfordnlp/SHP": (
        {
            "post_id": "p",
            "history": "My bread is flat.",
            "human_ref_A": "Throw it.",
            "human_ref_B": "Let it rise.",
            "labels": 0,
            "score_A": 3,
            "score_B": 9,
            "score_ratio": 3.0,
        },
        asked("My bread is flat.", "Let it rise.", "Throw it."),
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Tea? ASSISTANT: Yes.</s>USER: Milk? ASSISTANT:", "label": "A drop.</s>"},
        Comparison((Turn("user", "Tea?"), Turn("assistant", "Yes."), Turn("user", "Milk?")), ("A drop.",)),
    ),
    "wangrui6/Zhihu-KOL": (
        {"INSTRUCTION": "茶好喝吗?", "RESPONSE": "好喝。", "SOURCE": "Zhihu", "METADATA": "{}"},
        asked("茶好喝吗?", "好喝。"),
    ),
    "Cohere/miracl-zh-queries-22-12": (MIRACL, asked("富士山有多高?", "富士山高3776米。", "富士山很美。")),
    "Cohere/miracl-ja-queries-22-12": (MIRACL, asked("富士山有多高?", "富士山高3776米。", "富士山很美。")),
    "Hello-SimpleAI/HC3-Chinese": (
        {
            "question": "茶?",
            "human_answers": ["好。", "行。"],
            "chatgpt_answers": ["作为AI"],
            "source": "baike",
        },
        asked("茶?", "好。"),
    ),
    "mkqa-Chinese": (MKQA, asked("富士山有多高", "3776米")),
    "mkqa-Japanese": (MKQA, asked("富士山の高さは", "3776メートル")),
    "lmqg/qg_jaquad": (
        {"question": "高さは?", "sentence": "高さは3776メートル。", "answer": "3776", "paragraph": "富士山…"},
        asked("高さは?", "高さは3776メートル。"),
    ),
    "lmqg/qag_jaquad": (
        {
            "paragraph": "富士山は日本一高い山である。",
            "questions": ["日本一高い山は?", "どこ?"],
            "answers": ["富士山", "日本"],
            "questions_answers": "question: ...",
        },
        asked("日本一高い山は?", "富士山は日本一高い山である。"),
    ),
    "local/jsonfile": (
        {"prompt": "Name a tea.", "chosen": "Assam.", "rejected": "Coffee."},
        Comparison("Name a tea.", ("Assam.", "Coffee.")),
    ),
    "Anthropic/hh-rlhf": (
        {"chosen": DIALOGUE + " A drop.", "rejected": DIALOGUE + " No idea."},
        Comparison(DIALOGUE, (" A drop.", " No idea.")),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": "Name a tea.",
            "prompt_id": "0f",
            "chosen": [
                {"content": "Name a tea.", "role": "user"},
                {"content": "Assam.", "role": "assistant"},
            ],
            "rejected": [
                {"content": "Name a tea.", "role": "user"},
                {"content": "Coffee.", "role": "assistant"},
            ],
            "messages": [{"content": "Name a tea.", "role": "user"}],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        asked("Name a tea.", "Assam.", "Coffee."),
    ),
    "tatsu-lab/alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "Below is an instruction"},
        asked("Add.\n\n2 and 3", "5"),
    ),
    "openai/gsm8k": ({"question": "2 + 3?", "answer": "5\n#### 5"}, asked("2 + 3?", "5\n#### 5")),
}

COLUMNS = {
    "yitingxie/rlhf-reward-datasets": "prompt chosen rejected",
    "Dahoas/rm-static": "prompt chosen rejected",
    "Dahoas/full-hh-rlhf": "prompt chosen rejected",
    "Dahoas/synthetic-instruct-gptj-pairwise": "prompt chosen rejected",
    "openai/webgpt_comparisons": "question answer_0 answer_1 score_0 score_1",
    "stanfordnlp/SHP": "history human_ref_A human_ref_B labels",
    "pvduy/sharegpt_alpaca_oa_vicuna_format": "prompt label",
    "wangrui6/Zhihu-KOL": "INSTRUCTION RESPONSE",
    "Cohere/miracl-zh-queries-22-12": "query positive_passages negative_passages",
    "Cohere/miracl-ja-queries-22-12": "query positive_passages negative_passages",
    "Hello-SimpleAI/HC3-Chinese": "question human_answers",
    "mkqa-Chinese": "queries answers",
    "mkqa-Japanese": "queries answers",
    "lmqg/qg_jaquad": "question sentence",
    "lmqg/qag_jaquad": "questions paragraph",
    "local/jsonfile": "prompt chosen rejected",
    "Anthropic/hh-rlhf": "chosen rejected",
    "HuggingFaceH4/ultrafeedback_binarized": "chosen rejected",
    "tatsu-lab/alpaca": "instruction output",
    "openai/gsm8k": "question answer",
}
EACH_COLUMN = [(name, column) for name, columns in COLUMNS.items() for column in columns.split()]


def read(name, **changes):
    return KNOWN_SETS[name].read({**copy.deepcopy(SAMPLES[name][0]), **changes})


def test_the_known_sets_are_the_twenty_that_are_promised():
    assert set(KNOWN_SETS) == set(SAMPLES) == set(COLUMNS)
    assert len(KNOWN_SETS) == 20
    assert all(known.name == name for name, known in KNOWN_SETS.items())


def test_the_documentation_lists_each_with_its_columns():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, column in EACH_COLUMN:
        lines = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert len(lines) == 1
        assert f"`{column}" in lines[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_row_becomes_the_comparison_it_means(name):
    assert read(name) == SAMPLES[name][1]


@pytest.mark.parametrize(("name", "column"), EACH_COLUMN)
def test_a_missing_column_is_named(name, column):
    row = copy.deepcopy(SAMPLES[name][0])
    del row[column]
    with pytest.raises(BadRow, match=f'"{column}"'):
        KNOWN_SETS[name].read(row)


@pytest.mark.parametrize(
    ("name", "column"), [pair for pair in EACH_COLUMN if pair != ("openai/gsm8k", "answer")]
)
def test_a_column_of_another_type_is_named(name, column):
    with pytest.raises(BadRow, match=column):
        read(name, **{column: [2.5] if column.startswith("score") else 2.5})


TEXT_COLUMNS = [
    (name, column)
    for name, column in EACH_COLUMN
    if isinstance(SAMPLES[name][0][column], str) and name != "local/jsonfile"
]


@pytest.mark.parametrize("empty", [None, "", " \n"])
@pytest.mark.parametrize(("name", "column"), TEXT_COLUMNS)
def test_a_published_row_without_text_is_dropped(name, column, empty):
    with pytest.raises(DroppedRow, match=column):
        read(name, **{column: empty})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("yitingxie/rlhf-reward-datasets", {"rejected": "Assistant: "}, "empty answers"),
        (
            "yitingxie/rlhf-reward-datasets",
            {"prompt": "\n\nHuman: a\n\nAssistant: b\n\n"},
            "inside an answer",
        ),
        ("openai/webgpt_comparisons", {"score_0": 0.0, "score_1": 0.0}, "ties"),
        ("openai/webgpt_comparisons", {"answer_0": "[1] [2]"}, "empty answers"),
        ("openai/webgpt_comparisons", {"question": {"full_text": ""}}, "full_text"),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER: a ASSISTANT: b"}, "inside an answer"),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER: ASSISTANT:"}, "empty message"),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "ASSISTANT:"}, "without a question"),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"label": "</s>"}, "empty message"),
        ("Cohere/miracl-zh-queries-22-12", {"positive_passages": []}, "without an answer"),
        ("Cohere/miracl-ja-queries-22-12", {"positive_passages": [{"text": ""}]}, "without an answer"),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}, "without an answer"),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": [None]}, "without an answer"),
        ("mkqa-Chinese", {"queries": {"zh_cn": None}}, "zh_cn"),
        ("mkqa-Chinese", {"answers": {"zh_cn": [{"type": 7, "text": None}]}}, "without an answer"),
        ("mkqa-Japanese", {"answers": {"ja": []}}, "without an answer"),
        ("lmqg/qag_jaquad", {"questions": []}, "without an answer"),
        ("Anthropic/hh-rlhf", {"rejected": "\n\nHuman: Other?\n\nAssistant: No."}, "part before"),
        ("Anthropic/hh-rlhf", {"rejected": DIALOGUE + " "}, "empty answers"),
    ],
)
def test_what_is_of_no_use_is_dropped_with_its_reason(name, changes, reason):
    with pytest.raises(DroppedRow, match=reason):
        read(name, **changes)


def test_the_score_decides_which_answer_of_webgpt_is_better_and_is_no_margin():
    swapped = read("openai/webgpt_comparisons", score_0=1.0, score_1=-1.0)
    assert swapped.answers == ("It is a mirror.", "Air scatters blue light (more than red).")
    assert (swapped.margin, swapped.ranks) == (0.0, None)


def test_label_one_of_shp_prefers_a():
    assert read("stanfordnlp/SHP", labels=1).answers == ("Throw it.", "Let it rise.")
    with pytest.raises(BadRow, match='"labels" must be 0 or 1'):
        read("stanfordnlp/SHP", labels=2)


def test_a_query_without_a_wrong_passage_has_one_answer():
    for empty in ([], None):
        assert read("Cohere/miracl-zh-queries-22-12", negative_passages=empty).answers == (
            "富士山高3776米。",
        )


def test_a_prompt_of_the_reward_datasets_may_have_its_mark_already():
    assert read("yitingxie/rlhf-reward-datasets", prompt=DIALOGUE).prompt == DIALOGUE


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Be brief. USER: Tea? ASSISTANT:", (Turn("system", "Be brief."), Turn("user", "Tea?"))),
        ("Tea?", (Turn("user", "Tea?"),)),
        ("USER: What is a SUPERUSER: here?\nASSISTANT:", (Turn("user", "What is a SUPERUSER: here?"),)),
    ],
)
def test_vicuna_prompts_become_turns(prompt, expected):
    assert read("pvduy/sharegpt_alpaca_oa_vicuna_format", prompt=prompt).prompt == expected


def test_an_empty_message_of_ultrafeedback_drops_the_row():
    empty = [{"role": "user", "content": "Name a tea."}, {"role": "assistant", "content": ""}]
    with pytest.raises(DroppedRow, match="content"):
        read("HuggingFaceH4/ultrafeedback_binarized", chosen=empty)


def test_an_alpaca_row_without_input_is_its_instruction():
    assert read("tatsu-lab/alpaca", input="").prompt == (Turn("user", "Add."),)


def test_local_files_may_leave_answers_null_but_not_the_prompt():
    assert read("local/jsonfile", rejected=None) == Comparison("Name a tea.", ("Assam.",))
    assert read("local/jsonfile", rejected=None, chosen=None) == Comparison("Name a tea.")
    with pytest.raises(BadRow, match='"chosen" must be a string, but is null'):
        read("local/jsonfile", chosen=None)
    with pytest.raises(BadRow, match='"prompt" must be a string, but is null'):
        read("local/jsonfile", prompt=None, rejected=None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Dahoas/rm-static", {"path": "Dahoas/rm-static"}),
        ("openai/gsm8k", {"path": "openai/gsm8k", "name": "main"}),
        # The sets with a loading script: their Parquet copy, a folder for each config.
        (
            "mkqa-Chinese",
            {"path": "apple/mkqa", "revision": "refs/convert/parquet", "data_dir": "mkqa"},
        ),
        (
            "Hello-SimpleAI/HC3-Chinese",
            {"path": "Hello-SimpleAI/HC3-Chinese", "revision": "refs/convert/parquet", "data_dir": "all"},
        ),
    ],
)
def test_what_load_dataset_is_asked_for(name, options):
    assert KNOWN_SETS[name].load_options() == options


def test_where_the_splits_are():
    ultrafeedback = KNOWN_SETS["HuggingFaceH4/ultrafeedback_binarized"]
    assert (ultrafeedback.training, ultrafeedback.evaluation) == (("train_prefs",), ("test_prefs",))
    assert KNOWN_SETS["Cohere/miracl-ja-queries-22-12"].evaluation == ("dev",)
    assert KNOWN_SETS["local/jsonfile"].local_files == ("data/train.json", "data/eval.json")
    assert [name for name, known in KNOWN_SETS.items() if known.hub_id is None] == ["local/jsonfile"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["USER: a ASSISTANT:", DIALOGUE]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["text", "full_text", "role", "content", "ja", "zh_cn"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_whatever_the_columns_hold_it_is_read_or_refused(name, data):
    columns = {
        column: data.draw(VALUES | st.just(SAMPLES[name][0][column])) for column in COLUMNS[name].split()
    }
    try:
        comparison = KNOWN_SETS[name].read(columns)
    except (BadRow, DroppedRow):
        return
    assert all(answer.strip() for answer in comparison.answers)
