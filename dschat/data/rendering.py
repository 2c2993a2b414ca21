"""Rendering of conversations by a tokenizer's Jinja template."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dschat.data.comparisons import Turn
from dschat.data.messages import THOUGHTS
from dschat.errors import UserError

QUESTION, ANSWER = "a question of 7 words to be answered", "an answer of 5 words"
THOUGHT, OUTPUT, ARGUMENT = "a thought of 5 words", "an output of 5 words", "an argument of 5 words"
TOOL_NAME = "a_tool_to_try"
"""Content to try a template on; no template has it in its own text."""

CALL = {"id": "123456789", "type": "function", "function": {"name": TOOL_NAME, "arguments": {"x": ARGUMENT}}}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "A word."}}}
FUNCTION = {"name": TOOL_NAME, "description": "To try.", "parameters": PARAMETERS}

SHOWN_ROLES = 6
"""Of a long conversation, as many turns are named in a message."""


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template; of several the default one."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def shared_start(one: str, other: str) -> str:
    """The longest common beginning of two texts."""
    pairs = zip(one, other, strict=False)
    return one[: next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


class Renderer:
    """A template, and what it shows of a message beside its content, found by trying.

    `thought_key` is the field in which it reads a thought, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self.template = template
        self.thought_key: str | None = None
        self._arguments_are_text = False
        question, answer = Turn("user", QUESTION), Turn("assistant", ANSWER)
        self.thought_key = self._find_thought_key(question)
        tools = Turn("tools", json.dumps([{"type": "function", "function": FUNCTION}]))
        self._shows_tools = self._reads("tools") and TOOL_NAME in self.attempt([tools, question, answer])
        asked = [tools, question] if self._shows_tools else [question]
        self._shows_calls = self._reads("tool_calls") and self._find_form_of_calls(asked)
        self._shows_outputs = self._marks_outputs([*asked, _turn(content="", tool_calls=[CALL])])
        if not self._shows_calls:
            self._shows_outputs = self._marks_outputs([*asked, answer])

    def takes_tools(self, turns: Sequence[Turn]) -> bool:
        """Whether the template shows a conversation's tools, the calls of them and what they returned."""
        calls = any(
            '"tool_calls"' in turn.fields and "tool_calls" in json.loads(turn.fields) for turn in turns
        )
        roles = {turn.role for turn in turns}
        return (
            (self._shows_tools or "tools" not in roles)
            and (self._shows_outputs or "tool" not in roles)
            and (self._shows_calls or not calls)
        )

    def unshown(self, turns: Sequence[Turn]) -> set[str]:
        """Fields of the turns that the template does not read, less those about tools (`takes_tools`)."""
        names = {name for turn in turns if turn.fields for name in json.loads(turn.fields)}
        shown = {"tool_calls", "tool_call_id"} | ({"reasoning"} if self.thought_key else set())
        return {name for name in names - shown if name == "reasoning" or not self._reads(name)}

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises `UserError` where the template does not take it."""
        tools = json.loads(turns[0].content) if turns[0].role == "tools" else None
        turns = turns[1:] if tools else turns
        try:
            text = self._tokenizer.apply_chat_template(
                [self._message(turn) for turn in turns],
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return str(text)
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

    def attempt(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The conversation as text; nothing where the template does not take it."""
        try:
            return self.render(turns, add_generation_prompt)
        except UserError:
            return ""

    def _message(self, turn: Turn) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if not turn.fields:
            return message
        message |= json.loads(turn.fields)
        if "reasoning" in message and self.thought_key:
            message[self.thought_key] = message.pop("reasoning")
        if "tool_calls" in message and self._arguments_are_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return message

    def _reads(self, field: str) -> bool:
        return re.search(rf"\b{re.escape(field)}\b", self.template) is not None

    def _find_thought_key(self, question: Turn) -> str | None:
        for key in filter(self._reads, THOUGHTS):
            if THOUGHT in self.attempt([question, _turn(content=ANSWER, **{key: THOUGHT})]):
                return key
        return None

    def _find_form_of_calls(self, asked: Sequence[Turn]) -> bool:
        """Settle whether the template wants a call's arguments as an object or as text, and whether it shows
        any call."""
        for self._arguments_are_text in (False, True):
            shown = self.attempt([*asked, _turn(content="", tool_calls=[CALL])])
            if TOOL_NAME in shown.rpartition(QUESTION)[2] and ARGUMENT in shown:
                return True
        return False

    def _marks_outputs(self, asked: Sequence[Turn]) -> bool:
        """Whether it shows what a tool returned, and not as if it were anybody's text."""
        output = Turn("tool", OUTPUT, fields=json.dumps({"name": TOOL_NAME, "tool_call_id": CALL["id"]}))
        before, shown = self.attempt(asked), self.attempt([*asked, output])
        return OUTPUT in shown and shown.removeprefix(before).strip() != OUTPUT


def _turn(content: str, **fields: Any) -> Turn:
    return Turn("assistant", content, fields=json.dumps(fields))


def _with_text_arguments(call: dict) -> dict:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
