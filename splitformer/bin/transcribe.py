"""Transcribe recordings of any format, sampling rate, number of channels and length.

    python -m splitformer.bin.transcribe --checkpoint EXP/averaged.pt a.wav b.flac folder/ list.jsonl
    ffmpeg -i film.mkv -f wav - | python -m splitformer.bin.transcribe --checkpoint EXP/averaged.pt --format srt -

A line for each recording is printed as soon as its words are known, in the order given. What cannot be read is named
and left out, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from splitformer.checkpoint import CheckpointError, checkpoint_id, load_model
from splitformer.config import ConfigError
from splitformer.data.features import (
    EXTRACTORS,
    MIN_SAMPLES,
    SAMPLING_RATE,
    FbankOptions,
    extract,
    make_extractor,
)
from splitformer.decoding.loading import load_for_decoding, make_method
from splitformer.decoding.searches import METHODS, Method, Options, default_methods
from splitformer.early_exit.policies import FittedPolicy, Fixed, Policy
from splitformer.early_exit.search import EarlyResult, search_early
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.model.subsampling import MIN_FRAMES
from splitformer.speech.audio import AudioError, open_recording
from splitformer.speech.inputs import Fault, Source, find_sources
from splitformer.speech.segmentation import MAX_SEGMENT, OVERLAP, Piece, check_limits, plan_pieces, slice_pieces
from splitformer.speech.transcripts import (
    FORMATS,
    OUTPUT_FRAME,
    Segment,
    Transcript,
    as_ctm,
    as_json,
    as_srt,
    as_text,
    join_segments,
    printable,
    timed_words,
)

WEIGHTS = ("hlg_scale", "ngram_lm_scale", "blank_penalty")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "audio", nargs="+", help="files; folders; .jsonl lists of recordings; - for standard input. After -- any name"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt of bin/average, or an epoch")
    parser.add_argument("--lang-dir", type=Path, help="of the training, for methods that search graphs of words")
    parser.add_argument(
        "--method", choices=[name for name in METHODS if name != "nbest-oracle"], help="(default: greedy search)"
    )
    parser.add_argument("--hlg-scale", type=float, help="weight of the language model, for CTC's methods with graphs")
    parser.add_argument("--ngram-lm-scale", type=float, help="the same for fast_beam_search_nbest_LG")
    parser.add_argument("--blank-penalty", type=float, help="nats")
    exits = parser.add_mutually_exclusive_group()
    exits.add_argument("--exit", type=int, metavar="L", help="leave after layer L; nothing above is loaded")
    exits.add_argument("--exit-policy", type=Path, metavar="FILE", help="policy.json of bin/calibrate, with its method")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: standard output)")
    parser.add_argument("--channel", type=int, metavar="N", help="from 0 (default: the mean of all)")
    parser.add_argument("--max-segment", type=float, default=MAX_SEGMENT, help="seconds; see the guide (%(default)s)")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="seconds, where no silence is (%(default)s)")
    parser.add_argument("--fbank", choices=EXTRACTORS, help="(default: as in training)")
    parser.add_argument("--max-duration", type=float, default=60.0, help="seconds of audio in a batch (%(default)s)")
    parser.add_argument("--device", help="such as cuda:1 (default: a GPU where there is one)")
    args = parser.parse_args()
    try:
        faults = transcribe(args)
    except BrokenPipeError:  # whoever read has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"transcribe: {printable(str(error))}", file=sys.stderr)
        return 1
    return 1 if faults else 0


def transcribe(args: argparse.Namespace) -> int:
    """Transcribe what `args` names; returns how many recordings could not be."""
    check_limits(args.max_segment, args.overlap)
    if args.channel is not None and args.channel < 0:
        raise ValueError(f"--channel {args.channel}: channels are counted from 0")
    sources = list(find_sources(args.audio))
    if sum(isinstance(source, Source) and source.path is None for source in sources) > 1:
        raise ValueError("- is given twice, and standard input can be read once")
    if args.format == "srt" and len(sources) > 1:
        raise ValueError(f"--format srt holds one recording, and {len(sources)} are given: give one at a time")
    recognizer = make_recognizer(args)
    alone = len(args.audio) == 1 and not os.path.isdir(args.audio[0]) and sources[:1] == [
        Source(args.audio[0], None if args.audio[0] == "-" else Path(args.audio[0]))
    ]
    write_as: dict[str, Callable[[Transcript], str]] = {
        "text": lambda transcript: as_text(transcript, with_name=not alone),
        "jsonl": as_json,
        "srt": as_srt,
        "ctm": as_ctm,
    }

    faults = 0
    with (
        _output(args.output) as write,
        tqdm(total=0.0, unit="s", desc="transcribing", disable=None, leave=False, unit_scale=True) as bar,
    ):
        for found in transcripts(sources, recognizer, args.max_segment, args.overlap, args.channel, bar):
            if isinstance(found, Fault):
                faults += 1
                bar.write(f"transcribe: {printable(found.name)}: {printable(found.reason)}", file=sys.stderr)
                continue
            if not found.segments:
                why = f"{found.seconds:g} s are shorter than one output frame, so that there are no words"
                bar.write(f"transcribe: {printable(found.name)}: {why}", file=sys.stderr)
            write(write_as[args.format](found))
    if faults:
        done = len(sources) - faults
        print(f"transcribe: {faults} of {len(sources)} could not be transcribed, {done} are done", file=sys.stderr)
    return faults


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[str], Any]]:
    """Writes UTF-8 whatever the locale; a file appears when all is done."""
    if path is not None:
        with atomic_write(path) as file:
            yield file.write
        return

    def write(text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()

    yield write


# -------------------------------------------------------------------------------------------- recognition


@dataclass(frozen=True)
class Recognizer:
    """A model with a search, an exit policy and the features of its training."""

    model: AsrModel
    pieces: Sequence[str]
    method: Method
    options: Mapping[int, Options]
    policy: Policy
    fbank: FbankOptions
    max_duration: float
    device: torch.device
    extractor: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extractor", make_extractor(self.fbank))

    def features(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """(T, C) of each waveform (n,) at SAMPLING_RATE, n at least a window: the extractor of the training."""
        return [torch.from_numpy(np.asarray(each)) for each in extract(self.extractor, list(waveforms))]

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[EarlyResult | None]:
        """What was found in each waveform (n,); None where it has no output frame."""
        results: list[EarlyResult | None] = [None] * len(waveforms)
        long_enough = [row for row, each in enumerate(waveforms) if len(each) >= MIN_SAMPLES[self.fbank.extractor]]
        features = self.features([waveforms[row] for row in long_enough]) if long_enough else []
        chosen = [(row, each) for row, each in zip(long_enough, features) if len(each) >= MIN_FRAMES]
        if chosen:
            x = torch.nn.utils.rnn.pad_sequence([each for _, each in chosen], batch_first=True).to(self.device)
            lengths = torch.tensor([len(each) for _, each in chosen], device=self.device)
            found = search_early(self.model, x, lengths, self.policy, self.method, self.options)
            for (row, _), result in zip(chosen, found):
                results[row] = result
        return results

    def segment(self, piece: Piece, result: EarlyResult, samples: int) -> Segment:
        """A piece of a recording with what was found in it."""
        hypothesis = result.hypothesis
        tokens = [self.pieces[token] for token in hypothesis.tokens]
        starts = [piece.start + OUTPUT_FRAME * frame for frame in hypothesis.timestamps]
        frames = max(1, round(samples / SAMPLING_RATE / OUTPUT_FRAME))
        return Segment(
            start=piece.start,
            end=piece.end,
            words=timed_words(tokens, starts, hypothesis.words),
            tokens=tokens,
            timestamps=starts,
            confidence=float(min(1.0, np.exp(hypothesis.score / frames))),
            exit_layer=result.layer,
            milliseconds=1000 * result.seconds,
            overlap=piece.overlap,
        )


def make_recognizer(args: argparse.Namespace) -> Recognizer:
    """Load what `args` names.

    Raises:
      CheckpointError, FileNotFoundError, PolicyError, ValueError: what is missing, or does not fit together.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.lang_dir is None:
        model, config, contents = load_model(args.checkpoint, device, args.exit)
    else:
        model, config, contents, _ = load_for_decoding(args.checkpoint, args.lang_dir, device, args.exit)
    layers, heads = config.model.exit_layers, config.model.heads
    trained_on = "lhotse" if config.data.features == "fbank" else config.data.features
    given = {name: getattr(args, name) for name in WEIGHTS if getattr(args, name) is not None}
    fitted = FittedPolicy.load(args.exit_policy) if args.exit_policy else None
    if fitted is not None:
        fitted.check(layers, checkpoint_id(args.checkpoint), str(args.exit_policy))
        if given or args.method not in (None, fitted.method):
            raise ValueError(
                f"{args.exit_policy} was fitted with {fitted.method} and its weights; leave --method and weights out"
            )
    name = fitted.method if fitted else args.method or _greedy(heads)
    if METHODS[name] not in heads:
        known = [each for each, head in METHODS.items() if head in heads and each != "nbest-oracle"]
        raise ValueError(f"--method {name}: this model's heads are {', '.join(heads)}; choose among {', '.join(known)}")
    method = make_method(name, args.lang_dir, config.model.vocab_size, device)
    known = dict(method.default)
    if strangers := sorted(given.keys() - known.keys()):
        flags = ", ".join(f"--{each.replace('_', '-')}" for each in strangers)
        raise ValueError(f"{flags}: {name} has {' and '.join(known) or 'no weights'}; leave it out")
    chosen = tuple((known | given).items())
    return Recognizer(
        model=model,
        pieces=contents["tokens"],
        method=method,
        options={layer: tuple(each.items()) for layer, each in fitted.options.items()}
        if fitted
        else dict.fromkeys(layers, chosen),
        policy=fitted.policy if fitted else Fixed(layers[-1]),
        fbank=FbankOptions(args.fbank or trained_on, config.model.num_mel_bins),
        max_duration=args.max_duration,
        device=device,
    )


