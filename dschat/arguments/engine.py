"""Flags: what DeepSpeed's engines are given at every step beyond ZeRO stage and precision."""

from dataclasses import dataclass
from typing import Any

from dschat.arguments.deepspeed_override import read_override
from dschat.arguments.flags import flag, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """Settings of all DeepSpeed engines of a run."""

    offload: bool = flag(False, "Keep optimiser states (and at ZeRO stage 3 the weights) in CPU memory.")
    offload_nvme_path: str | None = flag(
        None,
        "ZeRO-3: folder on a disk where --offload keeps them in place of CPU memory; needs libaio.",
        at_resume="free",
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "ZeRO-3 with LoRA: shard the weights under the adapters in 8 bits (ZeRO++); needs a GPU.",
    )
    zero_hpz_partition_size: int = flag(
        1,
        "ZeRO-3: ranks, such as those of a machine, that hold a second copy of the weights among them, from "
        "which backward passes gather (ZeRO++'s hpZ); 1 is off.",
        at_resume="free",
    )
    zero_quantized_weights: bool = flag(
        False, "ZeRO-3: gather weights in 8 bits (ZeRO++'s qwZ); needs a GPU."
    )
    zero_quantized_gradients: bool = flag(
        False, "ZeRO-3: average gradients in 4 bits (ZeRO++'s qgZ); needs a GPU."
    )
    torch_compile: bool = flag(
        False,
        "Compile the decoder layers with torch.compile for training and scoring, with sizes left open; "
        "generation runs uncompiled.",
    )
    deepspeed_config_override: dict[str, Any] | None = flag(
        None,
        "JSON file with settings of DeepSpeed, merged last into the configuration of every engine; what a "
        "flag decides is refused. arguments.json records the content.",
        type=read_override,
        metavar="FILE",
    )

    @property
    def quantized(self) -> list[str]:
        """The flags given that need DeepSpeed's kernels for quantised collectives."""
        names = ("enable_mixed_precision_lora", "zero_quantized_weights", "zero_quantized_gradients")
        return [f"--{name}" for name in names if getattr(self, name)]

    @property
    def zeropp(self) -> dict[str, bool | int]:
        """DeepSpeed's settings of ZeRO++, without those that are off."""
        settings: dict[str, bool | int] = {
            "zero_quantized_nontrainable_weights": self.enable_mixed_precision_lora,
            "zero_quantized_weights": self.zero_quantized_weights,
            "zero_quantized_gradients": self.zero_quantized_gradients,
            "zero_hpz_partition_size": self.zero_hpz_partition_size,
        }
        return {name: value for name, value in settings.items() if value > 1 or value is True}

    @property
    def over_neighbours(self) -> list[str]:
        """The flags given for which DeepSpeed makes groups of ranks by number, whatever these share."""
        hpz = self.zero_hpz_partition_size
        return [
            *([f"--zero_hpz_partition_size {hpz}"] if hpz > 1 else []),
            *(["--zero_quantized_gradients"] if self.zero_quantized_gradients else []),
        ]

    @property
    def needs_stage_3(self) -> list[str]:
        """The flags given that ZeRO-3 alone has."""
        nvme = [f"--offload_nvme_path {self.offload_nvme_path}"] if self.offload_nvme_path else []
        return list(dict.fromkeys([*self.quantized, *self.over_neighbours, *nvme]))

    def __post_init__(self) -> None:
        require_at_least(1, self, "zero_hpz_partition_size")
        require(
            self.offload or self.offload_nvme_path is None,
            f"--offload_nvme_path {self.offload_nvme_path} says where --offload keeps states and weights; "
            "add --offload.",
        )
