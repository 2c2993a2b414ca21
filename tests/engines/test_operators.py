"""Operators that flags need: messages where this machine cannot build or load them."""

from types import SimpleNamespace

import pytest

from dschat.arguments import RunArguments
from dschat.engines import operators
from dschat.engines.operators import check_operators
from dschat.errors import UserError


def builder(*, is_compatible: bool = True, error: str = "") -> SimpleNamespace:
    def load(*, verbose):
        if error:
            raise ValueError(error)

    return SimpleNamespace(name="an_operator", is_compatible=lambda: is_compatible, load=load)


def nvme(path: object) -> RunArguments:
    return RunArguments(offload=True, offload_nvme_path=str(path))


def test_a_run_without_such_flags_builds_nothing(monkeypatch):
    monkeypatch.setattr(operators, "_builder", None)
    check_operators(RunArguments())


def test_a_machine_without_libaio_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "_builder", lambda name: builder(is_compatible=False))
    with pytest.raises(UserError, match=r"--offload_nvme_path .* needs libaio, .* install libaio-dev"):
        check_operators(nvme(tmp_path))


def test_an_operator_that_does_not_compile_is_said_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "_builder", lambda name: builder(error="ld: no such file"))
    with pytest.raises(UserError, match=r"'an_operator' cannot be built or loaded here: ld: no such file"):
        check_operators(nvme(tmp_path))


def test_the_folder_on_the_disk_is_made_or_its_error_said(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "_builder", lambda name: builder())
    check_operators(nvme(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--offload_nvme_path .*file/b: the folder cannot be made"):
        check_operators(nvme(tmp_path / "file" / "b"))


@pytest.mark.skipif(operators.get_accelerator().device_name() != "cpu", reason="for machines without a GPU")
def test_deepspeed_has_no_quantised_collectives_for_a_cpu():
    run = RunArguments(zero_quantized_weights=True, zero_quantized_gradients=True)
    with pytest.raises(
        UserError, match="--zero_quantized_weights and --zero_quantized_gradients: DeepSpeed's"
    ):
        check_operators(run)


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--torch_compile needs the C\\+\\+ compiler no-such-compiler"):
        check_operators(RunArguments(torch_compile=True))
