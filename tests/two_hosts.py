"""Two hosts on one machine: network namespaces with addresses, names and, if wanted, disks of their own.

A process on a host sees its network, its host name and its /etc/hosts; a folder of the test may be a disk of
each host's own under one path. What they share: memory, processor, the clock and the numbers of processes.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import environment

NAMES = ("node-a", "node-b")
SSH = """#!/bin/bash
# ssh [-o X] [-p N] HOST COMMAND...
while [[ $1 == -* ]]; do shift 2; done
host=$1; shift
exec "$HOSTS_FOLDER/on" "$host" sh -c "$*"
"""
PDSH = """#!/bin/bash
# pdsh -S -f N -w HOSTS COMMAND...: a shell on each host gets one line, in which %n is the host's number.
while [[ $1 == -* ]]; do case $1 in -f | -w) last=$2; shift 2;; *) shift;; esac; done
IFS=, read -ra hosts <<<"$last"
line="$*"
for number in "${!hosts[@]}"; do
    ssh "${hosts[number]}" "${line//%n/$number}" & running+=($!)
done
for process in "${running[@]}"; do wait "$process" || failed=1; done
exit ${failed:-0}
"""
ON = """#!/bin/bash
# on HOST COMMAND...: run the command on that host
host=$1; shift
exec ip netns exec "{prefix}$host" unshare --uts --mount bash -c '
hostname "$1"; mount --bind {folder}/etc_hosts /etc/hosts; mount --bind {folder}/no_names /etc/resolv.conf
if [[ -d {folder}/disk.$1 ]]; then mount --bind "{folder}/disk.$1" "{folder}/disk"; fi
cd "{folder}"; shift; exec "$@"' on "$host" "$@"
"""


def missing_right() -> str | None:
    """Why this machine lets nobody make hosts; None where it does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "there is no ip or unshare (iproute2, util-linux)"
    name = f"probe{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()}"
    tried = subprocess.run(
        ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "ip", "link", "add", "type", "veth"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return f"no veth pairs: {tried.stderr.strip()}" if tried.returncode else None


class TwoHosts:
    """node-a and node-b, which a link joins."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self._prefix = folder, f"d{number}-"
        self.more: dict[str, str] = {}
        """Further environment variables of all processes."""
        self.addresses = {name: f"10.77.0.{n + 1}" for n, name in enumerate(NAMES)}

    def popen(self, host: str, *command: object, **extra: str) -> subprocess.Popen:
        """Start a command on a host, in the folder of the test; `extra` are environment variables."""
        return subprocess.Popen(
            [str(self.folder / "on"), host, *map(str, command)],
            env=environment(**self.variables, **extra),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    @property
    def variables(self) -> dict[str, str]:
        """The environment with ssh and pdsh that reach the hosts, and a home that they share."""
        path = os.pathsep.join([str(self.folder), str(Path(sys.executable).parent), os.environ["PATH"]])
        return {"PATH": path, "HOSTS_FOLDER": str(self.folder), "CUDA_VISIBLE_DEVICES": "", **self.more}

    def set_link(self, state: str, host: str = NAMES[1]) -> None:
        """Cut the link, "down", at one host's end, or join it again, "up"."""
        self._ip("-n", self._prefix + host, "link", "set", "eth0", state)

    def give_own_disks(self) -> Path:
        """A folder that is a disk of its own on each host. Processes that start later see it."""
        for name in ("disk", *(f"disk.{host}" for host in NAMES)):
            (self.folder / name).mkdir(exist_ok=True)
        return self.folder / "disk"

    def build(self) -> None:
        """Make namespaces, the link, and the commands that reach the hosts."""
        (self.folder / "etc_hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        )
        (self.folder / "no_names").touch()  # or names without an entry would be asked for in vain
        on = ON.format(prefix=self._prefix, folder=self.folder)
        for name, text in (("on", on), ("ssh", SSH), ("pdsh", PDSH)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        spaces = [self._prefix + name for name in NAMES]
        for space in spaces:
            self._ip("netns", "add", space)
        self._ip(
            "link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "eth0", "netns", spaces[1]
        )
        for space, address in zip(spaces, self.addresses.values(), strict=True):
            self._ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", space, "link", "set", device, "up")

    def remove(self) -> None:
        """Take the namespaces away, and the link with them."""
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", self._prefix + name], check=False)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts for the time of the block; `folder` is on a disk that they share."""
    hosts = TwoHosts(folder, os.getpid())
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.remove()
