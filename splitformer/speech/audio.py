"""Recordings read as streams: any format that libsndfile reads, any sampling rate, any number of channels.

What training does to a recording at once (decode, resample by Lhotse) is done here block by block and gives the same
samples, so that memory does not grow with a recording's length.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler

from splitformer.data.features import SAMPLING_RATE
from splitformer.errors import UserError

BLOCK_SECONDS = 10
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""Hz. What claims another rate is no recording of speech, and would become endless when resampled."""
LOUDEST = 2.0**31
"""Samples of whole numbers stored as floats are taken as they are; beyond 32 bits the features would overflow."""
MAX_DENOMINATOR = 1000
"""Of the ratio of the sampling rates. The usual rates are below; another is taken as the nearest such ratio, less than
1 in 10,000 off in time and pitch, because the resampler's filters take memory with the square of it."""
_LENGTH_UNKNOWN = 0x7FFF_0000
"""What writes a WAV file into a pipe cannot know its length: it states this many bytes, or more, or none."""


class AudioError(UserError):
    """A recording that cannot be used; the message says why."""


class Levels(NamedTuple):
    """How loud a recording is, hop by hop."""

    decibels: np.ndarray
    """(hops,), float32, relative to full scale; a constant offset does not count"""
    hop_seconds: float
    """about 0.01"""
    seconds: float
    """of the whole recording; at the end less than a hop may be left"""


class Recording:
    """An open recording, or a span of it, which may be read several times. See `open_recording`.

    Attributes:
      rate: Hz.  channels: of the file.
    """

    def __init__(self, file: BinaryIO, start: float = 0.0, duration: float | None = None, channel: int | None = None):
        self._file, self._channel = file, channel
        with self._open() as sound:
            self.rate, self.channels, frames = sound.samplerate, sound.channels, sound.frames
        if not LOWEST_RATE <= self.rate <= HIGHEST_RATE:
            raise AudioError(f"its header says {self.rate} Hz; speech has {LOWEST_RATE} to {HIGHEST_RATE} Hz")
        if channel is not None and not 0 <= channel < self.channels:
            raise AudioError(f"it has no channel {channel}, only 0 to {self.channels - 1}")
        # where the length is unknown (a stream of some formats), what is there is taken
        self._frames_promised = frames if 0 <= frames < 1 << 60 else None
        self._first = round(start * self.rate)
        self._count = None if duration is None else round(duration * self.rate)
        self._check_span(start, duration)
        self._check_riff_size()

    def _check_span(self, start: float, duration: float | None) -> None:
        promised = self._frames_promised
        if start < 0 or (duration is not None and not duration > 0):
            raise AudioError(f"a span of {duration} s from {start} s on is none")
        if promised is None or not (self._first or self._count):
            return
        # durations in lists are rounded
        end = self._first + (self._count or 0)
        if self._first >= promised or end > promised + 0.01 * self.rate:
            raise AudioError(
                f"the span from {start} s to {end / self.rate:g} s leaves the recording of {promised / self.rate:g} s"
            )
        if self._count is not None:
            self._count = min(self._count, promised - self._first)

    def _check_riff_size(self) -> None:
        """libsndfile takes a WAV file that was cut off for a shorter one."""
        head = os.pread(self._file.fileno(), 12, 0)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            promised, there = int.from_bytes(head[4:8], "little") + 8, os.fstat(self._file.fileno()).st_size
            if there < promised < _LENGTH_UNKNOWN:
                raise AudioError(f"it is cut off: its header promises {promised} bytes, {there} are there")

    def _open(self) -> soundfile.SoundFile:
        # a descriptor, not a name: libsndfile then looks at what the file holds, and never at what it is called
        descriptor = os.dup(self._file.fileno())
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            return soundfile.SoundFile(descriptor, closefd=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"it is no audio file that libsndfile reads, or corrupt ({_told(error)})") from error

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples at the recording's own rate, (n,) float32: the mean of all channels, or the one asked for.

        Raises:
          AudioError: samples that are no numbers; fewer samples than promised, or what a decoder says of damage.
        """
        seen = 0
        with self._open() as sound:
            try:
                if self._first:
                    sound.seek(self._first)
                while self._count is None or seen < self._count:
                    size = BLOCK_SECONDS * self.rate
                    size = size if self._count is None else min(size, self._count - seen)
                    block = sound.read(size, dtype="float32", always_2d=True)
                    if not len(block):
                        break
                    self._check_samples(block, self._first + seen)
                    seen += len(block)
                    yield block.mean(axis=1) if self._channel is None else block[:, self._channel].copy()
            except soundfile.LibsndfileError as error:
                at = (self._first + seen) / self.rate
                raise AudioError(f"it is corrupt somewhere after {at:g} s ({_told(error)})") from error
        promised = self._count
        if promised is None and self._frames_promised is not None:
            promised = self._frames_promised - self._first
        if not seen:
            raise AudioError("it has no samples")
        if promised is not None and seen < promised:
            raise AudioError(
                f"it is cut off: {promised / self.rate:g} s are promised, {seen / self.rate:g} s can be read"
            )

    def _check_samples(self, block: np.ndarray, position: int) -> None:
        # a comparison with NaN is false
        wrong = ~(np.abs(block) <= LOUDEST).all(axis=1)
        if wrong.any():
            place = int(wrong.argmax())
            value = next(each for each in block[place] if not abs(each) <= LOUDEST)
            raise AudioError(f"sample {position + place} (at {(position + place) / self.rate:g} s) is {value}")

    def levels(self) -> Levels:
        """Reads the whole recording once. Raises AudioError as `blocks`."""
        hop = self.rate // 100
        found, rest, samples = [], np.zeros(0, np.float32), 0
        for block in self.blocks():
            samples += len(block)
            block = np.concatenate([rest, block])
            whole = len(block) // hop * hop
            power = block[:whole].reshape(-1, hop).var(axis=1, dtype=np.float64)
            found.append((10.0 * np.log10(power + 1e-12)).astype(np.float32))
            rest = block[whole:]
        return Levels(np.concatenate(found), hop / self.rate, samples / self.rate)

    def resampled(self) -> Iterator[np.ndarray]:
        """The samples at SAMPLING_RATE, (n,) float32, as Lhotse's resampling of the whole would give them."""
        return resample_blocks(self.blocks(), self.rate)


