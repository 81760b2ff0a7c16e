"""The report in a real browser: complete, without an error, and drawn within the page."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from servers import ROOT, tool

from esam_dist import findings
from esam_dist.compare import page
from esam_dist.compare.study import Method, Study

sys.path.insert(0, str(ROOT / "tests/unit"))
from test_report import write_run
from test_report_evaluations import evaluation
from test_study import COSTS, RESULTS, table

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET = "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=2000 --enable-logging=stderr"
# A page without script cannot measure itself: a frame around it does.
FRAME = """<!doctype html><pre id="out"></pre><script>
function measure(frame) {{
  const page = frame.contentDocument, box = element => element.getBoundingClientRect();
  document.getElementById("out").textContent = [
    "overflow", page.documentElement.scrollWidth > {width},
    "lines", [...page.querySelectorAll(".line")].filter(e => box(e).width > 50).length,
    "bands", [...page.querySelectorAll(".band")].filter(e => box(e).height > 0).length,
    "outside", [...page.querySelectorAll("svg :not(title)")].filter(e => e.ownerSVGElement
       && (box(e).right > box(e.ownerSVGElement).right + 1 || box(e).left < box(e.ownerSVGElement).left - 1)).length,
  ].join(" ");
}}
</script><iframe src="report.html" style="width:{width}px;height:900px" frameborder="0" onload="measure(this)">
</iframe>"""


@pytest.fixture
def site(tmp_path):
    """The address of a server of `tmp_path` on loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 360])
def test_browser_draws_every_curve_and_band_inside_the_page(tmp_path, site, width):
    folders = [tmp_path / f"{m}-{s}" for m in ("sgd", "esam") for s in range(3)]
    for folder in folders:
        method, _, seed = folder.name.partition("-")
        write_run(folder, method=method, seed=int(seed), offset=0.01 * int(seed), restarts=int(seed))
    names = ["a long name of a class", "\u4e00\u4e8c\u4e09", *"abcdefgh"]
    findings.write(folders[0] / "evaluation.json", evaluation(names))
    report = [sys.executable, "-m", "esam_dist", "report", *map(str, folders), f"--out={tmp_path / 'report.html'}"]
    done = subprocess.run(report, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0.9100 ± 0.0248" in done.stdout
    assert measured(tmp_path, site, width) == "overflow false lines 20 bands 6 outside 0"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 360])
def test_browser_draws_a_comparison_inside_the_page(tmp_path, site, width):
    methods = {name: Method(overrides={"method.name": name}) for name in ("sgd", "sam")}
    declared = Study(base=Path("x"), folder=Path("x"), methods=methods, budgets=[1.0, 3.0], seeds=[0, 1, 2])
    found = page.page(declared, table(RESULTS), [], {}, COSTS)
    (tmp_path / "report.html").write_text(found)
    assert measured(tmp_path, site, width) == "overflow false lines 3 bands 2 outside 0"


def measured(tmp_path, site, width):
    """What a browser of that width sees of `report.html`, without an error on its console."""
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    flags = [*FLAGS.split(), *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command = [tool("chromium"), *flags, "--dump-dom", f"{site}/frame.html"]
    shown = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="out">(.*?)</pre>', shown.stdout)
    assert found, shown.stdout[-500:]
    assert "CONSOLE" not in shown.stderr
    return found[1]
