"""What DeepSpeed and torch must compile for a run, tried before anything is loaded."""

import os
import shutil
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from dschat.arguments import RunArguments
from dschat.errors import UserError


def check_operators(run: RunArguments) -> None:
    """Raise `UserError` for flags whose operators this machine cannot build or load.

    DeepSpeed keeps what it has built, so that a second run finds it.
    """
    if run.offload_nvme_path is not None:
        flag = f"--offload_nvme_path {run.offload_nvme_path}"
        builder = _builder("AsyncIOBuilder")
        if not builder.is_compatible():
            raise UserError(
                f"{flag} needs libaio, and neither its header nor its library is found; install libaio-dev "
                "(libaio-devel), or name their folders in CFLAGS and LDFLAGS."
            )
        _load(flag, builder)
        _make_folder(flag, run.offload_nvme_path)
    if run.quantized:
        _load(" and ".join(run.quantized), _builder("QuantizerBuilder"))
    if run.torch_compile and get_accelerator().device_name() == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"--torch_compile needs the C++ compiler {compiler}, which is not there; install it."
            )


def _builder(name: str) -> Any:
    return get_accelerator().create_op_builder(name)


def _load(flag: str, builder: Any) -> None:
    try:
        builder.load(verbose=False)
    except Exception as error:  # a compiler's, a linker's, or DeepSpeed's where a device has no such operator
        reason = " ".join(str(error).split())[-500:]
        raise UserError(
            f"{flag}: DeepSpeed's operator {builder.name!r} cannot be built or loaded here: {reason}"
        ) from error


def _make_folder(flag: str, path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: the folder cannot be made: {error}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag}: the folder cannot be written.")
