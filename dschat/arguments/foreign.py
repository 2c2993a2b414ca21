"""What to write in place of a flag of another program."""

import re
from collections.abc import Collection

from dschat.arguments.foreign_flags import FAMILIES, FOREIGN

SIDES = ("actor", "critic")
"""The prefixes of step 3's flags for each model."""


def explain_foreign_flag(name: str, known: Collection[str], sides: Collection[str] = SIDES) -> str | None:
    """The explanation of another program's flag `name` for a step with the flags `known`, or None.

    It begins with "here: " where the step has the setting, and with "not there" where no step has it. The
    setting of a model is named for each of `sides` where the step has more than one model. All names are
    without hyphens before them.
    """
    family = next((texts for prefix, texts in FAMILIES.items() if name.startswith(prefix)), ())
    for text in (*FOREIGN.get(name, family), f"--{name}"):
        explanation = _for_step(text, known, sides)
        if explanation:
            return explanation if explanation.startswith("not there") else f"here: {explanation}"
    side, _, rest = name.partition("_")
    return explain_foreign_flag(rest, known, [side]) if side in SIDES else None


def _for_step(text: str, known: Collection[str], sides: Collection[str]) -> str | None:
    """`text` with its flags spelt as the step spells them; None where the step lacks one of them."""
    for name in dict.fromkeys(re.findall(r"--(\w+)", text)):
        of_models = [f"--{side}_{name}" for side in sides if f"{side}_{name}" in known]
        if name not in known and not of_models:
            return None
        if name not in known:
            text = re.sub(rf"--{name}\b", " and ".join(of_models), text)
    return text
