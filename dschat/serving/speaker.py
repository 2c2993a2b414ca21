"""A model that answers conversations, heard token by token.

Prompts have the tokens that step 3 samples from, and answers the noise of an evaluation of step 3: the same
conversation, seed, sample and settings give the same answer.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from dschat.data.collate import PromptBatch
from dschat.data.comparisons import Prompt
from dschat.data.encoder import Encoder
from dschat.data.templates import ChatTemplate
from dschat.data.tokenization import content_key
from dschat.data.tokenizer_fingerprint import start_tokens
from dschat.data.truncation import Truncation
from dschat.models.config import num_positions
from dschat.rlhf.answering import load
from dschat.rlhf.monitoring.evaluation import EVALUATION
from dschat.rlhf.rewards.retokenize import exact_text
from dschat.rlhf.rollout.backend import Sampling
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate

End = Literal["stop", "length", "interrupted"]
"""Why an answer ends: its end token or a stop text, the most tokens, or its listener."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character is decoded to whose bytes have not all come yet."""


class Interrupted(Exception):
    """A listener wants no more of an answer; it raises this when it is given a token or text."""


@dataclass(frozen=True)
class SpokenAnswer:
    """An answer."""

    text: str
    ids: list[int]
    """Its tokens, the end token included."""
    end: End


class AnswerText(BaseStreamer):
    """The text of an answer whose tokens `generate` gives one by one, in the pieces that `on_text` is given.

    The pieces together are the text, without the end token and what begins at one of the `stops`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        on_text: Callable[[str], None],
        *,
        stops: Sequence[str] = (),
        content: Callable[[str], str] | None = None,
    ) -> None:
        """`content` is what is shown of a text that the model wrote, by default all of it."""
        self._tokenizer, self._end_ids, self._stops = tokenizer, end_ids, stops
        self._content, self._on_text = content or str, on_text
        self._has_read_prompt = False
        self._shown = ""
        self.ids: list[int] = []
        self.end_reason: End = "length"

    @property
    def text(self) -> str:
        """All of it so far."""
        text = self._written()
        places = [place for place in map(text.find, self._stops) if place >= 0]
        return self._content(text[: min(places)]) if places else text

    def _written(self) -> str:
        """What the model wrote, stop texts and all."""
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self._end_ids else self.ids
        return self._content(exact_text(self._tokenizer, ids))

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token at a time. Raises `Interrupted` where the answer is to end."""
        if not self._has_read_prompt:
            self._has_read_prompt = True
            self._on_text("")  # a listener may have gone while the answer waited
            return
        self.ids += value.flatten().tolist()
        if self.ids[-1] in self._end_ids:
            self.end_reason = "stop"
            return
        text = self._written()
        if any(stop in text for stop in self._stops):
            self.end_reason = "stop"
            self.end()
            raise Interrupted
        held = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        self._show(self._content(text[: len(text) - max(held, default=0)].rstrip(INCOMPLETE)))

    def end(self) -> None:
        """Show what was held back."""
        self._show(self.text)

    def _show(self, text: str) -> None:
        """Show what the text has beyond what was shown, maybe nothing."""
        piece = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown += piece
        self._on_text(piece)


class Speaker:
    """A causal LM from a folder, a hub id or an adapter's folder, which answers one conversation at a time.

    `read` may be called from any thread, `answer` from one at a time.
    """

    def __init__(self, path: str, flag: str) -> None:
        """`flag` is what messages call the path. Raises `UserError` where the model cannot be loaded."""
        self.path, self.model = path, load(path, flag)
        self.positions = num_positions(self.model.module.config)
        """The most tokens of a prompt with its answer; None where the model does not say."""
        engine: Any = self.model
        self._template = ChatTemplate(self.tokenizer)
        self._backend = HuggingFaceGenerate(engine, self.tokenizer)
        # Encoding borrows a tokenizer from the threads that decode with it, and theirs would fail.
        self._reading, self._lock = copy.deepcopy(self.tokenizer), threading.Lock()
        self._encoder = Encoder(self._reading)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, with the template that it was saved with."""
        return self.model.tokenizer

    def read(self, prompt: Prompt, *, max_tokens: int | None = None) -> tuple[list[int], bool]:
        """The prompt's tokens, and whether its first exchanges were left out to keep to `max_tokens`.

        A prompt that cannot be cut at an exchange is returned whole. Raises `UserError` where the template
        refuses the conversation.
        """
        with self._lock:
            whole = self._encoder.prompts([prompt])[0]
            if max_tokens is None or len(whole) <= max_tokens:
                return whole, False
            (row,) = self._encoder.fitted(
                self._encoder.rows([prompt], [()]),
                [prompt],
                max_tokens,
                lambda numbers, prompts: self._encoder.rows(prompts, [()] * len(prompts)),
            )
        fits = row.truncation == Truncation.FEWER_TURNS
        return (row.prompt if fits else whole), fits

    def read_text(self, text: str) -> list[int]:
        """The tokens of a text as it stands, after the tokenizer's start tokens; at least one."""
        with self._lock:
            tokenizer = self._reading
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return [*start_tokens(tokenizer), *ids] or [tokenizer.eos_token_id]

    def answer(
        self,
        ids: list[int],
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda text: None,
        *,
        sample: int = 0,
        stops: Sequence[str] = (),
        as_written: bool = False,
    ) -> SpokenAnswer:
        """The answer to a prompt of these tokens; `on_text` is given its text in pieces, some of them empty.

        With `as_written` the text is all that the model wrote, the template's marks and white space with it.
        `sample` numbers the answers to one prompt. Where `on_text` raises `Interrupted`, or the user presses
        Ctrl-C, the answer is what there is by then.
        """
        device = self.model.device
        row = torch.tensor([ids], device=device)
        key, place, number = (torch.tensor([n], device=device) for n in (content_key(ids), 0, sample))
        prompts = PromptBatch(row, torch.ones_like(row), keys=key, rows=place, samples=number)
        content = None if as_written else self._template.content
        heard = AnswerText(self.tokenizer, self._backend.end_ids, on_text, stops=stops, content=content)
        try:
            with self._backend.session():
                self._backend.generate(prompts, replace(sampling, ppo_step=EVALUATION), heard)
        except (Interrupted, KeyboardInterrupt):
            if heard.end_reason != "stop":  # an end token or a stop text had come
                heard.end_reason = "interrupted"
        return SpokenAnswer(heard.text, heard.ids, heard.end_reason)
