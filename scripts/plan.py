"""What a run will take of memory, time and money, from its flags, before anything is downloaded or loaded.

    python scripts/plan.py STEP FLAGS...                       on this machine
    python scripts/plan.py STEP FLAGS... --gpus 8 --gpu_memory 80GB
    python scripts/plan.py STEP FLAGS... --gpus 1 --fit 24GB   the cheapest command line that fits
    torchrun --nproc_per_node 2 scripts/plan.py STEP FLAGS...  with what 2 ranks send each other

STEP is sft, reward, dpo or ppo (also: rlhf), and FLAGS are those of the step. Of a model only its config.json
is read. Where the devices are of this machine's kind, their speed is measured in some seconds and remembered,
so that the plan tells seconds too, and later runs tell them when they start. The exit status is 1 where the
run does not fit.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import PROGRAMS, ReadableParser, RlhfArguments, TrainingStep, parse_arguments
from dschat.errors import UserError
from dschat.program import readable_errors

if TYPE_CHECKING:  # torch takes seconds to import, and --help is to answer at once
    from dschat.planning.hardware import Hardware
    from dschat.planning.models import Spec
    from dschat.planning.plan import Plan
    from dschat.planning.slices import Slices
    from dschat.runs.measured_choices import MeasuredChoices

STEPS = ("sft", "reward", "dpo", "rlhf")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this program, and the words for the step, whose parser knows whether it has them."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "ppo"), help="The step to plan.")
    parser.add_argument(
        "--gpus", type=int, help="GPUs of all hosts; without it the plan is for this machine."
    )
    parser.add_argument("--gpus_per_host", type=int, default=8, help="Most GPUs of one host.")
    parser.add_argument("--gpu_memory", default="80GB", help="Memory of one GPU, such as 80GB or 24GiB.")
    parser.add_argument("--host_memory", help="Memory of one host, such as 512GB; without it any will do.")
    parser.add_argument("--fit", help="Find the cheapest flags with which a GPU of this memory is enough.")
    parser.add_argument("--allow_lora", action="store_true", help="Let --fit train adapters alone.")
    parser.add_argument("--steps", type=int, help="Optimiser steps (step 3: PPO steps) of the run.")
    parser.add_argument("--price_per_hour", type=float, default=0.0, help="Price of one device per hour.")
    own, rest = parser.own_words(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    args.step = "rlhf" if args.step == "ppo" else args.step
    for name in ("gpus", "gpus_per_host", "steps"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} must be at least 1, got {number}.")
    if not 0 <= args.price_per_hour < math.inf:
        raise UserError(f"--price_per_hour must be a number of at least 0, got {args.price_per_hour:g}.")
    if args.gpus is not None and args.gpus > args.gpus_per_host and args.gpus % args.gpus_per_host:
        raise UserError(
            f"--gpus {args.gpus} are no whole hosts of --gpus_per_host {args.gpus_per_host}: hosts are alike."
        )
    return args, rest


def bytes_named(flag: str, text: str) -> float:
    """The bytes that a flag names."""
    from dschat.planning.hardware import bytes_of

    try:
        return bytes_of(text)
    except UserError as error:
        raise UserError(f"--{flag} {error}") from None


def memory_of_gpu(flag: str, text: str) -> float:
    """The bytes that a flag names. Raises `UserError` where tensors would have none of them."""
    from dschat.planning.hardware import CUDA_CONTEXT

    found = bytes_named(flag, text)
    if found <= CUDA_CONTEXT:
        raise UserError(
            f"--{flag} {text} is {found:,.0f} bytes, of which a GPU's libraries take {CUDA_CONTEXT:,.0f}; "
            "write it as in 24GB or 24GiB."
        )
    return found


def hardware_of(args: argparse.Namespace) -> "Hardware":
    """The devices that the plan is for."""
    from dschat.planning.hardware import Hardware, this_hardware

    if args.gpus is None and args.fit is None:
        return this_hardware()
    gpus = args.gpus or 1
    return Hardware(
        device="cuda",
        ranks=gpus,
        ranks_per_host=min(gpus, args.gpus_per_host),
        device_memory=memory_of_gpu("gpu_memory" if args.fit is None else "fit", args.fit or args.gpu_memory),
        host_memory=bytes_named("host_memory", args.host_memory) if args.host_memory else 0.0,
    )


def check_sharing(step: TrainingStep, ranks: int) -> None:
    """Raise `UserError` where a run would refuse to share its models among so many ranks."""
    from dschat.distributed.mesh import check_parallel_sizes
    from dschat.models.preflight import meta_model
    from dschat.models.sequence_trial import check_sequence_parallel
    from dschat.models.stage import check_stages
    from dschat.models.tensor_parallel import check_tensor_parallel

    sizes = step.parallel_sizes
    check_parallel_sizes(sizes, ranks)
    for spec in specs_of(step):
        check_tensor_parallel(spec.path, spec.settings)
        check_sequence_parallel(spec.path, sizes.get("sequence", 1))
        if (stages := sizes.get("pipeline", 1)) > 1:
            model = meta_model(spec.path, is_reward_model=spec.head == "score")
            check_stages(model, stages, lambda _: [])  # which tokens are new, the tokenizer says in the run


def specs_of(step: Any) -> "Sequence[Spec]":
    """The models of a step."""
    from dschat.planning.models import supervised_specs
    from dschat.rlhf.roles import engine_specs

    return engine_specs(step) if isinstance(step, RlhfArguments) else supervised_specs(step)


def slices_for(step: TrainingStep, hardware: "Hardware", choices: "MeasuredChoices") -> "Slices | None":
    """What times few layers on this machine's device, computed in the ways that a run would choose.

    None where the plan is for devices of another kind.
    """
    from dschat.distributed.device import device_type
    from dschat.distributed.mesh import mesh, set_parallel_sizes
    from dschat.distributed.process_group import init_process_group
    from dschat.models.attention import choose_attention
    from dschat.models.products import choose_products
    from dschat.planning.slices import Slices
    from dschat.rlhf.rollout.slice_decoding import decode

    if device_type() != hardware.device:
        return None
    if mesh().world.size > 1:  # slices are whole on each of the ranks that share a model in the run
        set_parallel_sizes(tensor=math.prod(step.parallel_sizes.values()))
    init_process_group()
    models = [(spec.path, spec.settings) for spec in specs_of(step)]
    choose_attention(models, dtype=step.run.dtype, longest=step.pass_sizes.length, choices=choices)
    choose_products(step.run.dtype, choices)
    return Slices(step.optimizer, step.run, decode, gathers=step.pass_sizes.gather != "never")


def command(step: TrainingStep, words: Sequence[str], flags: dict[str, Any], gpus: int, per_host: int) -> str:
    """The command line with these flags in place of what was given."""
    kept, skips = [], False
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--"):
            skips = name in flags
        if not skips:
            kept.append(word)
    for name, value in flags.items():
        if value is True:
            kept.append(f"--{name}")
        elif value is not False:
            kept += [f"--{name}", str(value)]
    hosts = -(-gpus // per_host)
    launcher = f"torchrun --nproc_per_node {min(gpus, per_host)}" if gpus > 1 else "python"
    launcher += f" --nnodes {hosts} --rdzv_backend c10d --rdzv_endpoint FIRST_HOST:29500" if hosts > 1 else ""
    return f"{launcher} {PROGRAMS[step.step]} {shlex.join(kept)}"


def plan_lines(plan: "Plan", price_per_hour: float) -> list[str]:
    """The plan, and where a price was given without what it is multiplied with, what is missing."""
    found = plan.lines(price_per_hour=price_per_hour)
    if price_per_hour and plan.seconds is None:
        found.append(
            "plan: no cost, as the time of a step is not known: it is measured on a device of that kind"
        )
    elif price_per_hour and plan.steps is None:
        found.append("plan: no cost, as the number of steps is not known: give --steps")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print."""
    own, words = parse(argv)
    step: Any = parse_arguments(own.step, words)
    from dschat.distributed.mesh import is_main_process
    from dschat.planning.plan import plan_of
    from dschat.planning.savings import fitting, would_cut_most
    from dschat.runs.measured_choices import MeasuredChoices

    hardware = hardware_of(own)
    check_sharing(step, hardware.ranks)

    def planned(step: TrainingStep, **options: Any) -> "Plan":
        return plan_of(step, specs_of(step), hardware, steps=own.steps, **options)

    choices = MeasuredChoices()
    slices = slices_for(step, hardware, choices)
    timed = {"choices": choices, "slices": slices} if slices else {}
    plan = planned(step, **timed)
    saving = [] if own.fit is not None else would_cut_most(step, plan, planned, choices)
    if not is_main_process():
        return int(plan.fits is False)
    if own.fit is not None:
        prefixes = ("actor_", "critic_") if own.step == "rlhf" else ("",)
        found = fitting(step, prefixes, planned, with_lora=own.allow_lora)
        if found is None:
            hint = "" if own.allow_lora else " --allow_lora would let it train adapters."
            print(f"no flags make it fit {own.fit} on {hardware.ranks} GPU(s).{hint}")
            return 1
        flags, plan = found
        print(command(step, words, flags, hardware.ranks, hardware.ranks_per_host))
        print(*plan_lines(plan, own.price_per_hour), sep="\n")
        return 0
    print(*plan_lines(plan, own.price_per_hour), *saving, sep="\n")
    if plan.fits is False:
        print("plan: does not fit")
    return int(plan.fits is False)


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
