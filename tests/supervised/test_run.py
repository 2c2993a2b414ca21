"""What steps 1 and 2 and DPO do alike before they train."""

from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_model

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.errors import UserError
from dschat.runs.measured_choices import MeasuredChoices
from dschat.supervised import run as supervised_run
from dschat.supervised.run import SupervisedRun


class Context:
    """A run's context that keeps what it is asked."""

    def __init__(self) -> None:
        self.claimed, self.begun = [], []

    def claim_folder(self, *models: str) -> None:
        self.claimed += models

    def begin(self, data: str, models: list) -> SimpleNamespace:
        self.begun.append((data, [model.path for model in models]))
        return SimpleNamespace(name="checkpoints", choices=MeasuredChoices(measures=False))


@pytest.fixture
def base(tmp_path) -> str:
    return str(save_tiny_model(tmp_path / "base"))


def opened(base: str, *flags: str, step: str = "sft", head: str = "language_model") -> SupervisedRun:
    args = parse_arguments(step, [f"--model_name_or_path={base}", "--per_device_train_batch_size=2", *flags])
    return SupervisedRun.open(args, Context(), head=head)


@pytest.mark.parametrize(("step", "head"), [("sft", "language_model"), ("reward", "reward_model")])
def test_a_run_opens_with_its_model_verified_its_folder_claimed_and_its_tokenizer(step, head, base):
    run = opened(base, step=step, head=head)
    assert run.context.claimed == [base] == [run.base.path]
    assert run.tokenizer.pad_token_id is not None
    assert run.settings.description.step == step


def test_a_model_that_is_not_there_is_refused_before_the_folder_is_claimed(tmp_path):
    with pytest.raises(UserError, match="--model_name_or_path"):
        opened(str(tmp_path / "nowhere"))


def pairs(*lengths: int) -> SplitData:
    rows = Rows.from_dict({"length": lengths})
    return SplitData(rows, rows, {}, "the data")


def collate(rows, num_rows: int, denominator: float, *, pad_id: int) -> int:
    return pad_id


def collate_rows(rows, num_rows: int, denominator: float, *, pad_id: int) -> SimpleNamespace:
    """A batch of which no more is known than the lengths of its rows."""
    mask = (torch.arange(9) < torch.from_numpy(rows["length"].to_numpy())[:, None]).long()
    return SimpleNamespace(tokens=SimpleNamespace(attention_mask=mask))


def test_batches_are_padded_by_the_tokenizer_and_the_run_begins_with_their_data(base):
    run = opened(base)
    loaders = run.build_loaders(pairs(3, 4, 5), collate)
    assert list(loaders.train) == [run.tokenizer.pad_token_id] * 2
    checkpoints, _ = run.begin(run.build_loaders(pairs(3, 4, 5), collate_rows))
    assert checkpoints.name == "checkpoints"
    assert run.context.begun == [("the data", [base])]


def test_an_example_that_outgrows_learned_positions_is_refused(tmp_path):
    run = opened(str(save_tiny_model(tmp_path / "opt", "opt")))
    with pytest.raises(UserError, match=r"the longest row has 100000 tokens .*lower --max_seq_len"):
        run.build_loaders(pairs(3, 100_000), collate)


def test_an_example_that_outgrows_the_token_budget_is_refused(base):
    rows = Rows.from_dict({"length": [3, 20], "input_ids": [[1] * 3, [1] * 20]})
    run = opened(base, "--max_tokens_per_batch=16", "--pad_to_multiple_of=8")
    with pytest.raises(UserError, match=r"--max_tokens_per_batch 16 is too small.* Give 24 or more"):
        run.build_loaders(SplitData(rows, rows, {}, "the data"), collate)


def test_an_engine_is_built_of_the_model_that_the_function_loads(base, monkeypatch):
    run, seen = opened(base), {}

    def load(path, tokenizer, config, **options):
        seen["load"] = (path, tokenizer, config["train_micro_batch_size_per_gpu"])
        return "model"

    def build(model, *groups, config, num_training_steps):
        seen["build"] = (model, groups, num_training_steps)
        return SimpleNamespace()

    monkeypatch.setattr(supervised_run, "build_trained_engine", build)
    run.build_engine(load, run.build_loaders(pairs(3, 4, 5), collate))
    settings = run.settings
    assert seen["load"] == (base, run.tokenizer, 2)
    assert seen["build"] == ("model", (settings.model, settings.optimizer, settings.run), 2)
