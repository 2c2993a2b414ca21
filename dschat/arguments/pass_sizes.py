"""How many tokens the passes of a step read at once, by its flags: what decides the memory of activations."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """The batches of one rank."""

    train_rows: int
    """Rows of a micro-batch of training; a pair is two."""
    train_rows_flag: str
    accumulation: int
    """Micro-batches of an optimiser step."""
    length: int
    """Tokens of the longest row."""
    eval_rows: int = 0
    answer_length: int = 0
    """Tokens of the longest answer that is sampled; 0 in steps that sample none."""
    generation_rows: int = 0
    """Answers that are sampled at once."""
    rollout_rows: int = 0
    """Answers of a PPO step."""
    gather: Literal["auto", "always", "never"] = "auto"
    """Whether weights that ZeRO-3 shards are gathered whole to sample them; auto: where there is room."""
    passes: int = 1
    """How often a PPO step learns from each of them."""
    keeps_average: bool = False
    """Whether a moving average of the actor is kept, in fp32."""
    holds_both: bool = False
    """Whether activations of actor and critic are held at one time."""

    @property
    def num_outputs(self) -> int:
        """Positions per row whose logits are computed, at most."""
        return self.answer_length or self.length
