"""Known sets: data sets of the hub that --data_path takes by name, each read by one small function.

They keep their own columns, and one cannot mend a published row. So a row whose text is missing or blank is
dropped and counted here, where a file of one's own ends in an error; a missing column is an error in both.
To add a set, write a function from a row to a Comparison and put `@dataset(name)` above it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from dschat.data.cells import (
    BadRow,
    Columns,
    DroppedRow,
    Row,
    describe,
    finite_number,
    sound_text,
    text,
    value_of,
)
from dschat.data.comparisons import Comparison, Turn
from dschat.data.layouts import (
    ASSISTANT,
    ReadRow,
    a_prompt,
    alpaca,
    answers_to_a_prompt,
    question_answer,
    text_prompt,
    whole_dialogues,
)
from dschat.data.messages import turns

PARQUET_COPY = "refs/convert/parquet"
"""The branch on which the hub keeps a Parquet copy of a data set, with a folder for each config."""


@dataclass(frozen=True)
class KnownSet:
    """A data set that is known by name: where it is, its splits, and how to read a row of it."""

    name: str
    """What users give to --data_path."""
    read: ReadRow
    hub_id: str | None
    """What `datasets.load_dataset` takes; None where the rows come from `local_files`."""
    config: str | None = None
    """The part of it to load."""
    scripted: bool = False
    """Whether its repository has a loading script, which `datasets` refuses since version 4."""
    training: tuple[str, ...] = ("train",)
    """Names of splits."""
    evaluation: tuple[str, ...] = ("test", "validation")
    """Names of splits; those that are there are used."""
    others: tuple[str, ...] = ()
    """Columns that are known and left alone: they are not reported."""
    local_files: tuple[str, str] | None = None
    """Files for training and for evaluation, seen from the working directory, in place of a hub id."""

    def load_options(self) -> dict[str, str]:
        """The keyword arguments of `datasets.load_dataset`. Not for a set of `local_files`."""
        assert self.hub_id is not None
        if self.scripted:
            # The copy has no metadata that would make its folders configs, hence data_dir.
            return {"path": self.hub_id, "revision": PARQUET_COPY, "data_dir": self.config or "default"}
        return {"path": self.hub_id} | ({"name": self.config} if self.config else {})


KNOWN_SETS: dict[str, KnownSet] = {}
"""The known sets by name."""


def dataset(name: str, **where: Any) -> Callable[[ReadRow], ReadRow]:
    """Register the function below as the reader of that set; `where` are fields of `KnownSet`."""

    def register(read: ReadRow) -> ReadRow:
        @wraps(read)
        def read_known(row: Row) -> Comparison:
            if isinstance(row, Columns):
                row.asked.update(KNOWN_SETS[name].others)
            return read(row)

        KNOWN_SETS[name] = KnownSet(name, read_known, **{"hub_id": name, **where})
        return read

    return register


def _filled(row: Row, *columns: str) -> None:
    """Raise `DroppedRow` where one of the columns is null or blank."""
    for column in columns:
        value = value_of(row, column)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DroppedRow(f'rows with an empty "{column}"')


def _question(row: Row, column: str) -> tuple[Turn, ...]:
    return (Turn("user", text(row, column).strip()),)


def _plain(row: Row, question: str, *answers: str) -> Comparison:
    """A question and its answers, the best first, in columns of plain text."""
    _filled(row, question, *answers)
    return Comparison(_question(row, question), tuple(text(row, column) for column in answers))


def _items(row: Row, column: str) -> list[Any]:
    value = value_of(row, column)
    if value is not None and not isinstance(value, list):
        raise BadRow(f'"{column}" must be a list, but is {describe(value)}')
    return value or []


def _first_text(row: Row, column: str) -> str | None:
    """The first of a list of texts, or of objects with a "text"; None where there is none."""
    value = (_items(row, column) or [None])[0]
    if isinstance(value, dict):
        value = value_of(value, "text")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return sound_text(value, f'the first of "{column}"')


def _asked(question: str | None, answer: str | None) -> Comparison:
    """A question and its one answer, both of which must be there."""
    if question is None or answer is None:
        raise DroppedRow("questions without an answer")
    return Comparison((Turn("user", question.strip()),), (answer,))


def _object(row: Row, column: str) -> Row:
    value = value_of(row, column)
    if not isinstance(value, dict):
        raise BadRow(f'"{column}" must be an object, but is {describe(value)}')
    return value


@dataset("Dahoas/rm-static", others=("response",))
def rm_static(row: Row) -> Comparison:
    """`prompt` is a dialogue up to "\\n\\nAssistant:", `chosen` and `rejected` go on from there."""
    _filled(row, "prompt", "chosen", "rejected")
    return answers_to_a_prompt(row)


@dataset("Dahoas/full-hh-rlhf", others=("response",))
def full_hh_rlhf(row: Row) -> Comparison:
    """As rm-static, of which this is the whole."""
    return rm_static(row)


@dataset("Dahoas/synthetic-instruct-gptj-pairwise")
def synthetic_instruct(row: Row) -> Comparison:
    """Plain instructions; no split is for evaluation."""
    return _plain(row, "prompt", "chosen", "rejected")


@dataset("yitingxie/rlhf-reward-datasets")
def rlhf_reward_datasets(row: Row) -> Comparison:
    """As rm-static, but the mark "Assistant:" begins the answers and does not end the prompt."""
    _filled(row, "prompt", "chosen", "rejected")
    prompt = text_prompt(text(row, "prompt")).rstrip().removesuffix("Assistant:").rstrip() + ASSISTANT
    answers = [text(row, column).lstrip().removeprefix("Assistant:") for column in ("chosen", "rejected")]
    if not all(answer.strip() for answer in answers):
        raise DroppedRow("empty answers")
    return Comparison(prompt, tuple(answers))


@dataset(
    "openai/webgpt_comparisons",
    config="default",
    scripted=True,
    others=("quotes_0", "quotes_1", "tokens_0", "tokens_1"),
)
def webgpt_comparisons(row: Row) -> Comparison:
    """Two answers with scores from -1 to 1 that add up to 0; no split is for evaluation."""
    scores = [finite_number(value_of(row, column), f'"{column}"') for column in ("score_0", "score_1")]
    if scores[0] == scores[1]:
        raise DroppedRow("ties")
    question = _object(row, "question")
    best_first = ("answer_0", "answer_1") if scores[0] > scores[1] else ("answer_1", "answer_0")
    _filled(question, "full_text")
    _filled(row, *best_first)
    # They cite, by number, pages that our prompts do not hold.
    answers = tuple(re.sub(r" ?\[\d+(, ?\d+)*\]", "", text(row, column)) for column in best_first)
    if not all(answer.strip() for answer in answers):
        raise DroppedRow("empty answers")
    return Comparison(_question(question, "full_text"), answers)


@dataset(
    "stanfordnlp/SHP",
    others=(
        *("upvote_ratio", "c_root_id_A", "c_root_id_B", "created_at_utc_A", "created_at_utc_B"),
        *("score_A", "score_B", "seconds_difference", "score_ratio", "domain"),
    ),
)
def shp(row: Row) -> Comparison:
    """A post and two comments on it; `labels` is 1 where readers preferred A, 0 where they preferred B."""
    label = value_of(row, "labels")
    if label not in (0, 1):
        raise BadRow(f'"labels" must be 0 or 1, but is {describe(label)}')
    best_first = ("human_ref_A", "human_ref_B") if label == 1 else ("human_ref_B", "human_ref_A")
    return _plain(row, "history", *best_first)


@dataset("pvduy/sharegpt_alpaca_oa_vicuna_format")
def sharegpt_vicuna(row: Row) -> Comparison:
    """`prompt` is "USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:" and `label` the answer to it."""
    _filled(row, "prompt", "label")
    before, *parts = re.split(r"(?:^|(?<=\s)|</s>)(USER|ASSISTANT):", text(row, "prompt"))
    messages = [{"role": "system" if parts else "user", "content": before}] if before.strip() else []
    messages += [{"role": r.lower(), "content": c} for r, c in zip(parts[::2], parts[1::2], strict=True)]
    if messages[-1]["role"] == "assistant" and messages.pop()["content"].strip():
        raise DroppedRow("prompts that end inside an answer")
    answer = text(row, "label").removesuffix("</s>")  # the end token is the template's to write
    if not all(message["content"].strip() for message in messages) or not answer.strip():
        raise DroppedRow("conversations with an empty message")
    if not any(message["role"] == "user" for message in messages):
        raise DroppedRow("answers without a question")
    return Comparison(turns(messages, '"prompt"'), (answer,))


@dataset("wangrui6/Zhihu-KOL", others=("SOURCE", "METADATA"))
def zhihu_kol(row: Row) -> Comparison:
    """Chinese questions and answers; no split is for evaluation."""
    return _plain(row, "INSTRUCTION", "RESPONSE")


def _passages(row: Row) -> Comparison:
    """MIRACL: a query, a passage that answers it, and, in most rows, one that does not."""
    _filled(row, "query")
    right, wrong = _first_text(row, "positive_passages"), _first_text(row, "negative_passages")
    if right is None:
        raise DroppedRow("questions without an answer")
    return Comparison(_question(row, "query"), (right,) if wrong is None else (right, wrong))


@dataset("Cohere/miracl-zh-queries-22-12", evaluation=("dev",), others=("emb",))
def miracl_zh(row: Row) -> Comparison:
    """MIRACL in Chinese. Its third split, testB, has no passages."""
    return _passages(row)


@dataset("Hello-SimpleAI/HC3-Chinese", config="all", scripted=True, others=("chatgpt_answers",))
def hc3_chinese(row: Row) -> Comparison:
    """The first answer that a person gave. Nobody compared it with `chatgpt_answers`, so it makes no pair."""
    _filled(row, "question")
    return _asked(text(row, "question"), _first_text(row, "human_answers"))


def _mkqa(row: Row, language: str) -> Comparison:
    """MKQA: short answers; those to questions that need a long one, or that have none, are null."""
    queries, answers = _object(row, "queries"), _object(row, "answers")
    _filled(queries, language)
    return _asked(text(queries, language), _first_text(answers, language))


# One data set holds all languages of MKQA, so the name says which. The hub moved "mkqa" to its owner, apple.
@dataset("mkqa-Chinese", hub_id="apple/mkqa", config="mkqa", scripted=True)
def mkqa_chinese(row: Row) -> Comparison:
    """MKQA in Chinese, simplified script."""
    return _mkqa(row, "zh_cn")


@dataset("mkqa-Japanese", hub_id="apple/mkqa", config="mkqa", scripted=True)
def mkqa_japanese(row: Row) -> Comparison:
    """MKQA in Japanese."""
    return _mkqa(row, "ja")


@dataset("Cohere/miracl-ja-queries-22-12", evaluation=("dev",), others=("emb",))
def miracl_ja(row: Row) -> Comparison:
    """MIRACL in Japanese."""
    return _passages(row)


@dataset(
    "lmqg/qg_jaquad",
    config="qg_jaquad",
    scripted=True,
    others=(
        *("answer", "paragraph", "paragraph_id", "sentence_answer", "paragraph_answer"),
        "paragraph_sentence",
    ),
)
def qg_jaquad(row: Row) -> Comparison:
    """Japanese questions; the answer is the whole sentence, since `answer` is a few words of it."""
    return _plain(row, "question", "sentence")


@dataset(
    "lmqg/qag_jaquad",
    config="qag_jaquad",
    scripted=True,
    others=("answers", "questions_answers", "paragraph_id"),
)
def qag_jaquad(row: Row) -> Comparison:
    """The first of several questions on a Japanese paragraph, and that paragraph."""
    _filled(row, "paragraph")
    return _asked(_first_text(row, "questions"), text(row, "paragraph"))


@dataset("local/jsonfile", hub_id=None, local_files=("data/train.json", "data/eval.json"))
def local_jsonfile(row: Row) -> Comparison:
    """`prompt`, `chosen` and `rejected` in files of one's own; null is an answer that there is not."""
    given = {column: value_of(row, column) for column in ("prompt", "chosen", "rejected")}
    if given["rejected"] is not None:
        return answers_to_a_prompt(row)
    answer = () if given["chosen"] is None else (text(given, "chosen"),)
    return Comparison(a_prompt(given), answer)


