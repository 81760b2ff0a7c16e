"""The files that the image is made of: linted, complete, and nothing else."""

import contextlib
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import PurePosixPath

import pytest
from servers import ROOT, free_ports, tool


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


def test_image_is_made_of_what_the_dockerfile_copies_and_the_builder_gets_nothing_else():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rules = [line for line in lines if line and not line.startswith("#")]
    assert first == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    copied = " ".join(copies).split()
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(PurePosixPath(source).match(rule) for rule in let_in), f"{source} does not reach the builder"
    for rule in let_in:
        assert any(PurePosixPath(source).match(rule) for source in copied), f"{rule} is in no image"
    assert "**/__pycache__" in rules


@pytest.mark.parametrize(("answer", "healthy"), [(None, True), (200, True), (503, False)])
def test_health_check_fails_where_the_endpoint_says_so_and_passes_where_there_is_none(answer, healthy):
    text = (ROOT / "docker/Dockerfile").read_text()
    exposed = re.search(r"^EXPOSE (\d+)", text, re.MULTILINE)[1]
    command = json.loads(re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    asked = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *words):
            pass

    with contextlib.ExitStack() as stack:
        port = free_ports(1)
        if answer:
            server = stack.enter_context(http.server.HTTPServer(("127.0.0.1", port), Endpoint))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        words = [sys.executable, *(word.replace(exposed, str(port)) for word in command[1:])]
        done = subprocess.run(words, check=False, capture_output=True, timeout=60)
    assert (done.returncode == 0) == healthy, done.stderr
    assert asked == (["/healthz"] if answer else [])
