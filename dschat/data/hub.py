"""The hub: data sets that `datasets` fetches, or finds in its cache."""

import functools
import re
from typing import TYPE_CHECKING

from dschat.console import messages
from dschat.data.entries import Entry
from dschat.data.files import KNOWN_FILES
from dschat.errors import UserError

if TYPE_CHECKING:
    import datasets

CONFIGURATIONS = re.compile(r"available(?: configs)?(?: in the cache)?: \[([^\]]*)\]", re.IGNORECASE)
"""How `datasets` lists the configurations where none, or a wrong one, is named."""


@functools.cache
def reach_hub() -> None:
    """Go on offline where the hub cannot be connected to.

    Otherwise huggingface_hub tries to connect six times, in 23 s, for each file of a model.
    """
    import httpx2
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        constants.HF_HUB_OFFLINE = True
        messages.warning(
            f"{constants.ENDPOINT} cannot be reached ({error}): of models and data sets only folders, files "
            "and what was downloaded before can be used. dschat doctor says what may help."
        )


def load_from_hub(entry: Entry, options: dict[str, str]) -> "datasets.Dataset | datasets.DatasetDict":
    """Load a data set of the hub with `options` and with the entry's configuration and revision, if any.

    Raises `UserError` for what the hub does not have, and for a choice among configurations.
    """
    reach_hub()
    import datasets

    options = dict(options)
    if entry.config is not None:
        options["data_dir" if "data_dir" in options else "name"] = entry.config
    if entry.revision is not None:
        options["revision"] = entry.revision
    try:
        return datasets.load_dataset(**options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        listed = CONFIGURATIONS.search(str(error))
        if listed is not None:
            names = [name.strip(" '\"") for name in listed[1].split(",")]
            problem = "it has several configurations" if entry.config is None else "it has no such one"
            raise UserError(
                f"{entry}: {problem} (found: {', '.join(names)}). Write {entry.choices('config', names)}."
            ) from error
        raise UserError(
            f"{entry}: there is no such file or folder here, and the hub gives no such data set "
            f"({type(error).__name__}: {error}). Correct the name, go online, or give a file ({KNOWN_FILES})."
        ) from error
