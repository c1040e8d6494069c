"""Lhotse manifests: read and written as streams, made by a Lhotse recipe or from a corpus in sphinx layout.

A split is a pair of files, recordings and supervisions (`.jsonl` or `.jsonl.gz`), in the same order: the
supervisions of a recording stand together, in the order of the recordings. So both are read side by side, one
recording at a time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import gzip
import inspect
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lhotse.recipes
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import MonoCut

from splitformer.data.trust import Checked
from splitformer.results import atomic_write

AUDIO_SUFFIXES = {".flac", ".wav", ".sph", ".ogg", ".mp3", ".opus", ".aiff"}


Pair = tuple[Recording, list[SupervisionSegment]]
"""A recording and its supervisions."""


class ManifestError(ValueError):
    """A corpus or a manifest that cannot be used as it is; the message says what to do."""


@dataclass
class Skipped:
    """What was left out, and why: `reasons` maps an id or a file to a reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str, strict: bool) -> None:
        """Note and log that `name` is left out. Raises ManifestError where `strict`."""
        if strict:
            raise ManifestError(f"{name}: {reason} (--strict is given; else it would be skipped)")
        logging.warning("skipped %s: %s", name, reason)
        self.reasons[name] = reason

    def __len__(self) -> int:
        return len(self.reasons)


def use_soundfile() -> None:
    """Let Lhotse read audio by libsndfile, which reads SPHERE too; Lhotse's own choice would run sph2pipe.

    The environment variable LHOTSE_AUDIO_BACKEND, where set, wins.
    """
    if "LHOTSE_AUDIO_BACKEND" not in os.environ:
        set_current_audio_backend(LibsndfileBackend())


