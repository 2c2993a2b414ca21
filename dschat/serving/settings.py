"""How answers are sampled: what people and programs may ask for, and its bounds."""

import math
from collections.abc import Mapping
from typing import Any

from dschat.errors import UserError
from dschat.rlhf.rollout.backend import Sampling

DEFAULTS: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 512, "seed": 1234}
"""As step 3 samples. A temperature of 0 takes the likeliest token."""

BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31),
    "max_tokens": (1, 2**20),
    "seed": (0, 2**63 - 1),
}


def checked(name: str, value: Any, *, most: float | None = None) -> float:
    """The value of a setting, from a number or its text. `most` lowers its upper bound.

    Raises `UserError` for what is no number or out of bounds.
    """
    low, high = BOUNDS[name]
    high = high if most is None else min(high, most)
    kind = type(DEFAULTS[name])
    whole, opened = "whole " if kind is int else "", "(" if name == "top_p" else "["
    problem = f"{name} must be a {whole}number in {opened}{low:g}, {high:g}], got {value!r}."
    try:
        number = kind(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(problem) from error
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    is_within = is_number and low <= number <= high and not (name == "top_p" and number == 0)
    if not is_within or (kind is int and number != int(number)):
        raise UserError(problem)
    return kind(number)


def given(values: Mapping[str, Any]) -> dict[str, float]:
    """The settings among the values, those that are None left out. Raises `UserError`."""
    return {name: checked(name, values[name]) for name in DEFAULTS if values.get(name) is not None}


def completed(settings: Mapping[str, float], positions: int | None) -> dict[str, float]:
    """All settings, of which some are given, for a model of so many positions. Raises `UserError`."""
    room = DEFAULTS["max_tokens"] if positions is None else min(DEFAULTS["max_tokens"], positions // 2)
    whole = {**DEFAULTS, "max_tokens": room, **settings}
    if positions is not None and whole["max_tokens"] >= positions:
        raise UserError(
            f"max_tokens {whole['max_tokens']} leaves no room for a question in the model's "
            f"{positions} positions; lower it."
        )
    return whole


def sampling_of(settings: Mapping[str, float]) -> Sampling:
    """The sampling of `checked` settings."""
    temperature = settings["temperature"]
    return Sampling(
        max_answer_length=int(settings["max_tokens"]),
        temperature=temperature or 1.0,
        greedy=temperature == 0,
        top_k=int(settings["top_k"]),
        top_p=settings["top_p"],
        seed=int(settings["seed"]),
    )
