"""What `esam-dist launch --with kubernetes` prints: an overlay with the sizes, image and configuration of one job."""

import argparse

import kubernetes_validate
import pytest
import yaml
from servers import tool
from test_kubernetes_files import CUSTOM, FOLDER, OVERLAYS, job_spec, rendered

from esam_dist import launch


def render(capsys, path, *options):
    """{kind/name: resource} that `esam-dist launch` prints."""
    tool("kubectl")
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    assert launch.run(parser.parse_args(["--with=kubernetes", *options, str(path)])) == 0
    resources = yaml.safe_load_all(capsys.readouterr().out)
    return {f"{resource['kind']}/{resource['metadata']['name']}": resource for resource in resources}


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}\n")
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("overlay", ["base", "cpu-smoke", "imagenet", "jobset", "kubeflow-trainer"])
def test_launch_renders_the_job_for_one_config(overlay, mine, capsys):
    options = [f"--overlay={overlay}", "--nnodes=5", "--nproc-per-node=4", "--max-restarts=9", "--grace=600"]
    resources = render(capsys, mine, *options, "--image=host:5000/esam:7", "--namespace=train")
    assert {resource["metadata"]["namespace"] for resource in resources.values()} == {"train"}
    assert "epochs: 3" in resources["ConfigMap/esam-config"]["data"]["config.yaml"]
    settings = resources["ConfigMap/esam-settings"]["data"]
    assert (settings["NODES"], settings["RANKS_PER_NODE"], settings["MAX_RESTARTS"]) == ("5", "4", "9")
    job = job_spec(resources)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "host:5000/esam:7"
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (None if overlay == "cpu-smoke" else "4")
    assert [entry["name"] for entry in container["ports"]] == [f"metrics-{rank}" for rank in range(4)]
    assert "--grace=600" in container["args"]
    assert pod["terminationGracePeriodSeconds"] == 630
    if overlay == "kubeflow-trainer":
        assert resources["TrainJob/esam"]["spec"]["trainer"] == {"numNodes": 5, "numProcPerNode": 4}
    else:
        assert (job["parallelism"], job["completions"]) == (5, 5)
    for resource in resources.values():
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, "1.32", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_launch_leaves_an_overlays_sizes_where_none_are_given(overlay, mine, capsys):
    resources = render(capsys, mine, f"--overlay={FOLDER / overlay}")
    config_map = resources.pop("ConfigMap/esam-config")
    assert "epochs: 3" in config_map["data"]["config.yaml"]
    assert resources == {name: value for name, value in rendered(overlay).items() if name != "ConfigMap/esam-config"}
