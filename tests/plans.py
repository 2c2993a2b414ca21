"""Plans of tiny models, for tests."""

from typing import Any

from tiny import tiny_config

from dschat.arguments import parse_arguments
from dschat.planning.engine_memory import Moment
from dschat.planning.hardware import Hardware
from dschat.planning.models import supervised_specs
from dschat.planning.plan import Plan, plan_of
from dschat.rlhf.roles import engine_specs

CONFIGS = {"m": tiny_config("llama", 384), "r": tiny_config("opt", 384)}
MODELS = {
    "sft": ("--model_name_or_path=m",),
    "reward": ("--model_name_or_path=m",),
    "dpo": ("--model_name_or_path=m",),
    "rlhf": ("--actor_model_name_or_path=m", "--critic_model_name_or_path=r"),
}


class Remembered:
    """A machine that remembers the same seconds of every model, on so many ranks of data."""

    def __init__(self, seconds: dict[str, float] | None, ranks: int = 1) -> None:
        self._seconds, self._ranks = seconds, ranks

    def kept_numbers(self, name: str, measure: Any, *, key: Any) -> dict[str, float] | None:
        """Those seconds."""
        return self._seconds and dict(self._seconds) if key["ranks"] == self._ranks else None


def arguments(step: str, *flags: str) -> Any:
    """The arguments of a step with tiny models in fp32."""
    return parse_arguments(step, [*MODELS[step], "--data_path=d", "--dtype=fp32", *flags])


def specs_of(args: Any) -> Any:
    """The models of the step."""
    if args.step == "rlhf":
        return engine_specs(args)
    return supervised_specs(args)


def planned(args: Any, *, device: str = "cuda", ranks: int = 1, memory: float = 0.0, **options: Any) -> Plan:
    """The plan of the arguments on so many devices."""
    hardware = Hardware(device=device, ranks=ranks, ranks_per_host=ranks, device_memory=memory)
    return plan_of(args, specs_of(args), hardware, configs=CONFIGS, **options)


def size(moment: Moment, kind: str, model: str = "") -> float:
    """Bytes of one kind in a moment, of models whose name has that in it."""
    return sum(p.bytes for p in moment if p.kind == kind and model in p.model)
