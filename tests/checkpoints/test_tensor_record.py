from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dschat.checkpoints.tensor_record import TensorRecord


@dataclass(frozen=True)
class Measured:
    values: Tensor
    length: int
    critic: Tensor | None
    by_source: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    logprobs: Tensor | None = None


def restored(record: Measured | None) -> Measured | None:
    other: TensorRecord[Measured] = TensorRecord(Measured)
    state = TensorRecord(Measured, record).state_dict()
    if state:
        other.load_state_dict(state)
    return other.record


def test_fields_have_keys_of_their_own_and_entries_of_dictionaries_theirs():
    record = Measured(torch.ones(2), 3, None, {"a.b": torch.zeros(1)}, {"a.b": 4})
    state = TensorRecord(Measured, record).state_dict()
    assert list(state) == ["values", "length", "by_source.a.b", "errors.a.b"]
    assert state["length"].dtype == torch.int64


def test_every_kind_of_field_comes_back():
    found = restored(Measured(torch.arange(3.0), 5, None, {"a.b": torch.ones(2)}, {"x": 1}, torch.zeros(1)))
    assert (found.length, found.critic, found.errors) == (5, None, {"x": 1})
    assert isinstance(found.length, int)
    assert found.values.tolist() == [0, 1, 2]
    assert found.by_source["a.b"].tolist() == [1, 1]
    assert found.logprobs.tolist() == [0]


def test_a_scalar_of_floats_stays_a_tensor():
    assert restored(Measured(torch.tensor(2.5), 1, None)).values.item() == pytest.approx(2.5)
    assert isinstance(restored(Measured(torch.tensor(2.5), 1, None)).values, Tensor)


def test_without_a_record_there_is_no_state():
    assert TensorRecord(Measured).state_dict() == {}
    assert restored(None) is None
