"""Text that the actor goes on learning as in pre-training, beside PPO: InstructGPT's PPO-ptx."""

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments, TextArguments
from dschat.data.loaders import TextLoader
from dschat.data.text_blocks import text_blocks
from dschat.distributed.mesh import mesh
from dschat.models.config import check_positions


def build_text_loader(
    text: TextArguments,
    rollout: RolloutArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_path: str,
    batch_size: int,
    accumulation_steps: int,
    seed: int,
    data_output_path: str | None,
) -> TextLoader | None:
    """This rank's blocks of --unsupervised_dataset_name for each optimiser step, None without the flag.

    A block is as long as the longest prompt with the longest answer. A micro-batch holds `batch_size` blocks;
    `model_path` is the actor's, and tokens are kept below `data_output_path`. Raises `UserError` where the
    text cannot be read or fills no block, or a block outgrows the actor's positions.
    """
    if not text.unsupervised_dataset_name:
        return None
    block_size = rollout.max_prompt_seq_len + rollout.max_answer_seq_len
    flags = "--max_prompt_seq_len or --max_answer_seq_len"
    check_positions(model_path, block_size, flags, "a block of text")
    return TextLoader(
        text_blocks(
            text.unsupervised_dataset_name,
            tokenizer,
            block_size=block_size,
            config_name=text.unsupervised_dataset_config_name,
            data_output_path=data_output_path,
        ),
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        rank=mesh().data.rank,
        world_size=mesh().data.size,
        seed=seed,
    )
