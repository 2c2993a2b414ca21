"""Lists of messages, as chat data have them, to the turns of a conversation."""

import reprlib
from typing import Any

from dschat.data.cells import BadRow, DroppedRow, describe, sound_text
from dschat.data.comparisons import Prompt, Turn

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
}
"""What the field calls the parties of a conversation."""


def turns(value: Any, name: str) -> tuple[Turn, ...]:
    """A conversation from a list of {"role", "content"} or {"from", "value"}; neighbours of one role merge.

    Raises `BadRow` for anything else and `DroppedRow` where a tool speaks.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of messages, but is {describe(value)}")
    merged: list[Turn] = []
    for number, message in enumerate(value, start=1):
        turn = _turn(message, f"message {number} of {name}")
        if merged and merged[-1].role == turn.role:
            turn = Turn(turn.role, f"{merged.pop().content}\n\n{turn.content}")
        merged.append(turn)
    return tuple(merged)


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f'{name} must be an object {{"role", "content"}}, but is {describe(message)}')
    if message.get("tool_calls") or message.get("function_call"):  # such a message may have no content
        raise DroppedRow("conversations with tools")
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    for key in (role_key, content_key):
        if key not in message:
            raise BadRow(f'{name} has no "{key}"')
    role = str(message[role_key]).lower()
    if role in ("tool", "function", "function_call", "observation", "ipython"):
        raise DroppedRow("conversations with tools")
    if role not in ROLES:
        raise BadRow(f"{name} is by {reprlib.repr(message[role_key])}; known are {', '.join(ROLES)}")
    return Turn(ROLES[role], sound_text(message[content_key], name).strip())


def prompt_and_answer(conversation: tuple[Turn, ...], name: str) -> tuple[Prompt, str]:
    """A conversation cut before its last turn, which must be the assistant's."""
    *before, last = conversation
    if last.role != "assistant":
        raise DroppedRow("conversations that end with a question")
    return asked(tuple(before), name), last.content


def asked(prompt: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    """The same turns, if there is a question among them."""
    if not any(turn.role == "user" for turn in prompt):
        raise BadRow(f"{name} has an answer but no question before it")
    return prompt
