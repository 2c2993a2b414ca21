"""Parameters that ZeRO-3 shards over the ranks."""

import contextlib
from collections.abc import Iterable, Iterator

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import unwrap_model_for_generation
from torch import Tensor

from dschat.distributed.deepspeed_private import is_sharded, no_start_of_forward


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
    """Full parameters inside the block where ZeRO-3 shards them; nothing to do elsewhere.

    With `modifier_rank`, what that rank wrote into them is kept; without, changes are lost.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank):
        yield


@contextlib.contextmanager
def weights_gathered_for_generation(engine: DeepSpeedEngine) -> Iterator[None]:
    """Whole weights inside the block and none of ZeRO-3's hooks, so ranks may stop at different lengths."""
    with unwrap_model_for_generation(engine), no_start_of_forward(engine):
        yield
