"""What a model will see of the data, and what is wrong with it, before any training.

    python scripts/inspect_data.py --data_path pairs.jsonl --model_name_or_path MODEL

prints, and writes as an HTML page, for each data set: some rows as text, what is learned in colour (or
between brackets where there is no colour); token lengths and what --max_seq_len does to them; repeated
prompts and rows; and what is odd about the answers: equal, empty, or better because they are longer. The
flags of data and tokenizer are those of the training steps. Rows that cannot be read are all listed on the
page. The exit status is 0 where training would read this data and 2 where it would stop.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import InspectArguments, parse_arguments
from dschat.console.text import PLAIN, printable
from dschat.errors import UserError
from dschat.program import readable_errors

if __name__ == "__main__":  # before torch is imported, so that --help and a mistyped flag answer at once
    with readable_errors():
        ARGS = parse_arguments("inspect")

import numpy as np
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dschat.data import splits
from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison, text_of, write_comparisons
from dschat.data.contradictions import count_contradictions
from dschat.data.findings import Findings
from dschat.data.reading import Format, read_rows
from dschat.data.report import listed
from dschat.data.sources import Source, open_source
from dschat.data.token_turns import tokens_of
from dschat.data.tokenization import Tokenized, column, tokenize_pairs, tokenize_prompts, tokenize_sft
from dschat.models.tokenizer import load_tokenizer
from dschat.reports.page import render, write_page

NO_LIMIT = 2**31 - 1
NUM_BARS = 12
NUM_BAD_ROWS = 5
PAGE = Path(__file__).with_suffix(".html.jinja")

Pieces = list[tuple[str, bool]]
"""Text in pieces, each with whether a model learns it."""


@dataclass
class Counts:
    """What reading every row of a data set told, without a tokenizer."""

    rows: int = 0
    findings: Findings = field(default_factory=Findings)
    bad_rows: list[str] = field(default_factory=list)
    """A message for each row that cannot be read."""
    contradictions: int = 0
    """Different pairs that stand there both ways."""
    several_turns: int = 0
    pairs: int = 0
    equal_pairs: int = 0
    chosen_longer: int = 0
    """Pairs whose better answer has more characters, or tokens where it is given as those."""
    chosen_shorter: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of some part of the rows."""

    name: str
    tokens: np.ndarray

    @property
    def summary(self) -> str:
        """Mean, median, 95th percentile and longest."""
        q50, q95 = np.percentile(self.tokens, [50, 95])
        return f"mean {self.tokens.mean():.0f}, median {q50:.0f}, 95 % {q95:.0f}, longest {self.tokens.max()}"

    @property
    def bars(self) -> list[tuple[str, int, float]]:
        """The histogram: from-to, rows, their share of the largest bar."""
        edges = np.linspace(self.tokens.min(), self.tokens.max() + 1, NUM_BARS + 1).round().astype(int)
        counts, edges = np.histogram(self.tokens, np.unique(edges))
        limits = zip(edges[:-1], edges[1:] - 1, counts, strict=True)
        return [(f"{low} - {high}", int(n), n / counts.max()) for low, high, n in limits]


@dataclass(frozen=True)
class Report:
    """All that is told of one data set."""

    name: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    bad_rows: list[str]
    """A message for each row that cannot be read."""
    stops: bool
    """Whether training would stop at one of them."""
    lengths: list[Lengths]
    examples: list[dict[str, Pieces]]
    """Of each row shown, its parts by name."""


def main(args: InspectArguments) -> int:
    """Read, count, tokenise, tell; returns the exit status."""
    disable_progress_bars()
    form = Format.of(args.data)
    sources = [open_source(entry) for entry in args.data.data_path]
    sources += [open_source(entry, "--eval_data_path", evaluates=True) for entry in args.data.eval_data_path]
    tokenizer = load_tokenizer(args.inspect.model_name_or_path, args.tokenizer)
    reports = [inspect(source, form, tokenizer, args) for source in sources]
    console = Console(**PLAIN)
    for report in reports:
        show(report, console, args.inspect.max_seq_len)
    if args.inspect.html:
        write_page(Path(args.inspect.html), as_page(reports, args), "--html")
        console.print(f"the same as a page: {args.inspect.html}")
    return 2 if any(report.stops for report in reports) else 0


