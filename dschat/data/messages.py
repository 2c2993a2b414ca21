"""Lists of messages, as chat data have them, to the turns of a conversation."""

import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

from dschat.data.cells import BadRow, DroppedRow, describe, is_blank, sound_text
from dschat.data.comparisons import NAMED_FIELDS, Prompt, Reply, Role, Turn
from dschat.data.tools import calls_of, without_nulls

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
"""What the field calls the parties of a conversation."""

CALLERS = ("function_call", "tool_call")
"""Roles of messages whose content is a call of a tool by the assistant, as ShareGPT has them."""

MARKS = ("weight", "loss", "loss_mask", "train", "trainable", "training")
"""Fields that say whether a message is to be learned."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold what the assistant thought before its answer; they become one, "reasoning"."""

HARMLESS = frozenset(
    ("id", "message_id", "msg_id", "uuid", "parent_id", "conversation_id", "turn", "turn_id", "index", "idx")
    + ("timestamp", "created", "created_at", "date", "time", "source", "model", "lang", "language")
    + ("tokens", "num_tokens", "token_count", "metadata", "meta")
)
"""Fields that say where a message comes from, not what it says."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content that are text."""


@dataclass
class _Message:
    """A message on the way to a turn."""

    role: Role
    content: str
    learn: bool | None
    fields: dict[str, Any]

    def continues(self, before: "_Message") -> bool:
        """Whether both are one turn in two messages."""
        alone = any(name in message.fields for message in (self, before) for name in NAMED_FIELDS)
        return (self.role, self.learn) == (before.role, before.learn) and self.role != "tool" and not alone

    def turn(self) -> Turn:
        """The message as it is kept."""
        fields = dict(sorted(self.fields.items()))
        packed = json.dumps(fields, ensure_ascii=False, default=str) if fields else ""
        return Turn(self.role, self.content, self.learn, packed)


def turns(value: Any, name: str) -> tuple[Turn, ...]:
    """A conversation from a list of {"role", "content"} or {"from", "value"}; neighbours of one role merge,
    unless one of them is to be learned and the other not, or says more than its content.

    Every field of a message is a mark that says whether it is learned, or harmless, or goes with the turn to
    the template. Raises `BadRow` for anything else.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of messages, but is {describe(value)}")
    merged: list[_Message] = []
    for number, raw in enumerate(value, start=1):
        message = _message(raw, f"message {number} of {name}")
        if message is None:
            continue
        if merged and message.continues(merged[-1]):
            before = merged.pop()
            message.content = f"{before.content}\n\n{message.content}"
            message.fields = before.fields | message.fields
        merged.append(message)
    if not merged:
        raise BadRow(f"{name} has no message that says anything")
    return tuple(message.turn() for message in merged)


def _message(message: Any, name: str) -> _Message | None:
    """The message; None where it is a system message that says nothing."""
    if not isinstance(message, dict):
        raise BadRow(f'{name} must be an object {{"role", "content"}}, but is {describe(message)}')
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    if role_key not in message:
        raise BadRow(f'{name} has no "{role_key}"')
    role_name = str(message[role_key]).strip().lower()
    if role_name not in ROLES and role_name not in CALLERS:
        raise BadRow(f"{name} is by {reprlib.repr(message[role_key])}; known are {', '.join(ROLES)}")
    role = ROLES.get(role_name, "assistant")
    fields = _fields(message, {role_key, content_key}, name)
    value = message.get(content_key)
    if role_name in CALLERS:
        if not (calls := calls_of(value, name)):
            raise BadRow(f"{name} is a {role_name}, but calls nothing")
        fields["tool_calls"], value = calls, None
    if content_key not in message and not ({"tool_calls", "reasoning"} & set(fields)):
        raise BadRow(f'{name} has no "{content_key}"')
    content, thought = _content(value, role, name)
    if thought:
        fields.setdefault("reasoning", thought)
    if not content:
        if role == "system":
            return None
        if not (role == "tool" or (role == "assistant" and {"tool_calls", "reasoning"} & set(fields))):
            sound_text(value if not isinstance(value, list) else content, name)  # says what is wrong
            raise BadRow(f"{name} is empty")
    return _Message(role, content, _mark(message, role, name), fields)


def _content(value: Any, role: str, name: str) -> tuple[str, str]:
    """The message's text, less white space at its ends, and what its parts say was thought."""
    if is_blank(value):
        return "", ""
    parts = [value] if isinstance(value, dict) else value
    if role == "tool" and not isinstance(value, str) and not _are_parts(parts):
        return json.dumps(value, ensure_ascii=False, default=str), ""  # what a tool returned
    if not isinstance(parts, list):
        return sound_text(value, name).strip(), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for number, part in enumerate(parts, start=1):
        kind, text = _part(part, f"part {number} of {name}")
        if not is_blank(text):
            (thoughts if kind == "thinking" else texts).append(sound_text(text, f"part {number} of {name}"))
    return "\n".join(texts).strip(), "\n".join(thoughts).strip()


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in value
    )


