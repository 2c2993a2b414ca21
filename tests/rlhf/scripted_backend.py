"""A rollout back end for tests: its answers are written down."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout.backend import Ability, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch

END, PAD = 0, 1


class ScriptedBackend:
    """Gives one scripted list of answers per call of `generate`: tokens, and a log-probability for each."""

    name = "the script"

    def __init__(
        self, *script: Sequence[Sequence[tuple[int, float]]], cannot: frozenset[Ability] = frozenset()
    ) -> None:
        self.cannot, self.uses_cache = cannot, True
        self.calls: list[tuple[Sampling, bool]] = []
        """The sampling of each call so far, and whether there was a cache."""
        self._script, self._is_open = iter(script), False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self._is_open = True
        yield
        self._is_open = False

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> RolloutBatch:
        assert self._is_open, "generate belongs inside a session"
        self.calls.append((sampling, self.uses_cache))
        answers = next(self._script)
        length = max(map(len, answers))
        rows = [[*answer, *[(PAD, 0.0)] * (length - len(answer))] for answer in answers]
        tokens = torch.tensor([[token for token, _ in row] for row in rows])
        logprobs = torch.tensor([[logprob for _, logprob in row] for row in rows])
        recorded = logprobs if sampling.with_logprobs else None
        return RolloutBatch.of_answers(prompts, tokens, (END,), PAD, recorded)


def prompts(*texts: Sequence[int]) -> PromptBatch:
    """A batch of these prompts, padded on the left."""
    width = max(map(len, texts))
    return PromptBatch(
        input_ids=torch.tensor([[PAD] * (width - len(text)) + [*text] for text in texts]),
        attention_mask=torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts]),
        keys=torch.arange(len(texts)),
        rows=torch.arange(len(texts)),
        samples=torch.zeros(len(texts), dtype=torch.long),
    )
