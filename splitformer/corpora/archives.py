"""Archives of corpora: downloaded with resume, checked, and unpacked whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import secrets
import shutil
import tarfile
import urllib.error
import zlib
from pathlib import Path, PurePosixPath

from lhotse.utils import resumable_download
from tqdm import tqdm

from splitformer.errors import UserError
from splitformer.files import atomic_write

CHUNK = 1 << 20


class ArchiveError(UserError):
    """An archive that is missing, damaged or unsafe; the message says what to do."""


def fetch(url: str, archive: str | Path, md5: str | None = None) -> Path:
    """Make sure that the file `archive` is there and whole; download it where it is not.

    A download goes to `archive` + ".part", is resumed where that exists, and is moved into place when its
    checksum is right. A file that is there is never changed.

    Args:
      url: where the archive comes from.
      md5: its checksum in hexadecimal digits; None where none is published.
    Raises:
      ArchiveError: the checksum differs, or the download fails.
    """
    archive = Path(archive)
    if archive.is_file():
        check_md5(archive, md5, f"remove it and run this again to download it from {url}")
        return archive
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_name(archive.name + ".part")
        resumable_download(url, filename=part)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ArchiveError(
            f"there is no {archive}, and it cannot be downloaded from {url} ({error}); run this again to "
            f"resume, or put {archive.name} into a folder and pass that as --download-dir"
        ) from error
    if md5 is not None and (found := md5_of(part)) != md5:
        part.unlink()
        raise ArchiveError(f"{url}: what came has md5 {found}, expected {md5}; it was removed, run this again")
    part.rename(archive)
    return archive


def check_md5(path: Path, md5: str | None, remedy: str) -> None:
    """Raises ArchiveError where the file's checksum is another."""
    if md5 is not None and (found := md5_of(path)) != md5:
        raise ArchiveError(
            f"{path} ({path.stat().st_size} bytes) is truncated or another file: its md5 is {found}, expected "
            f"{md5}; {remedy}"
        )


def md5_of(path: Path) -> str:
    """The file's md5, as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def unpack_tar(archive: str | Path, member: str, target: str | Path) -> int:
    """Unpack the folder `member` of a tar archive as the folder `target`, which appears when it is complete.

    Symbolic links that stay within `member` are made last, so that nothing is written through one.

    Returns the number of files.

    Raises:
      ArchiveError: the archive is damaged, lacks `member`, or has an entry that would lie or lead outside, or is
        neither file, folder nor symbolic link; nothing is left of it then.
    """
    archive, target = Path(archive), Path(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    count = 0
    links: dict[Path, str] = {}
    try:
        with tarfile.open(archive) as tar, tqdm(desc=f"unpack {archive.name}", unit=" files") as bar:
            for entry in tar:
                inside = _path_inside(entry, member, archive)
                if inside is None:
                    continue
                destination = temporary.joinpath(*inside.parts)
                if entry.isdir():
                    destination.mkdir(parents=True, exist_ok=True)
                    continue
                if entry.issym():
                    links[destination] = entry.linkname
                    continue
                destination.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(entry)
                assert content is not None  # _path_inside lets files and folders through only
                with open(destination, "xb") as file:
                    shutil.copyfileobj(content, file, CHUNK)
                count += 1
                bar.update()
        if not count:
            raise ArchiveError(f"{archive} has no files in {member}/")
        _make_links(links, temporary, archive)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArchiveError(f"{archive} is truncated or no archive ({error}); remove it and fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def _make_links(links: dict[Path, str], root: Path, archive: Path) -> None:
    """Symbolic links {place below root: where it leads}. Raises ArchiveError where one leads out of `root`."""
    for place, leads_to in links.items():
        if not any(parent.is_symlink() for parent in place.parents if parent.is_relative_to(root)):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(leads_to)
    for place, leads_to in links.items():  # when all are made: one may lead through another
        if Path(leads_to).is_absolute() or not place.resolve().is_relative_to(root.resolve()):
            raise ArchiveError(f"{archive}: the link {place.name!r} leads outside; this is no archive to trust")


def _path_inside(entry: tarfile.TarInfo, member: str, archive: Path) -> PurePosixPath | None:
    """The entry's path below `member`; None for what lies elsewhere. Raises ArchiveError for what is unsafe."""
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts:
        raise ArchiveError(f"{archive}: the entry {entry.name!r} would lie outside; this is no archive to trust")
    if not path.is_relative_to(member):
        return None
    if not (entry.isfile() or entry.isdir() or entry.issym()):
        raise ArchiveError(f"{archive}: the entry {entry.name!r} is a hard link or a device: nothing to trust")
    return path.relative_to(member)


def unpack_gzip(archive: str | Path, target: str | Path) -> None:
    """Write the content of a gzip file to `target`. Raises ArchiveError for a damaged one."""
    try:
        with gzip.open(archive, "rb") as packed, atomic_write(target, "wb") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArchiveError(f"{archive} is truncated or no gzip file ({error}); remove it and fetch it again") from error
