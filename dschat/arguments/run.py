"""Flags: where a run writes, its checkpoints, its precision, and what launchers pass."""

import re
from dataclasses import dataclass
from typing import Literal

from dschat.arguments.engine import EngineArguments
from dschat.arguments.flags import flag, require, require_at_least

TRACKERS = ("wandb", "mlflow", "trackio")
"""Of --report_to: names that are those of the packages, and of our extras."""


@dataclass(frozen=True, kw_only=True)
class RunArguments(EngineArguments):
    """Precision, output and reproducibility."""

    output_dir: str | None = flag(
        None, "Folder for the trained model, logs and metrics; without it nothing is kept.", at_resume="free"
    )
    overwrite_output_dir: bool = flag(
        False,
        "Start anew in an --output_dir that holds a run, finished or not, and remove what that one wrote.",
        at_resume="free",
    )
    seed: int = flag(1234, "Decides the data split, the order of the data and every random draw.")
    dtype: Literal["bf16", "fp16", "fp32"] = flag("bf16", "Precision of weights and activations.")
    enable_tensorboard: bool = flag(
        True, "Write TensorBoard logs; needs --output_dir or --tensorboard_path.", at_resume="free"
    )
    tensorboard_path: str | None = flag(
        None, "Folder of the TensorBoard logs; default: tensorboard/ in --output_dir.", at_resume="free"
    )
    report_to: list[str] = flag(
        [],
        "Trackers that get the metrics too: wandb, mlflow, trackio, each an extra of pip (dschat[wandb]). "
        "tensorboard is there without it (--enable_tensorboard).",
        at_resume="free",
    )
    deterministic: bool = flag(
        False,
        "Let torch use deterministic algorithms alone: slower on a GPU, and an error where there is none.",
    )
    trust_remote_code: bool = flag(
        False,
        "Run Python code that comes with a model or tokenizer; read it first. Without the flag none runs.",
        at_resume="free",
    )
    save_interval: int = flag(0, "Optimiser steps between checkpoints; 0 makes none.", at_resume="free")
    save_minutes: float = flag(0.0, "Minutes between checkpoints; 0 makes none.", at_resume="free")
    save_total_limit: int = flag(
        2,
        "Checkpoints kept, the newest; an older one goes when a newer is complete; 0 keeps all.",
        at_resume="free",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from a checkpoint: latest (also without a value) is the newest intact one in --output_dir, or "
        "the beginning where there is none; or a checkpoint's folder.",
        at_resume="free",
        nargs="?",
        const="latest",
    )
    max_skipped_steps: int = flag(
        20,
        "Optimiser steps in a row that may be skipped for a loss or gradient that is not finite; one more "
        "ends the run. 0: never. The default is more than fp16 skips to find its loss scale.",
        at_resume="free",
    )
    auto_micro_batch: bool = flag(
        False,
        "Where memory runs out, start again with half the micro-batch and twice the accumulation, which "
        "gives the same gradient; from the newest checkpoint, where there is one.",
        at_resume="free",
    )
    profile: str | None = flag(
        None,
        "Write a trace of torch's profiler and a page that sums it up to profile/ in --output_dir: of a step "
        "(5), or of several (5-8); without a value of steps 3-5.",
        at_resume="free",
        nargs="?",
        const="3-5",
    )
    eval_command: str | None = flag(
        None,
        "Command to run on each best model and on the model that the run ends with: {model} becomes its "
        "folder, and the numbers of its last line of JSON go to metrics.jsonl and summary.json.",
        at_resume="free",
    )
    eval_command_timeout: float = flag(
        3600.0, "Seconds after which --eval_command is ended, with a warning.", at_resume="free"
    )
    host_timeout: float = flag(
        300.0,
        "Seconds after which one of several hosts that does not answer is lost, and the run ends; 0: never.",
        at_resume="free",
    )
    local_rank: int = flag(
        -1, "Set by the deepspeed launcher; torchrun sets the environment instead.", at_resume="free"
    )
    deepspeed: bool = flag(False, "Accepted for old scripts: DeepSpeed is always used.", at_resume="free")
    compute_fp32_loss: bool = flag(
        False, "Accepted for old scripts: losses are always computed in fp32.", at_resume="free"
    )
    debug: bool = flag(False, "Show the traceback of an error in the input.", at_resume="free")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.seed < 2**63,
            f"--seed must lie between 0 and 2**63 - 1, got {self.seed}; 1234 is usual.",
        )
        require(
            not (self.overwrite_output_dir and self.resume_from_checkpoint),
            "--overwrite_output_dir starts anew and --resume_from_checkpoint goes on; give one of them.",
        )
        require_at_least(0, self, "save_interval", "save_minutes", "save_total_limit", "max_skipped_steps")
        require_at_least(0, self, "host_timeout")
        for name in ("save_interval", "save_minutes", "resume_from_checkpoint", "overwrite_output_dir"):
            require(
                not getattr(self, name) or self.output_dir is not None,
                f"--{name} {getattr(self, name)} needs --output_dir, below which checkpoints are.",
            )
        known = ("tensorboard", *TRACKERS)
        for name in self.report_to:
            require(
                name in known,
                f"--report_to {name}: choose from {', '.join(known)}; without the flag nothing is sent.",
            )
        require(
            self.enable_tensorboard or "tensorboard" not in self.report_to,
            "--report_to tensorboard and --no_enable_tensorboard exclude each other; give one of them.",
        )
        require(
            self.eval_command is None or "{model}" in self.eval_command,
            f"--eval_command {self.eval_command} has no {{model}} for the folder to be measured.",
        )
        require(
            self.eval_command is None or self.output_dir is not None,
            "--eval_command needs --output_dir, in which the models are.",
        )
        require(
            0 < self.eval_command_timeout < 1e7,
            f"--eval_command_timeout must lie in (0, 1e7) seconds, got {self.eval_command_timeout}.",
        )
        first, last = self.profiled_steps or (1, 1)
        require(
            1 <= first <= last,
            f"--profile {self.profile} is neither a step, such as 5, nor the first and last of several, 5-8.",
        )
        require(
            self.profile is None or self.output_dir is not None,
            f"--profile {self.profile} needs --output_dir, in which profile/ is written.",
        )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers of --report_to beside TensorBoard, each once."""
        return tuple(name for name in TRACKERS if name in self.report_to)

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of --profile, from 1; None without it, (0, 0) if it names none."""
        if self.profile is None:
            return None
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", self.profile)
        return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