def _part(part: Any, name: str) -> tuple[str, Any]:
    """The part's type and text. Raises `BadRow` where it is anything but text and thoughts."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise BadRow(f"{name} must be text or an object, but is {describe(part)}")
    kind = part.get("type")
    if kind in TEXT_PARTS or (kind is None and "text" in part):
        return "text", part.get("text")
    if kind == "thinking" or kind == "reasoning":
        return "thinking", part.get("thinking") or part.get("text")
    raise BadRow(f"{name} is of type {reprlib.repr(kind)}; only text can be read: leave such rows out")


def _fields(message: dict[str, Any], taken: set[str], name: str) -> dict[str, Any]:
    """What the message says beside role and content, with one name for each thing."""
    fields: dict[str, Any] = {}
    for key, value in message.items():
        if key in taken or key in MARKS or key in HARMLESS or is_blank(value) or value is False:
            continue
        here = f'"{key}" of {name}'
        if key in THOUGHTS:
            thought = _content(value, "assistant", here)[0]
            if fields.setdefault("reasoning", thought) != thought:
                raise BadRow(f"{name} has several thoughts that differ ({', '.join(THOUGHTS)}); keep one")
        elif key in ("tool_calls", "function_call"):
            fields["tool_calls"] = calls_of(value, here)
        else:
            fields[key] = without_nulls(value)
    return fields


def _mark(message: dict[str, Any], role: str, name: str) -> bool | None:
    """Whether the message is marked as to be learned; None where it is not marked.

    Only the assistant's messages are learned without a mark, so "no" on another's says nothing.
    """
    marks = {key: _yes_or_no(message[key], f'"{key}" of {name}') for key in MARKS if key in message}
    marked = {mark for mark in marks.values() if mark is not None}
    if len(marked) > 1:
        raise BadRow(f"{name} is marked both as to be learned and as not: {', '.join(marks)}")
    learn = marked.pop() if marked else None
    return None if role != "assistant" and learn is False else learn


def _yes_or_no(value: Any, name: str) -> bool | None:
    if is_blank(value):
        return None
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "yes"):
        return True
    if word in ("false", "no"):
        return False
    try:
        number = float(word)
    except (TypeError, ValueError):
        number = math.nan
    if number not in (0, 1):
        raise BadRow(
            f"{name} is {describe(value)}; a message is learned or not: give 1 or 0, or true or false"
        )
    return number == 1


def prompt_and_answer(conversation: tuple[Turn, ...], name: str) -> tuple[Prompt, Reply]:
    """A conversation cut before its last turn, which must be the assistant's."""
    *before, last = conversation
    if last.role != "assistant":
        raise DroppedRow("conversations that end with a question")
    return asked(tuple(before), name), reply(last)


def reply(turn: Turn) -> Reply:
    """A turn of the assistant as an answer."""
    return turn.content if turn.is_plain else turn


def asked(prompt: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    """The same turns, if there is a question among them."""
    if not any(turn.role == "user" for turn in prompt):
        raise BadRow(f"{name} has an answer but no question before it")
    return prompt