@dataset("Anthropic/hh-rlhf")
def hh_rlhf(row: Row) -> Comparison:
    """Two whole dialogues that differ in the last answer."""
    _filled(row, "chosen", "rejected")
    return whole_dialogues(row)


@dataset(
    "HuggingFaceH4/ultrafeedback_binarized",
    training=("train_prefs",),
    evaluation=("test_prefs",),
    others=("prompt", "messages"),
)
def ultrafeedback_binarized(row: Row) -> Comparison:
    """Two conversations of one question and one answer each.

    `score_chosen` less `score_rejected` is no margin: GPT-4 gives 1 to 10 points, a margin is on the scale of
    the reward model's scores, where 9 would mean odds of 8,000 to 1.
    """
    for message in _items(row, "chosen") + _items(row, "rejected"):
        if isinstance(message, dict):
            _filled(message, "content")
    return whole_dialogues(row)


@dataset("tatsu-lab/alpaca", others=("text",))
def stanford_alpaca(row: Row) -> Comparison:
    """Instructions, some with an input; no split is for evaluation."""
    _filled(row, "instruction", "output")
    return alpaca(row)


@dataset("openai/gsm8k", config="main")
def gsm8k(row: Row) -> Comparison:
    """Sums in words; the answer ends with "#### " and the number."""
    _filled(row, "question", "answer")
    return question_answer(row)