def _told(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).removeprefix("Error : ").strip().rstrip(".")


@contextmanager
def open_recording(
    path: Path | BinaryIO, start: float = 0.0, duration: float | None = None, channel: int | None = None
) -> Iterator[Recording]:
    """Open a file, a named pipe, or a stream such as standard input; the last two are copied to a temporary file.

    Args:
      start, duration: seconds of the span to read; all of it by default.
      channel: counted from 0; None for the mean of all.
    Raises:
      AudioError: what cannot be read as audio; OSErrors become one.
    """
    try:
        with _regular_file(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise AudioError("it is empty")
            yield Recording(file, start, duration, channel)
    except OSError as error:
        raise AudioError(error.strerror or str(error)) from error


@contextmanager
def _regular_file(path: Path | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(path, Path):
        with _copied(path) as copy:
            yield copy
        return
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise AudioError("it is no file")  # a device might never end
    with open(path, "rb") as file:
        if stat.S_ISREG(mode):
            yield file
        else:
            with _copied(file) as copy:
                yield copy


@contextmanager
def _copied(stream: BinaryIO) -> Iterator[BinaryIO]:
    """A stream as a file, in which one can go back; gone when closed."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file, 1 << 20)
        file.flush()
        yield file


def resample_blocks(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks (n,) at `rate` Hz as blocks at SAMPLING_RATE, without seams.

    Lhotse's resampler makes each group of `new` samples from the group of `old` samples at the same place (rate : 16000
    = old : new, shortened) and a few of its neighbours. Blocks of whole groups, with these neighbours on both sides,
    give what the whole would give.
    """
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    ratio = Fraction(rate, SAMPLING_RATE)
    exact = max(ratio.numerator, ratio.denominator) <= MAX_DENOMINATOR
    if not exact:
        # the larger of the two numbers is the one to limit
        small = min(ratio, 1 / ratio).limit_denominator(MAX_DENOMINATOR)
        ratio = small if ratio < 1 else 1 / small
        if ratio == 1:
            yield from blocks
            return
    old, new = ratio.numerator, ratio.denominator
    resampler = get_or_create_resampler(old, new)
    margin = -(-resampler.width // old) + 1  # groups
    buffer, before, received, given = np.zeros(0, np.float32), 0, 0, 0
    waiting: list[np.ndarray] = []

    def convert() -> np.ndarray:
        with torch.no_grad():
            return resampler(torch.from_numpy(buffer)).numpy()

    for block in blocks:
        received += len(block)
        waiting.append(block)
        if sum(map(len, waiting)) < old * (2 * margin + 1):
            continue  # a block shorter than its margins
        buffer, waiting = np.concatenate([buffer, *waiting]), []
        groups = len(buffer) // old - margin  # those whose neighbours to the right are here
        if groups <= before:
            continue
        out = convert()[before * new : groups * new]
        given += len(out)
        yield out
        keep = max(0, groups - margin)
        buffer, before = buffer[keep * old :], groups - keep
    buffer = np.concatenate([buffer, *waiting])
    if not len(buffer):
        return
    # Lhotse rounds the length of a resampled recording to the nearest; the resampler rounds up
    total = (2 * received * SAMPLING_RATE + rate) // (2 * rate) if exact else None
    out = convert()[before * new :]
    yield out if total is None else out[: max(0, total - given)]
