"""The settings of steps 1 and 2 and of DPO, which share their loop."""

from dataclasses import dataclass

from dschat.arguments import (
    BatchArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    RunDescription,
    SupervisedArguments,
    TokenizerArguments,
    WidthArguments,
)


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings:
    """The groups of flags that steps 1 and 2 and DPO have in common."""

    description: RunDescription
    tokenizer: TokenizerArguments
    model: ModelArguments
    batch: BatchArguments
    widths: WidthArguments
    optimizer: OptimizerArguments

    @staticmethod
    def of(args: SupervisedArguments) -> "SupervisedSettings":
        """The settings of a step by its arguments."""
        return SupervisedSettings(
            description=args.description,
            tokenizer=args.tokenizer,
            model=args.model,
            batch=args.batch,
            widths=args.widths,
            optimizer=args.optimizer,
        )

    @property
    def run(self) -> RunArguments:
        """The flags of every program: seed, precision, output folder ..."""
        return self.description.run
