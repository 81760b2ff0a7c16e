"""What `esam-dist launch --with kubernetes` changes in an overlay: each number everywhere that it stands."""

import copy
import shutil

import pytest
import yaml

from esam_dist import config
from esam_dist.errors import UserError
from esam_dist.launch import arguments, kubernetes
from esam_dist.launch.sizes import Sizes, resize
from tests.jobs import parsed

POD = {
    "containers": [
        {
            "name": "node",
            "args": ["--nnodes=$(NODES)", "--grace=300"],
            "ports": [{"name": "metrics-0", "containerPort": 9400}],
            "resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "16Gi", "nvidia.com/gpu": 1}},
        }
    ],
    "terminationGracePeriodSeconds": 330,
    "volumes": [{"name": "shared-memory", "emptyDir": {"sizeLimit": "8Gi"}}],
}
OVERLAY = [
    {"kind": "ConfigMap", "data": {"config.yaml": "train: {}\n"}},
    {"kind": "ConfigMap", "data": {"NODES": "2", "RANKS_PER_NODE": "1", "MAX_RESTARTS": "3"}},
    {"kind": "NetworkPolicy", "spec": {"ingress": [{"from": []}, {"ports": [{"port": 9400, "endPort": 9407}]}]}},
    {"kind": "Job", "spec": {"parallelism": 2, "completions": 2, "template": {"spec": POD}}},
    {"kind": "Job", "spec": {"template": {"spec": {"containers": [{"name": "another"}]}}}},
]
AS_IT_IS = Sizes(nodes=None, ranks_per_node=None, max_restarts=None, grace_seconds=None)


def resized(**given):
    resources = copy.deepcopy(OVERLAY)
    resize(resources, Sizes(**(vars(AS_IT_IS) | given)))
    return resources


def test_what_is_not_given_stays_as_the_overlay_says():
    assert resized() == OVERLAY


@pytest.mark.parametrize("quantity", ["", "much", "-1", "1.2.3", "16 Gi"])
def test_a_quantity_that_cannot_be_scaled_is_refused(quantity):
    resources = copy.deepcopy(OVERLAY)
    resources[3]["spec"]["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] = quantity
    with pytest.raises(UserError, match=f"--overlay: '{quantity}' is no quantity that goes with the ranks; write it"):
        resize(resources, Sizes(**(vars(AS_IT_IS) | {"ranks_per_node": 2})))


def test_ranks_bring_their_gpus_cpus_memory_and_ports():
    _, settings, policy, job, another = resized(ranks_per_node=8)
    assert settings["data"] == {"NODES": "2", "RANKS_PER_NODE": "8", "MAX_RESTARTS": "3"}
    assert policy["spec"]["ingress"][1]["ports"] == [{"port": 9400, "endPort": 9407}]
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"] == {
        "requests": {"cpu": "4000m"},
        "limits": {"memory": "128Gi", "nvidia.com/gpu": "8"},
    }
    assert [port["containerPort"] for port in container["ports"]] == list(range(9400, 9408))
    assert pod["volumes"][0]["emptyDir"]["sizeLimit"] == "64Gi"
    assert another == OVERLAY[4]
    assert resized(ranks_per_node=3)[2]["spec"]["ingress"][1]["ports"] == [{"port": 9400, "endPort": 9402}]


def test_nodes_restarts_and_grace_are_changed_wherever_they_stand():
    _, settings, _, job, _ = resized(nodes=5, max_restarts=0, grace_seconds=60)
    assert settings["data"] == {"NODES": "5", "RANKS_PER_NODE": "1", "MAX_RESTARTS": "0"}
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (5, 5)
    pod = job["spec"]["template"]["spec"]
    assert "--grace=60" in pod["containers"][0]["args"]
    assert pod["terminationGracePeriodSeconds"] == 90


def test_overlay_without_the_bases_settings_is_refused():
    with pytest.raises(UserError, match="no ConfigMap with RANKS_PER_NODE"):
        resize([OVERLAY[0]], AS_IT_IS)


def test_image_and_namespace_are_the_jobs_own():
    values = kubernetes.kustomization("../base", "host:5000/esam:1.2", "train")
    assert values["images"] == [{"name": "esam-dist", "newName": "host:5000/esam", "newTag": "1.2"}]
    assert values["namespace"] == "train"
    assert "namespace" not in kubernetes.kustomization("../base", None, None)


def test_texts_of_several_lines_are_written_as_they_are():
    text = yaml.dump({"a": "x: 1\ny: 2\n", "b": "9400"}, Dumper=kubernetes._Blocks)
    assert text == "a: |\n  x: 1\n  y: 2\nb: '9400'\n"


def rendered(*options):
    args = parsed("--with=kubernetes", *options)
    return kubernetes.render(args, arguments.job(args), config.Config())


def test_unknown_overlay_names_those_there_are():
    with pytest.raises(UserError, match=r"--overlay moon: is none of .*jobset.*kubeflow-trainer"):
        rendered("--overlay=moon")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_elastic_job_is_refused():
    with pytest.raises(UserError, match="--nnodes 1:4: a Kubernetes job has a fixed size"):
        rendered("--nnodes=1:4")
