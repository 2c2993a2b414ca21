"""Two models side by side: who is on which side, and the votes."""

import random
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.data.comparisons import Turn
from dschat.errors import UserError
from dschat.serving.lines import append_line
from dschat.serving.protocol import ApiError, refused

VOTES = ("left", "right", "tie", "both_bad")
MOST_WAITING = 1000
"""Duels without a vote; an older one is forgotten."""


@dataclass
class Duel:
    """One question to two models."""

    prompt: tuple[Turn, ...]
    models: tuple[str, str]
    """Those on the left and on the right."""
    settings: dict[str, float]
    answers: dict[str, str] = field(default_factory=dict)
    """By side, what is there of them."""

    def row(self, vote: str) -> dict[str, Any]:
        """A row of the layout `two_answers` of docs/data.md, whose ties no step compares.

        Answers are lists of messages, so that none is taken for something else, whatever its text is.
        """
        left, right = ([{"role": "assistant", "content": self.answers[side]}] for side in ("left", "right"))
        return {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in self.prompt],
            "response_a": left,
            "response_b": right,
            "winner_model_a": int(vote == "left"),
            "winner_model_b": int(vote == "right"),
            "winner_tie": int(vote in ("tie", "both_bad")),
            "metadata": {
                "vote": vote,
                "model_a": self.models[0],
                "model_b": self.models[1],
                "settings": self.settings,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        }


class Duels:
    """Duels that wait for a vote, and the file of those that have one."""

    def __init__(self, path: Path, *, seed: int | None = None) -> None:
        """`seed` decides which model is on which side; None leaves that to chance.

        Raises `UserError` where the file cannot be written.
        """
        try:
            path.open("a").close()
        except OSError as error:
            raise UserError(f"--votes {path} cannot be written ({error.strerror}); name another.") from error
        self.path = path
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._waiting: OrderedDict[str, Duel] = OrderedDict()

    def shuffled(self, models: Sequence[str]) -> tuple[str, str]:
        """The two models as left and right."""
        left, right = self._random.sample(list(models), 2)
        return left, right

    def add(self, duel: Duel) -> str:
        """Let a duel wait for its vote; returns its name."""
        name = uuid.uuid4().hex
        with self._lock:
            self._waiting[name] = duel
            while len(self._waiting) > MOST_WAITING:
                self._waiting.popitem(last=False)
        return name

    def vote(self, body: Any) -> dict[str, Any]:
        """Write the vote of a body of JSON, and say which model was where. Raises `ApiError`."""
        name, vote = (str(body.get(key)) for key in ("duel", "vote")) if isinstance(body, dict) else ("", "")
        if vote not in VOTES:
            raise refused(f"vote must be one of {', '.join(VOTES)}", "vote")
        with self._lock:
            duel = self._waiting.pop(name, None)
            if duel is None:
                raise ApiError(404, "there is no such duel, or it has its vote", "duel_not_found", "duel")
            recorded = all(duel.answers.get(side, "").strip() for side in ("left", "right"))
            try:
                if recorded:  # an answer without a word cannot be learned from
                    append_line(self.path, duel.row(vote))
            except OSError as error:
                self._waiting[name] = duel
                raise ApiError(507, f"the vote cannot be written: {error.strerror}", "not_written") from error
        return {"left": duel.models[0], "right": duel.models[1], "recorded": recorded}