def inspect(
    source: Source, form: Format, tokenizer: PreTrainedTokenizerBase, args: InspectArguments
) -> Report:
    """Everything about one data set. Raises `UserError` where nothing of it can be read."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "rows.arrow"
        index = write_comparisons(((row, 0, False) for row in counted(source, form, counts)), text)
        if len(index.keys) == 0:
            why = (
                f": {counts.bad_rows[0]}" if counts.bad_rows else listed("; dropped", counts.findings.dropped)
            )
            raise UserError(f"{source.flag} {source.name} has no row that can be used{why}")
        sample = splits.some_rows(index.row_keys, args.inspect.num_sampled, args.inspect.seed)
        rows = Dataset.from_file(str(text), in_memory=True)
        shown = rows.select(splits.some_rows(index.row_keys, args.inspect.num_rows, args.inspect.seed))
        usable = rows.select(sample)
        tokens = Tokens(usable, tokenizer, args.inspect.max_seq_len)
        add_refused(
            {int(sample[number]): why for number, why in tokens.refused.items()}, source, form, counts
        )
        counts.contradictions = count_contradictions(rows, index.keys)
        stops = bool(counts.bad_rows) and not form.drop_bad_rows
        facts = [*text_facts(counts, index.keys, index.row_keys, stops), *tokens.facts()]
        examples = list(example_rows(shown, tokenizer, args.inspect.max_seq_len))
    warnings = warnings_of(counts, facts, stops)
    return Report(source.name, facts, warnings, counts.bad_rows, stops, tokens.lengths(), examples)


def counted(source: Source, form: Format, counts: Counts) -> Iterator[Comparison]:
    """Every row that can be used; the others and what answers are like go into `counts`."""
    for place, found in all_rows(source, form, counts.findings):
        counts.rows += 1
        if isinstance(found, BadRow):
            counts.findings.bad[found.reason] += 1
            counts.bad_rows.append(f"{place}: {found}")
        elif isinstance(found, DroppedRow):
            counts.findings.dropped[str(found)] += 1
        else:
            count_answers(found, counts)
            yield found


def all_rows(
    source: Source, form: Format, findings: Findings | None = None
) -> Iterator[tuple[str, Comparison | BadRow | DroppedRow]]:
    """The rows of training and of evaluation, as `read_rows` streams them."""
    for rows in filter(None, (source.training, source.evaluation)):
        yield from read_rows(source, rows, form, findings or Findings())


def add_refused(refused: dict[int, str], source: Source, form: Format, counts: Counts) -> None:
    """Add the rows, by their numbers among those that can be read, that tokenizer or template refuse."""
    places = (place for place, found in all_rows(source, form) if isinstance(found, Comparison))
    for number, place in enumerate(places if refused else ()):
        if number in refused:
            counts.findings.bad[BadRow(refused[number]).reason] += 1
            counts.bad_rows.append(f"{place}: {refused[number]}")


def count_answers(row: Comparison, counts: Counts) -> None:
    """Add what the row's prompt and pairs are like."""
    if isinstance(row.prompt, str):
        counts.several_turns += row.prompt.count("\n\nHuman:") + row.prompt.startswith("Human:") > 1
    else:
        counts.several_turns += sum(turn.role == "user" for turn in row.prompt) > 1
    for better, worse in row.pairs:
        chosen, rejected = (tokens_of(answer) or text_of(answer).strip() for answer in (better, worse))
        counts.pairs += 1
        counts.equal_pairs += chosen == rejected and (better == worse or isinstance(better, str))
        counts.chosen_longer += len(chosen) > len(rejected)
        counts.chosen_shorter += len(chosen) < len(rejected)


def text_facts(counts: Counts, keys: np.ndarray, row_keys: np.ndarray, stops: bool) -> list[tuple[str, str]]:
    """What the text tells, as names and values."""
    num_read, num_prompts = len(keys), len(np.unique(keys))
    num_usable = counts.rows - counts.findings.num_left_out
    usable = f"{num_usable} could be used with --on_bad_row drop" if stops else f"{num_usable} can be used"
    facts = [("rows", f"{counts.rows}, of which {usable}")]
    facts += [(f"dropped: {reason}", str(number)) for reason, number in counts.findings.dropped.items()]
    facts += [(f"cannot be read: {reason}", str(number)) for reason, number in counts.findings.bad.items()]
    facts += [(f"not learned: {reason}", str(number)) for reason, number in counts.findings.unlearned.items()]
    facts += [
        ("different prompts", str(num_prompts)),
        ("repeated prompts", share(num_read - num_prompts, num_read)),
        ("repeated rows", share(num_read - len(np.unique(row_keys)), num_read)),
        ("several turns", share(counts.several_turns, num_read)),
        ("pairs", str(counts.pairs)),
    ]
    if counts.pairs:
        unequal = counts.pairs - counts.equal_pairs
        facts.append(("pairs of equal answers", share(counts.equal_pairs, counts.pairs)))
        facts.append(("pairs that are labelled both ways", share(counts.contradictions, counts.pairs)))
        facts.append(("the longer answer is the better one", share(counts.chosen_longer, unequal)))
    return facts


