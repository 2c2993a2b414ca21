"""A training loop of one's own over DeepSpeed's engine, on as many ranks as it is started with.

python seed_loop.py MODEL ROWS.pt OUTPUT_FOLDER STAGE...
ROWS.pt has a list of batches of chosen_input_ids and rejected_input_ids [N, L], which the ranks share.
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch.nn.functional import logsigmoid

from dschat.utils.model.reward_model import RewardModel


def train(sft: str, batches: list[dict[str, torch.Tensor]], output: Path, stage: int) -> None:
    """The loop, with a model that is saved in both forms."""
    torch.manual_seed(7)
    model = RewardModel.from_pretrained(sft)
    adamw = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.0, "torch_adam": True}
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": adamw}}
    config |= {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    engine, _, _, _ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for whole in batches:
        batch = {name: rows[rank::num_ranks] for name, rows in whole.items()}
        chosen = engine(batch["chosen_input_ids"])
        rejected = engine(batch["rejected_input_ids"])
        loss = -logsigmoid(chosen - rejected).mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(output / f"checkpoint{stage}")
    engine.module.save_pretrained(output / f"reward{stage}")


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for stage in map(int, sys.argv[4:]):
        train(sys.argv[1], torch.load(sys.argv[2]), Path(sys.argv[3]), stage)
