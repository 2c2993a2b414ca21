"""What steps 1 and 2 and DPO share: epochs over rows, with an evaluation before, during and after.

A step brings two functions: `loss_and_metrics(batch)`, as `engines.step.train_step` takes it, and
`evaluate(loader)`, the metrics of an evaluation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dschat.arguments import DpoArguments, SftArguments, SupervisedArguments
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.console import messages
from dschat.data.loaders import Collate, EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from dschat.data.preparation import SplitData
from dschat.data.tokenization import column
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.random_state import seed_ranks_apart
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.skipped_steps import SkippedSteps
from dschat.engines.step import DeepSpeedEngine, LossAndMetrics, gradient_norm, learning_rate, train_step
from dschat.models.loading import create_hf_model
from dschat.runs.metrics import MetricsLogger
from dschat.supervised.evaluations import Evaluations, Figures
from dschat.supervised.exports import ModelExports

ENGINE = "model"
"""The engine's name in checkpoints."""


NUM_SHOWN = 3
"""Figures that fit beside the progress bar."""


@dataclass(frozen=True)
class Loaders:
    """The batches of a step on this rank."""

    train: TrainLoader
    evaluation: EvalLoader
    short_evaluation: EvalLoader
    """The part of the evaluation data that --eval_iters allows between epochs."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, prompt and answer."""
        return max(
            column(loader.dataset, "length").max(initial=0) for loader in (self.train, self.evaluation)
        )


def build_loaders(data: SplitData, collate: Collate, args: SupervisedArguments) -> Loaders:
    """Loaders over the data of a step; `collate` has its padding token filled in."""
    place = {"rank": mesh().data.rank, "world_size": mesh().data.size}
    eval_size = args.batch.per_device_eval_batch_size
    return Loaders(
        train=build_train_loader(
            data.train,
            collate,
            batch_size=args.batch.per_device_train_batch_size,
            accumulation_steps=args.optimizer.gradient_accumulation_steps,
            seed=args.run.seed,
            **place,
        ),
        evaluation=build_eval_loader(data.evaluation, collate, batch_size=eval_size, **place),
        short_evaluation=build_eval_loader(
            data.evaluation, collate, batch_size=eval_size, num_batches=args.batch.eval_iters, **place
        ),
    )


@phase(PhaseKind.LOADING, "model")
def build_language_model(
    args: SftArguments | DpoArguments, tokenizer: PreTrainedTokenizerBase, loaders: Loaders
) -> DeepSpeedEngine:
    """The language model to be trained, in its engine."""
    config = train_config(
        args.model, args.optimizer, args.run, per_device_batch_size=args.batch.per_device_train_batch_size
    )
    model = create_hf_model(
        AutoModelForCausalLM, args.model.model_name_or_path, tokenizer, config, **args.model.loading_options
    )
    num_steps = loaders.train.num_steps_of(args.optimizer.num_train_epochs)
    return build_trained_engine(
        model, args.model, args.optimizer, args.run, config=config, num_training_steps=num_steps
    )


def train_epochs(
    engine: DeepSpeedEngine,
    loaders: Loaders,
    args: SupervisedArguments,
    *,
    description: str,
    loss_and_metrics: LossAndMetrics,
    evaluate: Callable[[EvalLoader], Figures],
    checkpoints: Checkpoints,
    exports: ModelExports,
    print_loss: bool = False,
) -> None:
    """Train, evaluate, log, save, export; go on from a checkpoint where there is one.

    Without evaluation data there are no evaluations.
    """
    steps_per_epoch = loaders.train.steps_per_epoch
    num_steps = loaders.train.num_steps_of(args.optimizer.num_train_epochs)
    seed_ranks_apart(args.run.seed)
    begun = checkpoints.load({ENGINE: engine})
    metrics = MetricsLogger(
        args.run,
        total_steps=num_steps,
        description=description,
        is_main_process=is_main_process(),
        steps_done=begun.step or None,
    )
    interval = args.batch.eval_interval
    short = loaders.short_evaluation if interval else None
    evaluations = Evaluations(engine, evaluate, metrics, whole=loaders.evaluation, short=short)
    skipped = SkippedSteps(args.run)
    start = time.perf_counter() - begun.values.get("seconds", 0.0)
    parts = {"evaluations": evaluations, "exports": exports, "skipped": skipped}
    begun.restore(parts)
    if not begun.step:
        evaluations.make(0, "before training")
    numbers = range(begun.step + 1, num_steps + 1)
    for step, optimizer_step in zip(numbers, loaders.train.steps_after(begun.step), strict=False):
        trained = train_step(engine, optimizer_step.micro_batches, loss_and_metrics)
        values = {
            "learning_rate": learning_rate(engine),
            "grad_norm": gradient_norm(engine),
            "skipped_steps": skipped.note(engine, step=step),
        }
        metrics.log(step, show=tuple(trained)[:NUM_SHOWN], **trained, **values)
        metrics.advance()
        evaluations.take_in(trained["loss"])
        if print_loss:
            messages.info(f"step {step}: loss {trained['loss']:.4f}")
        if step % steps_per_epoch == 0 or step == num_steps:
            epochs = min(step / steps_per_epoch, args.optimizer.num_train_epochs)
            evaluations.make(step, f"epoch {epochs:g}")
        elif interval and step % interval == 0:
            evaluations.make(step, f"step {step}", is_short=True)
        if evaluations.last_step == step:
            exports.offer(evaluations.all)
        if checkpoints.is_due(step, is_last=step == num_steps):
            metrics.flush()
            seconds = time.perf_counter() - start
            checkpoints.save(step, engines={ENGINE: engine}, parts={**parts, "seconds": seconds})
    metrics.close()
    exports.finish(num_steps, evaluations.all, time.perf_counter() - start)
