"""Archives: resumable downloads, checksums, and unpacking completely or not at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from splitformer.corpora.archives import ArchiveError, fetch, unpack_gzip, unpack_tar

CONTENT = np.random.default_rng(0).bytes(100_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT and ranges of it, as OpenSLR does."""

    ranges: list[int] = []  # noqa: RUF012  # of the class: a handler lives for one request

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.ranges.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.ranges.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/corpus.tar.gz"
    server.shutdown()
    thread.join()
    server.server_close()


def make_tar(path: Path, entries: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, entry in entries.items():
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(entry)
                tar.addfile(info, io.BytesIO(entry))
    return path


def test_a_download_creates_the_file_alone(tmp_path: Path, url: str) -> None:
    archive = fetch(url, tmp_path / "new" / "corpus.tar.gz", MD5)
    assert archive.read_bytes() == CONTENT
    assert [p.name for p in archive.parent.iterdir()] == ["corpus.tar.gz"]


def test_a_download_resumes(tmp_path: Path, url: str) -> None:
    (tmp_path / "corpus.tar.gz.part").write_bytes(CONTENT[:40_000])
    assert fetch(url, tmp_path / "corpus.tar.gz", MD5).read_bytes() == CONTENT
    assert Server.ranges == [40_000]


def test_a_download_with_another_checksum_is_removed(tmp_path: Path, url: str) -> None:
    with pytest.raises(ArchiveError, match=f"has md5 {MD5}, expected 00"):
        fetch(url, tmp_path / "corpus.tar.gz", "00")
    assert not list(tmp_path.iterdir())


def test_an_existing_archive_is_not_downloaded(tmp_path: Path, url: str) -> None:
    (tmp_path / "corpus.tar.gz").write_bytes(CONTENT)
    fetch(url, tmp_path / "corpus.tar.gz", MD5)
    assert Server.ranges == []


def test_a_truncated_archive_is_named_with_its_size_and_kept(tmp_path: Path) -> None:
    archive = tmp_path / "corpus.tar.gz"
    archive.write_bytes(CONTENT[:99])
    with pytest.raises(ArchiveError, match=r"corpus\.tar\.gz \(99 bytes\) is truncated or another file: its md5 is"):
        fetch("http://localhost/", archive, MD5)
    assert archive.stat().st_size == 99


def test_a_missing_archive_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"there is no .*corpus\.tar\.gz.*--download-dir"):
        fetch("http://127.0.0.1:1/corpus.tar.gz", tmp_path / "corpus.tar.gz", MD5)


def test_only_the_member_is_unpacked(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", {"top/part/x": b"1", "top/part/deep/y": b"2", "top/other/z": b"3"})
    assert unpack_tar(archive, "top/part", tmp_path / "part") == 2
    assert {str(p.relative_to(tmp_path / "part")) for p in (tmp_path / "part").rglob("*")} == {"x", "deep", "deep/y"}
    with pytest.raises(ArchiveError, match="has no files in nothing/"):
        unpack_tar(archive, "nothing", tmp_path / "nothing")


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", {f"top/{n}": np.random.default_rng(n).bytes(5000) for n in range(5)})
    archive.write_bytes(archive.read_bytes()[:12_000])
    with pytest.raises(ArchiveError, match="is not a complete archive"):
        unpack_tar(archive, "top", tmp_path / "top")
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(ArchiveError, match="is not a complete archive"):
        unpack_tar(archive, "top", tmp_path / "top")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    """TED-LIUM keeps its audio once, and its splits as links."""
    links = [("top/legacy/train/sph", "../../data/sph"), ("top/chain", "legacy/train")]
    entries = {name: link(name, target) for name, target in links}
    archive = make_tar(tmp_path / "a.tar.gz", {**entries, "top/data/sph/a.sph": b"1"})
    assert unpack_tar(archive, "top", tmp_path / "top") == 1
    assert (tmp_path / "top/chain/sph/a.sph").read_bytes() == b"1"


OUTSIDE = [[("top/evil", "/etc/passwd")], [("top/evil", "../../x")]]
OUTSIDE += [[("top/a/b/up", "../.."), ("top/c", "a/b/up/../x")]]
OUTSIDE += [[("top/out", ".."), ("top/out/deep/evil", ".")]]


@pytest.mark.parametrize(
    "entry",
    [
        {"top/../../evil": b"!"},
        {"/top/evil": b"!"},
        *({name: link(name, target) for name, target in links} for links in OUTSIDE),
    ],
)
def test_nothing_is_written_outside(tmp_path: Path, entry: dict[str, bytes | tarfile.TarInfo]) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    archive = make_tar(inside / "a.tar.gz", {"top/good": b"1", **entry})
    with pytest.raises(ArchiveError, match="unsafe archive"):
        unpack_tar(archive, "top", inside / "top")
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "a.tar.gz"]


def test_a_gzip_file_is_unpacked_completely_or_not_at_all(tmp_path: Path) -> None:
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(CONTENT))
    unpack_gzip(packed, tmp_path / "lm.arpa")
    assert (tmp_path / "lm.arpa").read_bytes() == CONTENT
    packed.write_bytes(packed.read_bytes()[:-20])
    (tmp_path / "lm.arpa").unlink()
    with pytest.raises(ArchiveError, match="truncated"):
        unpack_gzip(packed, tmp_path / "lm.arpa")
    assert [p.name for p in tmp_path.iterdir()] == ["lm.arpa.gz"]
