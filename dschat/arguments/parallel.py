"""Flags: how the ranks of steps 1 and 2 and of DPO share one model beside ZeRO, docs/parallel.md."""

from collections.abc import Mapping
from dataclasses import dataclass

from dschat.arguments.flags import flag, require, require_at_least
from dschat.arguments.model import ModelArguments


@dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """Ranks that share what a model reads."""

    sequence_parallel_size: int = flag(
        1,
        "Ranks that share the tokens of each row, for rows too long for one device: each keeps the "
        "activations and logits of its part, and attention exchanges heads for tokens (DeepSpeed-Ulysses). "
        "The ranks of the run divided by this number are those that read rows of their own.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "sequence_parallel_size")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis of the mesh that a flag sets."""
        return {"sequence": self.sequence_parallel_size}

    def check(self, model: ModelArguments, sizes: Mapping[str, int]) -> None:
        """Raise `UserError` for what sequence parallelism does not have of `model`'s flags and of `sizes`,
        those of all axes of the mesh."""
        given = [f"--{axis}_parallel_size {sizes[axis]}" for axis in sizes if sizes[axis] > 1]
        require(
            self.sequence_parallel_size == 1 or len(given) == 1,
            f"{' and '.join(given)} cannot be combined: ranks share the tokens of a row, the weights of a "
            "layer or the layers of a model; leave --sequence_parallel_size out.",
        )
        require(
            self.sequence_parallel_size == 1 or model.attn_implementation in ("auto", "sdpa"),
            f"--sequence_parallel_size {self.sequence_parallel_size} computes attention by torch's SDPA, "
            "with its flash kernels on a GPU; leave out "
            f"--attn_implementation {model.attn_implementation}.",
        )
