"""Steps 1 and 3 where the reward pays for length: what a reward model does that has learned to like it.

python hacked_ppo.py SFT_FLAGS_AS_JSON PPO_FLAGS_AS_JSON
"""

import json
import sys
import unittest.mock

from three_steps import program
from torch import Tensor

from dschat.arguments import parse_arguments
from dschat.data.token_batch import TokenBatch
from dschat.distributed import process_group
from dschat.engines.step import DeepSpeedEngine
from dschat.program import prepare
from dschat.rlhf import analysis


def length_of_answers(model: DeepSpeedEngine, batch: TokenBatch) -> Tensor:
    """In place of the reward model's scores. -> [B]."""
    return batch.label_mask.sum(dim=1).float()


if __name__ == "__main__":
    process_group.init_process_group()
    sft, ppo = map(json.loads, sys.argv[1:])
    sft_args, ppo_args = parse_arguments("sft", sft), parse_arguments("rlhf", ppo)
    program("sft").main(sft_args, prepare(sft_args))
    with unittest.mock.patch.object(analysis, "scores_of", length_of_answers):
        program("rlhf").main(ppo_args, prepare(ppo_args))
    process_group.destroy_process_group()
