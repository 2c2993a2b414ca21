"""Variables of job systems and launchers are completed, or the one that is missing is named."""

import socket
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from dschat.distributed import rendezvous
from dschat.distributed.rendezvous import configure_environment, take_free_port, unmet, wait_for_rank_0
from dschat.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """A dictionary in the place of this process's variables."""
    variables = {}
    monkeypatch.setattr(rendezvous.os, "environ", variables)
    return variables


def meeting(
    rank: object, size: object, address: str = "node-0", port: object = 29777, **more: object
) -> dict[str, str]:
    given = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port, **more}
    return {name: str(value) for name, value in given.items() if value is not None}


def slurm(rank, size, local_rank, local_size) -> dict[str, str]:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    return dict(zip(names, map(str, (rank, size, local_rank, local_size)), strict=True))


@pytest.mark.parametrize(
    ("given", "rank", "size", "local_rank", "local_size"),
    [
        ({}, 0, 1, 0, 1),
        ({"LOCAL_RANK": "3"}, 0, 1, 0, 1),  # left over from another program
        ({"RANK": "", "WORLD_SIZE": " "}, 0, 1, 0, 1),
        ({"WORLD_SIZE": "1"}, 0, 1, 0, 1),
        (meeting(0, 1), 0, 1, 0, 1),  # PyTorchJob, one pod
        (meeting(1, 2), 1, 2, 0, 1),  # a pod a process
        (meeting(1, 2, LOCAL_WORLD_SIZE=1), 1, 2, 0, 1),
        (meeting(1, 2, address="127.0.0.1"), 1, 2, 1, 2),  # by hand, on one machine
        (meeting(3, 4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2), 3, 4, 1, 2),
        (meeting(3, 4, LOCAL_RANK=1, LOCAL_SIZE=2), 3, 4, 1, 2),  # the deepspeed launcher
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, 0, 1, 0, 1),  # sbatch without srun
        (slurm(1, 2, 1, "2"), 1, 2, 1, 2),
        ({**slurm(3, 4, 1, "2(x2)"), "MASTER_ADDR": "node-0"}, 3, 4, 1, 4),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 1, 2, 1, 2),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "node-0"}, 1, 2, 0, 1),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, 0, 1, 0, 1),
    ],
)  # fmt: skip
def test_what_is_certain_is_filled_in(given, rank, size, local_rank, local_size, environment):
    environment.update(given)
    configure_environment()
    assert [environment[name] for name in NAMES[:4]] == [*map(str, (rank, size, local_rank, local_size))]
    assert environment["MASTER_ADDR"] == given.get("MASTER_ADDR", "127.0.0.1")
    assert environment["MASTER_PORT"].isdecimal()
    before = dict(environment)
    configure_environment()
    assert environment == before


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, but RANK is 0"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE is 2"),
        (meeting(2, 2), "RANK='2' must be a whole number from 0 to 1, as WORLD_SIZE is 2"),
        (meeting(-1, 2), "RANK='-1' must"),
        (meeting("one", 2), "RANK='one' must"),
        (meeting(0, 0), "WORLD_SIZE='0' must be a whole number of at least 1"),
        (meeting(0, "2.0"), "WORLD_SIZE='2.0' must"),
        (meeting(0, 2, address=None), "MASTER_ADDR is not set, but WORLD_SIZE is 2"),
        (meeting(0, 2, port=None), "MASTER_PORT is not set, but RANK is 0 and WORLD_SIZE is 2"),
        (meeting(0, 2, port="http"), "MASTER_PORT='http' must be a whole number from 1 to 65535"),
        (meeting(0, 1, port="http"), "MASTER_PORT='http' must"),
        (meeting(0, 2, port=65536), "MASTER_PORT='65536' must"),
        (meeting(0, 4, LOCAL_WORLD_SIZE=2), "LOCAL_RANK is not set, but LOCAL_WORLD_SIZE is 2"),
        (meeting(0, 4, LOCAL_RANK=2, LOCAL_WORLD_SIZE=2), "LOCAL_RANK='2' must"),
        (meeting(0, 4, LOCAL_RANK="x"), "LOCAL_RANK='x' must"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_is_missing_or_wrong_is_named(given, named, environment):
    environment.update(given)
    with pytest.raises(UserError) as told:
        configure_environment()
    assert named in str(told.value)


def test_the_launcher_s_flag_counts_where_the_variable_is_not_set(environment):
    environment.update(meeting(1, 2))
    configure_environment(1)
    assert environment["LOCAL_RANK"] == "1"


def test_a_group_of_one_takes_another_port_and_several_ranks_are_told_one(environment, capsys):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        environment.update(meeting(0, 1, port=port))
        configure_environment()
        take_free_port()
        assert environment["MASTER_PORT"] != port
        assert f"note: port {port} is not used (address already in use)" in capsys.readouterr().out
        environment.update(WORLD_SIZE="2", MASTER_PORT=port)
        take_free_port()
        assert environment["MASTER_PORT"] == port
    in_use = RuntimeError("The server socket has failed to listen. port: 29777, EADDRINUSE")
    assert f"port {port} is in use (another run?); start with one that is free now: MASTER_PORT=" in str(
        unmet(in_use)
    )
    environment["CROSS_SIZE"] = "1"
    assert "deepspeed --master_port " in str(unmet(in_use))
    assert f"MASTER_ADDR node-0, MASTER_PORT {port}: gone" in str(unmet(RuntimeError("gone")))


@pytest.mark.slow
def test_ranks_wait_for_rank_0_and_say_where(environment, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "NOTE_AFTER", 0.5)
    port = rendezvous.free_port()
    environment.update(meeting(1, 2, address="127.0.0.1", port=port))
    with pytest.raises(UserError, match=f"met nobody at .* MASTER_PORT {port} within 0:00:02"):
        wait_for_rank_0(timedelta(seconds=2))
    assert f"waits for rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}" in capsys.readouterr().err

    def listen() -> None:
        time.sleep(1.5)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    threading.Thread(target=listen, daemon=True).start()
    wait_for_rank_0()
    environment["RANK"] = "0"
    wait_for_rank_0(timedelta(0))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_name_of_rank_0s_machine_may_be_unknown_for_a_while(environment, monkeypatch, rank):
    answers = [socket.gaierror(-2, "Name or service not known")] * 2
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _: None)

    def look_up(*_, **__):
        if answers:
            raise answers.pop()
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(rendezvous.socket, "create_connection", look_up)
    environment.update(meeting(rank, 2))
    wait_for_rank_0()
    monkeypatch.setattr(rendezvous, "NAME_PATIENCE", timedelta(0))
    answers += [socket.gaierror(-2, "Name or service not known")] * 2
    with pytest.raises(UserError, match=f"rank {rank} met nobody at MASTER_ADDR node-0, .* not known"):
        wait_for_rank_0()


@pytest.mark.parametrize(
    ("tasks", "names", "node", "local_size", "first"),
    [
        ("2(x2)", "gpu[07-08]", 1, 2, "gpu07"),
        ("4,2", "gpu[3,9-11]-ib", 1, 2, "gpu3-ib"),
        ("1(x2),4", "login,gpu1,gpu2", 2, 4, "login"),
    ],
)
def test_slurm_tells_where_rank_0_is_and_how_many_are_beside(
    environment, tasks, names, node, local_size, first
):
    environment |= slurm(3, 6, 0, tasks) | {"SLURM_NODEID": str(node), "SLURM_STEP_NODELIST": names}
    configure_environment()
    assert environment["MASTER_ADDR"] == first
    assert environment["LOCAL_WORLD_SIZE"] == str(local_size)
    assert environment["LOCAL_RANK"] == "0"


def test_gloo_takes_the_interface_that_leads_to_rank_0(environment, monkeypatch):
    environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    rendezvous.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in environment, "loopback leads to no other host"
    monkeypatch.setattr(rendezvous, "LOOPBACK", ())
    rendezvous.choose_interface()
    assert environment["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    environment |= {"GLOO_SOCKET_IFNAME": "ib0"}
    rendezvous.choose_interface()
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"
