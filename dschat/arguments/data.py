"""Flags: which rows are read, how they are shared between the steps, and the tokenizer that reads them."""

import re
from dataclasses import dataclass
from typing import Literal

from dschat.arguments.flags import flag, require, require_at_least


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Where the data comes from and how it is shared between the steps."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "Data sets to blend: hub ids, local .json, .jsonl, .csv, .tsv or .parquet files (all but the last "
        "also packed), patterns of files, pipes, or folders. NAME:split=train_sft, or "
        "NAME:config=main,split=a+b,revision=v1, says which part is meant; :0.3 at the end is a weight: "
        "training prompts (not rows) then stand in proportion to the weights (1 without).",
        at_resume="free",
    )
    eval_data_path: list[str] = flag(
        [],
        "Data sets for evaluation; without them what --data_path publishes for it or --eval_fraction.",
        at_resume="free",
    )
    data_format: str | None = flag(
        None, "How rows are read: a layout or a known data set of docs/data.md; default: by their columns."
    )
    prompt_key: str | None = flag(None, "Column of the prompt, where it is not called prompt.")
    chosen_key: str | None = flag(None, "Column of the better answer, where it is not called chosen.")
    rejected_key: str | None = flag(None, "Column of the worse answer, where it is not called rejected.")
    messages_key: str | None = flag(None, "Column of the conversation, where it is not called messages.")
    on_bad_row: Literal["stop", "drop"] = flag(
        "stop",
        "At a row that cannot be read, end the run with its place; or leave out all such rows and count them "
        "by reason. The same in every step.",
    )
    data_split: str = flag(
        "2,4,4", "Shares of the training prompts for steps 1, 2 and 3; no prompt is in two of them."
    )
    data_output_path: str | None = flag(
        None,
        "Folder of the tokenised data; default: dschat below the user's cache folder, private to the user.",
        at_resume="free",
    )
    eval_fraction: float = flag(
        0.05, "Share of the prompts held out for evaluation, in every step the same, where a source has none."
    )
    unique_prompts: bool = flag(
        False,
        "Steps 1 and 3 take a prompt of several rows once, with the first row's answer; default: step 1 "
        "learns every different answer and step 3 meets the prompt as often as the data has it.",
    )
    max_train_samples: int | None = flag(
        None, "Train on this many rows of the step's share, chosen at random by --seed; default: all."
    )
    preprocessing_num_workers: int | None = flag(
        None, "Processes that tokenise; default: one a CPU core.", at_resume="free"
    )

    @property
    def shares(self) -> tuple[float, float, float]:
        """The numbers of `--data_split`: the shares of steps 1, 2 and 3."""
        first, second, third = (float(part) for part in self.data_split.split(","))
        return first, second, third

    def __post_init__(self) -> None:
        number = r"\s*\d+(\.\d*)?\s*"
        require(
            re.fullmatch(f"{number},{number},{number}", self.data_split) is not None
            and 0 < sum(self.shares) < float("inf"),
            f"--data_split needs three shares such as 2,4,4 (for steps 1, 2 and 3), got {self.data_split!r}.",
        )
        require(
            0 <= self.eval_fraction < 1,
            f"--eval_fraction must lie in [0, 1), got {self.eval_fraction}; 0.05 holds out every twentieth.",
        )
        for name in ("max_train_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} must be positive, got {value}.")


@dataclass(frozen=True, kw_only=True)
class TokenizerArguments:
    """Changes to the tokenizer that comes with the model."""

    add_eot_token: bool = flag(False, "Add --eot_token to the vocabulary and end every answer with it.")
    eot_token: str = flag("<|endoftext|>", "The end token that --add_eot_token adds.")
    chat_template: str | None = flag(
        None,
        "Jinja file of the chat template; or plain (Human: / Assistant:), or none (text as it is). Default: "
        "the tokenizer's own, else plain. It is saved with the model: give it in step 1 and then no more.",
    )


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What scripts/inspect_data.py shows."""

    model_name_or_path: str = flag(help="Folder or hub id of the model whose tokenizer reads the data.")
    max_seq_len: int = flag(512, "Longest prompt and answer together, in tokens, as in steps 1 and 2.")
    num_rows: int = flag(3, "Rows shown of each data set.")
    num_sampled: int = flag(10_000, "Rows of each data set whose tokens are counted; all are read.")
    html: str = flag("inspect_data.html", "The page to write; empty: none.")
    seed: int = flag(1234, "Decides which rows are shown and counted.")
    debug: bool = flag(False, "Show the traceback of an error in the input.", at_resume="free")

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_rows", "num_sampled")
        require(self.max_seq_len >= 4, f"--max_seq_len must be at least 4 tokens, got {self.max_seq_len}.")
