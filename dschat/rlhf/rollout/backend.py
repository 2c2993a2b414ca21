"""The interface to whatever generates answers: a generation engine is one class in a file of its own.

Hugging Face's `generate` is the first, `hf_generate.py`. Another one takes about 20 lines, and a line in the
main of step 3 where `HuggingFaceGenerate` stands:

    class Remote:
        name = "the server"  # in messages: "the server and the training model disagree ..."
        cannot = frozenset({Ability.KEYED_NOISE, Ability.WITHOUT_CACHE})
        uses_cache = True

        def __init__(self, client: Client, actor: DeepSpeedEngine, tokenizer: Tokenizer) -> None:
            self._client, self._actor, self._pad = client, actor, tokenizer.pad_token_id
            self._end_ids = end_token_ids(tokenizer, actor.module)

        @contextlib.contextmanager
        def session(self) -> Iterator[None]:
            self._client.load_weights(self._actor.module.named_parameters())
            yield

        def generate(self, prompts: PromptBatch, sampling: Sampling) -> RolloutBatch:
            reply = self._client.generate(prompts.input_ids, prompts.attention_mask, sampling)
            answers = pad_sequence(reply.tokens, batch_first=True, padding_value=self._pad)
            logprobs = pad_sequence(reply.logprobs, batch_first=True)
            return RolloutBatch.of_answers(prompts, answers, self._end_ids, self._pad, logprobs)

The agreement check (`agreement.py`) stands in front of every back end: before anything is learned, the
log-probabilities that answers were sampled with are compared with those of the training model.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from dschat.arguments import RolloutArguments
from dschat.data.collate import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.keyed_sampling import TokenDraw, keyed_uniforms, row_keys


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that answers are drawn from, and the key of the noise: item 1 of docs/ppo.md."""

    max_answer_length: int
    """In tokens, the end token included."""
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    seed: int = 0
    ppo_step: int = 0
    """Part of the noise's key, with the seed, the prompt and the number of its sample."""
    greedy: bool = False
    """Whether the likeliest token is taken in place of a sample."""
    with_logprobs: bool = False
    """Whether the answers carry the log-probabilities that their tokens were sampled with."""

    @staticmethod
    def of(
        args: RolloutArguments, *, seed: int, greedy: bool = False, with_logprobs: bool = False
    ) -> "Sampling":
        """The sampling that flags describe, at PPO step 0."""
        return Sampling(
            max_answer_length=args.max_answer_seq_len,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=seed,
            greedy=greedy,
            with_logprobs=with_logprobs,
        )

    def uniforms(self, prompts: PromptBatch) -> Tensor:
        """The number that each token of the answers is drawn with. -> float64 [B, max_answer_length]."""
        keys = row_keys(prompts.keys, prompts.samples, seed=self.seed, ppo_step=self.ppo_step)
        return keyed_uniforms(keys, self.max_answer_length)

    def token_draw(self, num_tokens: int) -> TokenDraw:
        """How these draw a token of a tokenizer of that size."""
        return TokenDraw(
            num_tokens=num_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            greedy=self.greedy,
            with_logprobs=self.with_logprobs,
        )


class Ability(Enum):
    """An ability that a back end may lack; the value says it in messages."""

    KEYED_NOISE = "sample with noise that is keyed by seed, PPO step, prompt and sample"
    LOGPROBS = "record the log-probabilities of the tokens that it samples"
    GREEDY = "take the likeliest token"
    WITHOUT_CACHE = "generate without a KV cache"


class RolloutBackend(Protocol):
    """A generation engine for the actor. Every rank makes the same calls, with prompts of its own."""

    name: str
    """The back end in messages, such as "generate()"."""
    cannot: frozenset[Ability]
    """The abilities that it lacks."""
    uses_cache: bool
    """Whether a forward pass reads keys and values of earlier tokens; the agreement check may unset it."""

    def session(self) -> AbstractContextManager[None]:
        """A context in which the actor's present weights generate; they must not change inside."""

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> RolloutBatch:
        """One answer per row of prompts: tokens, which of them are valid, why they end, log-probabilities.

        The log-probabilities are of the whole softmax at the temperature, before top-k and top-p; None
        unless the sampling asks for them. To be called inside `session()`.
        """


def require(backend: RolloutBackend, sampling: Sampling, *, on_mismatch: str = "stop") -> None:
    """Raise `UserError` where the back end lacks an ability that the flags ask for."""
    wanted = {
        Ability.LOGPROBS: ("--rollout_tolerance above 0 or --rollout_correction", sampling.with_logprobs),
        Ability.GREEDY: ("greedy decoding", sampling.greedy),
        Ability.WITHOUT_CACHE: ("--rollout_on_mismatch uncached", on_mismatch == "uncached"),
    }
    for ability, (flag, is_wanted) in wanted.items():
        if is_wanted and ability in backend.cannot:
            raise UserError(f"{flag}: {backend.name} cannot {ability.value}.")
