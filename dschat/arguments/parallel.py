"""Flags: how the ranks of steps 1 and 2 and of DPO share one model beside ZeRO, docs/parallel.md."""

from collections.abc import Mapping
from dataclasses import dataclass

from dschat.arguments.flags import flag, require, require_at_least
from dschat.arguments.model import ModelArguments
from dschat.arguments.run import RunArguments


@dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """Ranks that share what a model reads, or its layers."""

    sequence_parallel_size: int = flag(
        1,
        "Ranks that share the tokens of each row, for rows too long for one device: each keeps the "
        "activations and logits of its part, and attention exchanges heads for tokens (DeepSpeed-Ulysses). "
        "The ranks of the run divided by this number are those that read rows of their own.",
        at_resume="free",
    )

    pipeline_parallel_size: int = flag(
        1,
        "Ranks that share a model's layers: each holds a part of them, and the micro-batches of an optimiser "
        "step go through all. With --zero_stage 0 or 1, and best with many --gradient_accumulation_steps.",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "sequence_parallel_size", "pipeline_parallel_size")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis of the mesh that a flag sets."""
        return {"sequence": self.sequence_parallel_size, "pipeline": self.pipeline_parallel_size}

    def check(self, model: ModelArguments, run: RunArguments, sizes: Mapping[str, int]) -> None:
        """Raise `UserError` for what other flags ask for and ranks that share a model cannot do. `sizes` are
        those of all axes of the mesh."""
        self._check_pipeline(model, run)
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

    def _check_pipeline(self, model: ModelArguments, run: RunArguments) -> None:
        """DeepSpeed's pipelines take ZeRO 0 and 1, and rows that are whole."""
        zero_stage = f"--zero_stage {model.zero_stage}, which shards gradients; use --zero_stage 1"
        override = run.deepspeed_config_override or {}
        timers = "'wall_clock_breakdown' in --deepspeed_config_override, as DeepSpeed starts its timers twice"
        others = {
            timers: bool(override.get("wall_clock_breakdown")),
            zero_stage: model.zero_stage > 1,
            "--torch_compile; leave it out": run.torch_compile,
            "--offload; --zero_stage 1 shards the optimiser states": run.offload,
            "--load_in_4bit, whose packed weights have no stages; leave it out": model.load_in_4bit,
            "--dtype fp16; use --dtype bf16": run.dtype == "fp16",
            "--auto_micro_batch; choose --per_device_train_batch_size": run.auto_micro_batch,
        }
        for problem, is_given in others.items():
            require(
                self.pipeline_parallel_size == 1 or not is_given,
                f"--pipeline_parallel_size {self.pipeline_parallel_size} cannot be combined with {problem}.",
            )
