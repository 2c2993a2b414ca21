"""Flags: what DeepSpeed's engines are given at every step beyond ZeRO stage and precision."""

from dataclasses import dataclass
from typing import Any

from dschat.arguments.deepspeed_override import read_override
from dschat.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """Settings of all DeepSpeed engines of a run."""

    deepspeed_config_override: dict[str, Any] | None = flag(
        None,
        "JSON file with settings of DeepSpeed, merged last into the configuration of every engine; what a "
        "flag decides is refused. arguments.json records the content.",
        type=read_override,
        metavar="FILE",
    )
