"""How a rank joins the process group, and how it leaves."""

import contextlib
import gc
import io
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from socket import gethostname

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from dschat.console import messages
from dschat.distributed import deepspeed_private, launcher, restart, watchdog
from dschat.distributed.collectives import all_gather_object, barrier, make_axis_groups
from dschat.distributed.extension_locks import clear_build_locks
from dschat.distributed.mesh import mesh
from dschat.distributed.process_end import end
from dschat.distributed.rendezvous import (
    PATIENCE,
    choose_interface,
    configure_environment,
    take_free_port,
    unmet,
    wait_for_rank_0,
)
from dschat.errors import UserError

TIMEOUT = timedelta(hours=2)
"""Longer than the slowest rank may take to load a model or to write a checkpoint."""


def init_process_group(
    local_rank: int = -1, *, host_timeout: float = 0.0, timeout: timedelta = TIMEOUT
) -> torch.device:
    """Join the process group (a group of one under plain `python`) and return this rank's device.

    Raises `UserError` where the ranks have not met within `timeout`, which is that of collectives too.
    `local_rank` is as `configure_environment` has it. A host that does not answer for `host_timeout` seconds
    ends the others; 0 waits for ever.
    """
    # DeepSpeed finds ninja, which is installed beside this Python, through PATH.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    configure_environment(local_rank)
    _check_device()
    deepspeed_private.compile_no_shared_memory_collectives()
    deepspeed_private.share_empty_weights()
    deepspeed_private.import_muon()
    # DeepSpeed calls collectives by names that newer torch versions rename; nothing a user could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # `dschat.distributed.restart` brings its own.
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt > 0 and keeps_store:
        _join_again(attempt)
    launcher.end_with_launcher()
    for lock in clear_build_locks(on_one_machine=mesh().world.size == mesh().machine.size):
        messages.note(
            f"{lock} was left behind by a process that was killed, and is deleted.", every_rank=True
        )
    take_free_port()
    choose_interface()
    wait_for_rank_0(min(PATIENCE, timeout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # every rank announces the collectives it compiled
            deepspeed.init_distributed(timeout=timeout, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise unmet(error) from error
    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    elif "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank all cores; ranks that compete for them wait for each other.
        torch.set_num_threads(max(1, torch.get_num_threads() // mesh().machine.size))
    restart.listen()
    make_axis_groups()
    if mesh().world.size > 1:
        mine = [os.getpid(), watchdog.machine_number(), gethostname()]
        pids, machines, names = zip(*all_gather_object(mine, axis="world"), strict=True)
        rank = mesh().world.rank
        watchdog.start_watching(pids, machines, rank=rank, each_time=restart.obey)
        store = restart.own_connection()
        watchdog.start_watching_hosts(store, machines, names, rank=rank, limit=host_timeout)
    return device


def _check_device() -> None:
    local_rank, number = int(os.environ["LOCAL_RANK"]), get_accelerator().device_count()
    if get_accelerator().device_name() != "cpu" and local_rank >= number:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine shows {number} devices (CUDA_VISIBLE_DEVICES "
            "limits them): start as many processes on it as it has."
        )


def destroy_process_group(exit_code: int = 0) -> None:
    """Leave the process group: the last call of a program, on every rank. Of several, each ends here.

    The group's threads end first, as far as they can: an engine at ZeRO-3 keeps some of gloo's.
    """
    barrier(axis="world")
    watchdog.stop_watching()
    restart.forget()
    deepspeed.comm.destroy_process_group()
    gc.collect()  # what else refers to the group, in cycles, keeps its threads alive
    if mesh().world.size > 1:
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
        rank=mesh().world.rank,
        world_size=mesh().world.size,
        timeout=TIMEOUT,
    )
