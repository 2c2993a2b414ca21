"""Every flag, declared once: small groups of settings, composed into one frozen object for each step.

A group checks itself, a step's object checks across its groups, and `parse_arguments` turns the command line
into that object. Importing this package does not import torch, so `--help` answers at once. The rest of the
library imports from here alone.
"""

from dschat.arguments.colossalchat import TrainRmCall
from dschat.arguments.command_line import ReadableParser, as_typed, complete
from dschat.arguments.data import DataArguments, TokenizerArguments
from dschat.arguments.foreign import explain_foreign_flag
from dschat.arguments.foreign_flags import FOREIGN
from dschat.arguments.guard import GuardArguments
from dschat.arguments.hybrid import HybridArguments
from dschat.arguments.model import ModelArguments, OptimizerArguments
from dschat.arguments.parsing import PROGRAMS, flags_of, parse_arguments
from dschat.arguments.pass_sizes import PassSizes
from dschat.arguments.ppo import PpoArguments, TextArguments
from dschat.arguments.record import STARTING, RunDescription, Setting, default_of, saved_settings, settings_of
from dschat.arguments.rewards import REWARD_MODEL, RewardSourceArguments
from dschat.arguments.rollout import ROLLOUT_TOLERANCES, RolloutArguments
from dschat.arguments.run import RunArguments
from dschat.arguments.secrets import without_secrets
from dschat.arguments.steps import (
    STEPS,
    DpoArguments,
    InspectArguments,
    RewardArguments,
    RlhfArguments,
    SftArguments,
    StepArguments,
    SupervisedArguments,
    TrainingStep,
)
from dschat.arguments.supervised import BatchArguments, DpoOptions, RewardOptions
from dschat.arguments.widths import WidthArguments

__all__ = [
    "FOREIGN",
    "PROGRAMS",
    "REWARD_MODEL",
    "ROLLOUT_TOLERANCES",
    "STARTING",
    "STEPS",
    "BatchArguments",
    "DataArguments",
    "DpoArguments",
    "DpoOptions",
    "GuardArguments",
    "HybridArguments",
    "InspectArguments",
    "ModelArguments",
    "OptimizerArguments",
    "PassSizes",
    "PpoArguments",
    "ReadableParser",
    "RewardArguments",
    "RewardOptions",
    "RewardSourceArguments",
    "RlhfArguments",
    "RolloutArguments",
    "RunArguments",
    "RunDescription",
    "Setting",
    "SftArguments",
    "StepArguments",
    "SupervisedArguments",
    "TextArguments",
    "TokenizerArguments",
    "TrainRmCall",
    "TrainingStep",
    "WidthArguments",
    "as_typed",
    "complete",
    "default_of",
    "explain_foreign_flag",
    "flags_of",
    "parse_arguments",
    "saved_settings",
    "settings_of",
    "without_secrets",
]
