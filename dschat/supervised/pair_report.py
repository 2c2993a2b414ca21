"""The report on a reward model by the pairs that it was evaluated on: `reward_report.html` and `.json`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.console import messages
from dschat.data.loaders import EvalLoader
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.distributed.collectives import gather_rows
from dschat.engines.pipeline import of_last_stage
from dschat.reports.page import write_page
from dschat.reports.reward_model import ScoredPairs, beyond_accuracy, mistakes, report_page, reward_report
from dschat.reports.statistics import Z

REPORT = "reward_report"


class PairReport:
    """Keeps the scores of the last evaluation for the report. Every rank must make the same calls."""

    def __init__(self, data: SplitData, tokenizer: PreTrainedTokenizerBase, title: str) -> None:
        self._data, self._tokenizer, self._title = data, tokenizer, title
        self._batches: list[Tensor] = []
        self._table: list[list[float]] = []  # row, score of the chosen and of the rejected answer
        self.has_scores = False
        """Whether an evaluation has been seen, also by the last stage of a pipeline alone."""

    def begin(self) -> None:
        """Forget the evaluation before."""
        self._batches, self._table, self.has_scores = [], [], True

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take in the scores [B] of a batch, fillers among them."""
        self._batches.append(torch.stack([chosen, rejected], dim=1).double())

    def end(self, loader: EvalLoader) -> None:
        """Gather the scores of all ranks, with the rows of the batches that the loader has given."""
        scores, size = torch.cat(self._batches), loader.batch_size * loader.world_size
        order = np.full(len(loader) * size, -1)
        order[: len(loader.order)] = loader.order  # -1 for fillers; neighbours go to different ranks
        mine = order.reshape(-1, loader.world_size)[:, loader.rank]
        rows = torch.from_numpy(mine).to(scores)
        table = gather_rows(torch.cat([rows[:, None], scores], dim=1), axis="data")
        self._table = table[table[:, 0] >= 0].tolist()

    def figures(self) -> dict[str, float]:
        """What the verdict takes beside the accuracy, of the pairs that `end` has gathered."""
        names = self._data.sources or ("held-out pairs",)
        _, gain, overconfidence = beyond_accuracy(scored(np.array(self._table), self._data.evaluation, names))
        found = {"eval_gain_over_length": gain, "eval_overconfidence": overconfidence}
        return {
            name + end: number
            for name, estimate in found.items()
            for end, number in (("", estimate.value), ("_stderr", (estimate.high - estimate.value) / Z))
        }

    def writer(self) -> Callable[[Path], None] | None:
        """What writes the report into a model's folder on rank 0; None without scores."""
        table = np.array(of_last_stage(self._table))
        if not len(table):
            return None

        def write(folder: Path) -> None:
            names = self._data.sources or ("held-out pairs",)
            try:
                write_report(folder, self._title, table, self._data.evaluation, names, self._tokenizer)
            except Exception as error:  # no report is worth the model that is being exported
                messages.warning(f"the report on the reward model could not be made: {error!r}.")

        return write


def scored(table: np.ndarray, rows: Rows, source_names: tuple[str, ...]) -> ScoredPairs:
    """Pairs of `rows`, as `tokenize_pairs` makes them, in their order.

    `table` [N, 3]: a pair's row and the scores of its chosen and of its rejected answer.
    """
    table = table[np.argsort(table[:, 0])]  # one order on any number of ranks
    taken = Rows(rows[table[:, 0].astype(int)])
    prompt = taken.column("prompt_length")
    lengths = {name: taken.lengths(f"{name}_ids") - prompt for name in ("chosen", "rejected")}
    return ScoredPairs(
        chosen=table[:, 1],
        rejected=table[:, 2],
        chosen_lengths=lengths["chosen"],
        rejected_lengths=lengths["rejected"],
        prompts=taken.column("group").astype(np.int64),
        sources=taken.column("source"),
        source_names=source_names,
        margins=taken.column("margin"),
    )


def write_report(
    folder: Path,
    title: str,
    table: np.ndarray,
    rows: Rows,
    source_names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the report on the pairs of a `table` that `scored` takes."""
    pairs, numbers = scored(table, rows, source_names), np.sort(table[:, 0]).astype(int)
    report = reward_report(pairs)
    places = mistakes(pairs)
    mistaken = zip(rows[numbers[places]].to_pylist(), places.tolist(), strict=True)
    wrong = [_texts(row, pairs, place, tokenizer) for row, place in mistaken]
    lead = f"{len(pairs.chosen)} held-out pairs of {', '.join(source_names)}"
    write_page(folder / f"{REPORT}.html", report_page(title, lead, pairs, report, wrong))
    content = json.dumps({**report, "data": list(source_names), "mistakes": wrong}, indent=1)
    (folder / f"{REPORT}.json").write_text(content + "\n", encoding="utf-8")


def announce_report(folder: Path) -> None:
    """Say what the report in the folder comes to, where there is one (rank 0)."""
    path = folder / f"{REPORT}.json"
    if path.is_file():
        verdict = json.loads(path.read_text(encoding="utf-8"))["verdict"]
        messages.info(f"report on the reward model: {verdict} ({path.with_suffix('.html')})")


def _texts(
    row: dict[str, Any], pairs: ScoredPairs, place: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A pair as text, with its scores."""
    start = row["prompt_length"]
    found: dict[str, Any] = {"prompt": tokenizer.decode(row["chosen_ids"][:start])}
    for name, scores, lengths in (
        ("chosen", pairs.chosen, pairs.chosen_lengths),
        ("rejected", pairs.rejected, pairs.rejected_lengths),
    ):
        found[name] = tokenizer.decode(row[f"{name}_ids"][start:])
        found[f"{name}_score"], found[f"{name}_length"] = float(scores[place]), int(lengths[place])
    return found
