"""The last lines of a step: what it achieved, where that is, and the next command, ready to copy."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from dschat.arguments import PROGRAMS, ReadableParser, RunDescription
from dschat.console import messages
from dschat.runs.output_folder import read_summary

UNASKED = "DSCHAT_NEXT_UNASKED"
"""Set by programs that start the steps in a row: then no next command is printed."""
COMMANDS = {"sft": "sft", "reward": "reward", "dpo": "dpo", "rlhf": "ppo"}
"""What follows `dschat` for a step; a tool's name is its file's in scripts/."""
OF_DATA = (
    *("data_path", "eval_data_path", "data_format", "prompt_key", "chosen_key", "rejected_key"),
    *("messages_key", "on_bad_row", "data_split", "eval_fraction", "max_train_samples", "data_output_path"),
)
OF_RUN = ("dtype", "seed", "offload", "only_optimize_lora", "trust_remote_code")
OF_MODEL = ("zero_stage", "gradient_checkpointing", "lora_dim", "lora_module_name", "load_in_4bit")
OF_BATCH = ("max_seq_len", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Flags that the next step gets as this one had them."""
COLUMNS = frozenset(("data_format", "prompt_key", "chosen_key", "rejected_key", "messages_key"))
"""Flags about data that scripts/compare.py does not have."""


def print_last_lines(description: RunDescription) -> None:
    """Say how a finished step ended. Rank 0 prints it."""
    folder = description.run.output_dir
    if not folder:
        messages.info("done. Nothing is kept, as there is no --output_dir.")
        return
    summary = read_summary(folder)
    if summary is None:
        return
    model = Path(folder, "actor") if description.step == "rlhf" else Path(folder)
    messages.info(f"done: {achieved(description.step, summary)}")
    messages.info(f"the model is in {model}; its README.md says how it was made and how to load it")
    print_next(description)


def print_next(description: RunDescription) -> None:
    """Print what may come after a step, unless another program starts that."""
    if UNASKED not in os.environ:
        for purpose, command in next_commands(description):
            messages.info(f"{purpose}:\n    {command}")


def achieved(step: str, summary: Mapping[str, Any]) -> str:
    """The figures of a finished step in one phrase."""

    def number(name: str, digits: int = 3) -> str:
        value = summary.get(name)
        return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"

    if step == "sft":
        before, after = number("initial_eval_perplexity"), number("eval_perplexity")
        return f"perplexity {before} -> {after} on held-out answers"
    if step in ("reward", "dpo"):
        words = str(summary.get("verdict", "")).partition(":")[0]
        accuracy = f"accuracy {number('eval_accuracy')} ± {number('eval_accuracy_stderr')} on held-out pairs"
        return f"{accuracy}: {words}" if words else accuracy
    if "verdict" in summary:
        before = f"score {number('initial_eval_score')} on held-out prompts before PPO; "
        return f"{before}actor/ (PPO step {summary.get('actor_step', '-')}) is {summary['verdict']}"
    return f"last of {summary.get('ppo_steps', '-')} PPO steps: score {number('score')}, KL {number('kl')}"


