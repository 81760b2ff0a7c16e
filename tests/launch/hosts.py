"""Hosts of a test's own on one machine: network namespaces on a bridge, each with its address and host name."""

import contextlib
import os
import shlex
import signal
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers import tool

SETUP = """
hostname {name}
ip link set lo up
mount --bind {hosts} /etc/hosts
{mounts}
exec "$@"
"""


@dataclass
class Host:
    """One host: what runs on it sees its address and name, and no other network."""

    name: str
    namespace: str
    address: str
    hosts_file: Path
    switch: str
    port: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command, log, *, mounts="", env=None, cwd=None):
        """Run `command` here in the background with its output in the file `log`; the process is the command itself."""
        setup = SETUP.format(name=self.name, hosts=shlex.quote(str(self.hosts_file)), mounts=mounts)
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "bash", "-ec", setup, "bash"]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*inside, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
                cwd=cwd,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def processes(self):
        """The numbers of all processes of this host."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def crash(self):
        """End all processes of this host at once; its kernel still closes their connections, as no power cut does."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in self.running:
            process.wait(30)
        self.running.clear()

    def cut_off(self):
        """Let everything from and to this host vanish in the switch; its own link stays up, and nothing is told."""
        ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def reconnect(self):
        """End what `cut_off` began."""
        ip("-n", self.switch, "link", "set", self.port, "master", "bridge")

    def run(self, *command):
        """Run a short command here and return what it prints."""
        inside = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True, timeout=60).stdout

    def connect(self):
        """Give the device eth0 of this host its address."""
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")


def ip(*words):
    """Run `ip` with these words."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@contextlib.contextmanager
def hosts(folder, names):
    """Hosts with these names, which reach each other by name; skips where a namespace cannot be made."""
    tool("ip")
    label = uuid.uuid4().hex[:6]
    switch = f"esam-{label}-switch"
    made = []
    try:
        try:
            ip("netns", "add", switch)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        made.append(switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        hosts_file = folder / "hosts"
        addresses = {name: f"10.77.0.{number + 1}" for number, name in enumerate(names)}
        lines = [f"{address} {name} {name.partition('.')[0]}" for name, address in addresses.items()]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        result = []
        for number, (name, address) in enumerate(addresses.items()):
            namespace = f"esam-{label}-{number}"
            ip("netns", "add", namespace)
            made.append(namespace)
            ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", namespace)
            ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            result.append(Host(name.partition(".")[0], namespace, address, hosts_file, switch, f"port{number}"))
            result[-1].connect()
        try:
            yield result
        finally:
            for host in result:
                host.crash()
    finally:
        for namespace in made:
            ip("netns", "delete", namespace)
