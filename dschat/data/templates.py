"""Chat templates: conversations to the text that a model reads, one way in all steps.

A template is the tokenizer's Jinja template, settled by `settle_template` and saved with the model, so that
what step 1 learned is what steps 2 and 3, chat and evaluation show.
"""

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import psutil
from transformers import PreTrainedTokenizerBase

from dschat.data.comparisons import Prompt, Turn, parse_dialogue
from dschat.data.files import user_path
from dschat.errors import UserError

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""The default: "\\n\\nHuman: question\\n\\nAssistant: answer", as HH and DeepSpeed-Chat have it."""

NONE = (
    "{% if messages | length > 2 %}{{ raise_exception('--chat_template none takes a prompt and an answer as "
    "they are, not conversations') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)
"""Nothing is added: an answer follows its prompt as both stand in the data."""

NAMED = {"plain": PLAIN, "none": NONE}

TRIAL_SECONDS = 10
"""Of processor time, so that a busy machine refuses nothing. A usual template takes milliseconds."""
TRIAL_MEMORY = 1 << 30
"""In bytes; a usual template takes kilobytes."""
TRIED = set(NAMED.values())
"""Templates that are known to end."""
LONGEST_SHOWN = 1_000_000
"""Characters; a template's own text, such as a system message, has thousands at most."""

QUESTION, ANSWER = "a question of 7 words to be answered", "an answer of 5 words"
SYSTEM, LATER = "a system of 4 words", "a later question of 7 words"
"""Content to try a template on; no template has it in its own text."""

PLACE = "\ue000a place\ue000"
"""Content put in the place of a turn's own, to find where a template shows it."""


SHOWN_ROLES = 6
"""Of a long conversation, as many turns are named in a message."""


def settle_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer its one template: a named one, a file's, or for None its own, else the plain one.

    Raises `UserError` for a file that cannot be read and a template that cannot serve.
    """
    if choice is None:
        tokenizer.chat_template = _own_template(tokenizer) or PLAIN
    elif choice in NAMED:
        tokenizer.chat_template = NAMED[choice]
    else:
        tokenizer.chat_template = _read_template(user_path(choice))
    if tokenizer.chat_template not in TRIED:
        _try_apart(tokenizer)
        TRIED.add(tokenizer.chat_template)
    ChatTemplate(tokenizer)


def _try_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a template that runs for ever, or takes all memory, or ends the process.

    transformers' sandbox bounds what a template may touch, not what it costs, and a template may come from
    the hub. So a process of its own, which shares this one's memory, tries it first.
    """
    trial = multiprocessing.get_context("fork").Process(target=_trial, args=(tokenizer,), daemon=True)
    trial.start()
    trial.join()
    if trial.exitcode != 0:
        raise UserError(
            f"the chat template needs more than {TRIAL_SECONDS} seconds or {TRIAL_MEMORY >> 20} MiB for a "
            "question of some words and its answer; give another with --chat_template."
        )


def _trial(tokenizer: PreTrainedTokenizerBase) -> None:
    limit, hard = psutil.Process().memory_info().vms + TRIAL_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
    with contextlib.suppress(UserError):  # which is raised again where people see it
        try:
            ChatTemplate(tokenizer)
        except MemoryError:
            sys.exit(1)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "its text is not UTF-8"
        raise UserError(
            f"--chat_template {path} cannot be read ({reason}); give a file with a Jinja template, "
            f"or one of {', '.join(NAMED)}."
        ) from error
    if not template.strip():
        raise UserError(f"--chat_template {path} is empty; give a file with a Jinja template.")
    return template


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


def _leading_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the added token, such as <|im_end|>, that the text begins with; None without one."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    leading = [token for token in added if text.lstrip().startswith(token)]
    return added[max(leading, key=len)] if leading else None


