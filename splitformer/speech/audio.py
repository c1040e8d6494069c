"""Recordings read as streams: files in any format that libsndfile reads, and arrays, at any sampling rate.

Samples are decoded, checked and resampled block by block, so that memory does not grow with the length of a
recording. The samples equal those of Lhotse and torchaudio, which decode and resample the whole recording at once.
"""

from __future__ import annotations

import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import soundfile
import torch
from torch import Tensor

from splitformer.errors import UserError
from splitformer.model.subsampling import SAMPLING_RATE

AUDIO_SUFFIXES = {".flac", ".wav", ".sph", ".ogg", ".mp3", ".opus", ".aiff"}
BLOCK_SECONDS = 10
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""Hz. A header that states another rate is damaged, and resampling from it might never end."""
LOUDEST = 2.0**31
"""Largest sample that is accepted: files may store 32-bit integers as floats; beyond that features would overflow."""
MAX_DENOMINATOR = 1000
"""Limit for both numbers of the ratio of sampling rates: the resampling filters need memory proportional to their
product. Usual rates are below it. Any other rate is rounded to the nearest such ratio, less than 1 in 10,000 off."""
_LENGTH_UNKNOWN = 0x7FFF_0000
"""Programs that write a WAV file to a pipe do not know its length; its header then states this many bytes, or more."""

Audio = str | Path | BinaryIO | np.ndarray | Tensor
"""A path, a binary stream, or samples: (n,) or (channels, n), floats from -1 to 1, int16 or int32."""


class AudioError(UserError):
    """A recording that cannot be transcribed; the message says why."""


@dataclass(frozen=True)
class Source:
    """One recording to transcribe, or a span of it.

    name: the path as it was given, or the id in a list.
    audio: a path, a binary stream, or samples (channels, n).
    sampling_rate: Hz, of samples; files state their own.
    start, duration: seconds of a file to read; None for the rest of it.
    channel: counted from 0; None for the mean of all channels.
    """

    name: str
    audio: Path | BinaryIO | np.ndarray
    sampling_rate: int = SAMPLING_RATE
    start: float = 0.0
    duration: float | None = None
    channel: int | None = None


def source_of(audio: Audio, sampling_rate: int | None = None, name: str = "audio") -> Source:
    """Return the source for a path, a binary stream or an array.

    Args:
      sampling_rate: Hz, of an array.
      name: for what has no name of its own.
    Raises:
      TypeError, ValueError: another type, shape or sample type, or an array without its sampling rate.
    """
    if isinstance(audio, (str, Path)):
        return Source(str(audio), Path(audio))
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu().numpy()
    if not isinstance(audio, np.ndarray):
        if not hasattr(audio, "read"):
            raise TypeError(f"audio is a {type(audio).__name__}; expected a path, a binary stream or an array")
        return Source(str(getattr(audio, "name", name)), cast(BinaryIO, audio))
    if audio.dtype.kind != "f" and audio.dtype not in (np.int16, np.int32):
        raise TypeError(f"samples are {audio.dtype}; expected floats from -1 to 1, int16 or int32")
    samples = np.atleast_2d(audio)
    if samples.ndim != 2 or samples.shape[0] < 1 or samples.shape[0] > max(1, samples.shape[1]):
        raise ValueError(f"samples have shape {audio.shape}; expected (n,) or (channels, n)")
    if sampling_rate is None:
        raise ValueError(f"sampling_rate is missing: an array does not state its own (models use {SAMPLING_RATE} Hz)")
    if not sampling_rate > 0 or sampling_rate != int(sampling_rate):
        raise ValueError(f"sampling_rate {sampling_rate}: expected a whole number of Hz, such as {SAMPLING_RATE}")
    return Source(name, samples, int(sampling_rate))


class Levels(NamedTuple):
    """Loudness of a recording per hop."""

    decibels: np.ndarray
    """(hops,), float32, relative to full scale; a constant offset does not count"""
    hop_seconds: float
    """about 0.01"""
    seconds: float
    """of the whole recording; less than a hop at its end has no level"""


class Recording:
    """An open recording, or a span of it, that may be read several times. `open_recording` returns one.

    rate: Hz.
    """

    def __init__(self, rate: int, channels: int, channel: int | None) -> None:
        self.rate, self._channel = rate, channel
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise AudioError(f"its sampling rate is {rate} Hz; expected {LOWEST_RATE} to {HIGHEST_RATE} Hz")
        if channel is not None and not 0 <= channel < channels:
            raise AudioError(f"it has no channel {channel}; channels are counted from 0 to {channels - 1}")

    def _read(self) -> Iterator[np.ndarray]:
        """Yield blocks (n, channels) of float32."""
        raise NotImplementedError

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield samples (n,) of float32 at the recording's own rate: one channel, or the mean of all.

        Raises:
          AudioError: there are no samples, fewer than the header states, or infinite ones, or the decoder failed.
        """
        count = 0
        for block in self._read():
            invalid = ~(np.abs(block) <= LOUDEST)  # also true for NaN
            if invalid.any():
                row = int(invalid.any(axis=1).argmax())
                value = block[row][invalid[row]][0]
                raise AudioError(f"sample {count + row} (at {(count + row) / self.rate:g} s) is {value:g}")
            count += len(block)
            yield block.mean(axis=1) if self._channel is None else block[:, self._channel].copy()
        if not count:
            raise AudioError("it has no samples")

    def levels(self) -> Levels:
        """Read the whole recording and return its levels. Raises AudioError as `blocks` does."""
        hop = self.rate // 100
        decibels, rest, count = [], np.zeros(0, np.float32), 0
        for block in self.blocks():
            count += len(block)
            block = np.concatenate([rest, block])
            whole = len(block) // hop * hop
            power = block[:whole].reshape(-1, hop).var(axis=1, dtype=np.float64)
            decibels.append((10.0 * np.log10(power + 1e-12)).astype(np.float32))
            rest = block[whole:]
        return Levels(np.concatenate(decibels), hop / self.rate, count / self.rate)

    def resampled(self) -> Iterator[np.ndarray]:
        """Yield samples (n,) of float32 at SAMPLING_RATE. Raises AudioError as `blocks` does."""
        return resample_blocks(self.blocks(), self.rate)


