"""What a run settles about its process before it reads anything."""

import os

import torch

from dschat.arguments import StepArguments
from dschat.distributed import check_precision
from dschat.models.remote_code import set_consent
from dschat.out_of_memory import remember
from dschat.rendezvous import settle_environment


def prepare(arguments: StepArguments) -> None:
    """Ranks, precision, foreign code, determinism. Raises `UserError` for what this machine cannot run."""
    run = arguments.run
    settle_environment(run.local_rank)
    remember(arguments)
    check_precision(run.dtype, run.offload)
    set_consent(run.trust_remote_code)
    if run.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
