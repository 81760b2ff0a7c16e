"""ssh without a password between the hosts of a test: a server on each, with keys that nothing else knows."""

import contextlib
import shlex
import subprocess
import sys

from servers import tool, until

SERVER = """
Port 22
HostKey {folder}/host_{name}
AuthorizedKeysFile {folder}/client.pub
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
# the test's folder lies in /tmp, where all may write
StrictModes no
"""
CLIENT = """
IdentityFile {folder}/client
UserKnownHostsFile {folder}/known_hosts
UpdateHostKeys no
BatchMode yes
"""
# Where sshd wants an empty folder; and the machine's own settings of ssh, as DeepSpeed calls it without options.
SERVER_MOUNTS = "mount -t tmpfs tmpfs /run\nmkdir /run/sshd"
CLIENT_MOUNTS = "mount --bind {config} /etc/ssh/ssh_config"


def _key(path):
    subprocess.run([tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=60)
    return path.with_name(path.name + ".pub").read_text()


@contextlib.contextmanager
def ssh_between(some_hosts, folder):
    """Serve ssh on every host for the block; yields the `mounts` with which a command started on a host may use it.

    What comes in by ssh sees no processes but those that did, as on a machine of its own: a `pkill` stays there.
    """
    server = tool("sshd")
    folder.mkdir(mode=0o700)
    _key(folder / "client")
    known = []
    for host in some_hosts:
        kind, key, *_ = _key(folder / f"host_{host.name}").split()
        known.append(f"{host.name},{host.address} {kind} {key}\n")
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh.conf").write_text(CLIENT.format(folder=folder))
    for host in some_hosts:
        config = folder / f"sshd_{host.name}.conf"
        config.write_text(SERVER.format(folder=folder, name=host.name))
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*alone, server, "-D", "-e", "-f", str(config)]
        host.start(command, folder / f"sshd_{host.name}.log", mounts=SERVER_MOUNTS)
    mounts = CLIENT_MOUNTS.format(config=shlex.quote(str(folder / "ssh.conf")))
    for host in some_hosts:
        until(lambda host=host: _listens(host), 30, f"sshd on {host.name}: see {folder}")
    yield mounts


def _listens(host):
    code = f"import socket; socket.create_connection(('{host.address}', 22), 5)"
    with contextlib.suppress(subprocess.CalledProcessError):
        host.run(sys.executable, "-c", code)
        return True
    return False
