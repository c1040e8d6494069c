"""Lhotse manifests: read and written as streams, made by a Lhotse recipe or from a corpus in sphinx layout.

A split is a pair of files, recordings and supervisions (`.jsonl` or `.jsonl.gz`), in the same order: the
supervisions of a recording stand together, in the order of the recordings. So both are read side by side, one
recording at a time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lhotse.recipes
from lhotse import SupervisionSegment

from splitformer.corpora.manifests import Skipped, audio_fault, spread
from splitformer.data.manifests import ManifestError, Pair, use_soundfile
from splitformer.speech.audio import AUDIO_SUFFIXES

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