def next_commands(description: RunDescription) -> Iterator[tuple[str, str]]:
    """What may come after a step, and the command line for it."""
    flags = {name: setting.value for name, setting in description.settings.items()}
    given = description.changed_flags()
    folder = Path(description.run.output_dir or "")
    same = {name: given[name] for name in (*OF_DATA, *OF_RUN) if name in given}
    if description.step == "sft":
        model = {"model_name_or_path": folder, **same}
        model |= {name: given[name] for name in (*OF_MODEL, *OF_BATCH) if name in given}
        yield "next, a reward model", _line("reward", model | {"output_dir": _sibling(folder, "reward")})
        yield (
            "or DPO, without reward model and PPO",
            _line("dpo", model | {"output_dir": _sibling(folder, "dpo")}),
        )
    elif description.step == "reward":
        models = {"actor_model_name_or_path": _actor(folder, flags["model_name_or_path"])}
        models |= {"critic_model_name_or_path": folder}
        same |= {
            f"{role}_{name}": given[name]
            for role in ("actor", "critic")
            for name in OF_MODEL
            if name in given
        }
        if "max_seq_len" in given:
            same |= dict.fromkeys(("max_prompt_seq_len", "max_answer_seq_len"), given["max_seq_len"] // 2)
        yield "next, PPO", _line("rlhf", models | same | {"output_dir": _sibling(folder, "ppo")})
    else:
        is_ppo = description.step == "rlhf"
        name = "actor_model_name_or_path" if is_ppo else "model_name_or_path"
        made = folder / "actor" if is_ppo else folder
        asked = [f"before={flags[name]}", f"after={made}"]
        data = [*flags["eval_data_path"], *flags["data_path"]][0]
        is_read = COLUMNS.isdisjoint(given)
        questions = {"data-path": data} if is_read else {"prompt": "What is the capital of France?"}
        yield (
            "next, its answers beside those of the model it was",
            _line("compare", {"model": asked, **questions}),
        )
        scores = flags.get("reward_model_name_or_path") or flags.get("critic_model_name_or_path")
        yield "or talk to it", _line("chat", {"reward_model": scores} if scores else {}, str(made))


def _line(program: str, flags: Mapping[str, Any], *first: str) -> str:
    """A command line that a shell takes as it is."""
    words = [*_start(program), *first]
    for name, value in flags.items():
        if name == "model":  # one flag for each
            words += [word for entry in value for word in ("--model", entry)]
        elif value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _start(program: str) -> list[str]:
    """How a program is started as this one was: by dschat or by its file, on as many ranks."""
    beside = Path(sys.executable).parent
    name = COMMANDS.get(program, program)

    def on_path(word: str) -> bool:
        return (found := shutil.which(word)) is not None and Path(found).parent == beside

    python = "python" if on_path("python") else _shown(Path(sys.executable))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    of_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    launcher = []
    if ranks > 1 and program in COMMANDS:
        launcher = ["torchrun"] if on_path("torchrun") else [python, "-m", "torch.distributed.run"]
        if ranks > of_host:
            endpoint = f"{os.environ['MASTER_ADDR']}:29400"
            launcher += [
                "--nnodes",
                str(ranks // of_host),
                "--rdzv_backend",
                "c10d",
                "--rdzv_endpoint",
                endpoint,
            ]
        launcher += ["--nproc_per_node", str(of_host)]
    if ReadableParser.command:
        if launcher:
            return [*launcher, "-m", "dschat", name]
        return ["dschat", name] if on_path("dschat") else [python, "-m", "dschat", name]
    file = Path(sys.argv[0]).resolve().parents[1] / PROGRAMS.get(program, f"scripts/{program}.py")
    return [*(launcher or [python]), _shown(file)]


def _shown(path: Path) -> str:
    """A path as one types it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _sibling(folder: Path, name: str) -> Path:
    """A folder beside a step's that is not there yet, named after the next step."""
    name = (
        {"reward": "step2_reward", "ppo": "step3_ppo"}.get(name, name)
        if folder.name.startswith("step")
        else name
    )
    names = (folder.parent / (f"{name}_{number}" if number > 1 else name) for number in count(1))
    return next(path for path in names if not path.exists())


def _actor(folder: Path, base: str) -> Path | str:
    """The model that PPO is to train: what the reward model was made of, or what step 1 wrote beside it."""
    if Path(base).is_dir() and (read_summary(base) or {}).get("step") in ("sft", "dpo"):
        return base
    made = [path.parent for path in folder.parent.glob("*/summary.json")]
    tuned = [path for path in made if (read_summary(path) or {}).get("step") == "sft"]
    return max(tuned, key=lambda path: path.stat().st_mtime) if tuned else base
