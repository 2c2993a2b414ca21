"""The report that step 2 writes beside its reward model: which scores are whose."""

import json

import numpy as np
import pytest
import torch
from tiny import comparison_rows, tiny_tokenizer

from dschat.data.collate import collate_pairs
from dschat.data.comparisons import Comparison
from dschat.data.loaders import build_eval_loader
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.data.tokenization import tokenize_pairs
from dschat.supervised.pair_report import PairReport

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Five pairs of four prompts, of different lengths so that a loader puts them in another order."""
    comparisons = [
        Comparison(prompt=f"\n\nHuman: {n} {'so ' * n}\n\nAssistant:", answers=("yes " * (n + 1), "no"))
        for n in (1, 4, 2, 3, 3)
    ]
    settings = {"groups": np.array([0, 1, 2, 3, 3]), "sources": np.array([0, 1, 0, 1, 1]), "max_seq_len": 99}
    return Rows.of(tokenize_pairs(comparison_rows(*comparisons), TOKENIZER, **settings).rows)


def report_of(rows: Rows, names: tuple[str, ...] = ("a", "b")) -> PairReport:
    return PairReport(SplitData(rows, rows, {}, "", sources=names), TOKENIZER, "a model")


def test_scores_find_their_pairs_whatever_the_order_of_the_batches(rows, tmp_path):
    """The score of an answer is its length here, but for one pair, which is the mistake that is shown."""
    report = report_of(rows)
    loader = build_eval_loader(
        rows, lambda *some: collate_pairs(*some, pad_id=0), batch_size=2, rank=0, world_size=1
    )
    assert list(loader.order) != list(range(5))
    report.begin()
    for batch in loader:
        lengths = batch.tokens.attention_mask.sum(dim=1).float()
        chosen, rejected = lengths.chunk(2)
        report.add(torch.where(batch.groups == 2, -chosen, chosen), rejected)
    report.end(loader)
    figures = report.figures()
    report.writer()(tmp_path)
    found = json.loads((tmp_path / "reward_report.json").read_text())
    assert (found["pairs"], found["prompts"], found["accuracy"]["value"]) == (5, 4, 0.8)
    assert found["longer_answer_accuracy"]["value"] == 1.0
    for name in ("gain_over_length", "overconfidence"):
        error, estimate = 1.959964 * figures[f"eval_{name}_stderr"], found[name]
        assert figures[f"eval_{name}"] == pytest.approx(estimate["value"])
        assert estimate["high"] == pytest.approx(estimate["value"] + error)
    assert figures["eval_gain_over_length"] == pytest.approx(-0.2)  # the rule of length is always right
    assert [(group["name"], group["pairs"]) for group in found["by_source"]] == [("a", 2), ("b", 3)]
    (wrong,) = found["mistakes"]
    assert wrong["prompt"].startswith("\n\nHuman: 2 so so")
    assert wrong["chosen"].strip().startswith("yes yes yes")
    assert wrong["chosen_score"] == -rows.lengths("chosen_ids")[2]
    assert wrong["chosen_length"] == rows.lengths("chosen_ids")[2] - rows.column("prompt_length")[2]
    html = (tmp_path / "reward_report.html").read_text()
    assert "yes yes yes" in html
    assert "5 held-out pairs of a, b" in html


def test_without_held_out_pairs_there_is_no_report(rows):
    report = report_of(rows)
    report.begin()
    assert report.writer() is None


def test_a_report_that_fails_costs_no_model(rows, tmp_path, capsys):
    report = report_of(rows)
    report.begin()
    report._table = [[77.0, 1.0, 0.0]]  # a row that is not there
    report.writer()(tmp_path)
    assert "WARNING: the report on the reward model could not be made: " in capsys.readouterr().out
