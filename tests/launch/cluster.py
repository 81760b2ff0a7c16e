"""A small Slurm cluster of a test's own: a controller and two nodes, each on a host with its own address."""

import contextlib
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hosts import Host, hosts
from servers import ROOT, tool, until

# CPUs: more than the machine has (config_overrides). Two partitions: a job in `high` preempts those in `low`.
# cred_expire: seconds before a job that was queued again may start, by default 120.
CONFIG = """\
ClusterName=esam
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
NodeName=alpha NodeAddr={alpha} CPUs=4 State=UNKNOWN
NodeName=beta NodeAddr={beta} CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class Cluster:
    """The host on which jobs are submitted, and the folder of all that the daemons keep."""

    head: Host
    folder: Path

    def run(self, program, *options, cwd=None):
        """What one of Slurm's commands prints; it must succeed."""
        command = ["ip", "netns", "exec", self.head.namespace, tool(program), *options]
        env = os.environ | self.environment()
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=cwd, timeout=60)
        assert done.returncode == 0, f"{program} {options}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def environment(self):
        """What a user who submits has in the environment."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        settings = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        return settings | {"PYTHONPATH": str(ROOT), "PATH": path}

    def submit(self, script, cwd, *options):
        """The number of the job that sbatch makes of the file `script`."""
        return self.run("sbatch", "--parsable", *options, str(script), cwd=cwd)

    def facts(self, job):
        """What scontrol tells about a job."""
        told = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait(self, job, *states, seconds=300):
        """The facts of a job as soon as it is in one of `states`."""

        def reached():
            facts = self.facts(job)
            return facts if facts["JobState"] in states else None

        return until(reached, seconds, f"job {job} is {' or '.join(states)}", every=1)


@contextlib.contextmanager
def cluster(folder):
    """A cluster whose two nodes are idle; skips where Slurm is not installed or a namespace cannot be made."""
    controller, node, munged = tool("slurmctld"), tool("slurmd"), tool("munged")
    with hosts(folder, ["head", "alpha", "beta"]) as three:
        head, *nodes = three
        addresses = {host.name: host.address for host in three}
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, **addresses))
        # named, since slurmd looks for the kind that is mounted, and a namespace has none; nothing here uses it
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        made = Cluster(head, folder)
        # the socket is a file, so that one munged serves all hosts; its folder may be anybody's: --force
        files = {"key-file": key} | {name: folder / f"munge.{name}" for name in ("socket", "pid-file", "seed-file")}
        options = [f"--{name}={path}" for name, path in files.items()]
        env = made.environment()
        log = folder / "daemons.log"
        head.start([munged, "--foreground", "--force", f"--log-file={folder / 'munge.log'}", *options], log)
        until((folder / "munge.socket").exists, 20, "munged listens")
        head.start([controller, "-D", "-f", env["SLURM_CONF"]], log, env=env)
        for host in nodes:
            (folder / host.name).mkdir()
            host.start([node, "-D", "-f", env["SLURM_CONF"]], log, env=env)

        until(lambda: made.run("sinfo", "--noheader", "--format=%T", "--partition=low") == "idle", 60, "nodes are idle")
        yield made
