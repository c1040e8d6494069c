"""Read Lhotse's manifests. Audio that a command or an address gives is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lhotse import Recording

from splitformer.corpora.sources.base import ReadOptions, SourceError, SourceRecording, Utterance
from splitformer.corpora.sources.text import clean_id, json_lines, read_span, split_in


def lhotse_manifests(folder: Path) -> list[Path]:
    """Return the manifests of recordings in a folder."""
    names = (path for path in folder.iterdir() if "recordings" in path.name)
    return sorted(path for path in names if path.name.endswith((".jsonl", ".jsonl.gz")))


def read_lhotse(manifest: Path, options: ReadOptions) -> list[SourceRecording]:
    """Return the recordings of a Lhotse manifest, with the supervisions of the manifest beside it.

    Raises:
      SourceError: a line is malformed, the two manifests contradict each other, or audio is not in files.
    """
    beside = manifest.with_name(manifest.name.replace("recordings", "supervisions"))
    if not beside.is_file():
        raise SourceError(f"{manifest} has no {beside.name} beside it: there are no transcripts to learn from")
    split, base = split_in(manifest.name), options.base(manifest.parent)
    groups: dict[str, list[Utterance]] = {}
    for where, item in json_lines(beside, options.encoding):
        start, end = read_span(where, _value(item, "start", where), duration=_value(item, "duration", where))
        channel = item.get("channel", 0)
        channel = channel[0] if isinstance(channel, list) and channel else channel
        name, text = clean_id(str(_value(item, "id", where))), str(item.get("text") or "")
        utterance = Utterance(where, name, text, item.get("speaker") or None, split, start, end, channel)
        groups.setdefault(str(_value(item, "recording_id", where)), []).append(utterance)
    recordings = []
    for where, item in json_lines(manifest, options.encoding):
        name = str(_value(item, "id", where))
        for source in _value(item, "sources", where):
            if source.get("type") != "file":
                raise SourceError(
                    f"{where}: the audio of recording {name!r} is a {source.get('type')}, which is not run or fetched: "
                    f"{str(source.get('source'))[:200]!r}. Save it as a file, and name that (type \"file\")"
                )
        try:
            recording = Recording.from_dict(item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SourceError(f"{where}: Lhotse cannot read this recording ({reason})") from error
        for part in recording.sources:
            part.source = str(base / part.source)
        utterances = sorted(groups.pop(name, ()), key=lambda utterance: utterance.start or 0.0)
        path = Path(recording.sources[0].source)
        recordings.append(SourceRecording(where, name, path, utterances, manifest=recording))
    for name, group in groups.items():
        raise SourceError(f"{group[0].where}: {manifest} has no recording {name!r}; add it or remove the supervision")
    return recordings


def _value(item: dict[str, Any], key: str, where: str) -> Any:
    if key not in item:
        raise SourceError(f"{where}: the line lacks {key!r}; it has {', '.join(item)}")
    return item[key]
