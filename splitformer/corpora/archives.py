"""Archives of corpora: downloaded resumably, verified, and unpacked completely or not at all."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import shutil
import tarfile
import urllib.error
import zlib
from pathlib import Path, PurePosixPath

from lhotse.utils import resumable_download
from tqdm import tqdm

from splitformer.errors import UserError
from splitformer.files import atomic_folder, atomic_write

CHUNK = 1 << 20
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
"""Exceptions raised by reading a damaged archive."""


class ArchiveError(UserError):
    """An archive is missing, damaged or unsafe."""


def fetch(url: str, archive: str | Path, md5: str | None = None) -> Path:
    """Download the file `archive` from `url` unless it exists; verify its checksum in either case.

    A download goes to `archive` + ".part", resumes if that exists, and is moved into place if its checksum is right. An
    existing file is never changed. A second process waits for the first one's download.

    Args:
      md5: checksum in hexadecimal digits; None if none is published.
    Raises:
      ArchiveError: the checksum differs, or the download fails.
    """
    archive = Path(archive)
    if archive.is_file():
        if md5 is not None and (found := md5_of(archive)) != md5:
            raise ArchiveError(
                f"{archive} ({archive.stat().st_size} bytes) is truncated or another file: its md5 is {found}, "
                f"expected {md5}; remove it and run this again to download it from {url}"
            )
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with open(part, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process that downloads the file
        if archive.is_file():
            if part.is_file() and not part.stat().st_size:
                part.unlink()
            return fetch(url, archive, md5)
        try:
            resumable_download(url, filename=part)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ArchiveError(
                f"there is no {archive}, and it cannot be downloaded from {url} ({error}); run this again to "
                f"resume, or put {archive.name} into a folder and pass that as --download-dir"
            ) from error
        if md5 is not None and (found := md5_of(part)) != md5:
            part.unlink()
            raise ArchiveError(f"{url}: the download has md5 {found}, expected {md5}; it was removed, run this again")
        part.rename(archive)
    return archive


def md5_of(path: Path) -> str:
    """Return the file's md5 in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def unpack_tar(archive: str | Path, member: str, target: str | Path) -> int:
    """Unpack the folder `member` of a tar archive as the folder `target`, which appears when it is complete.

    Symbolic links that stay within `member` are made last, so that nothing is written through one.

    Returns:
      the number of files.
    Raises:
      ArchiveError: the archive is damaged, lacks `member`, or has an entry that would be or lead outside, or is neither
        file, folder nor symbolic link. Nothing is left of it then.
    """
    archive = Path(archive)
    count = 0
    links: dict[Path, str] = {}
    try:
        with (
            atomic_folder(target) as temporary,
            tarfile.open(archive) as tar,
            tqdm(desc=f"unpack {archive.name}", unit=" files") as bar,
        ):
            for entry in tar:
                inside = _path_inside(entry, member, archive)
                if inside is None:
                    continue
                destination = temporary / inside
                if entry.isdir():
                    destination.mkdir(parents=True, exist_ok=True)
                elif entry.issym():
                    links[destination] = entry.linkname
                elif content := tar.extractfile(entry):
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    with open(destination, "xb") as file:
                        shutil.copyfileobj(content, file, CHUNK)
                    count += 1
                    bar.update()
            if not count:
                raise ArchiveError(f"{archive} has no files in {member}/")
            _make_links(links, temporary, archive)
    except DAMAGED as error:
        raise ArchiveError(f"{archive} is not a complete archive ({error}); remove it and fetch it again") from error
    return count


def _path_inside(entry: tarfile.TarInfo, member: str, archive: Path) -> PurePosixPath | None:
    """Return the entry's path below `member`, None if it is elsewhere. Raises ArchiveError for an unsafe entry."""
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts:
        raise ArchiveError(f"{archive}: the entry {entry.name!r} would be outside the target; unsafe archive")
    if not path.is_relative_to(member):
        return None
    if not (entry.isfile() or entry.isdir() or entry.issym()):
        raise ArchiveError(f"{archive}: the entry {entry.name!r} is a hard link or a device; unsafe archive")
    return path.relative_to(member)


def _make_links(links: dict[Path, str], root: Path, archive: Path) -> None:
    """Make symbolic links {path: target}. Raises ArchiveError if one leads out of `root`."""
    for path, leads_to in links.items():
        if not any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(root)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(leads_to)
    for path, leads_to in links.items():  # after all are made: one may lead through another
        if Path(leads_to).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
            raise ArchiveError(f"{archive}: the link {path.name!r} leads outside the target; unsafe archive")


def unpack_gzip(archive: str | Path, target: str | Path) -> None:
    """Write the content of a gzip file to `target`. Raises ArchiveError if it is damaged."""
    try:
        with gzip.open(archive, "rb") as packed, atomic_write(target, "wb") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    except DAMAGED as error:
        raise ArchiveError(f"{archive} is truncated or no gzip file ({error}); remove it and fetch it again") from error
