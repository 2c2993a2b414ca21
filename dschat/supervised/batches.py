"""The data of steps 1 and 2 and of DPO in batches: for training, and for evaluations."""

from dataclasses import dataclass, replace
from functools import partial

from dschat.data.loaders import Collate, EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from dschat.data.packing import RowLayout
from dschat.data.preparation import SplitData
from dschat.distributed.mesh import mesh
from dschat.supervised.settings import SupervisedSettings


@dataclass(frozen=True)
class Loaders:
    """The batches of a step on this rank."""

    data: SplitData
    """The examples that they are made of."""
    train: TrainLoader
    evaluation: EvalLoader
    short_evaluation: EvalLoader
    """The part of the evaluation data that --eval_iters allows between epochs."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, prompt and answer."""
        return self.data.longest

    def laid_out(self, layout: RowLayout) -> "Loaders":
        """The same batches in rows of that layout."""
        collate, budget = partial(self.train.collate, layout=layout), self.train.budget
        if budget is not None:
            budget = replace(budget, layout=layout)
        return replace(
            self,
            train=replace(self.train, collate=collate, budget=budget),
            evaluation=replace(self.evaluation, collate=collate),
            short_evaluation=replace(self.short_evaluation, collate=collate),
        )

    def over(self, data: SplitData) -> "Loaders":
        """The same batches of the same examples, which have further columns in `data`."""
        return Loaders(
            data=data,
            train=replace(self.train, dataset=data.train),
            evaluation=replace(self.evaluation, dataset=data.evaluation),
            short_evaluation=replace(self.short_evaluation, dataset=data.evaluation),
        )


def build_loaders(data: SplitData, collate: Collate, settings: SupervisedSettings) -> Loaders:
    """Loaders over the data of a step; `collate` has its padding token filled in."""
    batch, place = settings.batch, {"rank": mesh().data.rank, "world_size": mesh().data.size}
    eval_size = batch.per_device_eval_batch_size
    return Loaders(
        data=data,
        train=build_train_loader(
            data.train,
            collate,
            batch_size=batch.per_device_train_batch_size,
            accumulation_steps=settings.optimizer.gradient_accumulation_steps,
            seed=settings.run.seed,
            max_tokens=batch.max_tokens_per_batch,
            num_sharing=mesh().sequence.size,
            **place,
        ),
        evaluation=build_eval_loader(data.evaluation, collate, batch_size=eval_size, **place),
        short_evaluation=build_eval_loader(
            data.evaluation, collate, batch_size=eval_size, num_batches=batch.eval_iters, **place
        ),
    )
