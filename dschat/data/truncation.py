"""What a limit of tokens did to an example: kept whole, shortened, or dropped and why."""

from enum import IntEnum

from dschat.data.templates import TOOLS


class Truncation(IntEnum):
    """What became of an example when it was tokenised. Up to `CUT` it is kept."""

    WHOLE = 0
    FEWER_TURNS = 1
    """Whole but for its first turns."""
    CUT = 2
    """Cut inside its text, maybe after losing its first turns."""
    LONG_PROMPT = 3
    EQUAL_ANSWERS = 4
    NO_TOKEN = 5
    WITH_TOOLS = 6
    NOTHING_LEARNED = 7
    REFUSED = 99
    """Left out because tokenizer or template raised an error."""

    @property
    def is_kept(self) -> bool:
        """Whether the example is trained on."""
        return self <= Truncation.CUT


REASONS = {
    Truncation.LONG_PROMPT: "prompt over {limit}",
    Truncation.EQUAL_ANSWERS: "answers equal as tokens",
    Truncation.NO_TOKEN: "prompt without a token",
    Truncation.WITH_TOOLS: TOOLS,
    Truncation.NOTHING_LEARNED: "nothing left to learn",
}
"""Why an example was dropped, for messages; {limit} is the flag that bounds its tokens."""

NOT_FOR_LENGTH = {
    REASONS[kind] for kind in (Truncation.WITH_TOOLS, Truncation.NOTHING_LEARNED, Truncation.EQUAL_ANSWERS)
}
"""Reasons that no other limit of tokens would mend."""
