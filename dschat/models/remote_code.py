"""Whether Python code that comes with a model may run: only where --trust_remote_code says so."""

from dataclasses import dataclass

from dschat.console import messages
from dschat.distributed.process_wide import process_wide


@dataclass
class Consent:
    """Whether the user trusts code that comes with models: one answer for all loaders of a process."""

    given: bool = False


def set_consent(given: bool) -> None:
    """Allow or forbid such code in this process from now on, in every place that loads something."""
    consent = process_wide(Consent)
    if given and not consent.given:
        messages.note(
            "--trust_remote_code: Python code in the folders and repositories of the models runs with "
            "your rights."
        )
    consent.given = given


def loading_consent() -> dict[str, bool]:
    """What transformers' loaders take. Always given: without it they would ask on the terminal."""
    return {"trust_remote_code": process_wide(Consent).given}


def remedy(error: Exception) -> str:
    """What a loader's refusal of foreign code calls for, "" where `error` is another."""
    if "trust_remote_code" not in str(error):
        return ""
    return "it needs Python code of its own; read that code, and add --trust_remote_code where you trust it"
