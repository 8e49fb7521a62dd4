"""Machines on one machine: a network namespace for each, with an address, joined by a bridge.

The caller's own namespace has the bridge, and the caller runs under `unshare --net --mount`, so all
of it ends with the last of its processes. Needs root and iproute2.
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_NETWORK = "10.77.0."
_BRIDGE = "bridge"
_NOBODY = "02:00:00:00:00:01"


class Machine:
    """A network namespace with one address, and the processes in it.

    Args:
        name: by which all machines find it.
        number: the last part of its address.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"{_NETWORK}{number}"
        self._keeper = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while _namespace_of(self._keeper.pid) == _namespace_of(os.getpid()):
            time.sleep(0.01)
        self._enter = ["nsenter", f"--net=/proc/{self._keeper.pid}/ns/net", "--"]
        _run("ip", "link", "add", self._port, "type", "veth", "peer", "eth0",
             "netns", str(self._keeper.pid))  # fmt: skip
        _run("ip", "link", "set", self._port, "master", _BRIDGE, "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def _port(self) -> str:
        return f"to-{self.name}"

    def run(self, *command: str) -> None:
        """Run a command on it until it ends."""
        _run(*self._enter, *command)

    def output(self, *command: str) -> str:
        """Run a command on it, and return what it prints."""
        enter = [*self._enter, *command]
        return subprocess.run(enter, check=True, capture_output=True, text=True).stdout

    def start(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a server on it, with its own group of processes."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self._enter, *command], env=os.environ | dict(env or {}), stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def connect(self, is_connected: bool) -> None:
        """Plug it in, or pull the plug."""
        _run("ip", "link", "set", self._port, "up" if is_connected else "down")

    def reach(self, other: "Machine", is_reached: bool) -> None:
        """Have it send packets to another, or lose each of them without a word."""
        given = ["neigh", "replace", other.address, "lladdr", _NOBODY, "dev", "eth0"]
        flush = ["neigh", "del", other.address, "dev", "eth0"]
        self.run("ip", *(flush if is_reached else [*given, "nud", "permanent"]))

    def stop(self) -> None:
        """End its processes and give the namespace up."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        self._keeper.kill()
        self._keeper.wait()


def build(folder: Path, names: Sequence[str]) -> dict[str, Machine]:
    """Make the bridge, and a machine for each name, under which all of them find it."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", _BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{_NETWORK}1/24", "dev", _BRIDGE)
    _run("ip", "link", "set", _BRIDGE, "up")
    machines = {name: Machine(name, number) for number, name in enumerate(names, 2)}
    hosts = folder / "hosts"
    lines = [f"{machine.address} {name}\n" for name, machine in machines.items()]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
    # In our own mount namespace.
    _run("mount", "--bind", str(hosts), "/etc/hosts")
    return machines


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _namespace_of(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""
