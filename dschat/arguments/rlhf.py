"""Flags of step 3 with no room of their own: its reward model, offloading, overflow, short tests."""

from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class RlhfOptions:
    """Step 3's other settings."""

    reward_model_name_or_path: str | None = flag(
        None,
        "Folder or hub id of the reward model, where it is not the one that the critic starts from.",
        at_resume="free",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in CPU memory between uses; no use where the actor trains "
        "adapters alone, as it is its own reference then.",
        at_resume="free",
    )
    offload_reward_model: bool = flag(
        False, "Keep the reward models' weights in CPU memory between uses.", at_resume="free"
    )
    num_padding_at_beginning: int | None = flag(
        None, "Accepted for old scripts and not needed: padding is told by masks.", at_resume="free"
    )
    align_overflow: bool = flag(
        False,
        "In fp16: where gradients of actor or critic overflow, skip the step of both; both models' gradients "
        "are held at one time.",
    )
    reuse_first_pass: Literal["none", "actor", "both"] = flag(
        "actor",
        "Which models learn from the first micro-batch of a PPO step by the forward pass that analysed it: "
        "the same numbers for less work. The actor alone takes no more memory; with both the activations of "
        "actor and critic are held at one time.",
        at_resume="free",
    )
    enable_test_mode: bool = flag(False, "End after --test_stop_step PPO steps.")
    test_stop_step: int = flag(0, "PPO steps of a run with --enable_test_mode.")
