"""Scores of a reward model for what a model says, as step 3 gives them."""

import torch

from dschat.data.comparisons import Prompt
from dschat.data.encoder import Encoder
from dschat.data.token_batch import TokenBatch
from dschat.models.config import num_positions
from dschat.models.forward import scores_of
from dschat.models.loading import create_critic_model
from dschat.models.model_folder import check_model_path
from dschat.models.tokenizer import load_tokenizer, reads_otherwise
from dschat.serving.speaker import Speaker, SpokenAnswer


class Scorer:
    """A reward model beside a speaker: it reads the speaker's tokens, or, where its tokenizer or template is
    another, the conversation as text.

    """

    def __init__(self, path: str, flag: str, speaker: Speaker) -> None:
        check_model_path(path, flag)
        tokenizer = load_tokenizer(path)
        gpu = torch.cuda.is_available()
        config = {"bf16": {"enabled": gpu}, "zero_optimization": {"stage": 0}}
        self._model = create_critic_model(path, tokenizer, config, rlhf_training=True)
        self._model.to("cuda" if gpu else "cpu").eval()
        self._positions = num_positions(self._model.config)
        self._device = speaker.model.device
        self._encoder = Encoder(tokenizer) if reads_otherwise(speaker.tokenizer, tokenizer) else None

    def described(self, prompt: Prompt, ids: list[int], answer: SpokenAnswer) -> str:
        """The score in words."""
        tokens = self._tokens(prompt, ids, answer)
        if self._positions is not None and len(tokens) > self._positions:
            return f"no score, for the reward model has {self._positions} positions"
        return f"score {self._score(tokens):.4g}"

    def score(self, prompt: Prompt, ids: list[int], answer: SpokenAnswer) -> float:
        """The score of what was said to the prompt, whose tokens for the speaker are `ids`."""
        return self._score(self._tokens(prompt, ids, answer))

    def _tokens(self, prompt: Prompt, ids: list[int], answer: SpokenAnswer) -> list[int]:
        """The conversation as the reward model reads it."""
        if self._encoder is None:
            return [*ids, *answer.ids]
        (tokens,) = self._encoder.answers_alone([answer.text], [answer.end == "stop"])
        return [*self._encoder.prompts([prompt])[0], *tokens]

    def _score(self, tokens: list[int]) -> float:
        row = torch.tensor([tokens], device=self._device)
        with torch.no_grad():
            return scores_of(self._model, TokenBatch.of(row, torch.ones_like(row, dtype=torch.bool))).item()
