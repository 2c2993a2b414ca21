"""Chat templates: conversations to the text that a model reads, one way in all steps.

A template is the tokenizer's Jinja template, settled by `dschat.data.template_trial` and saved with the
model, so that what step 1 learned is what steps 2 and 3, chat and evaluation show.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from dschat.data.answer_marks import ASKED, TRIED, answer_marks
from dschat.data.cells import DroppedRow
from dschat.data.comparisons import Prompt, Reply, Turn, parse_dialogue, text_of
from dschat.data.rendering import ANSWER, QUESTION, Renderer, own_template
from dschat.data.turn_spans import PLACE, TurnSpans
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

TOOLS = "conversations with tools that the chat template does not take"
"""Why rows are dropped."""

SYSTEM, LATER = "a system of 4 words", "a later question of 7 words"
"""Content to try a template on; no template has it in its own text."""


def _leading_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of the added token, such as <|im_end|>, that the text begins with; None without one."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    leading = [token for token in added if text.lstrip().startswith(token)]
    return added[max(leading, key=len)] if leading else None


class ChatTemplate:
    """What the tokenizer's template makes of prompts and answers.

    `turn_end` is the id of the token of its own that the template writes right after an answer, if any.
    Raises `UserError` for a template that cannot serve: at once where it does not show a question, and where
    answers are asked for if it does not show those so that they can be learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = own_template(tokenizer) or PLAIN
        self._keeps_text = template == NONE
        self._knows_rendered_text = template not in NAMED.values()
        self._renderer = Renderer(tokenizer, template)
        self._marks = answer_marks(self._renderer, tokenizer.eos_token)
        self._spans = TurnSpans(self._renderer, self._marks)
        self.turn_end = _leading_token(tokenizer, self._marks.ending)
        question, answer = TRIED
        with_system = self._renderer.attempt([Turn("system", SYSTEM), question])
        self._takes_system = SYSTEM in with_system
        self._takes_leading_answer = bool(self._renderer.attempt([answer, question]))
        later = self._renderer.attempt([*TRIED, Turn("user", LATER)]).partition(ANSWER)[2]
        openings = (
            self._renderer.render(ASKED, True).partition(QUESTION)[0],
            with_system.partition(SYSTEM)[0] if self._takes_system else "",
            later.partition(LATER)[0].removeprefix(self._marks.ending),
        )
        self._bos = tokenizer.bos_token or ""
        self._openings = tuple(
            filter(None, (text.strip().removeprefix(self._bos).strip() for text in openings))
        )

    def check_answers(self) -> None:
        """Raise `UserError` where the template shows answers so that they cannot be learned."""
        self._marks.check()

    def prompt(self, prompt: Prompt) -> str:
        """What the model reads before it answers."""
        return self.texts(prompt, ())[0]

    def answer(self, prompt: Prompt, answer: Reply) -> str:
        """What follows `prompt(prompt)` when the model answers so, but for the end token."""
        return self.texts(prompt, (answer,))[1][0]

    def texts(self, prompt: Prompt, answers: Sequence[Reply]) -> tuple[str, list[str]]:
        """`prompt(prompt)` and `answer(prompt, answer)` for each of the answers, with less work.

        Raises `DroppedRow` where there are tools in it and the template does not take those.
        """
        rendered = self._rendered(prompt)
        if rendered is not None:
            return _from_bos(rendered, self._bos), [
                self.answer_alone(answer, ended=True) for answer in answers
            ]
        with _tools_taken(self._renderer, prompt, answers, any_turns=self._keeps_text):
            turns = self.turns(prompt)
            asked = self._renderer.render(turns, True)
            return asked, [self._continuation(asked, turns, answer) for answer in answers]

    def answer_alone(self, answer: Reply, ended: bool) -> str:
        """What follows some prompt when the model answers so: all of it, or a part that is cut off."""
        if self._keeps_text:
            return text_of(answer)
        if isinstance(answer, str) and not self._marks.thought_end:
            return self._marks.lead + answer.strip() + (self._marks.close if ended else "")
        shown = self._continuation(self._renderer.render(ASKED, True), ASKED, answer)
        return shown if ended else shown.removesuffix(self._marks.close)

    def content(self, shown: str) -> str:
        """The answer's own text, from what a model wrote in this template, its end token apart."""
        return shown if self._keeps_text else self._marks.inside(shown)

    def pieces(
        self, prompt: Prompt, answer: Reply, *, all_turns: bool = True, with_prompt: bool = False
    ) -> tuple[list[tuple[str, bool]], int]:
        """The conversation in pieces, each with whether it is learned, the end token apart; and the number of
        turns that ought to be learned but are not, for the template shows them in another form.

        Learned are the answer; with `all_turns` the assistant's earlier turns; with `with_prompt` everything;
        but of a turn that is marked, what its mark says. Of a turn that is its text and the mark that ends
        it, not the one that begins it. Raises `DroppedRow` as `texts` does.
        """
        asked, (shown,) = self.texts(prompt, (answer,))
        last = isinstance(answer, str) or answer.learn is not False
        if self._rendered(prompt) is not None:
            return [(asked, with_prompt), (shown, last)], 0
        turns, pieces, position = self.turns(prompt), [], 0

        def learned(turn: Turn) -> bool:
            default = with_prompt or (all_turns and turn.role == "assistant")
            return default if turn.learn is None else turn.learn

        others = [number for number, turn in enumerate(turns) if learned(turn) != with_prompt]
        spans = self._spans.find(turns, others, asked)
        if with_prompt and len(spans) < len(others):
            raise UserError(
                "a message that is marked as not to be learned cannot be kept out of --train_on_prompt, for "
                "the chat template shows it in another form; leave the row out or give another template."
            )
        for start, end in (spans[number] for number in others if number in spans):
            pieces += [(asked[position:start], with_prompt), (asked[start:end], not with_prompt)]
            position = end
        return [*pieces, (asked[position:], with_prompt), (shown, last)], len(others) - len(spans)

    def unshown(self, prompt: Prompt, answers: Sequence[Reply]) -> set[str]:
        """The fields of messages that the template does not show."""
        turns = [turn for turn in (*_turns_of(prompt), *answers) if isinstance(turn, Turn) and turn.fields]
        names = self._renderer.unshown(turns)
        if self._marks.thought_end and all(turn in answers for turn in turns):
            names.discard("reasoning")
        if any(self._loses_thought(prompt, answer) for answer in answers):
            names.add("reasoning")
        return names

    def _loses_thought(self, prompt: Prompt, answer: Reply) -> bool:
        """Whether the template takes a thought out of the answer's text and shows it nowhere."""
        before, end, _ = text_of(answer).partition("</think>")
        thought = before.replace("<think>", "").strip()
        return bool(end and thought) and thought not in self.answer(prompt, answer)

    def turns(self, prompt: Prompt) -> tuple[Turn, ...]:
        """The conversation that a prompt is, in the form that the template takes."""
        return self._adapted_to(self._conversation(prompt))

    def without_first_exchange(self, prompt: Prompt) -> Prompt | None:
        """The prompt less its first question and what follows up to the next; None where one question is
        left."""
        if self._keeps_text or self._rendered(prompt) is not None:
            return None
        turns = self._conversation(prompt)
        questions = [number for number, turn in enumerate(turns) if turn.role == "user"]
        if len(questions) < 2:
            return None
        head = tuple(turn for turn in turns[: questions[0]] if turn.role in ("tools", "system"))
        return head + turns[questions[1] :]

    def before_question(self, prompt: Prompt) -> str:
        """What stands before the last question's text: marks, and a system message."""
        if self._keeps_text or self._rendered(prompt) is not None:
            return ""
        turns = list(self._conversation(prompt))
        last = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            return ""
        turns[last] = Turn("user", PLACE)
        before, found, _ = self._renderer.render(self._adapted_to(turns), True).rpartition(PLACE)
        return before if found else ""

    def _conversation(self, prompt: Prompt) -> tuple[Turn, ...]:
        """The prompt's turns, whatever the template takes."""
        if not isinstance(prompt, str):
            return prompt
        if self._keeps_text:
            return (Turn("user", prompt),)
        return parse_dialogue(prompt) or (Turn("user", prompt.strip()),)

    def _rendered(self, prompt: Prompt) -> str | None:
        """The prompt's text if that is in this template's own form already, maybe beside tools."""
        if not isinstance(prompt, str):
            if [turn.role for turn in prompt] != ["tools", "user"]:
                return None
            prompt = prompt[1].content
        if not self._knows_rendered_text:
            return None
        shown = prompt.lstrip().removeprefix(self._bos).lstrip()
        return prompt if shown.startswith(self._openings) else None

    def _adapted_to(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        leading = self._takes_leading_answer
        return _adapted(turns, takes_system=self._takes_system, takes_leading_answer=leading)

    def _continuation(self, asked: str, turns: Sequence[Turn], answer: Reply) -> str:
        self._marks.check()
        turn = Turn("assistant", answer) if isinstance(answer, str) else answer
        turn = turn if self._keeps_text else turn._replace(content=turn.content.strip())
        whole = self._renderer.render([*turns, turn])
        if whole.startswith(asked):
            return self._marks.closed(whole[len(asked) :])
        if self._marks.opens:
            return self._after_opening(asked, turns, turn)
        if not turn.is_plain and tuple(turns) != ASKED:
            return self._continuation(self._renderer.render(ASKED, True), ASKED, turn)
        if {"reasoning", "tool_calls"} & set(json.loads(turn.fields or "{}")):
            raise UserError(
                "the chat template cannot be trained with where an answer has reasoning or calls: it shows "
                "that answer elsewhere than after its generation prompt; give another with --chat_template."
            )
        return self._marks.lead + turn.content + self._marks.close

    def _after_opening(self, asked: str, turns: Sequence[Turn], turn: Turn) -> str:
        """The answer after a generation prompt whose end no answer in a conversation is shown with."""
        thought, content = self._marks.thought_and_rest(turn.content)
        fields = json.loads(turn.fields or "{}")
        thought = fields.pop("reasoning", thought)
        bare = Turn("assistant", content, fields=json.dumps(fields) if fields else "")
        base, whole = asked.removesuffix(self._marks.opens), self._renderer.render([*turns, bare])
        shown = (
            self._marks.closed(whole[len(base) :]) if whole.startswith(base) else content + self._marks.close
        )
        return self._marks.thoughtful(thought, shown)


def _turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    return () if isinstance(prompt, str) else prompt


def _from_bos(text: str, bos: str) -> str:
    """Rendered text less the space before a BOS token that it spells out."""
    return text.lstrip() if bos and text.lstrip().startswith(bos) else text


@contextmanager
def _tools_taken(
    renderer: Renderer, prompt: Prompt, answers: Sequence[Reply], *, any_turns: bool
) -> Iterator[None]:
    """Raise `DroppedRow` for a conversation with tools that the template does not take, or fails on."""
    turns = [turn for turn in (*_turns_of(prompt), *answers) if isinstance(turn, Turn)]
    with_tools = any(turn.role in ("tools", "tool") or "tool_calls" in turn.fields for turn in turns)
    if with_tools and not any_turns and not renderer.takes_tools(turns):
        raise DroppedRow(TOOLS)
    try:
        yield
    except UserError as error:
        if with_tools:  # such as several calls at once
            raise DroppedRow(TOOLS) from error
        raise


def _adapted(turns: Sequence[Turn], *, takes_system: bool, takes_leading_answer: bool) -> tuple[Turn, ...]:
    """Turns for a template that takes no system message, or no answer before the first question."""
    tools = turns[:1] if turns[0].role == "tools" else ()
    turns = turns[len(tools) :]
    system = turns[:1] if turns[0].role == "system" and len(turns) > 1 else ()
    rest = list(turns[len(system) :])
    while rest[0].role == "assistant" and not takes_leading_answer and len(rest) > 1:
        rest.pop(0)
    if not system or takes_system:
        return (*tools, *system, *rest)
    if rest[0].role != "user":
        return (*tools, Turn("user", system[0].content), *rest)
    question = rest[0]._replace(content=f"{system[0].content}\n\n{rest[0].content}")
    return (*tools, question, *rest[1:])
