"""Read corpora and MUSAN with Lhotse's recipes; files that the recipes cannot read are skipped."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lhotse.recipes
from lhotse import Recording, SupervisionSegment
from lhotse.recipes import prepare_musan

from splitformer.corpora.manifests import Skipped, audio_error, spread
from splitformer.data.manifests import ManifestError, Pair, use_soundfile
from splitformer.speech.audio import AUDIO_SUFFIXES

MUSAN_PARTS = ("music", "noise", "speech")
WINDOW = 10.0
SHORTEST_WINDOW = 5.0
"""Seconds: icefall's local/compute_fbank_musan.py cuts MUSAN into windows of 10 s and keeps those longer than 5 s.
Shorter recordings, which icefall leaves out, are a window here."""


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
) -> Iterator[Pair]:
    """Yield one split of a corpus, read by `lhotse.recipes.prepare_<recipe>`, sorted by recording.

    Args:
      skipped: records unreadable files.
      folder: where below `corpus_dir` the split's audio is (default: in a folder of the split's name).
      options: further arguments of the recipe, such as {"normalize_text": "upper"}.
      limit: at most so many utterances, evenly over the split.
    Raises:
      ManifestError: unknown recipe or option, missing or empty split; unreadable files, if `skipped` is strict.
    """
    part = folder or split
    place = Path(corpus_dir) / part
    if not place.is_dir():
        beside = sorted(p.name for p in Path(corpus_dir).glob("*") if p.is_dir())
        raise ManifestError(f"there is no folder {place}; {corpus_dir} has: {', '.join(beside) or 'no folders'}")

    def run(root: Path) -> dict[str, Any]:
        return _run_recipe(recipe, root, split, num_jobs, options or {})

    manifests = without_unreadable(run, recipe, Path(corpus_dir), part, skipped)
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
        yield recording, groups.get(recording.id, [])


def musan_pairs(musan_dir: str | Path, skipped: Skipped, *, limit: int | None = None) -> Iterator[Pair]:
    """Yield the recordings of MUSAN, or of a folder in its layout, with windows of some seconds as supervisions.

    Args:
      musan_dir: with some of the folders music, noise and speech.
      skipped: records unreadable files.
      limit: at most so many recordings of each folder.
    Raises:
      ManifestError: there is none of the folders, or no recording in them; unreadable files, if `skipped` is strict.
    """
    musan_dir = Path(musan_dir)
    parts = [part for part in MUSAN_PARTS if (musan_dir / part).is_dir()]
    if not parts:
        raise ManifestError(f"{musan_dir} has none of the folders {', '.join(MUSAN_PARTS)}; give the folder `musan`")
    parts = [part for part in parts if next((musan_dir / part).rglob("*.wav"), None)]
    if not parts:
        raise ManifestError(f"{musan_dir}: there is no recording (.wav) in its folders")
    for part in parts:

        def run(folder: Path, part: str = part) -> dict[str, Any]:
            return prepare_musan(folder, parts=[part])[part]

        manifests = without_unreadable(run, "musan", musan_dir, part, skipped)
        for recording in spread(sorted(manifests["recordings"], key=lambda recording: recording.id), limit):
            yield recording, _windows(recording)


def _windows(recording: Recording) -> list[SupervisionSegment]:
    whole, rest = divmod(recording.duration, WINDOW)
    spans = [(i * WINDOW, WINDOW) for i in range(int(whole))]
    if rest > SHORTEST_WINDOW or not spans:
        spans.append((whole * WINDOW, round(rest, 8)))
    return [
        SupervisionSegment(f"{recording.id}-{i:03d}", recording.id, start, duration, recording.channel_ids[0], "noise")
        for i, (start, duration) in enumerate(spans)
    ]


def without_unreadable(
    run: Callable[[Path], dict[str, Any]], recipe: str, corpus_dir: Path, part: str, skipped: Skipped
) -> dict[str, Any]:
    """Return the manifests that Lhotse's recipe gives for the folder `part` of a corpus.

    Lhotse's recipes stop at the first audio file that they cannot read. If that happens, the unreadable files are
    recorded in `skipped`, and the recipe runs again on links to the other files. Files with the same name but for the
    suffix, such as a transcript, are left out with the audio: some recipes would miss it.

    Args:
      run: runs the recipe on a corpus folder.
    Raises:
      ManifestError: the recipe stops for another reason; unreadable files, if `skipped` is strict.
    """
    use_soundfile()
    folder = corpus_dir / part
    try:
        return run(corpus_dir)
    except ManifestError:
        raise
    except Exception as error:
        audio = sorted(path for path in files_below(folder) if path.suffix.lower() in AUDIO_SUFFIXES)
        errors = {path: reason for path in audio if (reason := audio_error(path))}
        if not errors:
            raise ManifestError(
                f"Lhotse's recipe {recipe!r} cannot read {folder} ({type(error).__name__}: {error}), though every "
                "audio file there is readable: look for a transcript without words, or for missing files"
            ) from error
    for path, reason in errors.items():
        skipped.add(str(path), reason)
    originals = {}
    stems = {path.stem for path in errors}
    with tempfile.TemporaryDirectory() as view:
        for path in sorted(files_below(folder)):
            if path.stem not in stems:
                link = Path(view) / path.relative_to(corpus_dir)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
                originals[str(link)] = str(path)
        manifests = run(Path(view))
    for recording in manifests["recordings"]:
        for source in recording.sources:
            source.source = originals.get(source.source, source.source)
    return manifests


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, in no order. Links to folders are followed; every folder comes once."""
    seen = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def _run_recipe(
    recipe: str, corpus_dir: Path, split: str, num_jobs: int, options: Mapping[str, str]
) -> dict[str, Any]:
    """Return the manifests {"recordings": ..., "supervisions": ...} of a split."""
    prepare = getattr(lhotse.recipes, f"prepare_{recipe}", None)
    if prepare is None:
        raise ManifestError(f"Lhotse {lhotse.__version__} has no recipe {recipe!r}; `lhotse prepare --help` lists them")
    parameters = inspect.signature(prepare).parameters
    unknown = sorted(options.keys() - parameters.keys())
    if unknown:
        raise ManifestError(f"Lhotse's recipe {recipe!r} has no option {', '.join(unknown)}; it has "
                            f"{', '.join(parameters)}")  # fmt: skip
    common: dict[str, Any] = {"dataset_parts": [split], "num_jobs": num_jobs}
    manifests = prepare(corpus_dir, **{name: value for name, value in common.items() if name in parameters}, **options)
    if split not in manifests:
        raise ManifestError(f"Lhotse's recipe {recipe!r} gave no split {split!r}, only {', '.join(manifests)}")
    return manifests[split]
