"""Flags: Python functions and endpoints that score answers in step 3."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from dschat.arguments.flags import flag, require, require_at_least
from dschat.arguments.secrets import without_secrets

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
REWARD_MODEL = "model"
"""The name of the reward model among the sources of scores."""


@dataclass(frozen=True, kw_only=True)
class RewardSourceArguments:
    """Scores beside those of a reward model, or in place of one (docs/rewards.md)."""

    reward_function: list[str] = flag(
        [],
        "FILE.py:NAME, ... of Python functions NAME(prompts, answers, **columns) that score answers; without "
        "--critic_model_name_or_path and --reward_model_name_or_path there is no reward model.",
    )
    reward_endpoint: list[str] = flag(
        [], "URLs, ... of servers that score answers, likewise; a user:password@ in one is kept nowhere."
    )
    reward_weights: list[str] = flag(
        [],
        "NAME=NUMBER, ... by which scores are multiplied before they are added: model, a function's name, "
        "endpoint (the second is endpoint_2); default: 1.",
    )
    reward_batch_size: int = flag(
        64, "Answers that a function or an endpoint is given at once.", at_resume="free"
    )
    reward_timeout: float = flag(
        30.0, "Seconds that a function may take for them; what has not returned is ended.", at_resume="free"
    )
    reward_on_error: float = flag(
        0.0, "Score of an answer for which a function raises, hangs, dies or returns no finite number."
    )
    reward_endpoint_timeout: float = flag(
        60.0,
        "Seconds in which an endpoint's whole reply must come before it is asked again.",
        at_resume="free",
    )
    reward_endpoint_retries: int = flag(
        5,
        "How often an endpoint is asked again, after 1 s, 2 s, 4 s, ..., before the run ends.",
        at_resume="free",
    )

    @property
    def has_sources(self) -> bool:
        """Whether anything but a reward model scores."""
        return bool(self.reward_function or self.reward_endpoint)

    @property
    def endpoints(self) -> dict[str, str]:
        """The endpoints' URLs by their names."""
        names = ["endpoint", *(f"endpoint_{n}" for n in range(2, len(self.reward_endpoint) + 1))]
        return dict(zip(names, self.reward_endpoint, strict=False))

    @property
    def names(self) -> list[str]:
        """The names of the functions, then of the endpoints."""
        return [spec.rpartition(":")[2] for spec in self.reward_function] + list(self.endpoints)

    @property
    def given_weights(self) -> dict[str, float]:
        """`--reward_weights` by name."""
        pairs = [entry.partition("=") for entry in self.reward_weights]
        return {name: float(number) for name, _, number in pairs}

    def __post_init__(self) -> None:
        for spec in self.reward_function:
            file, _, name = spec.rpartition(":")
            require(
                file.endswith(".py") and name.isidentifier(),
                f"--reward_function {spec!r} must be FILE.py:NAME, such as "
                "step3_ppo/rewards/gsm8k.py:exact_answer.",
            )
        for url in self.reward_endpoint:
            require(
                _is_url(url),
                f"--reward_endpoint {without_secrets(url)!r} must be a URL, such as "
                "http://localhost:8000/score.",
            )
        for entry in self.reward_weights:
            require(
                re.fullmatch(rf"\w+={NUMBER}", entry, re.IGNORECASE) is not None,
                f"--reward_weights {entry!r} must be NAME=NUMBER, such as model=0.5.",
            )
        require(
            self.has_sources or not self.reward_weights,
            "--reward_weights weighs scores against each other, and the reward model is alone; give "
            "--reward_function or --reward_endpoint, or leave it out.",
        )
        known = [REWARD_MODEL, *self.names]
        twice = [name for name in known if known.count(name) > 1]
        require(
            not twice,
            f"--reward_function: two sources of scores are called {twice[:1]}; weights and metrics go by "
            f"name ({REWARD_MODEL} is the reward model): call the function otherwise.",
        )
        require_at_least(1, self, "reward_batch_size")
        require_at_least(0, self, "reward_endpoint_retries")
        for name in ("reward_timeout", "reward_endpoint_timeout"):
            value = getattr(self, name)
            require(0 < value < 1e6, f"--{name} must be positive, got {value}; it is in seconds.")
        require(
            abs(self.reward_on_error) < float("inf"),
            f"--reward_on_error must be a finite number, got {self.reward_on_error}; 0 is usual.",
        )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        return False
    return has_place and parts.scheme in ("http", "https") and not re.search(r"\s", text)
