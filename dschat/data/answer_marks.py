"""Text that a template writes around an answer, found by rendering a question and an answer."""

import re
from dataclasses import dataclass

from dschat.data.comparisons import Turn
from dschat.data.rendering import ANSWER, QUESTION, Renderer, shared_start
from dschat.errors import UserError

THOUGHT_MARKS = (
    (r"<(WORD)>", "</{}>"),  # as in <think> and <seed:think>
    (r"\[(WORD)\]", "[/{}]"),
    (r"◁(WORD)▷", "◁/{}▷"),
    (r"<\|START_(WORD)\|>", "<|END_{}|>"),
    (r"<\|begin_of_(WORD)\|>", "<|end_of_{}|>"),
)
"""How marks open a thought and close it, around a word such as "think"."""
WORD = r"[\w:]*(?:think|thought|reason)\w*"

ASKED = (Turn("user", QUESTION),)
TRIED = (*ASKED, Turn("assistant", ANSWER))

LONGEST_SHOWN = 1_000_000
"""Characters; a template's own text, such as a system message, has thousands at most."""


@dataclass(frozen=True)
class AnswerMarks:
    """Text around an answer, and the end of the generation prompt that no answer is shown with."""

    lead: str
    """Between the generation prompt, less `opens`, and the answer."""
    ending: str
    """All that follows the answer."""
    close: str
    """What of it belongs to the answer, less the end token, which is added to the tokens."""
    close_inside: str
    """The same with the end token, as it stands within a conversation."""
    opens: str
    """The end of the generation prompt that an answer in a conversation is shown without, often none."""
    thought_end: str
    """What closes the thought that `opens` opens; nothing where it opens none."""
    problem: str
    """Why answers cannot be learned with this template; nothing where they can."""

    def check(self) -> None:
        """Raise `UserError` where the template cannot show answers so that they can be learned."""
        if self.problem:
            raise UserError(
                f"the chat template cannot be trained with: {self.problem}; or give another with "
                "--chat_template."
            )

    def thoughtful(self, thought: str, shown: str) -> str:
        """What follows the generation prompt for that thought, maybe none, and the answer without it."""
        if not self.thought_end:
            return shown
        return f"{thought}\n{self.thought_end}\n\n{shown.lstrip()}"

    def inside(self, shown: str) -> str:
        """The answer's own text, from what a model wrote, its end token apart."""
        return shown.strip().removeprefix(self.lead.strip()).removesuffix(self.close.strip()).strip()

    def closed(self, shown: str) -> str:
        """An answer as a template shows it, without the text that follows its end token."""
        return shown.removesuffix(self.ending) + self.close if shown.endswith(self.ending) else shown

    def thought_and_rest(self, content: str) -> tuple[str, str]:
        """The answer cut at the end of the thought it begins with; no thought without one."""
        before, end, rest = content.partition(self.thought_end) if self.thought_end else ("", "", content)
        if not end:
            return "", content
        opened = self.opens.strip()
        return before.strip().removeprefix(opened).strip(), rest.strip()


def answer_marks(renderer: Renderer, end_token: str | None) -> AnswerMarks:
    """Try the template. Raises `UserError` where it does not even show a question."""
    asked, whole = renderer.render(ASKED, True), renderer.render(TRIED)
    _check_shown(asked)
    _check_shown(whole)
    if QUESTION not in asked:
        raise UserError(
            f"the chat template cannot be trained with: it does not show a question ({asked!r}); give "
            "another with --chat_template."
        )
    base = shared_start(asked, whole)
    opens = asked[len(base) :]
    lead, found, ending = whole[len(base) :].partition(ANSWER)
    closing = _closing(opens)
    # The end token is added to the tokens; what follows it is between this turn and the next.
    before_end, end, _ = ending.partition(end_token or "\0")
    return AnswerMarks(
        lead=lead,
        ending=ending,
        close=before_end if end else ending.rstrip(),
        close_inside=before_end + end if end else ending.rstrip(),
        opens=opens,
        thought_end=closing or "",
        problem=_problem(base, opens, closing, lead) if found else "it does not show an answer as it is",
    )


def _closing(opens: str) -> str | None:
    """What closes the thought that this end of a generation prompt opens; "" where it opens none; None where
    it says something else."""
    for opening, closing in THOUGHT_MARKS:
        if found := re.search(opening.replace("WORD", WORD) + r"\s*$", opens, re.IGNORECASE):
            return closing.format(found[1])
        closed = re.escape(closing).replace(r"\{\}", WORD)
        if re.search(closed + r"\s*$", opens, re.IGNORECASE):
            return ""
    return None if opens.strip() else ""


def _problem(base: str, opens: str, closing: str | None, lead: str) -> str:
    if QUESTION not in base:
        return "it shows a question in another form once it is answered; show it in one form"
    if opens and (closing is None or lead.strip()):
        return (
            f"its generation prompt ends with {opens!r}, which the same answer in a conversation does not "
            "begin with; remove that text after the assistant's mark in the template"
        )
    return ""


def _check_shown(text: str) -> None:
    """Raise `UserError` for text that no row should begin with."""
    if len(text) > LONGEST_SHOWN:
        raise UserError(
            f"the chat template makes {len(text):,} characters of a question of some words and its answer; "
            "give another with --chat_template."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the chat template writes half of a surrogate pair ({text[error.start]!r}), which is no text; "
            "correct it, or give another with --chat_template."
        ) from error
