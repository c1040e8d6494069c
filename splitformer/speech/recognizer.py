"""Recognizers: recordings of any length in, transcripts out. `load` makes one from a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from splitformer.checkpoint import checkpoint_id, load_model
from splitformer.decoding.lang import lang_file, read_symbols
from splitformer.decoding.methods import METHODS
from splitformer.decoding.searches import Method, Options, make_method
from splitformer.early_exit.policies import FittedPolicy, Fixed, Policy
from splitformer.early_exit.search import EarlyResult, search_early
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.subsampling import MIN_FRAMES, OUTPUT_FRAME, SAMPLING_RATE
from splitformer.speech.audio import Audio, AudioError, Source, open_recording, source_of
from splitformer.speech.fbank import Fbank, LinearMel, front_end
from splitformer.speech.segmentation import MAX_SEGMENT, OVERLAP, Piece, check_limits, plan_pieces, slice_pieces
from splitformer.speech.transcripts import Segment, Transcript, join_segments, timed_words

MAX_DURATION = 60.0


@dataclass(frozen=True)
class Recognizer:
    """A model with its features, search and exit policy.

    model: truncated at the exit that was asked for.  tokens: its vocabulary.
    features: the front end of its training.
    method, options: the search, and its options at each exit.
    policy: decides at which exit a segment is searched.
    max_duration: seconds of audio in a batch, padding included.
    """

    model: AsrModel
    tokens: Sequence[str]
    features: Fbank | LinearMel
    method: Method
    options: Mapping[int, Options]
    policy: Policy
    device: torch.device
    max_duration: float = MAX_DURATION

    def transcribe(
        self,
        audio: Audio,
        sampling_rate: int | None = None,
        channel: int | None = None,
        max_segment: float = MAX_SEGMENT,
        overlap: float = OVERLAP,
    ) -> Transcript:
        """Return the transcript of one recording.

        Args:
          audio: a path, a binary stream, or samples (n,) or (channels, n): floats from -1 to 1, int16 or int32.
          sampling_rate: Hz, of samples, which must state it; files have their own.
          channel: counted from 0; None for the mean of all channels.
          max_segment: seconds; longer recordings are cut into segments, in pauses where there are any.
          overlap: seconds that two segments share where there is no pause.
        Raises:
          AudioError: the recording cannot be read.
          TypeError, ValueError: `audio` is of another type or shape, or samples come without their rate.
        """
        [result] = self.transcribe_batch([audio], sampling_rate, channel, max_segment, overlap)
        if isinstance(result, AudioError):
            raise result
        return result

    def transcribe_batch(
        self,
        audio: Iterable[Audio],
        sampling_rate: int | None = None,
        channel: int | None = None,
        max_segment: float = MAX_SEGMENT,
        overlap: float = OVERLAP,
    ) -> list[Transcript | AudioError]:
        """Return the transcripts of many recordings, in their order, with batches made across recordings.

        A recording that cannot be read has its AudioError in its place. Arguments are those of `transcribe`.
        """
        if isinstance(audio, (str, Path, np.ndarray, Tensor)):
            raise TypeError(f"audio is one {type(audio).__name__}; expected a list of recordings")
        sources = [source_of(each, sampling_rate, f"audio[{number}]") for number, each in enumerate(audio)]
        return list(self.transcripts(sources, channel, max_segment, overlap))

    def transcripts(
        self,
        sources: Iterable[Source | AudioError],
        channel: int | None = None,
        max_segment: float = MAX_SEGMENT,
        overlap: float = OVERLAP,
        progress: tqdm | None = None,
    ) -> Iterator[Transcript | AudioError]:
        """Yield the transcript of each source, or the error of one that cannot be read, in their order.

        Segments of several recordings share a batch. In memory are a batch and a block of the decoder's samples, and
        of each recording its levels (400 bytes a second) and its words.

        Args:
          channel: of sources that name none.
          progress: advances by seconds of audio.
        """
        check_limits(max_segment, overlap)
        jobs: deque[_Job] = deque()
        batch: list[_Row] = []
        for source in sources:
            jobs.append(job := _Job())
            try:
                if isinstance(source, AudioError):
                    raise source
                job.name = source.name
                with open_recording(source, channel) as recording:
                    levels = recording.levels()  # reads all samples, which detects damage before decoding
                    job.seconds = levels.seconds
                    if progress is not None:
                        progress.total += levels.seconds
                    pieces = plan_pieces(levels, max_segment, overlap)
                    for piece, samples in slice_pieces(recording.resampled(), SAMPLING_RATE, pieces):
                        longest = max([len(samples), *(len(row[2]) for row in batch)])
                        if batch and (len(batch) + 1) * longest > self.max_duration * SAMPLING_RATE:
                            self._run(batch, progress)
                            batch = []
                        job.pending += 1
                        batch.append((job, piece, samples))
            except AudioError as error:
                job.error = error if error is source else AudioError(f"{job.name}: {error}")
            job.is_read = True
            while jobs and (result := jobs[0].result) is not None:
                jobs.popleft()
                yield result
        self._run(batch, progress)
        yield from (result for job in jobs if (result := job.result) is not None)

    def _run(self, batch: Sequence[_Row], progress: tqdm | None) -> None:
        """Search the pieces of a batch, and add the segments to their jobs."""
        rows = [row for row in batch if row[0].error is None]
        for (job, piece, samples), result in zip(rows, self._search([samples for _, _, samples in rows])):
            job.pending -= 1
            if isinstance(result, UserError):
                job.error = AudioError(f"{job.name}: {result}")
            elif result is not None:
                job.segments.append(self._segment(piece, result, len(samples)))
            if progress is not None:
                progress.update(piece.end - piece.start - piece.overlap)

    def _search(self, waveforms: Sequence[np.ndarray]) -> list[EarlyResult | UserError | None]:
        """Return the result for each waveform (n,), None without an output frame, or why it cannot be searched."""
        results: list[EarlyResult | UserError | None] = [None] * len(waveforms)
        features = {
            row: self.features(torch.from_numpy(samples).to(self.device))
            for row, samples in enumerate(waveforms)
            if len(samples) >= self.features.min_samples
        }
        features = {row: each for row, each in features.items() if len(each) >= MIN_FRAMES}
        if not features:
            return results
        x = torch.nn.utils.rnn.pad_sequence(list(features.values()), batch_first=True)
        lengths = torch.tensor([len(each) for each in features.values()], device=self.device)
        try:
            searched = search_early(self.model, x, lengths, self.policy, self.method, self.options)
        except UserError as error:
            if len(waveforms) == 1:
                return [error]
            return [self._search([each])[0] for each in waveforms]  # one bad recording does not fail the others
        for row, result in zip(features, searched):
            results[row] = result
        return results

    def _segment(self, piece: Piece, result: EarlyResult, samples: int) -> Segment:
        """Return the segment for a piece of `samples` samples and the result of searching it."""
        hypothesis = result.hypothesis
        tokens = [self.tokens[token] for token in hypothesis.tokens]
        starts = [piece.start + OUTPUT_FRAME * frame for frame in hypothesis.timestamps]
        words = timed_words(tokens, starts, hypothesis.words)
        if self.method.correct is not None:
            corrected = self.method.correct([word.text for word in words])
            words = [word._replace(text=text) for word, text in zip(words, corrected, strict=True)]
        frames = max(1, round(samples / SAMPLING_RATE / OUTPUT_FRAME))
        return Segment(
            start=piece.start,
            end=piece.end,
            words=words,
            tokens=tokens,
            timestamps=starts,
            confidence=float(min(1.0, np.exp(hypothesis.score / frames))),
            exit=result.layer,
            milliseconds=1000 * result.seconds,
            overlap=piece.overlap,
        )


@dataclass
class _Job:
    """A recording that is being transcribed. `pending` pieces have no result yet."""

    name: str = ""
    seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    pending: int = 0
    is_read: bool = False
    error: AudioError | None = None

    @property
    def result(self) -> Transcript | AudioError | None:
        if self.error is None and (self.pending or not self.is_read):
            return None
        return self.error or Transcript(self.name, self.seconds, join_segments(self.segments))


_Row = tuple[_Job, Piece, np.ndarray]
"""a piece of a recording with its samples (n,) at SAMPLING_RATE"""


# ---- loading


def load(
    checkpoint: str | Path,
    *,
    exit: int | None = None,
    exit_policy: str | Path | None = None,
    method: str | None = None,
    lang_dir: str | Path | None = None,
    hlg_scale: float | None = None,
    ngram_lm_scale: float | None = None,
    blank_penalty: float | None = None,
    fbank: str | None = None,
    device: str | torch.device | None = None,
    max_duration: float = MAX_DURATION,
) -> Recognizer:
    """Return a recognizer for a checkpoint.

    Args:
      checkpoint: such as EXP/averaged.pt.
      exit: the encoder layer to stop after; nothing above it is loaded (default: the last exit).
      exit_policy: policy.json, which chooses an exit for each segment; the search is that which it was fitted for.
      method: the search (default: greedy search); see docs/decoding.md.
      lang_dir: of the training, for methods that read words or graphs.
      hlg_scale, ngram_lm_scale: weight of the language model, for methods that have one.
      blank_penalty: nats subtracted from the blank's score.
      fbank: lhotse, kaldifeat or linear-mel (default: as in training).
      device: such as cuda:1 (default: a GPU if there is one).
      max_duration: seconds of audio in a batch, padding included.
    Raises:
      UserError: something is missing, or does not fit together.
    """
    if exit is not None and exit_policy is not None:
        raise UserError("an exit policy chooses among all exits: give either an exit or an exit policy")
    if not max_duration > 0:
        raise UserError(f"max_duration {max_duration:g}: a batch needs more than 0 seconds of audio, such as 60")
    device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, config, contents = load_model(checkpoint, device, exit)
    exits = config.model.exit_layers
    if lang_dir is not None and read_symbols(path := lang_file(lang_dir, "tokens.txt")) != contents["tokens"]:
        raise UserError(f"{path} has other tokens than {checkpoint}: give the lang_dir of the training")
    weights = {"hlg_scale": hlg_scale, "ngram_lm_scale": ngram_lm_scale, "blank_penalty": blank_penalty}
    given = {name: value for name, value in weights.items() if value is not None}
    fitted = None
    if exit_policy is not None:
        fitted = FittedPolicy.load(exit_policy)
        fitted.check(exits, checkpoint_id(checkpoint), str(exit_policy))
        if given or method not in (None, fitted.method):
            raise UserError(f"{exit_policy} sets the method ({fitted.method}) and its weights; leave both out")
        method = fitted.method
    method = _usable_method(method, config.model.heads)
    search = make_method(method, None if lang_dir is None else Path(lang_dir), config.model.vocab_size, device)
    known = dict(search.default)
    if unknown := sorted(given.keys() - known.keys()):
        raise UserError(f"{', '.join(unknown)}: {search.name} has {' and '.join(known) or 'no weights'}; leave it out")
    options = dict.fromkeys(exits, tuple((known | given).items()))
    if fitted is not None:
        options = {layer: tuple(each.items()) for layer, each in fitted.options.items()}
    name = fbank or ("lhotse" if config.data.features == "fbank" else config.data.features)
    return Recognizer(
        model=model,
        tokens=contents["tokens"],
        features=front_end(name, config.model.num_mel_bins).to(device),
        method=search,
        options=options,
        policy=fitted.policy if fitted else Fixed(exits[-1]),
        device=device,
        max_duration=max_duration,
    )


def _usable(device: str | torch.device) -> torch.device:
    """Return the device. Raises UserError if this machine or this torch lacks it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): choose cpu, or one of the "
            f"{torch.cuda.device_count()} GPUs that torch sees, cuda:0 to begin with"
        ) from error
    return torch.device(device)


def _usable_method(method: str | None, heads: Sequence[str]) -> str:
    """Return `method`, or the default one for these heads. Raises UserError for one that needs another head."""
    method = method or ("greedy_search" if "ctc" in heads else "transducer-greedy_search")
    choices = [each.name for each in METHODS.values() if each.head in heads and each.name != "nbest-oracle"]
    if method not in choices:
        raise UserError(f"method {method}: the heads are {' and '.join(heads)}; choose among {', '.join(choices)}")
    return method
