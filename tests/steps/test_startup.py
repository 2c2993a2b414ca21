"""What a run settles before it reads anything."""

import pytest
import torch

from dschat.arguments import SftArguments, parse_arguments
from dschat.models.remote_code import loading_consent
from dschat.program import prepare


def arguments(*flags: str) -> SftArguments:
    return parse_arguments("sft", ["--model_name_or_path=m", "--data_path=d", "--dtype=fp32", *flags])


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)
    prepare(arguments())


def test_neither_foreign_code_nor_slow_algorithms_by_default():
    prepare(arguments())
    assert loading_consent() == {"trust_remote_code": False}
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_refuses_what_has_no_such_algorithm():
    prepare(arguments("--deterministic"))
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_foreign_code_runs_where_it_is_allowed():
    prepare(arguments("--trust_remote_code"))
    assert loading_consent() == {"trust_remote_code": True}
