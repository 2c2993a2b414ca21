"""A run of step 1 or 2 or of DPO from its flags to its exports: what their programs do alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dschat.arguments import SupervisedArguments
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.data.loaders import Collate
from dschat.data.preparation import SplitData
from dschat.distributed.device import current_device, device_type
from dschat.distributed.mesh import mesh, stage
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.export.upstream import UpstreamModel, verify_model
from dschat.models.attention import choose_attention, set_attention
from dschat.models.config import check_positions, learned_positions, read_config
from dschat.models.loading import create_hf_model
from dschat.models.lora import check_adapters
from dschat.models.packing_trial import choose_row_layout
from dschat.models.preflight import meta_model
from dschat.models.products import choose_products
from dschat.models.sequence_trial import check_sequence_parallel, try_sequence_parallel
from dschat.models.stage import check_stages
from dschat.models.tensor_parallel import check_tensor_parallel
from dschat.models.tokenizer import load_tokenizer
from dschat.models.vocabulary import new_token_ids
from dschat.planning.models import supervised_specs
from dschat.planning.run_plan import RunPlan
from dschat.program import RunContext
from dschat.supervised.batches import Loaders, build_loaders
from dschat.supervised.exports import ModelExports
from dschat.supervised.loop import Objective, train_epochs
from dschat.supervised.settings import SupervisedSettings

NUM_TRIED, NUM_MEASURED = 2, 8
"""Micro-batches whose lengths are tried in several layouts of rows."""


@dataclass(frozen=True)
class SupervisedRun:
    """A run whose flags are read. Every rank calls its methods, in the order in which they stand here."""

    settings: SupervisedSettings
    context: RunContext
    base: UpstreamModel
    """The model that training starts from."""
    tokenizer: PreTrainedTokenizerBase
    args: SupervisedArguments
    plans: list[RunPlan] = field(default_factory=list)
    """What the run was expected to take, from `begin` on."""

    @staticmethod
    def open(
        args: SupervisedArguments, context: RunContext, *, head: Literal["language_model", "reward_model"]
    ) -> "SupervisedRun":
        """Verify the model without loading it, claim the run's folder, load the tokenizer.

        `head` is that of the trained model; a reward model may start from a model of any kind. Raises
        `UserError` where the model or its adapters cannot be used, or the folder is not free.
        """
        path = args.model.model_name_or_path
        if head == "language_model":
            base = verify_model(path, "--model_name_or_path", "language_model")
            check_adapters(language=args.model)
        else:
            base = verify_model(path, "--model_name_or_path")
            check_adapters(reward=args.model)
        check_tensor_parallel(path, args.model)
        check_sequence_parallel(path, mesh().sequence.size)
        tokenizer = load_tokenizer(path, args.tokenizer)
        if args.parallel.pipeline_parallel_size > 1:
            model = meta_model(path, is_reward_model=head == "reward_model")
            is_alone = args.model.uses_lora and args.optimizer.only_optimize_lora
            check_stages(
                model,
                args.parallel.pipeline_parallel_size,
                lambda num_rows: new_token_ids(num_rows, tokenizer) if is_alone else [],
            )
        context.claim_folder(path)
        return SupervisedRun(SupervisedSettings.of(args), context, base, tokenizer, args)

    def build_loaders(self, data: SplitData, collate: Callable[..., object]) -> Loaders:
        """Batches of the data, made by `collate(rows, num_rows, denominator, pad_id=)`.

        Raises `UserError` where an example is longer than the model has positions or than
        --max_tokens_per_batch.
        """
        padded: Collate = partial(collate, pad_id=self.tokenizer.pad_token_id)
        loaders, path = build_loaders(data, padded, self.settings), self.settings.model.model_name_or_path
        check_positions(path, loaders.longest_row, "--max_seq_len", "the longest row")
        if loaders.train.budget is not None:
            width = self.settings.widths.multiple_of(device_type(), mesh().sequence.size)
            loaders.train.budget.check(width)
        return loaders

    def begin(self, loaders: Loaders) -> tuple[Checkpoints, Loaders]:
        """Join the process group, choose the checkpoint to go on from, time ways to compute, and say what the
        run will take.

        The first two are as in `RunContext.begin`. The loaders come back with the layout of rows that
        --packing and --pad_to_multiple_of ask for, or the faster one. Raises `UserError` where ranks cannot
        share rows of the model, and --sequence_parallel_size asks for it.
        """
        checkpoints, settings = self.context.begin(loaders.data.key, [self.base]), self.settings
        choose_attention(
            [(self.base.path, settings.model)],
            dtype=settings.run.dtype,
            longest=loaders.longest_row,
            choices=checkpoints.choices,
        )
        choose_products(settings.run.dtype, checkpoints.choices)
        if mesh().sequence.size > 1:
            try_sequence_parallel(self.base.path, current_device())
        laid_out, width, mean_length = self._lay_out(loaders, checkpoints)
        self.plans.append(
            RunPlan.begin(
                self.args,
                supervised_specs,
                checkpoints.choices,
                longest=width,
                mean_length=mean_length,
                steps=loaders.train.num_steps_of(settings.optimizer.num_train_epochs),
            )
        )
        return checkpoints, laid_out

    def _lay_out(self, loaders: Loaders, checkpoints: Checkpoints) -> tuple[Loaders, int, float]:
        """The loaders with the layout of rows, and a sequence's tokens, padding included: most and mean."""
        path, model = self.base.path, self.settings.model
        config = read_config(path, model.dropout)
        set_attention(config, model.attn_implementation)
        micro_batches = islice(loaders.train, NUM_MEASURED)
        lengths = [batch.tokens.attention_mask.sum(dim=1).numpy() for batch in micro_batches]
        layout = choose_row_layout(
            self.settings.widths,
            {"model": config},
            checkpoints.choices,
            dtype=self.settings.run.dtype,
            device=current_device(),
            limit=learned_positions(path),
            lengths=lengths[:NUM_TRIED],
            longest=loaders.longest_row,
        )
        mean = layout.tokens_per_sequence(lengths)
        return loaders.laid_out(layout), layout.width_of(loaders.longest_row), mean

    def build_language_model(self, loaders: Loaders) -> DeepSpeedEngine:
        """The language model to be trained, in its engine; checked against the outputs promised with it."""
        engine = self.build_engine(partial(create_hf_model, AutoModelForCausalLM), loaders)
        self.base.check_outputs(engine)
        return engine

    @phase(PhaseKind.LOADING, "model")
    def build_engine(self, create_model: Callable[..., PreTrainedModel], loaders: Loaders) -> DeepSpeedEngine:
        """The model that `create_model`, of models/loading.py, loads for training, in its engine."""
        model, optimizer, run = self.settings.model, self.settings.optimizer, self.settings.run
        size = self.settings.batch.per_device_train_batch_size
        config = train_config(model, optimizer, run, per_device_batch_size=size)
        return build_trained_engine(
            create_model(
                model.model_name_or_path, self.tokenizer, config, stage=stage(), **model.loading_options
            ),
            model,
            optimizer,
            run,
            config=config,
            num_training_steps=loaders.train.num_steps_of(optimizer.num_train_epochs),
        )

    def train(
        self, engine: DeepSpeedEngine, loaders: Loaders, checkpoints: Checkpoints, objective: Objective
    ) -> None:
        """Train and export the model, as `train_epochs` and `ModelExports` do."""
        exports = ModelExports(
            self.settings,
            engine,
            self.tokenizer,
            loaders.data,
            verdict_of=objective.verdict_of,
            report=objective.report,
        )
        train_epochs(engine, loaders, self.settings, objective, checkpoints, exports)
        for plan in self.plans:
            plan.finish()
