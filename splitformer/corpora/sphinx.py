"""Lhotse manifests: read and written as streams, made by a Lhotse recipe or from a corpus in sphinx layout.

A split is a pair of files, recordings and supervisions (`.jsonl` or `.jsonl.gz`), in the same order: the
supervisions of a recording stand together, in the order of the recordings. So both are read side by side, one
recording at a time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from lhotse import Recording, SupervisionSegment

from splitformer.corpora.manifests import Skipped, audio_fault, spread
from splitformer.data.manifests import ManifestError, Pair, use_soundfile

# ------------------------------------------------------------------------------ corpora in sphinx layout

_MARKS = re.compile(r"^\s*(?:<s>)?\s*(?P<text>.*?)\s*(?:</s>)?\s*\((?P<id>[^()\s]+)\)\s*$")


def sphinx_pairs(
    fileids: str | Path,
    transcription: str | Path,
    audio_dir: str | Path,
    skipped: Skipped,
    *,
    suffix: str = ".sph",
    speakers: Collection[str] = (),
    exclude_speakers: Collection[str] = (),
    limit: int | None = None,
    strict: bool = False,
) -> Iterator[Pair]:
    """The utterances of a corpus as CMU sphinx trainers keep it.

    Args:
      fileids: one path per line, relative to `audio_dir` and without suffix; the last folder names the
        speaker and the file the utterance.
      transcription: one line per utterance, `<s> TEXT </s> (utterance)`, the marks being optional.
      skipped: where utterances without a transcript or with unreadable audio are noted.
      speakers: where given, the only speakers taken.
      exclude_speakers: speakers that are left out.
      limit: at most so many utterances, taken evenly over the list.
    Raises:
      ManifestError: a line that is no transcription, unknown speakers, no utterance at all; anything that is
        skipped, where `strict`.
    """
    use_soundfile()
    texts = _sphinx_texts(Path(transcription))
    paths = [Path(line) for line in Path(fileids).read_text(encoding="utf-8").split()]
    known = {path.parent.name for path in paths}
    unknown = sorted((set(speakers) | set(exclude_speakers)) - known)
    if unknown:
        raise ManifestError(f"{fileids} has no speakers {unknown}; it has {', '.join(sorted(known))}")
    chosen = [
        path
        for path in paths
        if (not speakers or path.parent.name in speakers) and path.parent.name not in exclude_speakers
    ]
    if not chosen:
        raise ManifestError(f"{fileids}: no utterance is left of {len(paths)}; check the choice of speakers")
    for path in spread(chosen, limit):
        audio, utterance = Path(audio_dir) / f"{path}{suffix}", path.name
        if not texts.get(utterance):
            skipped.add(utterance, f"it has no transcript in {transcription}", strict)
            continue
        reason = audio_fault(audio)
        if reason:
            skipped.add(str(audio), reason, strict)
            continue
        recording = Recording.from_file(audio, recording_id=utterance)
        segment = SupervisionSegment(
            id=utterance,
            recording_id=utterance,
            start=0.0,
            duration=recording.duration,
            channel=0,
            text=texts[utterance],
            speaker=path.parent.name,
        )
        yield recording, [segment]


def sphinx_words(dictionary: str | Path) -> list[str]:
    """The words of a sphinx dictionary, sorted; `WORD(2)` is another pronunciation of WORD.

    Raises:
      ValueError: a line without a pronunciation.
    """
    words = set()
    with open(dictionary, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) == 1:
                raise ValueError(f"{dictionary}:{number}: {fields[0]!r} has no pronunciation")
            if fields:
                words.add(re.sub(r"\(\d+\)$", "", fields[0]))
    return sorted(words)


def _sphinx_texts(transcription: Path) -> dict[str, str]:
    """Utterance -> text."""
    texts: dict[str, str] = {}
    for number, line in enumerate(transcription.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        match = _MARKS.match(line)
        if match is None:
            raise ManifestError(f"{transcription}:{number}: {line!r} is not `<s> TEXT </s> (utterance)`")
        if match["id"] in texts:
            raise ManifestError(f"{transcription}:{number}: utterance {match['id']!r} is there twice")
        texts[match["id"]] = " ".join(match["text"].split())
    return texts
