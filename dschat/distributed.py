"""The process group, rank 0, ZeRO-3 gathers and seeds. Under plain `python` a run is a group of one."""

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import unwrap_model_for_generation
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dschat import peers, restart
from dschat.build_locks import clear_build_locks
from dschat.ending import end
from dschat.errors import UserError
from dschat.rendezvous import settle_environment, take_free_port, unmet, wait_for_rank_0

TIMEOUT = timedelta(hours=2)
"""Longer than the slowest rank may take to load a model or to write a checkpoint."""


def rank() -> int:
    """This process's number in the group, 0 where there is no group yet."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Processes in the group."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main_process() -> bool:
    """Whether this process prints, logs and writes."""
    return rank() == 0


def print_once(message: str) -> None:
    """Print on rank 0, on a line of its own also where a progress bar stands."""
    if is_main_process():
        tqdm.write(message)
        sys.stdout.flush()


def check_precision(dtype: str, offload: bool) -> None:
    """Raise `UserError` for what this machine cannot run, before anything is loaded."""
    on_cpu = get_accelerator().device_name() == "cpu"
    if dtype == "fp16" and on_cpu:
        raise UserError("--dtype fp16 needs a GPU and this machine has none; use --dtype bf16 or fp32.")
    if offload and shutil.which("g++") is None:
        raise UserError(
            "--offload compiles DeepSpeed's CPU optimiser, which needs g++; install it or leave it out."
        )


def setup(local_rank: int = -1) -> torch.device:
    """Join the process group (a group of one under plain `python`) and return this rank's device.

    Raises `UserError` where the ranks cannot meet. `local_rank` is as `settle_environment` has it.
    """
    # DeepSpeed finds ninja, which is installed beside this Python, through PATH.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    settle_environment(local_rank)
    _check_device()
    # DeepSpeed would compile collectives in shared memory, which only tensor-parallel inference calls. Their
    # buffers, 66 MiB a rank, stay in /dev/shm for ever, and where that is full the process dies.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that newer torch versions rename; nothing a user could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # `dschat.restart` brings its own
    if attempt > 0 and keeps_store:
        _join_again(attempt)
    peers.end_with_launcher()
    for lock in clear_build_locks(on_one_machine=world_size() == local_world_size()):
        print(f"note: {lock} was left behind by a process that was killed, and is deleted.", flush=True)
    take_free_port()
    wait_for_rank_0()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # every rank announces the collectives it compiled
            deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    except dist.DistNetworkError as error:
        raise unmet(error) from error
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    elif "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank all cores; ranks that compete for them wait for each other.
        torch.set_num_threads(max(1, torch.get_num_threads() // local_world_size()))
    restart.listen()
    if world_size() > 1:
        mine = torch.tensor([[os.getpid(), peers.machine_number()]], device=device)
        peers.watch(*gather_rows(mine).T.tolist(), rank=rank(), each_time=restart.obey)
    return device


def _check_device() -> None:
    local_rank, number = int(os.environ["LOCAL_RANK"]), get_accelerator().device_count()
    if get_accelerator().device_name() != "cpu" and local_rank >= number:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine shows {number} devices (CUDA_VISIBLE_DEVICES "
            "limits them): start as many processes on it as it has."
        )


def leave(exit_code: int = 0) -> None:
    """Leave the process group: the last call of a program, on every rank. Of several, each ends here.

    The group's threads end first, as far as they can: an engine at ZeRO-3 keeps some of gloo's.
    """
    barrier()
    peers.unwatch()
    restart.forget()
    deepspeed.comm.destroy_process_group()
    gc.collect()  # what else refers to the group, in cycles, keeps its threads alive
    if world_size() > 1:
        end(exit_code)


def _join_again(attempt: int) -> None:
    """Join the group of a run that torchrun has started again, which DeepSpeed then takes over.

    torchrun keeps the store of the first attempt, and gloo would connect to the addresses of its dead ranks.
    """
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=TIMEOUT)
    dist.init_process_group(
        get_accelerator().communication_backend_name(),
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=TIMEOUT,
    )


def current_device() -> torch.device:
    """This rank's device, on which its collectives run."""
    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks of tensors of one shape, in fp64 so that counts stay whole."""
    total = tensor.detach().double()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order; the same shape on each. [B, ...] -> [world * B, ...]."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_json(value: Any) -> list[Any]:
    """Every rank's value, which JSON can hold, in rank order."""
    text = json.dumps(value).encode()
    if world_size() == 1:
        return [json.loads(text)]
    length = largest_across_ranks(len(text), current_device())
    row = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8).to(current_device())
    return [json.loads(bytes(other.tolist())) for other in gather_rows(row[None])]


def problem_anywhere(work: Callable[[], str | None]) -> str | None:
    """Do this rank's work on files, which says or raises what goes wrong; on every rank, that of any.

    Every rank must call it. So none waits for one that could not write.
    """
    try:
        problem = work()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    said = gather_json(problem)
    return next((f"rank {number}: {text}" for number, text in enumerate(said) if text), None)


def max_across_ranks(tensor: Tensor) -> Tensor:
    """The elementwise largest over ranks of tensors of one shape."""
    largest = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def largest_across_ranks(number: int, device: torch.device) -> int:
    """The largest of one number a rank."""
    return int(max_across_ranks(torch.tensor(number, device=device)))


def synchronize() -> None:
    """Wait for the device, so that a clock read next to it is true."""
    get_accelerator().synchronize()


def peak_memory_gib() -> float:
    """The most this rank has used so far: device memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait, then they run it."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def is_zero3_parameter(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
    """Full parameters inside the block where ZeRO-3 shards them; nothing to do elsewhere.

    With `modifier_rank`, what that rank wrote into them is kept; without, changes are lost.
    """
    sharded = [p for p in parameters if is_zero3_parameter(p)]
    if not sharded:
        yield
        return
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank):
        yield


def weights_gathered_for_generation(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager:
    """Whole weights inside the block and none of ZeRO-3's hooks, so ranks may stop at different lengths."""
    return unwrap_model_for_generation(engine)


def seed_ranks_apart(seed: int) -> None:
    """Seed every rank with a number of its own, derived of both: ranks draw their dropout independently."""
    derived = numpy.random.SeedSequence([seed, rank()]).generate_state(1, numpy.uint64)
    seed_everything(int(derived[0]) % 2**63)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank, as new weights must be; sampling has its own keys."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where this rank's random generators stand: Python's and NumPy's as JSON, torch's and the device's."""
    name, keys, *rest = numpy.random.get_state()
    numbers = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    return numbers, {"torch": torch.get_rng_state(), "device": get_accelerator().get_rng_state().cpu()}


def restore_random_state(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Go on from what `random_state` said."""
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = numbers["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    get_accelerator().set_rng_state(tensors["device"])
    torch.set_rng_state(tensors["torch"])
