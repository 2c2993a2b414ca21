"""Flags of DeepSpeed's Hybrid Engine, which generates with the engine that trains the actor."""

from dataclasses import dataclass
from typing import Any

from dschat.arguments.flags import flag, require, require_at_least
from dschat.arguments.model import ModelArguments
from dschat.arguments.rollout import RolloutArguments


@dataclass(frozen=True, kw_only=True)
class HybridArguments:
    """DeepSpeed's Hybrid Engine for the actor."""

    enable_hybrid_engine: bool = flag(
        False,
        "Build the actor as DeepSpeed's Hybrid Engine: rollouts are phases with whole weights and adapters "
        "added into them. Its kernels generate where a trial at the start finds that they can, else "
        "--rollout_backend's; the run says which.",
    )
    inference_tp_size: int = flag(
        1,
        "Ranks over which the Hybrid Engine's kernels split each layer for generation; needs "
        "--actor_zero_stage 3.",
        at_resume="free",
    )
    tp_gather_partition_size: int = flag(
        8, "Layers that are gathered at a time to be split so.", at_resume="free"
    )
    release_inference_cache: bool = flag(
        False, "Give the memory of a rollout's keys and values back to the device after it.", at_resume="free"
    )
    unpin_actor_parameters: bool = flag(
        False,
        "ZeRO-3: gather a layer at a time in generation, not all at once, as --rollout_gather never; slow.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "inference_tp_size", "tp_gather_partition_size")
        given = {
            f"--inference_tp_size {self.inference_tp_size}": self.inference_tp_size != 1,
            f"--tp_gather_partition_size {self.tp_gather_partition_size}": self.tp_gather_partition_size != 8,
            "--release_inference_cache": self.release_inference_cache,
            "--unpin_actor_parameters": self.unpin_actor_parameters,
        }
        for text, is_given in given.items():
            require(self.enable_hybrid_engine or not is_given, f"{text} needs --enable_hybrid_engine.")

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's settings of the engine, without the length of rows."""
        return {
            "enabled": True,
            "inference_tp_size": self.inference_tp_size,
            "tp_gather_partition_size": self.tp_gather_partition_size,
            "release_inference_cache": self.release_inference_cache,
            "pin_parameters": not self.unpin_actor_parameters,
        }

    def check(self, actor: ModelArguments, rollout: RolloutArguments) -> None:
        """Raise `UserError` for flags of the actor and of rollouts that the Hybrid Engine does not take."""
        require(
            self.inference_tp_size == 1 or actor.zero_stage == 3,
            f"--inference_tp_size {self.inference_tp_size} splits layers as ZeRO-3 gathers them and "
            f"needs --actor_zero_stage 3, got {actor.zero_stage}.",
        )
        require(
            not self.unpin_actor_parameters or rollout.rollout_gather != "always",
            "--unpin_actor_parameters gathers a layer at a time, and --rollout_gather always all at once; "
            "leave one of them out.",
        )
