"""Look at this machine and this environment as a training run would, and say what is wrong and what mends it.

    python scripts/doctor.py                   python scripts/doctor.py --output_dir output --json

Nothing is installed, changed or trained; small files are written and removed again. One line per finding: ok,
note (nothing to do, good to know), warning (some runs fail) or problem (every run fails). Exit code 1 where
there is a problem.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser
from dschat.data.user_cache import user_cache
from dschat.distributed.rendezvous import DEFAULT_PORT
from dschat.program import readable_errors

GIB = 2**30
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 5 * GIB, 8 * GIB, GIB
"""Bytes below which a first run of a small model gets into trouble."""
PATIENCE = 5.0
"""Seconds that the hub and other programs have to answer."""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Finding:
    """What was found of one subject."""

    subject: str
    status: Literal["ok", "note", "warning", "problem"]
    text: str
    remedy: str = ""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="Where runs will write.")
    parser.add_argument("--json", action="store_true", help="Print the findings as one JSON list.")
    parser.add_argument("--offline", action="store_true", help="Do not ask whether the hub can be reached.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Print every finding; the exit code."""
    findings = []
    for finding in examine(args):
        findings.append(finding)
        if not args.json:
            remedy = f"\n         -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.status:8} {finding.subject}: {finding.text}{remedy}", flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        statuses = [finding.status for finding in findings]
        counts = [(statuses.count(status), status) for status in ("problem", "warning")]
        print(", ".join(f"{count} {status}{'s' * (count != 1)}" for count, status in counts))
    return int(any(finding.status == "problem" for finding in findings))


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Everything that a run needs, the cheapest and most common causes first."""
    yield python_version()
    yield from packages()
    yield from torch_and_devices()
    yield from compilers()
    yield from processor_and_memory()
    yield shared_memory(Path("/dev/shm"))
    for what, folder, at_fault in folders(args.output_dir):
        yield storage(what, folder, at_fault)
    yield port(int(os.environ.get("MASTER_PORT") or DEFAULT_PORT))
    yield from variables()
    yield from hub(args.offline)


def python_version() -> Finding:
    """Whether this Python is one that the project is made for, in an environment of its own."""
    found = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        remedy = "install Python 3.12 and run PYTHON=python3.12 bash scripts/setup.sh"
        return Finding("python", "problem", f"{found}; 3.11 to 3.14 are supported", remedy)
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        remedy = "python -m venv .venv && source .venv/bin/activate, or bash scripts/setup.sh"
        return Finding("python", "note", f"{found}, shared with the system", remedy)
    return Finding("python", "ok", f"{found} in {sys.prefix}")


def packages() -> Iterator[Finding]:
    """The installed packages against what the project requires, and the packages that cannot be imported."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in requires("dschat") or []]
    except PackageNotFoundError:
        yield Finding(
            "dschat", "problem", "not installed in this environment", "pip install -e . in the checkout"
        )
        return
    wrong = []
    for need in needed:
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            wrong.append(
                Finding(need.name, "problem", "not installed", f"pip install '{need.name}{need.specifier}'")
            )
            continue
        if not need.specifier.contains(found, prereleases=True):
            text = f"version {found}; {need.specifier} is needed"
            wrong.append(Finding(need.name, "problem", text, f"pip install '{need.name}{need.specifier}'"))
    yield from wrong or [
        Finding("packages", "ok", f"dschat {version('dschat')} has the versions that it requires")
    ]
    yield from clashes()


def clashes() -> Iterator[Finding]:
    """Packages that are not ours and that keep transformers or torch from starting."""
    code = "import torch, torchvision; torch.ops.torchvision.nms"
    if is_installed("torchvision") and (problem := failure_of(code)):
        remedy = (
            "pip install torchvision of the release that belongs to this torch, or pip uninstall torchvision"
        )
        yield Finding("torchvision", "problem", f"it does not fit this torch ({problem})", remedy)
    code = "import transformers, deepspeed, datasets, peft"
    if problem := failure_of(code, patience=120):
        yield Finding("imports", "problem", f"{code}: {problem}", "pip install -r requirements.txt")


