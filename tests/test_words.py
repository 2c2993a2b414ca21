"""The words of the house: names say what the field says, one word per thing."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "dschat").rglob("*.py"))
INSTEAD = {
    "figures": "metrics",
    "judge": "analyze",  # an LLM judge is another thing
    "judgement": "analysis",
    "handover": "upstream",
    "receive": "verify",
    "reader": "retokenizer or reward_tokenizer",
    "answered": "text_answers",
    "fate": "truncation",
    "settle": "configure",
    "begun": "restored",
    "skeleton": "meta_model",
    "said": "logged or reported",
    "told": "logged or reported",
}
"""Words that no name contains, and what to write in their place."""
NAMES = ("leave", "gather_json", "problem_anywhere", "print_once", "Schedule", "Watch", "Reading", "Judges")
"""Names that were used once, each for what another name says now."""
ON_DISK = {"begun", "figures", "judgement"}
"""Words in the keys of files that runs have written, which the fields of a record must have."""
PER = re.compile(
    r"\b(tokens?|nats?|number|value|rank|answer|row|prompt|tensor|line) an? "
    r"(token|answer|rank|row|prompt|step|pass|source|object|flag|figure)\b"
)
"""Where a sentence wants "per": two tokens a row."""


def names(path: Path) -> Iterator[str]:
    """Names that the module gives: of functions, classes, parameters, variables, fields and attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def docstrings(path: Path) -> Iterator[str]:
    """Strings that stand alone: of modules, functions, classes and fields."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def words(name: str) -> set[str]:
    """The words of a name, lower case: ReceiveModel and receive_model are receive and model."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_has_a_word_that_the_field_does_not_use(path):
    banned = {name: words(name) & (INSTEAD.keys() - ON_DISK) for name in names(path)}
    assert {name: [INSTEAD[word] for word in found] for name, found in banned.items() if found} == {}
    assert not set(names(path)) & set(NAMES)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_say_per_and_not_a(path):
    found = [match[0] for text in docstrings(path) for match in PER.finditer(text)]
    assert found == []


def test_a_name_is_cut_into_its_words():
    assert words("ReceiveModel") == words("receive_model") == {"receive", "model"}
    assert words("SFTFigures") == {"sft", "figures"}