def _greedy(heads: Sequence[str]) -> str:
    return default_methods(heads)[0] if "ctc" in heads else "transducer-greedy_search"


@dataclass
class _Job:
    """A recording on its way."""

    name: str
    seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    left: int = 0
    """pieces without a result"""
    read: bool = False
    fault: str | None = None

    @property
    def result(self) -> Transcript | Fault | None:
        if self.fault is not None:
            return Fault(self.name, self.fault)
        if not self.read or self.left:
            return None
        return Transcript(self.name, self.seconds, join_segments(self.segments))


def transcripts(
    sources: Iterable[Source | Fault],
    recognizer: Recognizer,
    max_segment: float,
    overlap: float,
    channel: int | None = None,
    bar: tqdm | None = None,
) -> Iterator[Transcript | Fault]:
    """What was heard in each source, or why nothing was, in their order.

    Pieces of several recordings share a batch. Of the audio no more is in memory than a batch and a block of the
    decoder's; of a recording, its levels are (400 bytes a second) and what was found.

    Args:
      channel: of sources that name none.
      bar: goes forward by seconds of audio.
    """
    jobs: deque[_Job] = deque()
    batch: list[tuple[_Job, Piece, np.ndarray]] = []

    def run() -> None:
        rows = [row for row in batch if row[0].fault is None]
        batch.clear()
        for (job, piece, samples), result in zip(rows, _recognize(recognizer, rows)):
            job.left -= 1
            if isinstance(result, str):
                job.fault = result
            elif result is not None:
                job.segments.append(recognizer.segment(piece, result, len(samples)))
            if bar is not None:
                bar.update(piece.end - piece.start - piece.overlap)

    for source in sources:
        job = _Job(source.name)
        jobs.append(job)
        if isinstance(source, Fault):
            job.fault = source.reason
        else:
            try:
                for piece, samples in _pieces(source, job, max_segment, overlap, channel, bar):
                    longest = max(len(samples), *(len(each) for _, _, each in batch), 0)
                    if batch and (len(batch) + 1) * longest > recognizer.max_duration * SAMPLING_RATE:
                        run()
                    job.left += 1
                    batch.append((job, piece, samples))
            except AudioError as error:
                job.fault = str(error)
            job.read = True
        while jobs and (result := jobs[0].result) is not None:
            jobs.popleft()
            yield result
    run()
    yield from (job.result for job in jobs)


