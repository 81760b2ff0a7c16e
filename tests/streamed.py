"""Shards for the tests of streaming, and a server that gives them out badly."""

import contextlib
import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image


class Flaky(BaseHTTPRequestHandler):
    """Serves a folder; of each file the first answers are faults, the later ones whole.

    A fault is a status; `half` of what is announced; `unannounced`, half of what is not; a `page` of words; or `slow`.
    Faults by turns over all files would not do: of two workers, one could meet nothing else.
    """

    def __init__(self, root: Path, faults: dict[str, Iterator[str]], counts: Counter, lock: threading.Lock, *args):
        self.root, self.faults, self.counts, self.lock = root, faults, counts, lock
        super().__init__(*args)

    def do_GET(self):
        path = self.root / self.path.lstrip("/")
        with self.lock:
            fault = next(self.faults[self.path], "ok") if path.exists() else "404"
            self.counts[fault] += 1
        if fault.isdigit():
            self.send_error(int(fault))
            return
        data = b"<html>please log in</html>" if fault == "page" else path.read_bytes()
        self.send_response(200)
        if fault != "unannounced":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        if fault == "slow":
            time.sleep(0.2)
        if fault not in ("half", "unannounced"):
            self.wfile.write(data[len(data) // 2 :])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def server(root: Path, faults: list[str]):
    counts: Counter[str] = Counter()
    each = {f"/{path.name}": iter(faults) for path in root.iterdir()}
    handler = partial(Flaky, root, each, counts, threading.Lock())
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}", counts
        finally:
            served.shutdown()
            thread.join()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sound(count: int) -> list[tuple[str, bytes]]:
    """Members of so many samples."""
    return [part for n in range(count) for part in ((f"{n}.png", png(n)), (f"{n}.cls", b"1"))]
