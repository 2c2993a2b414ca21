"""OpenAI's requests and answers: https://platform.openai.com/docs/api-reference, of it what is text.

What a request asks for is done or refused; only fields that change no answer are passed over.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dschat.data.cells import BadRow
from dschat.data.comparisons import Turn
from dschat.data.messages import turns
from dschat.errors import UserError
from dschat.serving.settings import DEFAULTS, checked
from dschat.serving.speaker import SpokenAnswer

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields with the values that ask for nothing; null does not either."""

HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that change no answer."""

KINDS = {401: "authentication_error", 403: "permission_error", 408: "timeout", 429: "rate_limit_error"}
"""OpenAI's types of errors by status, where they are not those of all below 500 and of all above."""

MOST_MESSAGES, MOST_STOPS, LONGEST_STOP = 1000, 4, 200


class ApiError(Exception):
    """A request that is refused, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that says so."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(message: str, param: str | None = None) -> ApiError:
    """The error of a request that has to be another."""
    return ApiError(400, message, "invalid_value", param)


@dataclass(frozen=True)
class Asked:
    """What a request asks for, checked."""

    model: str | None
    prompt: tuple[Turn, ...] | str
    """A conversation that ends with a question; of /v1/completions a text."""
    settings: dict[str, float]
    """Those that the request gives."""
    stops: tuple[str, ...] = ()
    streams: bool = False
    wants_usage: bool = False
    """Whether a stream ends with the counts of tokens."""

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The prompt of a chat."""
        assert not isinstance(self.prompt, str), "it is a text"
        return self.prompt


def asked(body: Any, *, is_chat: bool, most_tokens: int) -> Asked:
    """The request in a body of JSON. Raises `ApiError`."""
    if not isinstance(body, dict):
        raise refused("the body must be a JSON object")
    prompt_key = "messages" if is_chat else "prompt"
    known = {"model", prompt_key, "stream", "stream_options", "stop", "max_completion_tokens", *DEFAULTS}
    for name, value in body.items():
        if name in known or name in HARMLESS or value is None:
            continue
        if name not in NEUTRAL:
            raise refused(f"there is no parameter {name!r:.100}", str(name)[:100])
        if value not in NEUTRAL[name]:
            raise refused(f"{name} is not supported here; leave it out", name)
    for name, kind in (("model", str), ("stream", bool), ("stream_options", dict)):
        if not isinstance(body.get(name), kind | None):
            raise refused(f"{name} must be of type {kind.__name__}", name)
    if prompt_key not in body:
        raise ApiError(400, f"{prompt_key} is missing", "missing_required_parameter", prompt_key)
    return Asked(
        model=body.get("model"),
        prompt=_conversation(body["messages"]) if is_chat else _text(body["prompt"]),
        settings=_settings(body, most_tokens),
        stops=_stops(body.get("stop")),
        streams=bool(body.get("stream")),
        wants_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _settings(body: Mapping[str, Any], most_tokens: int) -> dict[str, float]:
    values = {name: body[name] for name in DEFAULTS if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        values["max_tokens"] = body["max_completion_tokens"]
    found = {}
    for name, value in values.items():
        if isinstance(value, str):
            raise refused(f"{name} must be a number", name)
        try:
            found[name] = checked(name, value, most=most_tokens if name == "max_tokens" else None)
        except UserError as error:
            raise refused(str(error), name) from error
    return found


def _conversation(value: Any) -> tuple[Turn, ...]:
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise refused(f"messages has more than {MOST_MESSAGES} messages", "messages")
    try:
        found = turns(value, "messages")
    except BadRow as error:
        raise refused(str(error), "messages") from error
    if found[-1].role != "user":
        raise refused("the last message must be the user's", "messages")
    return found


def _text(value: Any) -> str:
    (text,) = value if isinstance(value, list) and len(value) == 1 else (value,)
    if not isinstance(text, str):
        raise refused("prompt must be one text", "prompt")
    return _sound(text, "prompt")


def _sound(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refused(f"{name} holds half of a surrogate pair", name) from error
    return text


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise refused("stop must be a text or a list of texts", "stop")
    if len(texts) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in texts):
        raise refused(f"stop has at most {MOST_STOPS} texts of {LONGEST_STOP} characters", "stop")
    return tuple(_sound(text, "stop") for text in texts)


@dataclass(frozen=True)
class Form:
    """The objects that answer one request."""

    is_chat: bool
    model: str
    num_prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        of_chat = "chat.completion.chunk" if chunk else "chat.completion"
        kind = of_chat if self.is_chat else "text_completion"
        head = {"id": ("chatcmpl-" if self.is_chat else "cmpl-") + self.id, "object": kind}
        return {**head, "created": self.created, "model": self.model, "choices": list(choices)}

    def whole(self, answer: SpokenAnswer) -> dict[str, Any]:
        """The answer in one object."""
        content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        text = content if self.is_chat else {"text": answer.text}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": answer.end}
        return self._object([choice], chunk=False) | {"usage": self.usage(answer)}

    def chunk(self, piece: str, *, is_first: bool = False) -> dict[str, Any]:
        """A piece of the answer."""
        role = {"role": "assistant"} if is_first else {}
        text = {"delta": {**role, "content": piece}} if self.is_chat else {"text": piece}
        return self._object([{"index": 0, **text, "logprobs": None, "finish_reason": None}], chunk=True)

    def last_chunk(self, answer: SpokenAnswer) -> dict[str, Any]:
        """What ends a stream of pieces."""
        text: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": answer.end}
        return self._object([choice], chunk=True)

    def usage_chunk(self, answer: SpokenAnswer) -> dict[str, Any]:
        """The counts of tokens, where a stream is to end with them."""
        return self._object([], chunk=True) | {"usage": self.usage(answer)}

    def usage(self, answer: SpokenAnswer) -> dict[str, int]:
        """Counts of tokens, the end token included."""
        prompt, written = self.num_prompt_tokens, len(answer.ids)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