class ChatTemplate:
    """What the tokenizer's template makes of prompts and answers.

    `turn_end` is the id of the token of its own that the template writes right after an answer, if any.
    Raises `UserError` for a template that cannot serve.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = _own_template(tokenizer) or PLAIN
        self._keeps_text = self._template == NONE
        question, answer = Turn("user", QUESTION), Turn("assistant", ANSWER)
        asked, whole = self._render([question], True), self._render([question, answer])
        _check_shown(whole)
        self._lead, _, ending = whole.removeprefix(asked).partition(ANSWER)
        if QUESTION not in asked or not whole.startswith(asked) or ANSWER not in whole:
            raise UserError(
                "the chat template cannot be trained with: what it shows for a question and its answer does "
                f"not begin with what it shows for the question alone ({asked!r}); give another with "
                "--chat_template."
            )
        self._ending = ending
        self.turn_end = _leading_token(tokenizer, ending)
        # The end token is added to the tokens; what follows it is between this turn and the next.
        before_end, end, _ = ending.partition(tokenizer.eos_token or "\0")
        self._close = before_end if end else ending.rstrip()
        self._close_inside = before_end + end if end else ending.rstrip()
        with_system = self._attempt([Turn("system", SYSTEM), question])
        self._takes_system = SYSTEM in with_system
        self._takes_leading_answer = bool(self._attempt([answer, question]))
        later = self._attempt([question, answer, Turn("user", LATER)]).partition(ANSWER)[2]
        openings = (
            asked.partition(QUESTION)[0],
            with_system.partition(SYSTEM)[0] if self._takes_system else "",
            later.partition(LATER)[0].removeprefix(ending),
        )
        bos = tokenizer.bos_token or ""
        self._openings = tuple(filter(None, (text.strip().removeprefix(bos).strip() for text in openings)))

    def prompt(self, prompt: Prompt) -> str:
        """What the model reads before it answers."""
        return self.texts(prompt, ())[0]

    def answer(self, prompt: Prompt, answer: str) -> str:
        """What follows `prompt(prompt)` when the model answers so, but for the end token."""
        return self.texts(prompt, (answer,))[1][0]

    def texts(self, prompt: Prompt, answers: Sequence[str]) -> tuple[str, list[str]]:
        """`prompt(prompt)` and `answer(prompt, answer)` for each of the answers, with less work."""
        if self._is_rendered(prompt):
            return self._from_bos(prompt), [self.answer_alone(answer, ended=True) for answer in answers]
        turns = self.turns(prompt)
        asked = self._render(turns, True)
        return asked, [self._continuation(asked, turns, answer) for answer in answers]

    def answer_alone(self, answer: str, ended: bool) -> str:
        """What follows some prompt when the model answers so: all of it, or a part that is cut off."""
        if self._keeps_text:
            return answer
        return self._lead + answer.strip() + (self._close if ended else "")

    def content(self, shown: str) -> str:
        """The answer's own text, from what a model wrote in this template, its end token apart."""
        if self._keeps_text:
            return shown
        return shown.strip().removeprefix(self._lead.strip()).removesuffix(self._close.strip()).strip()

    def pieces(self, prompt: Prompt, answer: str) -> list[tuple[str, bool]]:
        """The whole conversation in pieces, each with whether the assistant says it; the end token apart.

        What the assistant says is its text and the mark that ends its turn, not the one that begins it.
        """
        if self._is_rendered(prompt):
            asked, (shown,) = self.texts(prompt, (answer,))
            return [(asked, False), (shown, True)]
        turns = self.turns(prompt)
        whole, pieces, position = self._render(turns, True), [], 0
        for start, end in self._earlier_answers(turns, whole):
            start -= len(self._lead) * whole.endswith(self._lead, position, start)
            end += len(self._close_inside) * whole.startswith(self._close_inside, end)
            pieces += [(whole[position:start], False), (whole[start:end], True)]
            position = end
        return [*pieces, (whole[position:], False), (self._continuation(whole, turns, answer), True)]

    def turns(self, prompt: Prompt) -> tuple[Turn, ...]:
        """The conversation that a prompt is, in the form that the template takes."""
        return self._adapted(self._conversation(prompt))

    def without_first_exchange(self, prompt: Prompt) -> Prompt | None:
        """The prompt less its first question and the answer to that; None where one question is left."""
        if self._keeps_text or self._is_rendered(prompt):
            return None
        turns = self._conversation(prompt)
        questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
        if len(questions) < 2:
            return None
        return tuple(turn for turn in turns[: questions[0]] if turn.role == "system") + turns[questions[1] :]

    def before_question(self, prompt: Prompt) -> str:
        """What stands before the last question's text: marks, and a system message."""
        if self._keeps_text or self._is_rendered(prompt):
            return ""
        turns = list(self._conversation(prompt))
        last = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            return ""
        turns[last] = Turn("user", PLACE)
        before, found, _ = self._render(self._adapted(turns), True).rpartition(PLACE)
        return before if found else ""

    def _conversation(self, prompt: Prompt) -> tuple[Turn, ...]:
        """The prompt's turns, whatever the template takes."""
        if not isinstance(prompt, str):
            return prompt
        if self._keeps_text:
            return (Turn("user", prompt),)
        return parse_dialogue(prompt) or (Turn("user", prompt.strip()),)

    def _earlier_answers(self, turns: Sequence[Turn], whole: str) -> list[tuple[int, int]]:
        """Where `whole` shows what the assistant said; not what it shows in another form."""
        numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        together = self._found(turns, numbers, whole) if numbers else []
        if together is not None:
            return together
        return [span for number in numbers for span in self._found(turns, [number], whole) or ()]

    def _found(self, turns: Sequence[Turn], numbers: list[int], whole: str) -> list[tuple[int, int]] | None:
        """Where `whole` shows the contents of those turns; None unless it shows them all as they are."""
        places = [Turn(turn.role, PLACE) if number in numbers else turn for number, turn in enumerate(turns)]
        first, *rest = self._render(places, True).split(PLACE)
        if len(rest) != len(numbers):
            return None
        shown, spans = first, []
        for number, following in zip(numbers, rest, strict=True):
            spans.append((len(shown), len(shown) + len(turns[number].content)))
            shown += turns[number].content + following
        return spans if shown == whole else None

    def _is_rendered(self, prompt: Prompt) -> bool:
        """Whether the prompt is text in this template's own form already."""
        if not isinstance(prompt, str) or self._template in (PLAIN, NONE):
            return False
        bos = self._tokenizer.bos_token or ""
        return prompt.lstrip().removeprefix(bos).lstrip().startswith(self._openings)

    def _from_bos(self, text: str) -> str:
        """Rendered text less the space before a BOS token that it spells out."""
        bos = self._tokenizer.bos_token
        return text.lstrip() if bos and text.lstrip().startswith(bos) else text

    def _adapted(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The same for a template that takes no system message, or no answer before the first question."""
        system = turns[:1] if turns[0].role == "system" and len(turns) > 1 else ()
        rest = list(turns[len(system) :])
        while rest[0].role == "assistant" and not self._takes_leading_answer and len(rest) > 1:
            rest.pop(0)
        if not system or self._takes_system:
            return (*system, *rest)
        told = system[0].content
        if rest[0].role == "user":
            told += f"\n\n{rest.pop(0).content}"
        return (Turn("user", told), *rest)

    def _continuation(self, asked: str, turns: Sequence[Turn], answer: str) -> str:
        content = answer if self._keeps_text else answer.strip()
        whole = self._render([*turns, Turn("assistant", content)])
        if not whole.startswith(asked):
            return self._lead + content + self._close
        shown = whole[len(asked) :]
        return shown.removesuffix(self._ending) + self._close if shown.endswith(self._ending) else shown

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        messages = [turn._asdict() for turn in turns]
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not sound Jinja (line {error.lineno}: {error.message}); correct it, "
                "or give another with --chat_template."
            ) from error
        except MemoryError:  # which ends the trial
            raise
        except Exception as error:  # a template's own expressions raise what they like, such as 1 / 0
            refused = isinstance(error, jinja2.TemplateError)
            problem = ("does not work with", "does not take")[refused]
            reason = str(error) if refused else f"{type(error).__name__}: {error}"
            roles = ", ".join(turn.role for turn in turns[:SHOWN_ROLES])
            if len(turns) > SHOWN_ROLES:
                roles += f", ... ({len(turns)} messages)"
            raise UserError(
                f"the chat template {problem} a conversation of {roles} ({reason}); give another with "
                "--chat_template, or leave such rows out."
            ) from error

    def _attempt(self, turns: Sequence[Turn]) -> str:
        try:
            return self._render(turns)
        except UserError:
            return ""
