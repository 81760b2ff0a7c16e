"""The image, built and run for real, without a Docker engine and without an image registry."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import ROOT, tool

WRITABLE = ["/mnt/runs", "/tmp", "/var/tmp", "/run/lock", "/dev/shm", "/dev/mqueue"]

# What an engine mounts: temporary folders, the names of hosts, the volumes. No network: nothing is to be reached.
READ_ONLY = """
touch {root}/etc/hosts
mount --bind {root} {root}
mount -o remount,bind,ro {root}
mount -t tmpfs tmpfs {root}/tmp
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount --bind {hosts} {root}/etc/hosts
mount --bind {runs} {root}/mnt/runs
mount --bind {data} {root}/mnt/data
mount -o remount,bind,ro {root}/mnt/data
ip link set lo up
inside=({inside})
exec 2>&1
{script}
"""
# The job is process 1 of a namespace, which no signal without a handler ends. The health check passes where nobody
# listens yet (test_container_files.py sees it fail) and while the job trains; SIGTERM then ends it in order.
TRAIN = """
"${{inside[@]}}" touch /var/tmp/new && exit 1
"${{inside[@]}}" {health}
unshare --pid --fork --kill-child "${{inside[@]}}" esam-dist launch --nproc-per-node=2 configs/digits_esam.yaml \\
    data.path=/mnt/data run.folder=/mnt/runs/digits metrics.port=9400 train.log_every=2 train.max_steps=100000 &
until grep -qs train {rows}; do sleep 1; kill -0 $!; done
"${{inside[@]}}" {health}
"${{inside[@]}}" python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:9400/healthz', timeout=10)"
kill -TERM $(cat /proc/$!/task/$!/children)
wait $!
"""


class Image:
    """buildah with a storage of its own, and one container of the image."""

    def __init__(self, folder):
        roots = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]
        self.buildah = [tool("buildah"), *roots]
        # overlay shares the files of the layers, vfs copies all of them for each; not every file system can be overlaid
        probe = [*self.buildah, "--storage-driver=overlay", "info"]
        overlay = subprocess.run(probe, check=False, capture_output=True, timeout=60).returncode == 0
        self.buildah.append(f"--storage-driver={'overlay' if overlay else 'vfs'}")
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

    def run(self, *command):
        words = [*self.buildah, "run", "--isolation=chroot", "--network=host", self.container, "--", *command]
        return subprocess.run(words, check=False, capture_output=True, text=True, timeout=600)

    def settings(self):
        """User, environment, entry point, health check and ports, as an engine reads them."""
        return json.loads(self("inspect", "--type=image", "localhost/esam-dist"))["Docker"]["config"]

    def run_read_only(self, script, runs, data):
        """Run the shell's `script` as an engine would run the image with --read-only, --tmpfs /tmp and no network.

        In it the array `inside` begins a command in the container, as its user and in its environment.
        """
        settings = self.settings()
        inside = ["chroot", f"--userspec={settings['User']}", self("mount", self.container), "env", "-i"]
        inside += [*settings["Env"], "sh", "-c", f'cd {settings["WorkingDir"]} && exec "$@"', "sh"]
        hosts = self.folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n")
        places = {"root": inside[2], "hosts": hosts, "runs": runs, "data": data}
        text = READ_ONLY.format(**places, inside=shlex.join(inside), script=script)
        words = ["unshare", "--mount-proc", "--net", "--pid", "--fork", "--kill-child", "bash", "-euc", text]
        try:
            return subprocess.run(words, check=False, capture_output=True, text=True, timeout=600)
        finally:
            self("umount", self.container)

    def remove(self):
        """Delete all; the overlay driver leaves its folder mounted on itself."""
        subprocess.run(["umount", self.folder / "storage/overlay"], check=False, capture_output=True)
        shutil.rmtree(self.folder)


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
    built.remove()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_image_says_what_it_is_and_its_user_can_write_to_the_runs_only(image):
    settings = image.settings()
    assert settings["User"] == "10001:10001"
    assert settings["Entrypoint"] == ["esam-dist"]
    assert set(settings["ExposedPorts"]) == {"9400/tcp", "29500/tcp"}
    assert image.run("id", "-u").stdout.strip() == "10001"
    found = image.run("find", "/", "-xdev", "-writable", "-type", "d", "-not", "-path", "/proc/*")
    assert "/mnt/runs" in found.stdout.split(), found.stderr
    inside = [path for path in found.stdout.split() if not path.startswith(tuple(WRITABLE))]
    assert not inside, "the user can write elsewhere"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_image_trains_on_a_read_only_root_and_its_health_check_sees_it(image, digits, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 10001, 10001)
    health = shlex.join(image.settings()["Healthcheck"]["Test"][1:])
    script = TRAIN.format(health=health, rows=runs / "digits/metrics.jsonl")
    done = image.run_read_only(script, runs, digits / "data")
    assert done.returncode == 143, done.stdout[-3000:] + done.stderr[-3000:]
    assert "/var/tmp/new: Read-only file system" in done.stdout.replace("'", "")
    rows = [json.loads(line) for line in (runs / "digits/metrics.jsonl").read_text().splitlines()]
    step = max(row["step"] for row in rows)
    assert (runs / f"digits/checkpoints/step_{step:08d}").is_dir()
    assert (runs / "digits/config.yaml").stat().st_uid == 10001


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_image_tells_a_user_error_in_one_line(image):
    wrong = image.run("esam-dist", "launch", "configs/digits_esam.yaml", "method.gamma=2")
    assert wrong.returncode == 2
    assert "method.gamma" in wrong.stderr
    assert "Traceback" not in wrong.stderr
