"""Transcribe recordings of any format, sampling rate, number of channels and length."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from splitformer.cli import Positional, command
from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.speech.audio import AudioError, Source
from splitformer.speech.inputs import STANDARD_INPUT, find_sources
from splitformer.speech.recognizer import MAX_DURATION, load
from splitformer.speech.segmentation import MAX_SEGMENT, OVERLAP, check_limits
from splitformer.speech.transcripts import Format, printable, written


@dataclass(frozen=True)
class Options:
    """Transcribe recordings of any format, sampling rate, number of channels and length.

    The transcript of a recording is printed as soon as it is complete, in the order given. Recordings that cannot be
    read are named on standard error, and the exit status is then 1.
    """

    audio: Positional[tuple[str, ...]]
    """files; folders; .jsonl lists of recordings; - for standard input. Put -- before names that begin with a dash"""
    checkpoint: Path
    """EXP/averaged.pt, or the checkpoint of an epoch"""
    exit: int | None = None
    """encoder layer to stop after; nothing above it is loaded (default: the last exit)"""
    exit_policy: Path | None = None
    """policy.json of `calibrate`, which chooses an exit for each segment, with the search it was fitted for"""
    method: str | None = None
    """search method (default: greedy search)"""
    lang_dir: Path | None = None
    """lang_dir of the training, for methods that read words or graphs"""
    hlg_scale: float | None = None
    """weight of the language model, for CTC methods with graphs"""
    ngram_lm_scale: float | None = None
    """weight of the language model, for fast_beam_search_nbest_LG"""
    blank_penalty: float | None = None
    """nats subtracted from the blank's score"""
    format: Format = "text"
    """what is written"""
    output: Path | None = None
    """file to write once all is transcribed (default: standard output)"""
    channel: int | None = None
    """channel to transcribe, counted from 0 (default: the mean of all)"""
    max_segment: float = MAX_SEGMENT
    """seconds; longer recordings are cut into segments, in pauses where there are any"""
    overlap: float = OVERLAP
    """seconds that two segments share where there is no pause"""
    fbank: str | None = None
    """lhotse, kaldifeat or linear-mel (default: as in training)"""
    max_duration: float = MAX_DURATION
    """seconds of audio in a batch, padding included"""
    device: str | None = None
    """such as cuda:1 (default: a GPU if there is one)"""


def run(options: Options) -> int:
    if not options.audio:
        raise UserError("no recordings are given: name files, folders, .jsonl lists, or - for standard input")
    check_limits(options.max_segment, options.overlap)
    if options.channel is not None and options.channel < 0:
        raise UserError(f"--channel {options.channel}: channels are counted from 0")
    if options.audio.count(STANDARD_INPUT) > 1:
        raise UserError("- is given twice, and standard input can be read once")
    sources = list(find_sources(options.audio))
    if options.format == "srt" and len(sources) != 1:
        raise UserError(f"--format srt holds one recording, and {len(sources)} are given: give one at a time")
    recognizer = load(
        options.checkpoint,
        exit=options.exit,
        exit_policy=options.exit_policy,
        method=options.method,
        lang_dir=options.lang_dir,
        hlg_scale=options.hlg_scale,
        ngram_lm_scale=options.ngram_lm_scale,
        blank_penalty=options.blank_penalty,
        fbank=options.fbank,
        device=options.device,
        max_duration=options.max_duration,
    )
    one_file = len(sources) == 1 and isinstance(sources[0], Source) and (sources[0].name,) == options.audio
    failed = 0
    with (
        # UTF-8 whatever the locale; a file appears when it is complete
        atomic_write(options.output) if options.output else open(1, "w", encoding="utf-8", closefd=False) as file,
        tqdm(total=0.0, unit="s", desc="transcribing", disable=None, leave=False, unit_scale=True) as progress,
    ):
        for result in recognizer.transcripts(sources, options.channel, options.max_segment, options.overlap, progress):
            if isinstance(result, AudioError):
                failed += 1
                progress.write(f"splitformer transcribe: {printable(str(result))}", file=sys.stderr)
                continue
            if not result.segments:
                why = f"no words: {result.seconds:g} s are shorter than one output frame"
                progress.write(f"splitformer transcribe: {printable(result.name)}: {why}", file=sys.stderr)
            file.write(written(result, options.format, with_name=not one_file))
            file.flush()
    if failed:
        done = len(sources) - failed
        message = f"{failed} of {len(sources)} could not be transcribed, {done} are done"
        print(f"splitformer transcribe: {message}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(command(run))
