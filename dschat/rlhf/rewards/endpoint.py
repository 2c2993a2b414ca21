"""Scores from a server: prompts and answers are posted, scores come back."""

import json
import time
from typing import Any

import httpx2

from dschat.arguments import without_secrets
from dschat.console import messages
from dschat.console.text import printable
from dschat.errors import UserError
from dschat.rlhf.rewards.function_worker import LARGEST
from dschat.rlhf.rewards.http_posts import TooLong, cause_of, post, proxy_of
from dschat.rlhf.rewards.text_answers import Problem, Score, TextAnswers

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the first further attempt, which double from one to the next, and where that ends."""
TOO_MANY_REQUESTS = 429
LONGEST_REPLY = 1 << 24
"""Bytes. A number takes some twenty."""


class RewardEndpoint:
    """POST {"prompts", "answers", "columns"} -> {"scores"}, in JSON, `batch_size` answers at once.

    What may pass is tried again `retries` times: no connection, no whole reply within `seconds`, HTTP 429 and
    5xx. A user and password in the URL are sent as HTTP's basic authentication, and named nowhere.
    """

    def __init__(self, name: str, url: str, *, batch_size: int, seconds: float, retries: int) -> None:
        self.name, self._shown = name, without_secrets(url)
        self._batch_size, self._seconds, self._retries = batch_size, seconds, retries
        self._url, self._proxy = url, proxy_of(url)

    def score(self, answers: TextAnswers) -> list[Score]:
        """Each answer's score, or why it has none. Raises `UserError` where the endpoint does not serve."""
        return [score for batch in answers.batches(self._batch_size) for score in self._score_batch(batch)]

    def _score_batch(self, batch: TextAnswers) -> list[Score]:
        body = {"prompts": batch.prompts, "answers": batch.answers, "columns": batch.columns}
        reply = self._post(json.dumps(body).encode())
        try:
            scores = json.loads(reply)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f'a reply without {{"scores": [...]}}: {reply[:100].decode(errors="replace")!r}'
            raise self._error(problem) from error
        if not isinstance(scores, list) or len(scores) != len(batch):
            raise self._error(f'a reply whose "scores" are no list of {len(batch)} numbers, one an answer')
        return [_score(value) for value in scores]

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self._retries + 1):
            try:
                return post(self._url, body, self._proxy, seconds=self._seconds, longest=LONGEST_REPLY)
            except httpx2.HTTPStatusError as error:
                reply = error.response
                cause = f"HTTP {reply.status_code} {_plain(reply.reason_phrase)}"
                if reply.status_code < 500 and reply.status_code != TOO_MANY_REQUESTS:
                    raise self._error(cause + _where_to(reply)) from error
            except TooLong as error:
                raise self._error(str(error)) from error
            except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
                cause = _plain(cause_of(error)) or type(error).__name__
            cause += self._through
            if attempt < self._retries:
                pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                messages.note(
                    f"--reward_endpoint {self._shown}: {cause}; attempt {attempt + 2} of "
                    f"{self._retries + 1} in {pause:g} s.",
                    every_rank=True,
                )
                time.sleep(pause)
        raise self._error(f"{cause}, {self._retries + 1} times in a row (--reward_endpoint_retries)")

    @property
    def _through(self) -> str:
        """That a proxy stands between, as it may be what does not answer."""
        if self._proxy is None:
            return ""
        return f", through the proxy {without_secrets(self._proxy.url)} of {self._proxy.variable}"

    def _error(self, problem: str) -> UserError:
        remedy = "See that it serves, then start again."
        if self._proxy is not None:
            remedy = (
                f"See that both serve, or add its host to no_proxy if {self._proxy.variable} is not for it."
            )
        return UserError(f"--reward_endpoint {self._shown}: {problem}. {remedy}")


def _where_to(reply: httpx2.Response) -> str:
    """Where a redirection leads: a POST that follows one becomes a GET, or goes to another server."""
    location = reply.headers.get("Location") if 300 <= reply.status_code < 400 else None
    return (
        f" to {without_secrets(_plain(location))}, which is not followed: name that URL" if location else ""
    )


def _plain(text: object, limit: int = 200) -> str:
    """What a server says, on one line that steers no terminal, without what a URL in it hides."""
    return without_secrets(printable(str(text), keep="")[:limit]).strip()


def _score(value: Any) -> Score:
    # An integer of JSON has no largest, and cannot always be made a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return Problem("no finite number", f"it returned {str(value)[:60]}, which is no finite number")
