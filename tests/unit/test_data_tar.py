"""Tars that were made to hang, to exhaust, or to deceive their reader: told at once, and counted in a stream."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest

from esam_dist.data.fetch import FetchError, fetch
from esam_dist.data.prepare.existing import scan_shard
from esam_dist.data.tar import BLOCK, contents, members
from tests.prepared import jpeg, picture, refused, tar
from tests.streamed import png, shard, sound
from tests.unit.test_data_stream import streamed

SOUND = dict(sound(40))
END = bytes(2 * BLOCK)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(kind: bytes = tarfile.XHDTYPE, **records: str) -> bytes:
    """A header of PAX records; those of a key stand behind it as they are written."""
    text = b""
    for key, value in records.items():
        record = f" {key}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 9) if n == len(record) + len(str(n)))
        text += str(length).encode() + record
    return header("pax", len(text), kind) + padded(text)


def long_name(name: bytes) -> bytes:
    return header("././@LongLink", len(name), tarfile.GNUTYPE_LONGNAME) + padded(name)


FILE = header("x.png", len(png(3))) + padded(png(3))
HOSTILE = {
    "a negative size": header("x.png", -BLOCK) + FILE,
    "a negative size that leads to the beginning": header("x.png", -(1 << 40)) + FILE,
    "a negative size in PAX": pax(size="-10240") + FILE,
    "a negative size in PAX for all": pax(tarfile.XGLTYPE, size="-512") + FILE,
    "a negative size of PAX records": header("pax", -BLOCK, tarfile.XHDTYPE) + FILE,
    "a negative size of a long name": header("././@LongLink", -BLOCK, tarfile.GNUTYPE_LONGNAME) + FILE,
    "a negative size of an unknown kind": header("x", -BLOCK, b"Z") + FILE,
    "a chain of PAX headers": pax(path="x.png") * 5000 + FILE,
    "a chain of PAX headers for all": pax(tarfile.XGLTYPE, comment="x") * 5000 + FILE,
    "a chain of long names": long_name(b"x.png\0") * 3000 + FILE,
    "a size of 5,000 digits": pax(size="9" * 5000) + FILE,
    "a size that is no number": pax(size="many") + FILE,
    "a size beyond the end": header("x.png", 1 << 60) + FILE,
    "a PAX record of length 0": header("pax", 6, tarfile.XHDTYPE) + padded(b"0 a=b\n") + FILE,
    "a PAX record that is longer than its header": header("pax", 7, tarfile.XHDTYPE) + padded(b"99 a=b\n") + FILE,
    "a PAX header that is not there whole": header("pax", 1 << 19, tarfile.XHDTYPE) + FILE,
    "a PAX header of megabytes": pax(comment="x" * (3 << 20)) + FILE,
    "a sparse file of terabytes": pax(**{"GNU.sparse.size": str(1 << 42), "GNU.sparse.numblocks": "0"}) + FILE,
    "an old sparse file": header("x.png", BLOCK, tarfile.GNUTYPE_SPARSE) + bytes(BLOCK),
}
BEFORE = tar(SOUND)
BEFORE = BEFORE[: len(BEFORE.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_told_with_its_place(kind):
    with pytest.raises(tarfile.ReadError, match=f"^cut short or damaged at byte {len(BEFORE)}$"):
        list(members(io.BytesIO(BEFORE + HOSTILE[kind] + END)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_of_a_stream_is_broken_and_the_run_goes_on(digits, tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(BEFORE + HOSTILE[kind] + END)
    (tmp_path / "1.tar").write_bytes(gzip.compress(BEFORE + HOSTILE[kind] + END, 1))
    for number in (2, 3):
        shard(tmp_path / f"{number}.tar", sound(90))
    data, batches = streamed(digits, f"{tmp_path}/{{0..3}}.tar", 20, stream_tries=1, max_skipped=1.0)
    assert len(batches) == 20
    assert set(data.skipped) == {"broken_shard"}
    assert data._skipped._named == {f"{tmp_path}/{number}.tar" for number in (0, 1)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_refused_where_shards_are_indexed(tmp_path, kind):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(BEFORE + HOSTILE[kind] + END)
    assert f"cut short or damaged at byte {len(BEFORE)}" in refused("index", tmp_path)


def test_a_shard_that_was_damaged_in_the_cache_is_broken_and_the_run_goes_on(digits, tmp_path):
    cache = tmp_path / "cache"
    for number in range(3):
        shard(tmp_path / f"{number}.tar", sound(90), "w:gz" if number == 2 else "w")
    streamed(digits, f"{tmp_path}/{{0..2}}.tar", 20, stream_cache=cache)
    *_, plain, packed = sorted(cache.iterdir(), key=lambda path: path.read_bytes()[:2] == b"\x1f\x8b")
    for path in (plain, packed):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
    data, batches = streamed(digits, f"{tmp_path}/{{0..2}}.tar", 20, stream_cache=cache, max_skipped=1.0)
    assert len(batches) == 20
    assert set(data.skipped) == {"broken_shard"}


NAMES = [
    "short.png",
    f"{'n' * 150}.png",
    f"{'d' * 120}/{'n' * 40}.png",
    "\u00e4\u00f6.png",
    f"{'d' * 90}/{'n' * 60}.png",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_names_and_contents_are_those_that_tarfile_reads(tmp_path, form, pack):
    file = io.BytesIO()
    names = NAMES if form != tarfile.USTAR_FORMAT else [NAMES[0], NAMES[4]]
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "for all"}) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.linkname = 400 * number, 1.5, "x" * 120 if form == tarfile.GNU_FORMAT else ""
            archive.addfile(info, io.BytesIO(bytes([number]) * 400 * number))
            link = tarfile.TarInfo(f"link to {name}"[:90])
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    assert list(contents(io.BytesIO(pack(file.getvalue())))) == [
        (name, bytes([number]) * 400 * number) for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", ["BZhouse.png", "\x1f\x8b.png"])
def test_a_name_that_looks_like_a_compressed_file_is_a_name(name):
    assert [found for found, _ in contents(io.BytesIO(tar({name: b"x"})))] == [name]


def test_two_tars_in_one_file_are_no_whole_shard(tmp_path):
    # Of the second one, nothing would be read.
    (tmp_path / "0.tar").write_bytes(tar(SOUND) * 2)
    with pytest.raises(FetchError, match="is no whole tar"):
        fetch(str(tmp_path / "0.tar"), tries=1)


def test_resource_forks_of_macos_are_no_images_of_a_shard(tmp_path):
    image = jpeg(picture(0, 0))
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(
            tar({"a.jpg": image, "._a.jpg": b"fork", "a.cls": b"0", "._a.cls": b"fork", "x/._b.jpg": b"fork"})
        )
    assert len(scan_shard(tmp_path / "train" / "0.tar")) == 1
