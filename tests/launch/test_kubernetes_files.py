"""Every overlay, rendered by kubectl: built-in kinds against their schemas, the rest by its structure."""

import argparse
import functools
import subprocess

import kubernetes_validate
import pytest
import yaml
from servers import ROOT, tool

from esam_dist import config, launch
from esam_dist.launch import arguments
from esam_dist.metrics.keys import MetricsKeys

FOLDER = ROOT / "launch/kubernetes"
OVERLAYS = ["base", *sorted(f"overlays/{path.name}" for path in (FOLDER / "overlays").iterdir())]
CUSTOM = {"JobSet", "TrainJob", "TrainingRuntime", "PodMonitor", "PrometheusRule"}


@functools.cache
def rendered(overlay):
    """{kind/name: resource} of one overlay."""
    command = [tool("kubectl"), "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    resources = list(yaml.safe_load_all(done.stdout))
    named = {f"{resource['kind']}/{resource['metadata']['name']}": resource for resource in resources}
    assert len(named) == len(resources)
    return named


def job_spec(resources):
    """The specification of the Job among {kind/name: resource}, or of that which a controller makes."""
    if "Job/esam" in resources:
        return resources["Job/esam"]["spec"]
    if "JobSet/esam" in resources:
        return resources["JobSet/esam"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    return resources["TrainingRuntime/esam"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_template(overlay):
    return job_spec(rendered(overlay))["template"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_built_in_kinds_fit_their_schemas(overlay):
    for name, resource in rendered(overlay).items():
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, "1.32", strict=True)
        else:
            assert "." in resource["apiVersion"].partition("/")[0], name


def test_schema_check_finds_a_misspelt_field():
    job = rendered("base")["Job/esam"]
    wrong = job | {"spec": job["spec"] | {"backOffLimit": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_keep_the_restricted_profile(overlay):
    spec = pod_template(overlay)["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    for container in spec["containers"] + spec.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_of_the_namespace_sets_variables_of_a_pod(overlay):
    assert pod_template(overlay)["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_the_health_endpoint_and_grace_covers_the_checkpoint(overlay):
    template = pod_template(overlay)
    container = template["spec"]["containers"][0]
    paths = {probe: container[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
    assert {probe: get["path"] for probe, get in paths.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    port = next(entry["containerPort"] for entry in container["ports"] if entry["name"] == "metrics-0")
    assert {get["port"] for get in paths.values()} == {"metrics-0"}
    assert f"metrics.port={port}" in container["args"]
    grace = int(next(word for word in container["args"] if word.startswith("--grace=")).partition("=")[2])
    assert template["spec"]["terminationGracePeriodSeconds"] > grace
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= MetricsKeys().stall_seconds


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_arguments_are_options_that_launch_knows(overlay):
    container = pod_template(overlay)["spec"]["containers"][0]
    assert container["command"] == ["esam-dist", "launch"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    launch.add_arguments(parser)
    numbers = {"NODES": "2", "RANKS_PER_NODE": "1", "MAX_RESTARTS": "3", "JOB_COMPLETION_INDEX": "1"}
    numbers |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1", "RENDEZVOUS": "esam-0.esam:29500"}
    numbers |= {"PET_MASTER_ADDR": "esam-node-0-0.esam", "PET_MASTER_PORT": "29500"}
    words = [
        functools.reduce(lambda w, n: w.replace(f"$({n})", numbers[n]), numbers, word) for word in container["args"]
    ]
    assert not [word for word in words if "$(" in word]
    args = parser.parse_args(words)
    assert arguments.job(args).max_nodes == 2
    text = rendered(overlay)["ConfigMap/esam-config"]["data"]["config.yaml"]
    values = yaml.safe_load(text)
    for override in args.overrides:
        section, key = override.partition("=")[0].split(".")
        values.setdefault(section, {})[key] = yaml.safe_load(override.partition("=")[2])
    config.parse(values, overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_users_mistake_fails_the_job_and_preemption_does_not_count(overlay):
    job = job_spec(rendered(overlay))
    fail, ignore = job["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"containerName": "node", "operator": "In", "values": [2]}
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert job["template"]["spec"]["restartPolicy"] == "Never", "the API server takes such a policy with no other"
    if overlay != "overlays/kubeflow-trainer":  # whose controller sets it
        assert job["completionMode"] == "Indexed"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_are_as_many_as_ranks_and_only_the_smoke_test_has_none(overlay):
    spec = pod_template(overlay)["spec"]
    resources = spec["containers"][0]["resources"]
    ranks = rendered(overlay)["ConfigMap/esam-settings"]["data"]["RANKS_PER_NODE"]
    if overlay == "overlays/cpu-smoke":
        assert "nvidia.com/gpu" not in str(spec)
        return
    assert resources["limits"]["nvidia.com/gpu"] == ranks
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_loaders_have_shared_memory_in_memory_within_the_pods_own(overlay):
    spec = pod_template(overlay)["spec"]
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "shared-memory")
    assert volume["emptyDir"]["medium"] == "Memory"
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["shared-memory"] == "/dev/shm"
    size, limit = volume["emptyDir"]["sizeLimit"], spec["containers"][0]["resources"]["limits"]["memory"]
    assert int(size.removesuffix("Gi")) >= 1
    assert int(size.removesuffix("Gi")) < int(limit.removesuffix("Gi")), "it counts as memory of the pod"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_placed_and_told_what_nccl_needs(overlay):
    template = pod_template(overlay)
    affinity, labels = template["spec"]["affinity"], template["metadata"]["labels"]
    where = {}
    for kind, terms in affinity.items():
        (term,) = terms["preferredDuringSchedulingIgnoredDuringExecution"]
        where[kind] = term["podAffinityTerm"]["topologyKey"]
        assert term["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= labels.items()
    assert where == {"podAntiAffinity": "kubernetes.io/hostname", "podAffinity": "topology.kubernetes.io/zone"}
    env = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
    assert env["NCCL_SOCKET_IFNAME"] == "eth0"
    assert env["NCCL_DEBUG"] == "WARN"
    assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


def test_claim_of_the_data_can_be_filled_and_the_run_only_reads_it():
    for name in ("esam-data", "esam-runs"):
        claim = rendered("overlays/imagenet")[f"PersistentVolumeClaim/{name}"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = pod_template("overlays/imagenet")["spec"]["containers"][0]["volumeMounts"]
    assert {mount["name"]: mount.get("readOnly", False) for mount in mounts if mount["name"] in ("data", "runs")} == {
        "data": True,
        "runs": False,
    }


@pytest.mark.parametrize("overlay", ["base", "overlays/cpu-smoke", "overlays/imagenet"])
def test_job_size_settings_and_meeting_point_agree(overlay):
    resources = rendered(overlay)
    settings = resources["ConfigMap/esam-settings"]["data"]
    job = resources["Job/esam"]["spec"]
    assert settings["NODES"] == str(job["parallelism"]) == str(job["completions"])
    service = resources["Service/esam"]["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert service["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert job["template"]["spec"]["subdomain"] == "esam"
    assert settings["RENDEZVOUS"] == "esam-0.esam:29500"


def test_smoke_overlay_needs_no_storage_of_the_cluster():
    volumes = {volume["name"]: volume for volume in pod_template("overlays/cpu-smoke")["spec"]["volumes"]}
    assert set(volumes["data"]) == set(volumes["runs"]) == {"name", "emptyDir"}
    assert set(volumes) == {volume["name"] for volume in pod_template("base")["spec"]["volumes"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_metrics_port_per_rank_is_declared_and_scraped(overlay):
    template = pod_template(overlay)
    ranks = int(rendered(overlay)["ConfigMap/esam-settings"]["data"]["RANKS_PER_NODE"])
    ports = {entry["name"]: entry["containerPort"] for entry in template["spec"]["containers"][0]["ports"]}
    assert ports == {f"metrics-{rank}": 9400 + rank for rank in range(ranks)}
    monitor = rendered("overlays/prometheus-operator")["PodMonitor/esam"]["spec"]
    assert set(ports) <= {entry["port"] for entry in monitor["podMetricsEndpoints"]}
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    # with a port named there, that one alone would be scraped
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/path": "/metrics"}
    assert template["metadata"]["annotations"] == ({} if overlay == "overlays/prometheus-operator" else scraped)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policy_closes_all_but_the_run_its_metrics_and_names(overlay):
    policy = rendered(overlay)["NetworkPolicy/esam"]["spec"]
    run = policy["podSelector"]["matchLabels"]
    assert run
    assert run.items() <= pod_template(overlay)["metadata"]["labels"].items()
    own = {"podSelector": {"matchLabels": run}}
    namespace = {
        name: {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
        for name in ("monitoring", "kube-system")
    }
    metrics = [{"protocol": "TCP", "port": 9400, "endPort": 9407}]
    names = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    assert policy == {
        "podSelector": {"matchLabels": run},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [own]}, {"from": [namespace["monitoring"]], "ports": metrics}],
        "egress": [{"to": [own]}, {"to": [namespace["kube-system"]], "ports": names}],
    }


def test_jobset_runs_the_bases_pods_and_its_meeting_point_is_its_pod_zero():
    resources = rendered("overlays/jobset")
    assert "Job/esam" not in resources
    assert "Service/esam" not in resources
    spec = resources["JobSet/esam"]["spec"]
    name, subdomain = spec["replicatedJobs"][0]["name"], spec["network"]["subdomain"]
    assert resources["ConfigMap/esam-settings"]["data"]["RENDEZVOUS"] == f"esam-{name}-0-0.{subdomain}:29500"
    base = pod_template("base")
    copied = pod_template("overlays/jobset")
    assert copied["spec"] == {key: value for key, value in base["spec"].items() if key != "subdomain"}


def test_trainer_runs_the_bases_pods_and_tells_them_the_size():
    resources = rendered("overlays/kubeflow-trainer")
    job = resources["TrainJob/esam"]["spec"]
    assert job["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "esam"}
    runtime = resources["TrainingRuntime/esam"]["spec"]
    replicated = runtime["template"]["spec"]["replicatedJobs"][0]
    step = replicated["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert step == "trainer"
    container = pod_template("overlays/kubeflow-trainer")["spec"]["containers"][0]
    base = pod_template("base")["spec"]["containers"][0]
    assert replicated["name"] == container["name"] == "node"
    assert container["args"][4:] == base["args"][4:]
    assert {k: v for k, v in container.items() if k != "args"} == {k: v for k, v in base.items() if k != "args"}


def one_line(rules):
    """The rules, with every run of white space in a text as one space."""
    if isinstance(rules, dict):
        return {key: one_line(value) for key, value in rules.items()}
    return [one_line(rule) for rule in rules] if isinstance(rules, list) else " ".join(str(rules).split())


def test_prometheus_rule_and_dashboard_are_the_files_of_the_repository():
    resources = rendered("overlays/prometheus-operator")
    rules = yaml.safe_load((ROOT / "launch/prometheus/rules.yaml").read_text())
    # kustomize puts empty lines into long expressions.
    assert one_line(resources["PrometheusRule/esam"]["spec"]) == one_line(rules)
    dashboard = resources["ConfigMap/esam-dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"]["dashboard.json"] == (ROOT / "launch/grafana/dashboard.json").read_text()