class _ArrayRecording(Recording):
    def __init__(self, samples: np.ndarray, rate: int, channel: int | None) -> None:
        super().__init__(rate, len(samples), channel)
        self._samples = samples

    def _read(self) -> Iterator[np.ndarray]:
        full_scale = 1.0 if self._samples.dtype.kind == "f" else -float(np.iinfo(self._samples.dtype).min)
        size = BLOCK_SECONDS * self.rate
        for first in range(0, self._samples.shape[1], size):
            yield self._samples[:, first : first + size].T.astype(np.float32) / np.float32(full_scale)


class _FileRecording(Recording):
    def __init__(self, file: BinaryIO, source: Source, channel: int | None) -> None:
        self._file = file
        with self._open() as sound:
            super().__init__(sound.samplerate, sound.channels, channel)
            # some formats do not state their length when they are written to a pipe
            frames = sound.frames if 0 <= sound.frames < 1 << 60 else math.inf
        self._first, stop = round(source.start * self.rate), math.inf
        if source.duration is not None:
            stop = self._first + round(source.duration * self.rate)
            within = self._first < stop <= frames + 0.01 * self.rate  # durations in lists are rounded
        else:
            within = self._first == 0 or self._first < frames
        if not within:
            length = "to its end" if source.duration is None else f"of {source.duration:g} s"
            raise AudioError(f"the span from {source.start:g} s {length} is outside its {frames / self.rate:g} s")
        self._stop = min(stop, frames)
        # libsndfile reads a WAV file that was cut off as a shorter one
        head, size = os.pread(file.fileno(), 12, 0), os.fstat(file.fileno()).st_size
        stated = int.from_bytes(head[4:8], "little") + 8
        if head[:4] == b"RIFF" and head[8:] == b"WAVE" and size < stated < _LENGTH_UNKNOWN:
            raise AudioError(f"it is cut off: its header states {stated} bytes, the file has {size}")

    def _open(self) -> soundfile.SoundFile:
        # a descriptor, not a name: libsndfile then goes by the contents, not by the suffix
        descriptor = os.dup(self._file.fileno())
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            return soundfile.SoundFile(descriptor, closefd=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"libsndfile cannot read it as audio ({_reason(error)})") from error

    def _read(self) -> Iterator[np.ndarray]:
        position, size = self._first, BLOCK_SECONDS * self.rate
        with self._open() as sound:
            try:
                if position:
                    sound.seek(position)
                while position < self._stop:
                    block = sound.read(int(min(size, self._stop - position)), dtype="float32", always_2d=True)
                    if not len(block):
                        break
                    position += len(block)
                    yield block
            except soundfile.LibsndfileError as error:
                start, end = position / self.rate, min(position + size, self._stop) / self.rate
                raise AudioError(f"it is corrupt between {start:g} and {end:g} s ({_reason(error)})") from error
        if position < self._stop < math.inf:
            stated, read = self._stop / self.rate, position / self.rate
            raise AudioError(f"it is cut off: {stated:g} s are stated, {read:g} s can be read")


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).removeprefix("Error : ").strip().rstrip(".")


