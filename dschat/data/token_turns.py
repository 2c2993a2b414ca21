"""Prompts and answers that the data hold as token ids: one turn each, which no chat template shows."""

import json
from collections.abc import Sequence

from dschat.data.comparisons import Prompt, Reply, Turn


def token_turn(ids: Sequence[int]) -> Turn:
    """A prompt or an answer of these token ids."""
    return Turn("tokens", json.dumps(list(ids)))


def tokens_of(message: Prompt | Reply) -> list[int] | None:
    """The token ids of a prompt or an answer; None where it is text."""
    turn = (
        message
        if isinstance(message, Turn)
        else message[-1]
        if isinstance(message, tuple) and message
        else None
    )
    return json.loads(turn.content) if isinstance(turn, Turn) and turn.role == "tokens" else None
