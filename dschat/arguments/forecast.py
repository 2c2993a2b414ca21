"""Flags: the forecast before PPO."""

import shlex
from dataclasses import dataclass

from dschat.arguments.flags import flag, require


@dataclass(frozen=True, kw_only=True)
class ForecastArguments:
    """Whether the reward model is worth PPO, told before the first PPO step (docs/forecast.md)."""

    forecast: str | None = flag(
        None,
        "Flags of dschat forecast as one string, such as '--gold_function check.py:right': it runs before "
        "the models are loaded, and the run ends where the reward model is not worth PPO. none: no forecast. "
        "Default: one by --guard_reward_model_name_or_path, where that is given and cheap.",
        at_resume="free",
    )
    force: bool = flag(False, "Train whatever the forecast says.", at_resume="free")

    @property
    def words(self) -> list[str]:
        """The flags of the forecast that is asked for, each word for itself."""
        return [] if self.forecast in (None, "none") else shlex.split(self.forecast)

    def __post_init__(self) -> None:
        try:
            words = self.words
        except ValueError as error:
            require(False, f"--forecast {self.forecast!r} cannot be split into flags ({error}).")
        require(
            self.forecast in (None, "none") or any(word.startswith("--") for word in words),
            f"--forecast {self.forecast!r} has no flag; give what is believed, such as "
            "'--gold_function check.py:right', or none.",
        )
