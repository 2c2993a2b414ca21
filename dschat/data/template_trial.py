"""Choice of a tokenizer's one chat template, which is tried before anything depends on it."""

import contextlib
import multiprocessing
import resource
import sys
from pathlib import Path

import psutil
from transformers import PreTrainedTokenizerBase

from dschat.data.files import user_path
from dschat.data.rendering import own_template
from dschat.data.templates import NAMED, PLAIN, ChatTemplate
from dschat.errors import UserError

TRIAL_SECONDS = 10
"""Of processor time, so that a busy machine refuses nothing. A usual template takes milliseconds."""
TRIAL_MEMORY = 1 << 30
"""In bytes; a usual template takes kilobytes."""
TRIED = set(NAMED.values())
"""Templates that are known to end."""


def configure_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer its one template: a named one, a file's, or for None its own, else the plain one.

    Raises `UserError` for a file that cannot be read and a template that cannot serve.
    """
    if choice is None:
        tokenizer.chat_template = own_template(tokenizer) or PLAIN
    elif choice in NAMED:
        tokenizer.chat_template = NAMED[choice]
    else:
        tokenizer.chat_template = _read_template(user_path(choice))
    if tokenizer.chat_template not in TRIED:
        _try_apart(tokenizer)
        TRIED.add(tokenizer.chat_template)
    ChatTemplate(tokenizer)


def _try_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a template that runs for ever, or takes all memory, or ends the process.

    transformers' sandbox bounds what a template may touch, not what it costs, and a template may come from
    the hub. So a process of its own, which shares this one's memory, tries it first.
    """
    trial = multiprocessing.get_context("fork").Process(target=_trial, args=(tokenizer,), daemon=True)
    trial.start()
    trial.join()
    if trial.exitcode != 0:
        raise UserError(
            f"the chat template needs more than {TRIAL_SECONDS} seconds or {TRIAL_MEMORY >> 20} MiB for a "
            "question of some words and its answer; give another with --chat_template."
        )


def _trial(tokenizer: PreTrainedTokenizerBase) -> None:
    limit, hard = psutil.Process().memory_info().vms + TRIAL_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
    with contextlib.suppress(UserError):  # which is raised again where people see it
        try:
            ChatTemplate(tokenizer)
        except MemoryError:
            sys.exit(1)


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "its text is not UTF-8"
        raise UserError(
            f"--chat_template {path} cannot be read ({reason}); give a file with a Jinja template, "
            f"or one of {', '.join(NAMED)}."
        ) from error
    if not template.strip():
        raise UserError(f"--chat_template {path} is empty; give a file with a Jinja template.")
    return template
