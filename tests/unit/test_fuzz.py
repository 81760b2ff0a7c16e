"""Whatever is read, only a documented error comes out, in bounded time and memory: sound inputs, and mutations of them.

The same targets run under a fuzzer by command (`python -m benchmarks.fuzz`).
"""

from __future__ import annotations

import gzip
import io
import logging
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.targets import TARGETS, Target, attempt
from esam_dist import config
from esam_dist.data.jpeg import Edges, cut, read_header
from esam_dist.data.tar import check_whole, contents
from esam_dist.errors import UserError
from tests.prepared import jpeg, picture, tar

# A sparse tensor in a checkpoint makes torch say that it looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    logging.disable()
    yield TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    logging.disable(logging.NOTSET)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), max_size=4)


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """`data` with some bytes replaced, removed or put in, at places given as shares."""
    for share, length, instead in edits:
        place = int(share * len(data))
        data = data[:place] + instead + data[place + length :]
    return data


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_only_documented_errors_come_out(target: Target, data: st.DataObject) -> None:
    seeds = target.seeds()
    seed = seeds[data.draw(st.integers(0, len(seeds) - 1))]
    attempt(target, edited(seed, data.draw(EDITS)))


def test_sound_inputs_are_taken(target: Target) -> None:
    assert sum(attempt(target, seed) for seed in target.seeds()[:5]) >= 2


class Broken:
    allowed, modules, memory_bytes = (ValueError,), (), 1 << 24

    def seeds(self) -> list[bytes]:
        return []

    def run(self, data: bytes) -> None:
        if data == b"memory":
            len(bytearray(b"x") * (1 << 27))
        raise {b"key": KeyError("x"), b"lines": ValueError("a\nb")}.get(data, ValueError("one line"))


@pytest.mark.parametrize(("data", "error"), [(b"key", KeyError), (b"lines", AssertionError)])
def test_what_is_not_documented_is_found(data: bytes, error: type[Exception]) -> None:
    assert not attempt(Broken(), b"")
    with pytest.raises(error):
        attempt(Broken(), data)


# What was found, and what is bounded since.


def bomb(files: dict[str, bytes], zeros: int) -> bytes:
    """A tar in gzip, which goes on with so many MiB of zeros in a thousandth of the room."""
    return gzip.compress(tar(files), 1) + gzip.compress(bytes(1 << 20), 9) * zeros


@pytest.mark.parametrize("read", [lambda file: list(contents(file)), check_whole], ids=["contents", "check_whole"])
def test_a_bomb_in_gzip_is_refused_at_its_bound(read) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(tarfile.ReadError, match=r"^decompresses to more than 67\d{6} bytes, 32 times its size$"):
        read(io.BytesIO(bomb({"0.png": b"x", "0.cls": b"1"}, 2000)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


@pytest.mark.parametrize("size", [1 << 27, 1 << 60])
def test_a_file_that_claims_a_bomb_for_itself_is_refused(size: int) -> None:
    info = tarfile.TarInfo("0.png")
    info.size = size
    data = gzip.compress(info.tobuf(tarfile.GNU_FORMAT), 1) + gzip.compress(bytes(1 << 20), 9) * 200
    with pytest.raises(tarfile.ReadError, match=r"decompresses to more than|images are smaller"):
        list(contents(io.BytesIO(data)))


def test_an_archive_that_gains_little_may_be_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esam_dist.data.tar._FREE_BYTES", 1 << 10)
    random = Random(0)
    files = {f"{number}.png": random.randbytes(1000) for number in range(20)}
    assert dict(contents(io.BytesIO(gzip.compress(tar(files))))) == files


@pytest.mark.parametrize(
    "override",
    [
        "method.nam\0\0=sam",
        "method.\udce5.rho=1",
        "met\udce5hod.name=sam",
        "method.name={shs: 90}",
        "method.name=[1]",
        "optim.l\u2028r=1",
        "optim.\x1b[31mlr=1",
    ],
)
@pytest.mark.parametrize("content", ["", "method: {name: [1, 2]}", "method: {name: {a: 1}}"])
def test_an_odd_override_is_refused_in_one_line(tmp_path: Path, content: str, override: str) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        config.load(path, [override])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["a\u2028b", "a\u200bb", "nam\x85e"])
def test_an_odd_key_of_a_file_is_shown_in_one_line(tmp_path: Path, key: str) -> None:
    path = tmp_path / "given.yaml"
    for content in (f'method: {{"{key}": 1}}', f'"{key}": {{a: 1}}', f'optim: {{"{key}": 1}}'):
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            config.load(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("wanted", [Edges(0, 900, 8, 908), Edges(900, 0, 908, 8), Edges(900, 900, 1000, 1000)])
def test_a_jpeg_is_left_whole_where_what_is_wanted_lies_outside(wanted: Edges) -> None:
    data = jpeg(picture(1, 2, (64, 48)), restart_marker_blocks=1)
    header = read_header(data)
    assert header is not None
    assert header.restart
    assert cut(data, header, wanted).data is data
