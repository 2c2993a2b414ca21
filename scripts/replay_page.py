"""The page of a replay: answers with their tokens coloured, a table per token, and what would have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.reports.page import Block, Section, Table, Text, Verdict, render

COLUMNS = (
    ("actor, old", "old_logprob", ".3f"),
    ("reference", "ref_logprob", ".3f"),
    ("value", "value", ".3f"),
    ("KL reward", "kl_reward", "+.4f"),
    ("score reward", "score_reward", "+.3f"),
    ("advantage", "advantage", "+.3f"),
    ("return", "return", "+.3f"),
)
STRONGEST = 2.0
"""Magnitude of an advantage that has the full colour; whitened ones have a standard deviation of 1."""
TEMPLATE = Path(__file__).with_suffix(".html.jinja")


def replay_page(found: Mapping[str, Any]) -> str:
    """The HTML of a replay.json."""
    start, between = found["checkpoint"] or "the beginning of the run", found["steps_between"]
    way = f", over {between} PPO step(s) between" if between else ""
    versions = [("as it was", found["answers"])]
    what_if = found.get("what_if")
    if what_if:
        versions.append((f"with {flags_in_words(what_if['flags'])}", what_if["answers"]))
    return render(
        TEMPLATE.read_text(encoding="utf-8"),
        title=f"PPO step {found['ppo_step']} again",
        lead=f"{found['run']}, from {start}{way}; {found['ranks']} rank(s).",
        blocks=[*_equality(found), *(_changes(what_if) if what_if else [])],
        versions=[(name, [_shown(answer) for answer in answers]) for name, answers in versions],
    )


def flags_in_words(flags: Mapping[str, Sequence[Any]]) -> str:
    """The flags of --with, each with what it replaces."""
    return ", ".join(f"--{name} {new} in place of {old}" for name, (old, new) in flags.items()) or "no change"


def _equality(found: Mapping[str, Any]) -> list[Block]:
    different, equal = found["different"], found["equal"]
    if not different:
        words = f"equal to the last bit in all {len(equal)} metrics that were logged"
        return [Verdict(words, level="good")]
    words = f"{len(different)} of {len(different) + len(equal)} metrics are not the logged ones"
    rows = [(name, repr(was), repr(now)) for name, (was, now) in different.items()]
    return [Verdict(words, level="bad"), Table(rows, columns=("metric", "logged", "now"))]


def _changes(what_if: Mapping[str, Any]) -> list[Block]:
    rows = [(name, *both_shown(was, now)) for name, (was, now) in what_if["metrics"].items()]
    moved = [
        (name, "other answers" if size is None else f"{size:.3g}")
        for name, size in what_if["columns"].items()
    ]
    blocks: list[Block] = [
        Table(rows, columns=("metric", "was", "would be")),
        Text(f"Unchanged metrics: {', '.join(what_if['same_metrics']) or 'none'}.", faint=True),
        Table(moved, columns=("number of a token or an answer", "largest change")),
        Text(f"The same to the last bit: {', '.join(what_if['same_columns']) or 'none'}.", faint=True),
    ]
    return [Section(f"With {flags_in_words(what_if['flags'])}", blocks)]


def both_shown(was: Any, now: Any) -> tuple[str, str]:
    """Two values that differ: floats in six digits, and in all where six do not tell them apart."""
    first, second = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in (was, now))
    return (first, second) if first != second else (repr(was), repr(now))


def _shown(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as the template takes it."""
    tokens = answer["tokens"]
    columns = [(title, name, form) for title, name, form in COLUMNS if tokens and name in tokens[0]]
    numbers = range(1, len(tokens[0]["passes"]) + 1) if tokens else range(0)
    titles = ["token", *(title for title, _, _ in columns)]
    titles += [f"{name}, pass {n}" for n in numbers for name in ("actor", "ratio", "clip")]
    end = "ended" if answer["ended"] else "cut at the length limit"
    return {
        "prompt": answer["prompt"],
        "prompt_text": answer["prompt_text"],
        "note": f"score {answer['score']:.4g}, as it is learned from {answer['shaped_score']:.4g}; {end}",
        "columns": titles,
        "rows": [
            [repr(token["text"]), *(f"{token[name]:{form}}" for _, name, form in columns), *_passes(token)]
            for token in tokens
        ],
        "shown": [_span(token) for token in tokens],
    }


def _passes(token: Mapping[str, Any]) -> list[str]:
    cells = []
    for said in token["passes"]:
        if said["logprob"] is None:
            cells += ["-", "-", "not learned"]
            continue
        clip = f"{said['clipped']}, no gradient" if said["held"] else said["clipped"]
        cells += [f"{said['logprob']:.3f}", f"{said['ratio']:.4f}", clip]
    return cells


def _span(token: Mapping[str, Any]) -> dict[str, Any]:
    advantage = token["advantage"]
    held = any(said["held"] for said in token["passes"])
    return {
        "text": token["text"],
        "kind": ("more" if advantage > 0 else "less") + (" held" if held else ""),
        "strength": round(50 * min(abs(advantage) / STRONGEST, 1)),
        "title": f"advantage {advantage:+.3f}, log-probability {token['old_logprob']:.3f}",
    }