def share(part: int, whole: int) -> str:
    """A count and its share."""
    return f"{part} ({part / whole:.1%})" if whole else str(part)


class Tokens:
    """The sampled rows' tokens, without a limit and within --max_seq_len."""

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> None:
        numbers = np.array([len(answers) for answers in rows["answers"]])
        self._num_rows = len(rows)
        with_answer, with_pair = np.flatnonzero(numbers > 0), np.flatnonzero(numbers > 1)
        answered, paired = rows.select(with_answer), rows.select(with_pair)
        prompts = tokenize_prompts(rows, tokenizer, max_prompt_seq_len=NO_LIMIT, mark_refused=True)
        sft = tokenize_sft(answered, tokenizer, max_seq_len=NO_LIMIT, mark_refused=True)
        pairs = tokenize_pairs(paired, tokenizer, max_seq_len=NO_LIMIT, mark_refused=True)
        self._prompts, self._sft, self._pairs = prompts.rows, sft.rows, pairs.rows
        self.refused = dict(prompts.refused)
        """The numbers of the rows that tokenizer or template refuse, and why."""
        for some, tokenized in ((with_answer, sft), (with_pair, pairs)):
            self.refused |= {int(some[number]): why for number, why in tokenized.refused.items()}
        self._limited = {
            "1 (SFT)": tokenize_sft(answered, tokenizer, max_seq_len=max_seq_len, mark_refused=True),
            "2 (reward)": tokenize_pairs(paired, tokenizer, max_seq_len=max_seq_len, mark_refused=True),
        }

    def facts(self) -> list[tuple[str, str]]:
        """What the limit does to the rows of each step."""
        facts = [("rows whose tokens were counted", str(self._num_rows))]
        for step, limited in self._limited.items():
            facts += [(f"step {step}, {what}", value) for what, value in truncation(limited)]
        if len(self._pairs):
            chosen, rejected = self._sides()
            longer = int((chosen > rejected).sum())
            facts.append(("in tokens, the longer answer is the better one", share(longer, len(chosen))))
        return facts

    def lengths(self) -> list[Lengths]:
        """The lengths of what there is."""
        parts = {"prompt": column(self._prompts, "length")}
        if len(self._sft):
            parts["what step 1 learns of a row"] = column(self._sft, "num_targets")
        if len(self._pairs):
            chosen, rejected = self._sides()
            parts |= {"prompt with the better answer": chosen, "prompt with the worse answer": rejected}
        elif len(self._sft):
            parts["prompt with the answer"] = column(self._sft, "length")
        return [Lengths(name, tokens) for name, tokens in parts.items() if len(tokens)]

    def _sides(self) -> list[np.ndarray]:
        table = self._pairs.with_format("arrow")[:]
        return [
            table[name].combine_chunks().value_lengths().to_numpy() for name in ("chosen_ids", "rejected_ids")
        ]


def truncation(limited: Tokenized) -> list[tuple[str, str]]:
    """How many rows lost turns or text, and how many were dropped for what."""
    num_rows = len(limited.rows) + sum(limited.dropped.values())
    if num_rows == 0:
        return []
    counts = {"without their first turns": limited.num_fewer_turns, "cut in their text": limited.num_cut}
    counts |= {f"dropped: {reason}": number for reason, number in limited.dropped.items()}
    counts |= {f"not shown by the chat template: {name}": number for name, number in limited.unshown.items()}
    return [(name, share(number, num_rows)) for name, number in counts.items()]


