"""Scores from a server: prompts and answers are posted, scores come back."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any

from tqdm import tqdm

from dschat.errors import UserError
from dschat.rlhf.answered import Answered, Problem, Score

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the first further attempt, which double from one to the next, and where that ends."""
TOO_MANY_REQUESTS = 429


class RewardEndpoint:
    """POST {"prompts", "answers", "columns"} -> {"scores"}, in JSON, `batch_size` answers at once.

    What may pass is tried again `retries` times: no connection, nothing within `seconds`, HTTP 429 and 5xx.
    """

    def __init__(self, name: str, url: str, *, batch_size: int, seconds: float, retries: int) -> None:
        self.name, self._url = name, url
        self._batch_size, self._seconds, self._retries = batch_size, seconds, retries

    def score(self, answered: Answered) -> list[Score]:
        """Each answer's score, or that it got none. Raises `UserError` where the endpoint does not serve."""
        return [score for batch in answered.batches(self._batch_size) for score in self._score_batch(batch)]

    def _score_batch(self, batch: Answered) -> list[Score]:
        body = {"prompts": batch.prompts, "answers": batch.answers, "columns": batch.columns}
        reply = self._post(json.dumps(body).encode())
        try:
            scores = json.loads(reply)["scores"]
        except (ValueError, KeyError, TypeError) as error:
            problem = f'a reply without {{"scores": [...]}}: {reply[:100].decode(errors="replace")!r}'
            raise self._error(problem) from error
        if not isinstance(scores, list) or len(scores) != len(batch):
            raise self._error(f'a reply whose "scores" are no list of {len(batch)} numbers, one an answer')
        return [_score(value) for value in scores]

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=self._seconds) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                cause = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code != TOO_MANY_REQUESTS:
                    raise self._error(cause) from error
            except (OSError, http.client.HTTPException) as error:
                cause = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self._retries:
                pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                tqdm.write(
                    f"note: --reward_endpoint {self._url}: {cause}; attempt {attempt + 2} of "
                    f"{self._retries + 1} in {pause:g} s."
                )
                time.sleep(pause)
        raise self._error(f"{cause}, {self._retries + 1} times in a row (--reward_endpoint_retries)")

    def _error(self, problem: str) -> UserError:
        return UserError(f"--reward_endpoint {self._url}: {problem}. See that it serves, then start again.")


def _score(value: Any) -> Score:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return Problem("no finite number", f"it returned {str(value)[:60]}, which is no finite number")
