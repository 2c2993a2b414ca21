"""Flags: the rows of tokens that models read, which change what a step costs and not what it learns."""

import math
from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require_at_least

CPU_MULTIPLE, GPU_MULTIPLE = 32, 16
"""Default multiples: on a CPU with AMX a token took 0.7 of its time where widths were multiples of 32."""


@dataclass(frozen=True, kw_only=True)
class WidthArguments:
    """How wide the rows of a forward pass are."""

    pad_to_multiple_of: int | None = flag(
        None,
        "Pad rows to a multiple of so many tokens: processors compute round widths faster and prepare a "
        f"kernel for each new one. Default: {CPU_MULTIPLE} on a CPU, {GPU_MULTIPLE} on a GPU; 1 pads to the "
        "longest row of a batch.",
        at_resume="free",
    )
    packing: Literal["auto", "on", "off"] = flag(
        "auto",
        "Let short sequences share a row in place of padding them, each as if it were alone; auto: where a "
        "trial at the start finds it faster. For a model that cannot tell them apart they are padded, which "
        "the log says.",
        at_resume="free",
    )

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None:
            require_at_least(1, self, "pad_to_multiple_of")

    def multiple_of(self, device_type: str, num_sharing: int = 1) -> int:
        """What widths are multiples of on a device of torch's type "cpu", "cuda" ...

        So many ranks share the tokens of a row in equal parts.
        """
        chosen = self.pad_to_multiple_of or (CPU_MULTIPLE if device_type == "cpu" else GPU_MULTIPLE)
        return math.lcm(chosen, num_sharing)