@contextmanager
def manifest_writer(path: str | Path) -> Iterator[Any]:
    """Yield a function that appends one Lhotse item (anything with `to_dict`) to the manifest `path`.

    The file appears when it is complete (see results.atomic_write), and the same items give the same bytes.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ManifestError(f"{path}: a manifest's name ends in .jsonl or .jsonl.gz")
    with atomic_write(path, "wb") as raw:
        # no name and no time in the gzip header: they would make equal manifests differ
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(packed, encoding="utf-8", write_through=True)
        yield lambda item: text.write(json.dumps(item.to_dict(), ensure_ascii=False) + "\n")
        text.flush()
        text.detach()
        if packed is not raw:
            packed.close()


def read_recordings(path: str | Path) -> Iterator[Recording]:
    """The recordings of a manifest, one by one. Raises FileNotFoundError and UnsafeManifest."""
    return iter(Checked(RecordingSet.from_jsonl_lazy(_existing(path)), path))


def read_supervisions(path: str | Path) -> Iterator[SupervisionSegment]:
    """The supervisions of a manifest, one by one. Raises FileNotFoundError and UnsafeManifest."""
    return iter(Checked(SupervisionSet.from_jsonl_lazy(_existing(path)), path))


def read_cuts(path: str | Path) -> CutSet:
    """The cuts of a manifest, as a lazy CutSet. Raises FileNotFoundError and UnsafeManifest, that while it is read."""
    return CutSet(Checked(CutSet.from_jsonl_lazy(_existing(path)), path))


def count_items(path: str | Path) -> int:
    """Number of items in a manifest (its lines)."""
    path = _existing(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no manifest {path}; an earlier stage of prepare.sh makes it")
    return path


def read_pairs(recordings: str | Path, supervisions: str | Path) -> Iterator[Pair]:
    """Every recording with its supervisions (none, one or several).

    Raises:
      ManifestError: a supervision whose recording is absent, or which stands in another order.
    """
    waiting = read_supervisions(supervisions)
    next_one = next(waiting, None)
    for recording in read_recordings(recordings):
        group = []
        while next_one is not None and next_one.recording_id == recording.id:
            group.append(next_one)
            next_one = next(waiting, None)
        yield recording, group
    if next_one is not None:
        raise ManifestError(
            f"{supervisions}: supervision {next_one.id!r} belongs to recording {next_one.recording_id!r}, "
            f"which {recordings} does not have, or not in the same order as the supervisions"
        )


def cuts_from_manifests(recordings: str | Path, supervisions: str | Path) -> Iterator[MonoCut]:
    """One cut per supervision, named as the supervision."""
    for recording, group in read_pairs(recordings, supervisions):
        for segment in group:
            channel = segment.channel if isinstance(segment.channel, int) else segment.channel[0]
            yield MonoCut(
                id=segment.id,
                start=segment.start,
                duration=segment.duration,
                channel=channel,
                recording=recording,
                supervisions=[segment.with_offset(-segment.start)],
            )


def write_split(
    pairs: Iterable[tuple[Recording, list[SupervisionSegment]]],
    recordings: str | Path,
    supervisions: str | Path,
) -> int:
    """Write both manifests of a split; return the number of supervisions."""
    count = 0
    with manifest_writer(recordings) as write_recording, manifest_writer(supervisions) as write_supervision:
        for recording, group in pairs:
            write_recording(recording)
            for segment in group:
                write_supervision(segment)
                count += 1
    return count


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


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the items, evenly spaced, in order; all of them where limit is None."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ManifestError(f"a limit of {limit} utterances leaves none; give 1 or more")
    return [items[i * len(items) // limit] for i in range(limit)]


def audio_fault(path: Path) -> str | None:
    """Why the header of an audio file cannot be used, or None where it can: reads no samples."""
    import soundfile  # here: the readers of ready-made manifests do without

    if not path.is_file():
        return "the audio file does not exist"
    if path.stat().st_size == 0:
        return "the audio file is empty"
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        return f"the audio file is corrupt ({error})"
    if info.frames <= 0:
        return "the audio file has no samples"
    return None


# -------------------------------------------------------------------------------------- Lhotse's recipes


def recipe_pairs(
    recipe: str,
    corpus_dir: str | Path,
    split: str,
    skipped: Skipped,
    *,
    folder: str | None = None,
    options: Mapping[str, str] | None = None,
    num_jobs: int = 1,
    limit: int | None = None,
    strict: bool = False,
) -> Iterator[Pair]:
    """One split of a corpus by Lhotse's own recipe `lhotse.recipes.prepare_<recipe>`, sorted by recording.

    Lhotse's recipes stop at the first audio file that they cannot read. Where that happens, the unreadable
    files are looked for, noted in `skipped`, and the recipe runs again on a view of the corpus without them.

    Args:
      folder: where below `corpus_dir` the split's audio lies (default: in a folder of the split's name).
      options: further arguments of the recipe, such as {"normalize_text": "upper"}.
      limit: at most so many utterances, taken evenly over the split.
    Raises:
      ManifestError: unknown recipe or option, absent or empty split; unreadable files, where `strict`.
    """
    use_soundfile()
    part = folder or split
    place = Path(corpus_dir) / part
    if not place.is_dir():
        beside = sorted(p.name for p in Path(corpus_dir).glob("*") if p.is_dir())
        raise ManifestError(f"there is no folder {place}; {corpus_dir} has: {', '.join(beside) or 'no folders'}")

    def run(root: Path) -> dict[str, Any]:
        return _run_recipe(recipe, root, split, num_jobs, options or {})

    manifests, originals = without_unreadable(run, recipe, Path(corpus_dir), part, skipped, strict)
    groups: dict[str, list[SupervisionSegment]] = {}
    for segment in manifests["supervisions"]:
        groups.setdefault(segment.recording_id, []).append(segment)
    recordings = sorted(manifests["recordings"], key=lambda recording: recording.id)
    if not recordings:
        raise ManifestError(f"Lhotse's recipe {recipe!r} found no utterance in {place}")
    if limit is not None:
        utterances = [segment for recording in recordings for segment in groups.get(recording.id, [])]
        chosen = {id(segment) for segment in spread(utterances, limit)}
        groups = {name: [s for s in group if id(s) in chosen] for name, group in groups.items()}
        recordings = [recording for recording in recordings if groups.get(recording.id)]
    for recording in recordings:
        for source in recording.sources:
            source.source = originals.get(source.source, source.source)
        yield recording, groups.get(recording.id, [])


def without_unreadable(
    run: Callable[[Path], dict[str, Any]], recipe: str, corpus_dir: Path, part: str, skipped: Skipped, strict: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a recipe of Lhotse, named `recipe`, gives for the folder `part` of a corpus, and {link: original} of audio
    files.

    Where it stops, unreadable files are looked for, noted in `skipped`, and it runs again on links to the others. What
    is named as an unreadable file is, such as its transcript, is left out with it: some recipes would miss the audio.

    Raises:
      ManifestError: it stops for another reason; unreadable files, where `strict`.
    """
    use_soundfile()
    folder = corpus_dir / part
    try:
        return run(corpus_dir), {}
    except ManifestError:
        raise
    except Exception as error:
        faults = {path: fault for path in _audio_files(folder) if (fault := audio_fault(path))}
        if not faults:
            raise ManifestError(
                f"Lhotse's recipe {recipe!r} cannot read {folder} ({type(error).__name__}: {error}), though every "
                "audio file there is readable: look for a transcript without words, or for files that are missing"
            ) from error
    for path, fault in faults.items():
        skipped.add(str(path), fault, strict)
    originals = {}
    stems = {path.stem for path in faults}
    with tempfile.TemporaryDirectory() as view:
        for path in sorted(files_below(folder)):
            if path.stem not in stems:
                link = Path(view) / path.relative_to(corpus_dir)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
                originals[str(link)] = str(path)
        return run(Path(view)), originals


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and of those below it, folders that are links included, each folder once, in no order."""
    seen = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in files_below(folder) if path.suffix.lower() in AUDIO_SUFFIXES)


def _run_recipe(
    recipe: str, corpus_dir: Path, split: str, num_jobs: int, options: Mapping[str, str]
) -> dict[str, Any]:
    """The manifests {"recordings": ..., "supervisions": ...} of a split."""
    prepare = getattr(lhotse.recipes, f"prepare_{recipe}", None)
    if prepare is None:
        raise ManifestError(f"Lhotse {lhotse.__version__} has no recipe {recipe!r}; `lhotse prepare --help` lists them")
    taken = inspect.signature(prepare).parameters
    unknown = sorted(options.keys() - taken.keys())
    if unknown:
        raise ManifestError(f"Lhotse's recipe {recipe!r} has no option {', '.join(unknown)}; it has {', '.join(taken)}")
    usual: dict[str, Any] = {"dataset_parts": [split], "num_jobs": num_jobs}
    manifests = prepare(corpus_dir, **{name: value for name, value in usual.items() if name in taken}, **options)
    if split not in manifests:
        raise ManifestError(f"Lhotse's recipe {recipe!r} gave no split {split!r}, only {', '.join(manifests)}")
    return manifests[split]