@contextmanager
def open_recording(source: Source, channel: int | None = None) -> Iterator[Recording]:
    """Open a source. Named pipes and streams are copied to an unnamed temporary file, because they are read twice.

    Args:
      channel: of a source that names none.
    Raises:
      AudioError: it cannot be read as audio; OSErrors become one.
    """
    audio: Any = source.audio
    channel = channel if source.channel is None else source.channel
    if isinstance(audio, np.ndarray):
        yield _ArrayRecording(audio, source.sampling_rate, channel)
        return
    try:
        with ExitStack() as stack:
            seekable = False
            if isinstance(audio, Path):
                mode = audio.stat().st_mode
                seekable = stat.S_ISREG(mode)
                if not seekable and not stat.S_ISFIFO(mode):
                    raise AudioError("it is neither a file nor a pipe")  # a device might never end
                audio = stack.enter_context(open(audio, "rb"))
            if not seekable:
                copy = stack.enter_context(tempfile.TemporaryFile())
                try:
                    shutil.copyfileobj(audio, copy, 1 << 20)
                except TypeError:
                    raise AudioError("it is a stream of text; open it in binary mode") from None
                copy.flush()
                audio = copy
            if os.fstat(audio.fileno()).st_size == 0:
                raise AudioError("it is empty")
            yield _FileRecording(audio, source, channel)
    except OSError as error:
        raise AudioError(error.strerror or str(error)) from error


# ---- resampling


def resample_blocks(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Yield blocks (n,) at `rate` Hz resampled to SAMPLING_RATE, as if they were resampled together.

    Band-limited interpolation, as torchaudio and Lhotse do it (https://ccrma.stanford.edu/~jos/resample): with
    rate : SAMPLING_RATE = old : new, a group of `old` samples and `width` neighbours on both sides give `new` samples.
    """
    low, high = sorted((rate, SAMPLING_RATE))
    ratio = Fraction(low, high).limit_denominator(MAX_DENOMINATOR)
    old, new = sorted(ratio.as_integer_ratio(), reverse=rate > SAMPLING_RATE)
    if old == new:
        yield from blocks
        return
    kernel, width = _sinc_kernel(old, new)
    buffer, received, yielded = np.zeros(width, np.float32), 0, 0
    end = np.zeros(width + old, np.float32)
    for block in chain(blocks, [end]):
        received += len(block) if block is not end else 0
        buffer = np.concatenate([buffer, block])
        groups = max(0, (len(buffer) - 2 * width) // old)
        if groups == 0:
            continue
        inputs = torch.from_numpy(buffer[: groups * old + 2 * width])[None, None]
        output = torch.nn.functional.conv1d(inputs, kernel, stride=old)[0].T.flatten().numpy()
        if block is end:  # Lhotse rounds the number of samples to the nearest
            output = output[: (2 * received * new + old) // (2 * old) - yielded]
        buffer, yielded = buffer[groups * old :], yielded + len(output)
        yield output


def _sinc_kernel(old: int, new: int) -> tuple[Tensor, int]:
    """Return filters (new, 1, old + 2 * width) and their `width`: sinc, low-pass at 0.99 of Nyquist, Hann, 6 zeros."""
    zeros, base = 6, 0.99 * min(old, new)
    width = math.ceil(zeros * old / base)
    phases = torch.arange(new) / new  # float32, as in Lhotse
    places = torch.arange(-width, width + old, dtype=torch.float64) / old
    t = ((places - phases.unsqueeze(1)) * base).clamp(-zeros, zeros)
    kernel = torch.sinc(t) * torch.cos(math.pi / 2 * t / zeros) ** 2 * base / old
    return kernel.float().unsqueeze(1), width
