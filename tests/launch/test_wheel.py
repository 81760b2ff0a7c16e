"""A wheel is enough: built from this tree, installed into an environment of its own, used in an empty folder."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import yaml
from servers import ROOT, tool

from esam_dist import launch

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
FILES = "esam_dist/launch/files"


def files(folder):
    """Every file below `folder` that is not a leftover of Python's, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel; built from a copy, as setuptools writes beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("esam_dist", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, out], check=True, cwd=source, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of an environment that has the wheel, in an empty folder of the environment's own."""
    root, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    venv.create(root, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(root / "bin/python")]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=120
    )
    # Only now: else pip would find this tree's own installation there. What a .pth in that folder adds stays out.
    packages = next(root.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words):
        command = [str(root / "bin" / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=env, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    assert run("python", "-c", "import esam_dist; print(esam_dist.__file__)").startswith(str(root))
    return run


def test_wheel_holds_every_package_and_every_file_of_launch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"esam_dist/{name}" for name in files(ROOT / "esam_dist")}
    expected |= {f"{FILES}/{name}" for name in files(ROOT / "launch")}
    expected |= {f"esam_dist/guide/files/{name}" for name in files(ROOT / "configs")}
    assert held == expected, "a new package belongs into `packages` of pyproject.toml"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--with=kubernetes", "--overlay=jobset"], ["--with=slurm", "--nnodes=2"]])
def test_installed_manifests_and_slurm_script_are_rendered_as_in_the_source_tree(run, options, capsys, monkeypatch):
    tool("kubectl")
    (run.folder / "run.yaml").write_text((ROOT / "configs/digits_esam.yaml").read_text())
    words = [*options, "run.yaml", "train.epochs=3"]
    printed = run("esam-dist", "launch", *words)
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    monkeypatch.chdir(run.folder)
    assert launch.run(parser.parse_args(words)) == 0
    assert printed == capsys.readouterr().out


@pytest.mark.slow
def test_installed_recipes_are_those_of_the_source_tree(run):
    assert run("esam-dist", "recipes", "digits_esam") == (ROOT / "configs/digits_esam.yaml").read_text()


@pytest.mark.slow
def test_installed_wheel_prepares_and_trains(run):
    run("esam-dist", "prepare", "digits", "data/digits")
    values = yaml.safe_load((ROOT / "configs/digits_esam.yaml").read_text())
    values["data"] |= {"batch_size": 16, "image_size": 16, "workers": 0}
    (run.folder / "run.yaml").write_text(yaml.safe_dump(values))
    words = ["--standalone", "--nproc-per-node=2", "-m", "esam_dist", "train", "run.yaml"]
    run("python", "-m", "torch.distributed.run", *words, "train.max_steps=3", "train.log_every=1")
    rows = [json.loads(line) for line in (run.folder / "runs/digits_esam/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
