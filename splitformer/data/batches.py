"""Batches of features and labels, made from cuts with Lhotse's datasets."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from splitformer.data.batch import Batch
from splitformer.data.cut_features import AllFrames
from splitformer.data.manifests import read_cuts
from splitformer.data.shar import SharCuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError
from splitformer.model.subsampling import MIN_FRAMES


def load_cuts(paths: Iterable[str | Path]) -> CutSet:
    """Return the cuts of all manifests, lazily; a folder is read as Lhotse Shar.

    Raises:
      ManifestError: a file is missing, or a folder is not in the Shar format.
    """
    first, *others = [CutSet(SharCuts(path)) if path.is_dir() else read_cuts(path) for path in map(Path, paths)]
    for cuts in others:
        first = first + cuts
    return first


def cut_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files that `load_cuts` reads."""
    return [file for path in map(Path, paths) for file in (SharCuts(path).files if path.is_dir() else [path])]


class SpeechDataset(Dataset[Batch]):
    """Maps cuts with stored features and one supervision each to a batch, without augmentation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dataset = K2SpeechRecognitionDataset(return_cuts=True, input_strategy=AllFrames())

    def __getitem__(self, cuts: CutSet) -> Batch:
        raw = self.dataset[cuts]
        supervisions = raw["supervisions"]
        order = supervisions["sequence_idx"].argsort()  # rows of `inputs`, one supervision each
        texts = [supervisions["text"][i] for i in order.tolist()]
        cuts = [supervisions["cut"][i] for i in order.tolist()]
        y, y_lens = padded_labels([self.tokenizer.encode(text) for text in texts])
        return Batch(
            x=long_enough(raw["inputs"]),
            x_lens=supervisions["num_frames"][order].long(),
            y=y,
            y_lens=y_lens,
            texts=texts,
            cut_ids=[cut.id for cut in cuts],
            durations=[cut.duration for cut in cuts],
            errors={},
        )


def long_enough(x: Tensor) -> Tensor:
    """Pad features (N, T, C) of very short batches to what the front end's convolutions need."""
    return torch.nn.functional.pad(x, (0, 0, 0, MIN_FRAMES - x.size(1))) if x.size(1) < MIN_FRAMES else x


def padded_labels(labels: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return labels (N, S), padded with 0, and their lengths (N,)."""
    lengths = [len(each) for each in labels]
    y = np.zeros((len(labels), max(lengths)), dtype=np.int64)
    for row, each in zip(y, labels, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(y), torch.tensor(lengths)


def evaluation_batches(
    cuts: CutSet,
    tokenizer: Tokenizer,
    max_duration: float | None,
    num_workers: int = 0,
    max_cuts: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """Yield all cuts in their order, without augmentation; each of several ranks takes every `world_size`-th batch.

    A batch has up to `max_duration` seconds of audio, padding included, and up to `max_cuts` cuts.

    Raises:
      UserError: `max_duration` is not above 0.
    """
    if max_duration is not None and not max_duration > 0:
        raise UserError(f"max_duration {max_duration:g}: a batch needs more than 0 seconds of audio, such as 60")
    sampler = SimpleCutSampler(cuts, max_duration=max_duration, max_cuts=max_cuts, shuffle=False, drop_last=False,
                               rank=0, world_size=1)  # fmt: skip
    own = itertools.islice(sampler, rank, None, world_size)
    loader = DataLoader(SpeechDataset(tokenizer), sampler=own, batch_size=None, num_workers=num_workers,
                        worker_init_fn=ignore_stop_signals)  # fmt: skip
    yield from quiet_iterator(loader)


def ignore_stop_signals(worker: int) -> None:
    """Let a loading process live on when a whole process group is asked to stop: the run saves first, and ends it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def quiet_iterator(loader: DataLoader) -> Iterator[Batch]:
    """Return `iter(loader)` without torch's handler for SIGCHLD.

    The handler raises the death of a loading process in the middle of whatever runs, such as an optimizer step.
    Without it, the next request for a batch raises within seconds.
    """
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator
