#!/usr/bin/env python3
"""Look at own data, show what is in them, and describe them as a corpus, egs/NAME/, for ./prepare.sh and ./run.sh.

SOURCE is
  a table, .tsv or .csv, with a header: columns audio (a path) and text, and where wanted id, speaker, split (train,
    dev, test), start and end (seconds), channel;
  a Kaldi data directory: wav.scp (files alone), text, and where wanted segments, utt2spk;
  a folder of audio with a .txt or .lab beside each file, in folders by speaker, and by split, where wanted;
  a folder with Lhotse's manifests, NAME_recordings_SPLIT.jsonl.gz and NAME_supervisions_SPLIT.jsonl.gz.

The audio may be whatever libsndfile reads, at any sampling rate. Text is UTF-8. Nothing is copied: the source stays
where it is."""

import argparse
import sys
from pathlib import Path

from splitformer.corpora.description import check_name, description, write_folder
from splitformer.corpora.rules import CASES, DIGITS, PUNCTUATIONS, SPLIT_KEYS
from splitformer.corpora.survey import Choices, propose, render, survey


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="new_corpus.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the corpus")
    parser.add_argument("--from", dest="source", metavar="SOURCE", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="write corpus.sh and confs of egs/NAME anew")
    parser.add_argument("--look-only", action="store_true", help="show the survey and write nothing")
    parser.add_argument("--audio-dir", type=Path, metavar="DIR", help="what relative paths in SOURCE start from")
    parser.add_argument("--channel", type=int, default=0, help="of recordings with several, counted from 0")
    parser.add_argument("--speakers", choices=("folders", "none"), help="of a folder: whether its folders are speakers")
    group = parser.add_argument_group("instead of what is proposed")
    group.add_argument("--case", choices=CASES)
    group.add_argument("--punctuation", choices=PUNCTUATIONS)
    group.add_argument("--digits", choices=DIGITS, help="reject: leave out utterances with digits")
    group.add_argument("--split-by", choices=SPLIT_KEYS, help="whose utterances stay together")
    group.add_argument("--split-seed", type=int)
    group.add_argument("--dev-share", type=_share, metavar="X", help="0 to 0.5")
    group.add_argument("--test-share", type=_share, metavar="X", help="0 to 0.5")
    group.add_argument("--token-type", choices=("bpe", "char"))
    group.add_argument("--vocab-size", type=int, metavar="N")
    group.add_argument("--chars-per-second", type=float, nargs=2, metavar=("LOW", "HIGH"), help="plausible ones")
    parser.add_argument("--egs", type=Path, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.egs / args.name
    try:
        if not args.look_only:
            check_name(args.name, folder, args.force)
        found = survey(
            args.source,
            channel=args.channel,
            audio_dir=args.audio_dir,
            speakers_from_folders=None if args.speakers is None else args.speakers == "folders",
        )
        choices = Choices(
            args.case,
            args.punctuation,
            args.digits,
            args.split_by,
            args.split_seed,
            args.dev_share,
            args.test_share,
            args.token_type,
            args.vocab_size,
            tuple(args.chars_per_second) if args.chars_per_second else None,
        )
        proposal = propose(found, choices)
        print(render(found, proposal))
        if args.look_only:
            return
        files = description(
            args.name,
            args.source,
            proposal,
            channel=args.channel,
            audio_dir=args.audio_dir,
            speakers=args.speakers,
        )
        write_folder(folder, files)
    except (ValueError, OSError) as error:
        sys.exit(f"new_corpus.sh: {error}")
    print(f"Written: {', '.join(str(folder / name) for name in files)}\nNext: ./run.sh --corpus {args.name}")


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 0.5:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 0.5")
    return share


if __name__ == "__main__":
    main()
