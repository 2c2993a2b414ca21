"""Two answers of two and of one token to prompts of one, for tests of losses and updates."""

import torch

from dschat.rlhf.rollout.batch import RolloutBatch

MASK = torch.tensor([[True, True], [True, False]])
ROLLOUT = RolloutBatch(
    input_ids=torch.zeros(2, 3, dtype=torch.long),
    attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
    answer_mask=MASK,
    ended=torch.tensor([True, True]),
    prompt_rows=torch.arange(2),
    prompt_length=1,
)
