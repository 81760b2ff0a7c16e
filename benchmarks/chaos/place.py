"""Where a job lives: its folder, its disk, its shared memory, and on request hosts with a network between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

DISK_BYTES = 24 * 2**20
ADDRESS = "10.78.0."
# A private /dev/shm: what is left in it is this job's.
ENTER = 'mount --bind "$1" /dev/shm && shift && exec "$@"'


def may_mount() -> bool:
    """Whether file systems can be mounted here, and network namespaces made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"esam-{uuid.uuid4().hex[:6]}"
    words = (["unshare", "--mount", "true"], ["ip", "netns", "add", name], ["ip", "netns", "delete", name])
    return all(subprocess.run(command, check=False, capture_output=True).returncode == 0 for command in words)


class Place:
    """The folders of one job below `root`; with `mounts`, its checkpoints lie on a small disk of their own."""

    def __init__(self, root: Path, *, mounts: bool, hosts: int = 1) -> None:
        self.root, self.mounts = root, mounts
        self.run, self.control, self.logs = root / "run", root / "control", root / "logs"
        self.disk, self.shared, self.temporary = root / "disk", root / "shm", root / "tmp"
        for folder in (self.run, self.control, self.logs, self.disk, self.shared, self.temporary):
            folder.mkdir(parents=True)
        self.network = Network(hosts) if hosts > 1 else None
        if mounts:
            _command("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk))
            _command("mount", "-t", "tmpfs", "tmpfs", str(self.shared))
            for folder in (self.disk / "checkpoints", self.run / "checkpoints"):
                folder.mkdir()
            _command("mount", "--bind", str(self.disk / "checkpoints"), str(self.run / "checkpoints"))

    def entered(self, host: int, words: list[str]) -> list[str]:
        """The command that runs `words` in this place, on that host."""
        inside = ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(self.shared)] if self.mounts else []
        return [*(self.network.entered(host) if self.network else []), *inside, *words]

    def fill(self) -> None:
        """Leave no room on the disk, twice: what is freed meanwhile is taken too."""
        with (self.disk / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        """Make room again."""
        (self.disk / "ballast").unlink(missing_ok=True)

    def set_read_only(self, value: bool) -> bool:
        """Let the disk take no writes, or take them again; False where a file is open for writing at each try."""
        for _ in range(200):
            words = ["mount", "-o", f"remount,{'ro' if value else 'rw'}", str(self.disk)]
            if subprocess.run(words, check=False, capture_output=True).returncode == 0:
                return True
            time.sleep(0.01)
        return False

    def left_in_shared_memory(self) -> list[str]:
        """Names in the job's /dev/shm."""
        return sorted(path.name for path in self.shared.iterdir())

    def close(self) -> None:
        """Unmount all; nothing of the job may be running."""
        if self.network:
            self.network.close()
        if self.mounts:
            for folder in (self.run / "checkpoints", self.disk, self.shared):
                # A zombie may hold it for a moment; lazily, it vanishes with the last.
                _command("umount", "--lazy", str(folder))


class Network:
    """Hosts on a switch, each with an address, which can be cut off."""

    def __init__(self, hosts: int) -> None:
        self._label = f"esam-{uuid.uuid4().hex[:6]}"
        self._switch = f"{self._label}-switch"
        self._names = [f"{self._label}-{host}" for host in range(hosts)]
        _command("ip", "netns", "add", self._switch)
        _command("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _command("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self._names):
            port = f"port{host}"
            _command("ip", "netns", "add", name)
            _command("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
            _command("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _command("ip", "-n", name, "link", "set", "lo", "up")
            _command("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _command("ip", "-n", name, "link", "set", "eth0", "up")

    @staticmethod
    def address(host: int) -> str:
        """The address of a host; every job has its own network."""
        return f"{ADDRESS}{host + 1}"

    def entered(self, host: int) -> list[str]:
        """What runs a command on that host."""
        return ["nsenter", f"--net=/run/netns/{self._names[host]}"]

    def cut_off(self, host: int) -> None:
        """Let everything from and to the host vanish in the switch; nobody is told."""
        _command("ip", "-n", self._switch, "link", "set", f"port{host}", "nomaster")

    def reconnect(self, host: int) -> None:
        """End what `cut_off` began."""
        _command("ip", "-n", self._switch, "link", "set", f"port{host}", "master", "bridge")

    def close(self) -> None:
        """Remove the hosts."""
        for name in [*self._names, self._switch]:
            _command("ip", "netns", "delete", name)


def _command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
