"""Text that the actor goes on learning as in pre-training, beside PPO: InstructGPT's PPO-ptx."""

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments
from dschat.data.loaders import TextLoader
from dschat.data.text_blocks import text_blocks
from dschat.distributed.mesh import mesh
from dschat.models.config import check_positions


def build_text_loader(args: RlhfArguments, tokenizer: PreTrainedTokenizerBase) -> TextLoader | None:
    """This rank's blocks of --unsupervised_dataset_name for each optimiser step, None without the flag.

    As many blocks meet in an optimiser step as answers. Raises `UserError` where the text cannot be read or
    is too short, or a block outgrows the actor's positions.
    """
    if not args.text.unsupervised_dataset_name:
        return None
    block_size = args.rollout.max_prompt_seq_len + args.rollout.max_answer_seq_len
    flags = "--max_prompt_seq_len or --max_answer_seq_len"
    check_positions(args.actor.model_name_or_path, block_size, flags, "a block of text")
    return TextLoader(
        text_blocks(
            args.text.unsupervised_dataset_name,
            tokenizer,
            block_size=block_size,
            config_name=args.text.unsupervised_dataset_config_name,
            data_output_path=args.data.data_output_path,
        ),
        batch_size=args.ppo.per_device_training_batch_size,
        accumulation_steps=args.optimizer.gradient_accumulation_steps,
        rank=mesh().data.rank,
        world_size=mesh().data.size,
        seed=args.run.seed,
    )
