"""The rendered pods, started as processes: one host per pod, with the manifest's command, variables, mounts and probes.

What a kubelet does is done here by hand; what the manifests say is what runs. The root file system is read-only and
all capabilities are dropped, as the manifests ask.
"""

import functools
import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from hosts import hosts
from servers import ROOT, tool, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DROPPED = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
PROBE = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode())"


class Pod:
    """One pod of the rendered job, on a host of its own."""

    def __init__(self, host, index, template, config_maps, folder, claims):
        self.host, self.index, self.spec, self.config_maps = host, index, template["spec"], config_maps
        self.folder = folder / f"pod-{index}"
        self.folder.mkdir()
        self.log = folder / f"pod-{index}.log"
        self.sources = {volume["name"]: self._source(volume, claims) for volume in self.spec["volumes"]}

    def _source(self, volume, claims):
        if "persistentVolumeClaim" in volume:
            return claims / volume["persistentVolumeClaim"]["claimName"]
        made = self.folder / volume["name"]
        made.mkdir()
        for name, text in self.config_maps[volume["configMap"]["name"]].items() if "configMap" in volume else []:
            (made / name).write_text(text)
        return made

    def start(self, container, injected=()):
        """Start one container and return its process."""
        env = self._variables(container) | dict(injected)
        words = [self._expand(word, env) for word in [*container["command"], *container.get("args", [])]]
        assert words[0] == "esam-dist"
        command = [tool("setpriv"), *DROPPED, sys.executable, "-m", "esam_dist", *words[1:]]
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return self.host.start(command, self.log, mounts=self._mounts(container), env=env, cwd="/")

    def probe(self, container, kind):
        """What the probe `kind` of the container gets, asked at the pod address as the kubelet asks; None: it fails."""
        get = container[f"{kind}Probe"]["httpGet"]
        port = next(entry["containerPort"] for entry in container["ports"] if entry["name"] == get["port"])
        return self.fetch(f"http://{self.host.address}:{port}{get['path']}")

    def fetch(self, url):
        """What the address answers to this host; None where it does not."""
        try:
            return self.host.run(sys.executable, "-c", PROBE, url)
        except subprocess.CalledProcessError:
            return None

    def _variables(self, container):
        env = {}
        for source in container.get("envFrom", []):
            env |= self.config_maps[source["configMapRef"]["name"]]
        for entry in container["env"]:
            path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            assert "value" in entry or "job-completion-index" in path
            env[entry["name"]] = entry.get("value", str(self.index))
        return env

    @staticmethod
    def _expand(word, env):
        return re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), word)

    def _mounts(self, container):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        lines = ["mount -t tmpfs tmpfs /mnt"]
        # /tmp last: it hides the folders of the test itself
        for mount in sorted(container["volumeMounts"], key=lambda mount: mount["mountPath"] == "/tmp"):
            path, source = mount["mountPath"], shlex.quote(str(self.sources[mount["name"]]))
            lines += [f"mkdir -p {path}", f"mount --bind {source} {path}"]
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {path}")
        return "\n".join([*lines, "mount -o remount,bind,ro /", "cd /"])


def render(overlay, digits, *overrides):
    options = ["--with=kubernetes", "--nnodes=2", "--nproc-per-node=1", f"--overlay={overlay}"]
    command = [sys.executable, "-m", "esam_dist", "launch", *options, str(digits / "config.yaml"), *overrides]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    resources = list(yaml.safe_load_all(done.stdout))
    return {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}


def pods_of(resources):
    """The pod template of the rendered job, its pods' host names, and what its controller injects into pod i."""
    if ("Job", "esam") in resources:
        spec = resources["Job", "esam"]["spec"]
        names = [f"esam-{index}.{spec['template']['spec']['subdomain']}" for index in range(spec["completions"])]
        return spec["template"], names, lambda index: {}
    if ("JobSet", "esam") in resources:
        spec = resources["JobSet", "esam"]["spec"]
        job = spec["replicatedJobs"][0]
        size = job["template"]["spec"]["completions"]
        names = [f"esam-{job['name']}-0-{index}.{spec['network']['subdomain']}" for index in range(size)]
        return job["template"]["spec"]["template"], names, lambda index: {}
    trainer = resources["TrainJob", "esam"]["spec"]["trainer"]
    job = resources["TrainingRuntime", "esam"]["spec"]["template"]["spec"]["replicatedJobs"][0]
    names = [f"esam-{job['name']}-0-{index}.esam" for index in range(trainer["numNodes"])]

    def injected(index):  # by Trainer's torch plugin
        env = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
        return env | {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": names[0], "PET_MASTER_PORT": "29400"}

    return job["template"]["spec"]["template"], names, injected


@pytest.mark.parametrize("overlay", ["cpu-smoke", "jobset", "kubeflow-trainer"])
def test_rendered_pods_train_the_digits(overlay, digits, tmp_path):
    resources = render(overlay, digits, "train.max_steps=100000", "checkpoint.every_steps=10")
    config_maps = {name: resource["data"] for (kind, name), resource in resources.items() if kind == "ConfigMap"}
    template, names, injected = pods_of(resources)
    container = template["spec"]["containers"][0]
    claims = tmp_path / "claims"
    (claims / "esam-runs").mkdir(parents=True)
    (claims / "esam-data").symlink_to(digits / "data")
    with hosts(tmp_path, names) as machines:
        new_pod = functools.partial(Pod, template=template, config_maps=config_maps, folder=tmp_path, claims=claims)
        pods = [new_pod(host, index) for index, host in enumerate(machines)]
        for first in template["spec"].get("initContainers", []):
            for prepared in [pod.start(first) for pod in pods]:
                assert prepared.wait(300) == 0, pods[0].log.read_text()
        running = [pod.start(container, injected(pod.index)) for pod in pods]
        until(lambda: all(pod.probe(container, "startup") for pod in pods), 400, "both pods have started")
        until(lambda: all(pod.probe(container, "readiness") for pod in pods), 120, "both pods are ready")
        assert all(pod.probe(container, "liveness") for pod in pods)
        path = template["metadata"]["annotations"]["prometheus.io/path"]
        (port,) = container["ports"]  # all that are declared are scraped
        pages = [pods[0].fetch(f"http://{pod.host.address}:{port['containerPort']}{path}") for pod in pods]
        assert all("esam_world_size 2.0" in page for page in pages)
        assert {re.search(r'esam_run_info{.*rank="(\d)"', page)[1] for page in pages} == {"0", "1"}
        rows = pods[0].sources["runs"] / "esam/metrics.jsonl"
        until(lambda: rows.exists() and '"step": 20,' in rows.read_text(), 400, "20 updates")
        for process in running:
            process.terminate()
        assert [process.wait(120) for process in running] == [143, 143], pods[0].log.read_text()
    losses = [row["loss"] for row in map(json.loads, rows.read_text().splitlines()) if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert any((pods[0].sources["runs"] / "esam/checkpoints").iterdir())


def test_users_mistake_ends_the_pod_with_the_status_that_fails_the_job(digits, tmp_path):
    resources = render("cpu-smoke", digits)
    config_maps = {name: resource["data"] for (kind, name), resource in resources.items() if kind == "ConfigMap"}
    template, names, _ = pods_of(resources)
    config_maps["esam-config"]["config.yaml"] = "method: {gamma: 2}\n"
    with hosts(tmp_path, names) as machines:
        pod = Pod(machines[0], 0, template, config_maps, tmp_path, tmp_path)
        assert pod.start(template["spec"]["containers"][0]).wait(120) == 2
    assert "method.gamma" in pod.log.read_text()
    assert "Traceback" not in pod.log.read_text()
