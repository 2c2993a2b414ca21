r"""Step 3: train an actor with PPO against a reward model.

python step3_ppo/main.py --actor_model_name_or_path output/sft --critic_model_name_or_path output/reward \
    --data_path pairs.jsonl --output_dir output/ppo
On two ranks: `deepspeed --num_gpus 2` or `torchrun --nproc_per_node 2` in place of `python`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import RlhfArguments, parse_arguments
from dschat.distributed.mesh import mesh
from dschat.program import prepare, readable_errors
from dschat.runs.output_folder import check_free

if __name__ == "__main__":  # before torch is imported, so that what can be said without it is said at once
    with readable_errors():
        ARGS = parse_arguments("rlhf")
        check_free(ARGS.run)


from dschat.checkpoints.resume import begin_run
from dschat.data.loaders import PromptLoader, build_prompt_loader
from dschat.data.preparation import SplitData, prompt_data
from dschat.data.tokenization import column
from dschat.distributed import process_group, random_state
from dschat.models.config import check_positions
from dschat.models.lora import check_adapters
from dschat.models.tokenizer import RlhfTokenizers, load_rlhf_tokenizers
from dschat.rlhf.monitoring.best_actor import Exports
from dschat.rlhf.monitoring.evaluation import build_evaluator
from dschat.rlhf.monitoring.guard import Guard
from dschat.rlhf.monitoring.monitor import TrainingMonitor
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.rewards.sources import build_rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.text_loader import build_text_loader
from dschat.rlhf.train import train_ppo
from dschat.rlhf.upstream import verify_models
from dschat.runs.output_folder import check_run_folder, write_summary


def main(args: RlhfArguments) -> None:
    """The step from flags to the saved actor and critic."""
    prepare(args)
    handovers = verify_models(args)
    check_adapters(language=args.actor, reward=args.starting_critic)
    check_run_folder(args.description, *args.model_paths)
    tokenizers = load_rlhf_tokenizers(args)
    handovers.check_templates(tokenizers)
    score_scale = handovers.reward.score_statistics() if args.ppo.score_scale == "step2" else (0.0, 1.0)
    data = prompt_data(
        args.data,
        tokenizers.actor,
        max_prompt_seq_len=args.rollout.max_prompt_seq_len,
        seed=args.run.seed,
        reader=tokenizers.reader,
        keep_rows=args.rewards.has_sources,
    )
    prompt_loader = build_loader(args, data, tokenizers)
    texts = build_text_loader(args, tokenizers.actor)
    rewards = build_rewards(args, tokenizers, data, score_scale)

    process_group.init_process_group(args.run.local_rank)
    checkpoints = begin_run(args.description, data=data.key, models=handovers.all)
    random_state.seed_everything(args.run.seed)
    num_ppo_steps = args.rlhf.test_stop_step if args.rlhf.enable_test_mode else len(prompt_loader)
    num_ppo_steps = min(num_ppo_steps, len(prompt_loader))
    num_updates = num_ppo_steps * args.updates_per_ppo_step
    engine = DeepSpeedRLHFEngine(args, tokenizers, num_training_steps=num_updates)
    handovers.check_outputs(engine)
    trainer = DeepSpeedPPOTrainer(
        engine, tokenizers, args, prompts=data.train, score_scale=score_scale, rewards=rewards, texts=texts
    )
    watch = TrainingMonitor(
        build_evaluator(trainer, tokenizers, args, data.evaluation),
        Guard(args.guard, kl_target=args.ppo.kl_target),
        Exports(args, engine, tokenizers.actor, data),
        args.guard.eval_interval,
    )
    num_done, figures, seconds = train_ppo(
        trainer,
        prompt_loader,
        args,
        watch,
        num_ppo_steps=num_ppo_steps,
        tokenizer=tokenizers.actor,
        checkpoints=checkpoints,
    )
    figures |= watch.exports.finish(num_done, figures) | watch.guard.verdict()
    if mesh().is_main_process:
        summary = {"step": "rlhf", "ppo_steps": num_done, **figures, "seconds": seconds}
        write_summary(args.run.output_dir, summary)


def build_loader(args: RlhfArguments, data: SplitData, tokenizers: RlhfTokenizers) -> PromptLoader:
    """The prompts of each PPO step. Raises `UserError` where answers could outgrow a model's positions."""
    longest = max(column(part, "length").max(initial=0) for part in (data.train, data.evaluation))
    longest += args.rollout.max_answer_seq_len
    has_own_critic = args.ppo.has_critic and not tokenizers.fresh_critic
    paths = {args.actor.model_name_or_path: True, args.critic.model_name_or_path: has_own_critic}
    paths |= {args.reward_path: True} if args.reward_path and tokenizers.reader is None else {}
    if args.guard.guard_reward_model_name_or_path and tokenizers.guard_reader is None:
        paths[args.guard.guard_reward_model_name_or_path] = True
    for path in (path for path, reads_tokens in paths.items() if reads_tokens):
        check_positions(
            path,
            longest,
            "--max_prompt_seq_len or --max_answer_seq_len",
            "the longest prompt with the longest answer",
        )
    return build_prompt_loader(
        data.train,
        pad_id=tokenizers.actor.pad_token_id,
        batch_size=args.rollout.per_device_generation_batch_size,
        batches_per_step=args.rollout.generation_batches,
        rank=mesh().data.rank,
        world_size=mesh().data.size,
        seed=args.run.seed,
        num_epochs=args.optimizer.num_train_epochs,
        samples_per_prompt=args.rollout.num_samples_per_prompt,
    )


if __name__ == "__main__":
    with readable_errors(ARGS.run.debug):
        main(ARGS)
        process_group.destroy_process_group()
