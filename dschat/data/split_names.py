"""Names of splits: for training, for evaluation, and which of them belong together."""

import re
from collections.abc import Sequence

from dschat.data.entries import Entry
from dschat.errors import UserError

TRAINING = ("train", "training")
EVALUATION = ("test", "testing", "validation", "valid", "val", "eval", "evaluation", "dev")
SHARD = re.compile(r"[-_.]?\d+-of-\d+.*$")
UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
NUMBERED = "numbered"
"""The split of files whose names are numbers alone."""


def split_of(stem: str) -> str:
    """The split of the file or folder called that: what is left without numbers, so shards are one split."""
    stem = UUID.sub("", SHARD.sub("", stem.lower()))
    return "_".join(word for word in re.split(r"[-_. ]+|\d+", stem) if word) or NUMBERED


def is_for_evaluation(name: str) -> bool:
    """Whether the split is meant for evaluation, as test and test_sft are."""
    words = _words(name)
    return not words.isdisjoint(EVALUATION) and words.isdisjoint(TRAINING)


def says_a_split(name: str) -> bool:
    """Whether any word of the name is that of a split."""
    return not _words(name).isdisjoint((*TRAINING, *EVALUATION))


def is_plain(name: str) -> bool:
    """Whether the name is that of a split and nothing more."""
    return name.lower() in (*TRAINING, *EVALUATION)


def choose_splits(names: Sequence[str], entry: Entry) -> tuple[list[str], list[str]]:
    """The splits to train on and those to evaluate on, of the names that are there.

    The former is the one that `entry` names, or is called train, or is the only one that is not for
    evaluation; with it go the splits for evaluation that are called alike: test_sft with train_sft, test with
    train. Of an entry for evaluation only, the former are what it names, or else its splits for evaluation.
    Raises `UserError` with what to write where that leaves a choice.
    """
    evaluation = [name for name in names if is_for_evaluation(name)]
    others = [name for name in names if name not in evaluation]
    if entry.split is not None:
        training = list(dict.fromkeys(_named(wanted, names, entry) for wanted in entry.split.split("+")))
    elif entry.evaluates and evaluation:
        if len(evaluation) > 1 and not set(evaluation) <= set(EVALUATION):
            raise _several(evaluation, entry, "evaluate")
        training = evaluation
    else:
        training = [name for name in names if name in TRAINING] or others
        if len(training) != 1:
            raise _several(others, entry, "train") if others else _none(evaluation, entry)
    if entry.evaluates:
        return training, []
    return training, _partners(training, [name for name in evaluation if name not in training], others)


def _partners(training: list[str], evaluation: list[str], others: list[str]) -> list[str]:
    alike = {
        re.sub(r"(?<![^\W_])train(ing)?(?![^\W_])", word, name.lower())
        for name in training
        for word in EVALUATION
    }
    found = [name for name in evaluation if name.lower() in alike]
    found = found or [name for name in evaluation if name.lower() in EVALUATION]
    return found or (evaluation if len(others) <= 1 else [])


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_. \d]+", name.lower()))


def _named(wanted: str, names: Sequence[str], entry: Entry) -> str:
    """The name that is wanted, be it as a file has it or without its number."""
    for name in names:
        if name in (wanted, split_of(wanted)):
            return name
    names = sorted(names)
    remedy = f"; write {entry.choices('split', names)}" if names else ""
    raise UserError(f"{entry}: there is no split {wanted} (found: {', '.join(names) or 'none'}){remedy}.")


def _several(names: list[str], entry: Entry, use: str) -> UserError:
    names = sorted(names)
    return UserError(
        f"{entry}: there are several splits to {use} on: {', '.join(names)}. Write "
        f"{entry.choices('split', names)}; split={'+'.join(names[:2])} would join two."
    )


def _none(evaluation: list[str], entry: Entry) -> UserError:
    if not evaluation:
        return UserError(f"{entry}: there are no splits in it; name another data set.")
    names = sorted(evaluation)
    return UserError(
        f"{entry}: there is no split to train on (found: {', '.join(names)}). To train on what is meant for "
        f"evaluation, write {entry.choices('split', names)}."
    )
