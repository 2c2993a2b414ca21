"""Rows as users have them, for tests of layouts."""

from dschat.data.comparisons import Turn
from dschat.data.layouts import recognise

TURN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant:"
ASKED = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Sum?"))
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def said(*contents, roles=("user", "assistant")):
    """Messages by the roles in turn."""
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def shared_gpt(*contents):
    """The same in ShareGPT's keys."""
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]


def read(row):
    """The comparison that the layout of the row's columns makes of it."""
    return recognise(row).read(row)
