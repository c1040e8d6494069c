#!/usr/bin/env python3
"""Survey own data, and describe them as a corpus, egs/NAME/, for prepare.sh and run.sh."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from splitformer.cli import command, conf
from splitformer.corpora.description import check_name, description, write_folder
from splitformer.corpora.proposal import Choices, propose, render
from splitformer.corpora.rules import check_shares
from splitformer.corpora.sources import FORMS, ReadOptions
from splitformer.corpora.survey import survey


@dataclass(frozen=True)
class Options:
    __doc__ = f"""Survey own data, and describe them as a corpus, egs/NAME/, for ./prepare.sh and ./run.sh.

{FORMS}

Audio is anything that libsndfile reads, at any sampling rate. Text is UTF-8 or UTF-16, or see --encoding. The data stay
where they are; nothing is copied. docs/new_corpus.md explains more."""

    name: Annotated[conf.Positional[str], conf.arg(metavar="NAME")]
    """name of the corpus"""
    source: Annotated[Path, conf.arg(name="from", metavar="SOURCE")]
    """your data"""
    reading: conf.OmitArgPrefixes[ReadOptions]
    decision: conf.OmitArgPrefixes[Choices]
    look_only: bool = False
    """show the survey and write nothing"""
    force: bool = False
    """replace corpus.sh and confs of egs/NAME"""
    check_audio: Literal["all", "sample", "headers"] | None = None
    """audio to decode completely; of other files, headers and ends are read (default: all up to 20 hours, else a
    sample of 20 hours)"""
    egs: Path = Path(__file__).resolve().parents[1] / "egs"
    """folder of all corpora"""


def run(options: Options) -> None:
    folder = options.egs / options.name
    check_shares(options.decision.dev_share, options.decision.test_share)
    if not options.look_only:
        check_name(options.name, folder, options.force)
    found = survey(options.source, options.reading, options.check_audio)
    proposal = propose(found, options.decision)
    print(render(found, proposal))
    if options.look_only:
        return
    files = description(options.name, options.source, proposal, options.reading, found.decoded_all)
    write_folder(folder, files)
    print(f"Written: {', '.join(str(folder / name) for name in files)}\nNext: ./run.sh --corpus {options.name}")


if __name__ == "__main__":
    sys.exit(command(run, prog="new_corpus.sh"))