def warnings_of(counts: Counts, facts: list[tuple[str, str]], stops: bool) -> list[str]:
    """What deserves a second look, and what training will do about rows that cannot be read."""
    found, bad = [], counts.bad_rows
    if bad:
        place = bad[0].split(": ")[0]
        will = f"stop at {place} (--on_bad_row stop)" if stops else "leave them out (--on_bad_row drop)"
        found.append(f"{len(bad)} of {counts.rows} rows cannot be read: training will {will}")
        found += bad[:NUM_BAD_ROWS]
    if len(bad) > NUM_BAD_ROWS:
        found.append(f"and {len(bad) - NUM_BAD_ROWS} more rows that cannot be read; the page lists them")
    found += counts.findings.lines(bad=False)
    if counts.contradictions:
        found.append(
            f"{counts.contradictions} pairs stand there both ways: a reward model cannot learn either"
        )
    unequal = counts.pairs - counts.equal_pairs
    rate = max(counts.chosen_longer, counts.chosen_shorter) / unequal if unequal else 0.0
    if rate > 0.7:
        found.append(
            f"length alone tells the better answer in {rate:.0%} of the pairs: a reward model will learn "
            "that first"
        )
    if counts.equal_pairs:
        found.append(f"{counts.equal_pairs} pairs of equal answers teach nothing; step 2 drops them")
    over = [f"{value} {name}" for name, value in facts if name.startswith("step") and "prompt over" in name]
    return found + over


def example_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> Iterator[dict[str, Pieces]]:
    """Each row's parts as the steps would see them: the example of step 1, the first pair of step 2."""
    for number in range(len(rows)):
        row, parts = rows.select([number]), {}
        num_answers = len(row[0]["answers"])
        if num_answers == 0:
            limit = {"max_prompt_seq_len": max_seq_len, "mark_refused": True}
            prompts = tokenize_prompts(row, tokenizer, **limit).rows
            for ids in prompts["input_ids"]:
                parts[f"step 3, {len(ids)} tokens"] = [(tokenizer.decode(list(ids)), False)]
        if num_answers > 0:
            for sft in tokenize_sft(row, tokenizer, max_seq_len=max_seq_len, mark_refused=True).rows:
                title = f"step 1, {sft['length']} tokens, {sft['num_targets']} of them learned"
                parts[title] = pieces(sft["input_ids"], sft["loss_mask"], tokenizer)
        if num_answers > 1:
            pairs = tokenize_pairs(row, tokenizer, max_seq_len=max_seq_len, mark_refused=True).rows
            for pair in islice(pairs, 1):
                ids = pair["rejected_ids"]
                parts[f"step 2, the worse answer, {len(ids)} tokens"] = [(tokenizer.decode(ids), False)]
        yield parts or {
            "dropped": [("tokenizer or template refuse this row, or --max_seq_len drops it", False)]
        }


def pieces(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The text in runs of tokens that are learned and that are not."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([token for token, _ in run]), learned) for learned, run in runs]


def show(report: Report, console: Console, max_seq_len: int) -> None:
    """Print one data set."""
    console.rule(Text(printable(report.name)), align="left")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report.facts:
        table.add_row(name, printable(value))
    console.print(table)
    for warning in report.warnings:
        console.print(Text(f"! {printable(warning)}", style="yellow"))
    for lengths in report.lengths:
        console.print(f"\n{lengths.name}, tokens: {lengths.summary}")
        for limits, number, part in lengths.bars:
            bar = ("#" if console.options.ascii_only else "█") * round(40 * part)
            console.print(f"  {limits:>13} {number:>7} {bar}".rstrip())
    for number, parts in enumerate(report.examples, start=1):
        for title, text in parts.items():
            console.print(Text(f"\n--- row {number}: {printable(title)}", style="bold"))
            console.print(coloured(text, brackets=not console.is_terminal))
    console.print()


def coloured(text: Pieces, *, brackets: bool) -> Text:
    """The text, what is learned in green, and between brackets where colours may not be seen."""
    shown = Text()
    for part, learned in text:
        part = printable(part)
        shown.append(f"⟦{part}⟧" if learned and brackets else part, style="green" if learned else "")
    return shown


def as_page(reports: list[Report], args: InspectArguments) -> str:
    """The same as one HTML file that needs nothing else."""
    title = f"Data as {args.inspect.model_name_or_path} reads it"
    return render(PAGE.read_text(encoding="utf-8"), title=title, reports=reports, options=args.inspect)


if __name__ == "__main__":
    with readable_errors(ARGS.inspect.debug):
        sys.exit(main(ARGS))
