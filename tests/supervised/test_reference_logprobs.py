"""What is kept of the reference model, and for whom; the numbers themselves are tested in test_dpo.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import save_tiny_model

from dschat.arguments import parse_arguments
from dschat.data.collate import REFERENCE_COLUMNS
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.distributed.mesh import set_parallel_sizes
from dschat.errors import UserError
from dschat.export.upstream import UpstreamModel
from dschat.supervised.reference_logprobs import FILE, ReferenceStore, with_reference
from dschat.supervised.settings import SupervisedSettings

TABLE = torch.tensor([[-1.5, -2.5], [-3.0, -4.0], [-0.25, -0.5]])
"""Of two training pairs and one for evaluation."""


@pytest.fixture
def base(tmp_path) -> UpstreamModel:
    return UpstreamModel(str(save_tiny_model(tmp_path / "base")), "--model_name_or_path", None)


@pytest.fixture
def data() -> SplitData:
    return SplitData(Rows.from_dict({"length": [4, 3]}), Rows.from_dict({"length": [5]}), {}, "pairs")


def settings(tmp_path, *more: str) -> SupervisedSettings:
    argv = ["--model_name_or_path", str(tmp_path / "base"), "--data_output_path", str(tmp_path / "cache")]
    return SupervisedSettings.of(parse_arguments("dpo", [*argv, *more]))


def opened(
    tmp_path, base: UpstreamModel, data: SplitData, *more: str, choices: dict | None = None
) -> ReferenceStore:
    return ReferenceStore.open(settings(tmp_path, *more), base, data, choices or {})


def test_what_was_computed_once_is_read_and_stands_beside_its_rows(base, data, tmp_path):
    calls = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return TABLE

    for _ in range(2):
        extended = with_reference(data, opened(tmp_path, base, data), compute)
        parts = (extended.train, extended.evaluation)
        assert [[list(rows.column(name)) for name in REFERENCE_COLUMNS] for rows in parts] == [
            [[-1.5, -3.0], [-2.5, -4.0]],
            [[-0.25], [-0.5]],
        ]
    assert len(calls) == 1


def test_what_changes_the_numbers_or_their_rounding_has_its_own(base, data, tmp_path, monkeypatch):
    keys = [opened(tmp_path, base, data).key]
    keys.append(opened(tmp_path, base, replace(data, key="others")).key)
    keys.append(opened(tmp_path, base, data, choices={"packing": "rows"}).key)
    for more in (
        *("--dtype=fp32", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"),
        *("--pad_to_multiple_of=8", "--packing=off", "--seed=5", "--max_tokens_per_batch=600"),
        "--torch_compile",
    ):
        keys.append(opened(tmp_path, base, data, more).key)
    monkeypatch.setenv("WORLD_SIZE", "2")
    keys.append(opened(tmp_path, base, data).key)
    set_parallel_sizes(sequence=2)
    keys.append(opened(tmp_path, base, data).key)
    set_parallel_sizes()
    monkeypatch.undo()
    save_tiny_model(tmp_path / "base", seed=1)
    keys.append(opened(tmp_path, base, data).key)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    keys.append(opened(tmp_path, base, data).key)
    assert len(set(keys)) == len(keys)


def test_stages_and_dpos_own_settings_share_the_numbers(base, data, tmp_path):
    more = ["--beta", "0.5", "--zero_stage", "3", "--learning_rate", "1", "--loss_type", "ipo"]
    usual, other = (opened(tmp_path, base, data, *flags) for flags in ([], more))
    assert usual.key == other.key


@pytest.mark.parametrize("spoil", [lambda table: table[:2], lambda table: table.astype(np.float64)])
def test_a_file_of_another_shape_or_kind_is_named(spoil, base, data, tmp_path):
    store = opened(tmp_path, base, data)
    store.root.joinpath(store.key).mkdir(parents=True)
    store.write(TABLE)
    path = store.root / store.key / FILE
    np.save(path, spoil(TABLE.numpy()))
    (path.parent / "files.json").write_text(f'{{"{FILE}": {path.stat().st_size}}}')
    with pytest.raises(UserError, match=rf"{store.key}.* cannot be read .*remove"):
        opened(tmp_path, base, data)


def test_numbers_that_are_not_finite_are_not_kept(base, data, tmp_path):
    store = opened(tmp_path, base, data)
    with pytest.raises(UserError, match=r"1 of 3 pairs no finite log-probability.*--dtype"):
        with_reference(data, store, lambda: TABLE.clone().index_fill(0, torch.tensor([1]), torch.nan))
    assert opened(tmp_path, base, data).found is None
