"""The image: linted; then built and run for real, without a Docker engine and without an image registry."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import ROOT, tool

WRITABLE = ["/mnt/runs", "/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/dev/mqueue"]


def test_dockerfile_passes_the_linter():
    done = subprocess.run(
        [tool("hadolint"), str(ROOT / "docker/Dockerfile")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_requirements_are_the_tested_versions_and_cover_the_dependencies():
    lines = [
        line.split("#")[0].strip().lower().replace("_", "-")
        for name in ("requirements-torch.txt", "requirements.txt")
        for line in (ROOT / "docker" / name).read_text().splitlines()
    ]
    pinned = {line for line in lines if line}
    assert pinned <= {line.strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    text = (ROOT / "pyproject.toml").read_text()
    declared = text[text.index("dependencies = [") : text.index("]", text.index("dependencies = ["))]
    wanted = {line.strip(' ",').split(">")[0].lower() for line in declared.splitlines()[1:] if line.strip()}
    assert wanted <= {line.partition("==")[0] for line in pinned}


class Image:
    """buildah with a storage of its own, and one container of the image."""

    def __init__(self, folder):
        roots = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]
        self.buildah = [tool("buildah"), *roots, "--storage-driver=vfs"]
        self.folder = folder
        self.container = ""

    def __call__(self, *words, timeout=1200):
        done = subprocess.run([*self.buildah, *words], check=False, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def base(self):
        """A Debian of this machine's own making, in place of a registry's."""
        packages = "ca-certificates,python3,python3-venv,python3-pip"
        tar = self.folder / "base.tar"
        command = [tool("mmdebstrap"), "--variant=minbase", f"--include={packages}", "bookworm", str(tar)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        container = self("from", "scratch")
        self("add", container, str(tar), "/")
        self("commit", "--rm", container, "localhost/base")

    def build(self):
        """The Dockerfile as it is; certificates and pip's settings are those of this machine."""
        shared = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]
        options = [f"--volume={path}:{path}:ro" for path in shared]
        options += ["--isolation=chroot", "--format=docker", "--network=host", "--build-arg=BASE_IMAGE=localhost/base"]
        self("bud", *options, f"--file={ROOT / 'docker/Dockerfile'}", "--tag=localhost/esam-dist", str(ROOT))
        self.container = self("from", "--pull-never", "localhost/esam-dist")

    def run(self, *command, volumes=()):
        options = ["--isolation=chroot", "--network=host", *(f"--volume={volume}" for volume in volumes)]
        words = [*self.buildah, "run", *options, self.container, "--", *command]
        return subprocess.run(words, check=False, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if os.geteuid():
        pytest.skip("building with --isolation chroot needs root")
    folder = tmp_path_factory.mktemp("image")
    if shutil.disk_usage(folder).free < 40e9:
        pytest.skip("the image and its stages need 40 GB of disk")
    built = Image(folder)
    tool("mmdebstrap")
    built.base()
    built.build()
    yield built
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_image_trains_as_a_user_who_can_write_to_the_runs_only(image, digits, tmp_path):
    found = image.run("find", "/", "-xdev", "-writable", "-type", "d", "-not", "-path", "/proc/*")
    inside = [path for path in found.stdout.split() if not path.startswith(tuple(WRITABLE))]
    assert not inside, "the user can write elsewhere"
    assert image.run("id", "-u").stdout.strip() == "10001"

    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 10001, 10001)
    volumes = [f"{runs}:/mnt/runs", f"{digits / 'data'}:/mnt/data:ro"]
    options = ["launch", "--nproc-per-node=2", "configs/digits_esam.yaml", "data.path=/mnt/data"]
    done = image.run("esam-dist", *options, "run.folder=/mnt/runs/digits", "train.max_steps=4", volumes=volumes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (runs / "digits/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert (runs / "digits/config.yaml").stat().st_uid == 10001

    wrong = image.run("esam-dist", *options, "run.folder=/mnt/runs/wrong", "method.gamma=2", volumes=volumes)
    assert wrong.returncode == 2
    assert "method.gamma" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_image_says_what_it_is(image):
    described = json.loads(image("inspect", "--type=image", "localhost/esam-dist"))
    docker = described["Docker"]["config"]
    assert docker["User"] == "10001:10001"
    assert docker["Entrypoint"] == ["esam-dist"]
    assert "/healthz" in docker["Healthcheck"]["Test"][-1]
    assert set(docker["ExposedPorts"]) == {"9400/tcp", "29500/tcp"}