def _pieces(
    source: Source, job: _Job, max_segment: float, overlap: float, channel: int | None, bar: tqdm | None
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of a recording with their samples (n,) at SAMPLING_RATE. It is read twice: of a damaged one nothing is
    searched."""
    stream = sys.stdin.buffer if source.path is None else source.path
    channel = channel if source.channel is None else source.channel
    with open_recording(stream, source.start, source.duration, channel) as recording:
        levels = recording.levels()
        job.seconds = levels.seconds
        if bar is not None:
            bar.total += levels.seconds
        pieces = plan_pieces(levels.decibels, levels.hop_seconds, levels.seconds, max_segment, overlap)
        yield from slice_pieces(recording.resampled(), SAMPLING_RATE, pieces)


def _recognize(
    recognizer: Recognizer, rows: Sequence[tuple[_Job, Piece, np.ndarray]]
) -> Iterator[EarlyResult | str | None]:
    """What was found in each row, or why it could not be searched."""
    if not rows:
        return
    try:
        yield from recognizer([samples for _, _, samples in rows])
        return
    except ValueError as error:
        if len(rows) == 1:
            yield str(error)
            return
    for row in rows:  # whose fault it was
        yield from _recognize(recognizer, [row])


if __name__ == "__main__":
    sys.exit(main())
