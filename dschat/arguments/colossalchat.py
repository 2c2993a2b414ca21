"""ColossalChat's train_rm.py: its flags, and the run that they ask for in the flags of step 2."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dschat.arguments.command_line import ReadableParser
from dschat.arguments.flags import flag, require
from dschat.arguments.foreign import explain_foreign_flag
from dschat.arguments.foreign_flags import FOREIGN
from dschat.arguments.parsing import FlagParser, add_flags, flags_of
from dschat.arguments.secrets import recorded
from dschat.console import messages
from dschat.errors import UserError

PLUGINS: dict[str, dict[str, Any]] = {
    "gemini": {"zero_stage": 3},
    "gemini_auto": {"zero_stage": 3, "offload": True},
    "zero2": {"zero_stage": 2},
    "zero2_cpu": {"zero_stage": 2, "offload": True},
    "3d": {"zero_stage": 0},
    "ddp": {"zero_stage": 0},
}
"""The plugins by the flags of step 2 for what they shard."""

SHARED = {"loss_fn": "log_sig", "weight_decay": 0.1, "save_interval": 1000}
"""Flags of the same name and meaning in step 2, with ColossalChat's defaults."""

SIZES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "sp": "sequence_parallel_size"}


@dataclass(frozen=True, kw_only=True)
class TrainRmArguments:
    """ColossalChat's flags."""

    pretrain: str = flag(help="Folder or hub id of the model to start from.")
    dataset: list[str] = flag(help="Data sets to train on, whole: tokenised pairs, or text as in step 2.")
    eval_dataset: list[str] = flag([], "Data sets for evaluation at the ends of epochs; without it none.")
    plugin: Literal["gemini", "gemini_auto", "zero2", "zero2_cpu", "3d", "ddp"] = flag(
        "gemini",
        "What is sharded over the ranks: gemini is ZeRO stage 3, gemini_auto that with the CPU's memory, "
        "zero2 and zero2_cpu stage 2, ddp nothing, 3d what --tp, --pp and --sp say.",
    )
    tp: int = flag(1, "Ranks that share each layer, with --plugin 3d.")
    pp: int = flag(1, "Ranks that share the layers of the model, with --plugin 3d.")
    sp: int = flag(1, "Ranks that share each sequence, with --plugin 3d.")
    checkpoint_path: str | None = flag(None, "Checkpoint of this project to go on from, or latest.")
    lora_config: str | None = flag(
        None, "JSON file of a PEFT LoraConfig: train adapters alone, merged in what is written."
    )
    max_length: int = flag(2048, "Longest prompt and answer together, in tokens.")
    max_epochs: int = flag(3, "Passes over the data.")
    batch_size: int = flag(4, "Pairs that a rank trains on at once.")
    accumulation_steps: int = flag(8, "Micro-batches of an optimiser step.")
    lr: float = flag(5e-6, "Peak learning rate, of adapters too.")
    warmup_steps: int | None = flag(None, "Optimiser steps of warm-up; default: 2.5 per cent of the run.")
    grad_clip: float = flag(1.0, "Gradients are scaled down to this norm.")
    mixed_precision: Literal["fp16", "bf16"] | None = flag(
        None,
        "Precision of weights and activations; default: fp16 on a GPU, bf16 on a CPU and with --pp above 1.",
    )
    grad_checkpoint: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    use_flash_attn: bool = flag(
        False,
        "Use the package flash-attn; where it or a GPU is missing, PyTorch's own attention computes the "
        "same, which is noted.",
    )
    save_dir: str = flag("output", "Folder below which the run and its model are written, to modeling/.")
    config_file: str | None = flag(None, "JSON file to which these flags are written.")
    log_dir: str | None = flag(None, "Folder of the TensorBoard logs; default: in the run's folder.")

    def __post_init__(self) -> None:
        given = [f"--{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) != 1]
        require(
            not given or self.plugin == "3d",
            f"{' '.join(given)}: --plugin {self.plugin} shares the work otherwise; give --plugin 3d with it.",
        )

    def in_step_2(self, *, on_gpu: bool, has_flash_attention: bool) -> dict[str, Any]:
        """The flags of step 2 for the same run, by name."""
        flags = {
            "model_name_or_path": self.pretrain,
            "data_path": self.dataset,
            "eval_data_path": self.eval_dataset,
            # All of the data are step 2's, and none are held out.
            "data_split": "0,1,0",
            "eval_fraction": 0.0,
            "export_model": "last",
            "output_dir": str(Path(self.save_dir) / "modeling"),
            "resume_from_checkpoint": self.checkpoint_path,
            "max_seq_len": self.max_length,
            "num_train_epochs": self.max_epochs,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "learning_rate": self.lr,
            "num_warmup_steps": self.warmup_steps,
            "warmup_ratio": 0.025 if self.warmup_steps is None else None,
            "max_grad_norm": self.grad_clip,
            "dtype": self.mixed_precision or ("fp16" if on_gpu and self.pp == 1 else "bf16"),
            "gradient_checkpointing": self.grad_checkpoint,
            "tensorboard_path": self.log_dir,
            **PLUGINS[self.plugin],
            **{ours: getattr(self, name) for name, ours in SIZES.items() if getattr(self, name) != 1},
        }
        if self.lora_config is not None:
            adapters = {"lora_config": self.lora_config, "lora_learning_rate": self.lr}
            flags |= {**adapters, "only_optimize_lora": True}
        if self.use_flash_attn and on_gpu and has_flash_attention:
            flags["attn_implementation"] = "flash_attention_2"
        elif self.use_flash_attn:
            lacking = "the package flash-attn is not installed" if on_gpu else "there is no GPU"
            messages.note(f"--use_flash_attn: {lacking}, so PyTorch's own attention computes the same.")
        return flags


class TrainRmParser(FlagParser):
    """Step 2's parser with ColossalChat's flags, of which alone some are required and have defaults."""

    def __init__(self) -> None:
        super().__init__("reward")
        for action in self._actions:
            action.required, action.default = False, argparse.SUPPRESS
        self.conflict_handler = "resolve"  # --lora_config is in both
        add_flags(self, "colossalchat", TrainRmArguments, defaults={})
        self.set_defaults(**SHARED)

    def explain(self, name: str) -> str | None:
        """What to write in place of a flag that is not there."""
        spelt = name.lower().replace("-", "_")
        foreign = explain_foreign_flag(spelt, flags_of("reward")) if spelt in FOREIGN else None
        return foreign or ReadableParser.explain(self, name) or super().explain(name)


@dataclass(frozen=True)
class TrainRmCall:
    """A command line of train_rm.py."""

    arguments: TrainRmArguments
    of_step_2: dict[str, Any]
    """Flags of step 2 that are given as they are; they win over the translation."""

    @staticmethod
    def parse(argv: Sequence[str] | None = None) -> "TrainRmCall":
        """Raises `UserError` as `parse_arguments` does."""
        values = vars(TrainRmParser().parse_args(argv))
        names = [f.name for f in dataclasses.fields(TrainRmArguments)]
        arguments = TrainRmArguments(**{name: values.pop(name) for name in names})
        return TrainRmCall(arguments, values)

    def words(self, *, on_gpu: bool, has_flash_attention: bool) -> list[str]:
        """The command line of step 2 for the same run."""
        flags = self.arguments.in_step_2(on_gpu=on_gpu, has_flash_attention=has_flash_attention)
        if {"warmup_ratio", "num_warmup_steps"} & self.of_step_2.keys():
            flags |= {"warmup_ratio": None, "num_warmup_steps": None}
        words = []
        for name, value in {**flags, **self.of_step_2}.items():
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)] if value else []
            elif value is True or (value is not None and value is not False):
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
            elif value is False and name in self.of_step_2:
                words.append(f"--{name}=false")
        return words

    def write_config(self) -> None:
        """Write the flags to --config_file, if it is given. Raises `UserError` where that fails."""
        if self.arguments.config_file is None:
            return
        path = Path(self.arguments.config_file)
        flags = recorded({**dataclasses.asdict(self.arguments), **self.of_step_2})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(flags, indent=4) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--config_file {path} cannot be written ({error.strerror}).") from error
