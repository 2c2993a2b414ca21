"""The loop of step 3: PPO steps, and what is logged of each."""

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments
from dschat.data.loaders import PromptLoader
from dschat.distributed import current_device
from dschat.metrics import MetricsLogger
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer

SHOWN = ("score", "kl", "answer_length", "value_loss")
NUM_PRINTED_ANSWERS = 3


def train_ppo(
    trainer: DeepSpeedPPOTrainer,
    prompt_loader: PromptLoader,
    metrics: MetricsLogger,
    args: RlhfArguments,
    *,
    num_ppo_steps: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """Train for so many PPO steps. Returns the figures of the last. Every rank must call it."""
    device, values = current_device(), {}
    for step, prompts in zip(range(1, num_ppo_steps + 1), prompt_loader, strict=False):
        experience = trainer.generate_experience([batch.to(device) for batch in prompts])
        for epoch in range(args.ppo.ppo_epochs):
            for minibatch in experience.minibatches(epoch):
                trainer.train_rlhf(minibatch)
        values = trainer.metrics()
        metrics.log(step, show=SHOWN, **values)
        metrics.advance()
        if args.rollout.print_answers and step % args.rollout.print_answers_interval == 0:
            metrics.say(experience.examples(tokenizer, NUM_PRINTED_ANSWERS))
    return values
