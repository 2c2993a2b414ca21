r"""Step 3: train an actor with PPO against a reward model.

python step3_ppo/main.py --actor_model_name_or_path output/sft --critic_model_name_or_path output/reward \
    --data_path pairs.jsonl --output_dir output/ppo
2 ranks: torchrun --nproc_per_node 2 step3_ppo/main.py ..., deepspeed --num_gpus 2 step3_ppo/main.py ...
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import RlhfArguments
from dschat.distributed.mesh import mesh
from dschat.program import RunContext, run_step

if __name__ == "__main__":
    run_step("rlhf", __file__)  # reads the flags, and only then imports the rest of this file


from dschat.data.loaders import build_prompt_loader
from dschat.data.preparation import prompt_data
from dschat.distributed.device import current_device
from dschat.export.eval_command import EvalCommand
from dschat.export.provenance import step_provenance
from dschat.planning.run_plan import RunPlan
from dschat.rlhf.layout import choose_ways_and_layout
from dschat.rlhf.monitoring.best_actor import Exports
from dschat.rlhf.monitoring.evaluation import build_evaluator
from dschat.rlhf.monitoring.guard import Guard
from dschat.rlhf.monitoring.monitor import TrainingMonitor
from dschat.rlhf.ppo_trainer import build_trainer
from dschat.rlhf.rewards.sources import build_rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine, num_training_steps
from dschat.rlhf.roles import engine_specs
from dschat.rlhf.rollout.choice import build_backend
from dschat.rlhf.speed import PpoSpeed
from dschat.rlhf.text_loader import build_text_loader
from dschat.rlhf.tokenizers import load_rlhf_tokenizers
from dschat.rlhf.train import Assembly, train_ppo
from dschat.rlhf.upstream import check_adapters, check_positions, verify_models
from dschat.runs.output_folder import write_summary
from step3_ppo.forecast import check_worth


def main(args: RlhfArguments, context: RunContext) -> None:
    """The step from flags to the saved actor and critic."""
    run = assemble(args, context, forecasts=True)
    tokenizer, output_dir = run.tokenizers.actor, args.run.output_dir
    trainer = run.trainer_of(args)
    monitor = TrainingMonitor(
        run.evaluator_of(args),
        Guard(args.guard, kl_target=args.ppo.kl_target),
        Exports(
            run.engine,
            tokenizer,
            partial(step_provenance, args.description, data=run.data),
            output_dir=output_dir,
            export_actor=args.guard.export_actor,
            command=EvalCommand.of(args.run),
        ),
        args.guard.eval_interval,
    )
    num_done, metrics, seconds = train_ppo(
        trainer,
        run.prompts,
        monitor,
        description=args.description,
        rollout=args.rollout,
        speed=PpoSpeed(trainer, args, run.checkpoints.choices),
        num_ppo_steps=run.num_ppo_steps,
        tokenizer=tokenizer,
        checkpoints=run.checkpoints,
    )
    metrics |= monitor.guard.verdict()
    run.plan.finish()
    if mesh().is_main_process:
        write_summary(output_dir, {"step": "rlhf", "ppo_steps": num_done, **metrics, "seconds": seconds})


def assemble(args: RlhfArguments, context: RunContext, *, forecasts: bool = False) -> Assembly:
    """Everything that the flags name, read, checked and loaded; where asked to, a forecast before the models.

    Every rank calls it.
    """
    specs = engine_specs(args)
    received = verify_models(specs)
    check_adapters(specs)
    context.claim_folder(*args.model_paths)
    tokenizers, specs = load_rlhf_tokenizers(specs, args.tokenizer)
    received.check_templates(specs, tokenizers)
    score_scale = received.score_scale(args.ppo.score_scale)
    data = prompt_data(
        args.data,
        tokenizers.actor,
        max_prompt_seq_len=args.rollout.max_prompt_seq_len,
        seed=args.run.seed,
        reward_tokenizer=tokenizers.reward_tokenizer,
        keep_rows=args.rewards.has_sources,
    )
    longest = data.longest + args.rollout.max_answer_seq_len
    check_positions(specs, tokenizers, longest)
    prompts = build_prompt_loader(
        data.train,
        pad_id=tokenizers.actor.pad_token_id,
        batch_size=args.rollout.per_device_generation_batch_size,
        batches_per_step=args.rollout.generation_batches,
        rank=mesh().data.rank,
        world_size=mesh().data.size,
        seed=args.run.seed,
        num_epochs=args.optimizer.num_train_epochs,
        samples_per_prompt=args.rollout.num_samples_per_prompt,
        multiple_of=args.widths.multiple_of(current_device().type),
    )
    texts = build_text_loader(
        args.text,
        args.rollout,
        tokenizers.actor,
        model_path=args.actor.model_name_or_path,
        batch_size=args.ppo.per_device_training_batch_size,
        accumulation_steps=args.optimizer.gradient_accumulation_steps,
        seed=args.run.seed,
        data_output_path=args.data.data_output_path,
    )
    rewards = build_rewards(args.rewards, args.reward_weights, tokenizers.actor, data.columns, score_scale)

    checkpoints = context.begin(data.key, received.all)
    choices = checkpoints.choices
    layout, widest, mean = choose_ways_and_layout(args, specs, data.train, choices, longest=longest)
    steps = min(args.rlhf.test_stop_step, len(prompts)) if args.rlhf.enable_test_mode else len(prompts)
    plan = RunPlan.begin(args, engine_specs, choices, longest=widest, mean_length=mean, steps=steps)
    if forecasts:
        check_worth(args, steps * args.rollout_size * mesh().data.size, len(data.evaluation))
    updates = args.updates_per_ppo_step
    engine = DeepSpeedRLHFEngine(
        specs,
        tokenizers,
        optimizer=args.optimizer,
        ppo=args.ppo,
        run=args.run,
        num_training_steps=num_training_steps(args.ppo, num_ppo_steps=steps, updates_per_ppo_step=updates),
    )
    received.check_outputs(specs, engine.by_role)
    backend = build_backend(args.rollout, engine.actor, tokenizers.actor, longest=longest, choices=choices)
    models = {"engine": engine, "tokenizers": tokenizers, "backend": backend}
    scores = {"score_scale": score_scale, "rewards": rewards, "layout": layout}
    trainer_of = partial(build_trainer, **models, **scores, prompts=data.train, texts=texts)
    evaluator_of = partial(build_evaluator, **models, **scores, prompts=data.evaluation)
    return Assembly(data, tokenizers, prompts, steps, engine, trainer_of, evaluator_of, checkpoints, plan)