def is_installed(name: str) -> bool:
    """Whether pip has installed a package of that name."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def failure_of(code: str, patience: float = 60) -> str:
    """The last line that a Python program of its own prints where it fails, else nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {patience:g} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1][:300] if done.returncode else ""


def torch_and_devices() -> Iterator[Finding]:
    """Torch's build against the devices that the machine has."""
    try:
        import torch
    except Exception as error:  # a broken shared library is an OSError, a missing symbol an ImportError
        yield Finding(
            "torch", "problem", f"it cannot be imported: {error}", "pip install --force-reinstall torch"
        )
        return
    driver = answer_of("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
    built_for = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            text = f"{torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            busy = free < total / 2
            remedy = "nvidia-smi lists the processes that hold it" if busy else ""
            yield Finding(f"GPU {number}", "warning" if busy else "ok", text, remedy)
    elif driver and not built_for:
        remedy = "install the build of torch for CUDA that pytorch.org's Get Started page shows"
        yield Finding("torch", "problem", f"{torch.__version__} is the CPU build, and there is a GPU", remedy)
    elif driver:
        remedy = f"update the driver to one for CUDA {built_for}, or install a torch for an older CUDA"
        text = f"{torch.__version__} finds no usable GPU, though nvidia-smi lists {driver.splitlines()[0]}"
        yield Finding("torch", "problem", text, remedy)
    else:
        build = f"built for CUDA {built_for}, which nothing here uses" if built_for else "the CPU build"
        yield Finding("torch", "ok", f"{torch.__version__}, {build}; no GPU")


def answer_of(*command: str) -> str:
    """What a program prints, nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 4, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def compilers() -> Iterator[Finding]:
    """What DeepSpeed compiles its operators with."""
    if shutil.which("g++") is None:
        remedy = "sudo apt install g++, or conda install gxx; everything but --offload works without it"
        yield Finding(
            "g++", "warning", "not found: --offload cannot compile DeepSpeed's Adam for the CPU", remedy
        )
    else:
        yield Finding("g++", "ok", answer_of("g++", "-dumpfullversion") or "found")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        remedy = "sudo apt install python3-dev, or dnf install python3-devel; all but --offload works without"
        yield Finding(
            "Python.h", "warning", "this Python has no headers, which --offload compiles with", remedy
        )
    beside = Path(sys.executable).with_name("ninja")
    if shutil.which("ninja") is None and not beside.exists():
        yield Finding(
            "ninja", "warning", "not found: it drives the compiler for --offload", "pip install ninja"
        )
    if shutil.which("nvidia-smi") and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        remedy = "install the CUDA toolkit of torch's CUDA version, and set CUDA_HOME"
        yield Finding("nvcc", "note", "not found: DeepSpeed's CUDA operators cannot be compiled", remedy)


def processor_and_memory() -> Iterator[Finding]:
    """Cores, and the memory that this process may use."""
    import psutil  # not above, so that without packages dschat says what is missing

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    limit = memory_limit(Path("/sys/fs/cgroup/memory.max"))
    total, of = (
        (limit, "that the container allows") if limit and limit < memory.total else (memory.total, "in all")
    )
    text = f"{cores} cores; {memory.available / GIB:.1f} GiB of memory free, {total / GIB:.1f} {of}"
    if min(memory.available, total) < LEAST_MEMORY:
        remedy = "close other programs, or take a smaller model, --gradient_checkpointing, --lora_dim"
        yield Finding("memory", "warning", text, remedy)
    else:
        yield Finding("memory", "ok", text)
    if memory.available < memory.total / 10:
        yield Finding("memory", "warning", "over nine tenths of it are in use", "top lists who uses it")


def memory_limit(file: Path) -> int | None:
    """The limit in bytes of the container that this process runs in, if it has one."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def shared_memory(folder: Path) -> Finding:
    """Where processes of one machine exchange data; containers start with 64 MiB."""
    if not folder.is_dir():
        return Finding("shared memory", "warning", f"{folder} is missing", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    if free < LEAST_SHARED:
        remedy = "start the container with --shm-size 8g or --ipc host"
        return Finding("shared memory", "warning", f"{free / GIB:.2f} GiB free in {folder}", remedy)
    return Finding("shared memory", "ok", f"{free / GIB:.1f} GiB free in {folder}")


def folders(output_dir: Path) -> Iterator[tuple[str, Path, str]]:
    """What a run writes, where, and the setting that names another place."""
    cache = user_cache()
    hub_cache = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    operators = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    yield "output", output_dir, "--output_dir"
    yield "tokenised data", cache / "dschat", "--data_output_path or XDG_CACHE_HOME"
    yield "models of the hub", hub_cache, "HF_HOME"
    yield "compiled operators", operators, "TORCH_EXTENSIONS_DIR"
    yield "temporary files", Path(tempfile.gettempdir()), "TMPDIR"


def storage(what: str, folder: Path, setting: str) -> Finding:
    """Whether a megabyte can be written where the folder is or would be made, and how much room is left."""
    subject = f"disk for {what}"
    place = folder.expanduser().resolve()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"make room in {place}" if full else f"make {place} writable for this user"
        return Finding(
            subject, "problem", f"{folder}: {error.strerror or error}", f"{remedy}, or set {setting}"
        )
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free in {place}"
    if free < LEAST_DISK:
        return Finding(subject, "warning", text, f"make room, or set {setting} to a larger disk")
    return Finding(subject, "ok", text)


def port(number: int) -> Finding:
    """Whether ranks could meet at the port that launchers use unless told otherwise."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as error:
            remedy = "torchrun --standalone, or --master_port with another number (deepspeed: the same flag)"
            return Finding("port", "warning", f"{number}: {error.strerror}; another run may use it", remedy)
    return Finding("port", "ok", f"{number} is free")


def variables() -> Iterator[Finding]:
    """Variables of the environment that change what a run does."""
    left = [f"{name}={os.environ[name]}" for name in LAUNCHERS if name in os.environ]
    if left:
        text = f"{' '.join(left)}: a run takes itself for one of several ranks"
        yield Finding(
            "launcher", "warning", text, f"unset {' '.join(word.partition('=')[0] for word in left)}"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding(
            "GPU", "note", "CUDA_VISIBLE_DEVICES is empty: GPUs are hidden", "unset CUDA_VISIBLE_DEVICES"
        )
    if sys.getfilesystemencoding() != "utf-8":
        text = f"files are read as {sys.getfilesystemencoding()}; runs start again in UTF-8 mode"
        yield Finding("encoding", "note", text, "export LC_ALL=C.UTF-8")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        value = os.environ.get(name) or os.environ.get(name.upper())
        if value:
            yield Finding("proxy", "note", f"{name} is {hidden_user(value)}")


def hidden_user(value: str) -> str:
    """A proxy's address without the user and password."""
    return re.sub(r"//[^/@]*@", "//***@", value)


def hub(is_offline: bool) -> Iterator[Finding]:
    """Whether models and data sets can be fetched by their ids."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or is_offline:
        yield Finding("hub", "note", "not asked: offline. Folders and what is cached can be used")
        return
    import httpx2

    try:
        httpx2.head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # whatever a proxy, a certificate or a resolver does
        remedy = (
            "name local folders, set HF_ENDPOINT to a mirror or https_proxy to a proxy, or HF_HUB_OFFLINE=1"
        )
        text = f"not reached: {hidden_user(str(error) or type(error).__name__)}"
        yield Finding("hub", "warning", text, remedy)
        return
    has_token = "with a token" if get_token() else "without a token, which gated models need (hf auth login)"
    yield Finding("hub", "ok", f"reached, {has_token}")


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main(parse()))
