"""What the recipe writes down: records of decoding and training, and the one way in which files are written.

Standard library only, so that every other module may import it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from splitformer.files import atomic_write, read_json


def _checked(kind: type, values: object, source: str) -> dict[str, Any]:
    """`values` where it is an object with exactly the fields of the dataclass `kind`, else a ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: a {kind.__name__} is a JSON object, this is {type(values).__name__}")
    expected = {each.name for each in fields(kind)}
    required = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    unknown, missing = sorted(values.keys() - expected), sorted(required - values.keys())
    if unknown or missing:
        raise ValueError(
            f"{source} is no {kind.__name__} of this version: unknown keys {unknown}, missing {missing}. "
            "Was it written by another version? Run decoding (or training) again, or remove the file."
        )
    return values


@dataclass(frozen=True)
class DecodeRecord:
    """The result of one test set at one exit with one method.

    corpus, system, seed: what was trained; `system` is the configuration's name.
    test_set, exit_layer, num_layers, method: what was decoded, at which of the encoder's layers, and how.
    wer: percent; errors = insertions + deletions + substitutions, against `ref_words` reference words.
    num_utterances: all of the test set; fallback_utterances: those with an empty lattice, decoded greedily.
    audio_seconds: duration of the test set.
    rtf: real-time factor, the time that decoding up to this exit took over `audio_seconds`.
    parameters: of the encoder up to this exit and of the exit's own head.
    macs_per_second: multiply-accumulates per second of audio up to this exit, the head included.
    epoch, avg: the last epoch averaged, and how many epochs went into the average.
    training_seconds, world_size, device: wall-clock time of the training and what it ran on.
    config: the resolved configuration by sections; one more, `decoding`, holds the options of this decoding.
    commit: of the code that decoded; command: as typed; date: ISO 8601.
    """

    corpus: str
    system: str
    seed: int
    test_set: str
    exit_layer: int
    num_layers: int
    method: str
    wer: float
    errors: int
    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    num_utterances: int
    fallback_utterances: int
    audio_seconds: float
    rtf: float
    parameters: int
    macs_per_second: float
    epoch: int
    avg: int
    training_seconds: float
    world_size: int
    device: str
    config: dict[str, Any]
    commit: str
    command: str
    date: str

    def __post_init__(self) -> None:
        counted = self.insertions + self.deletions + self.substitutions
        if self.errors != counted:
            raise ValueError(
                f"{self.errors} errors, but {self.insertions} insertions, {self.deletions} deletions and "
                f"{self.substitutions} substitutions make {counted}"
            )

    def save(self, path: str | Path) -> None:
        """Write the record as JSON with sorted keys."""
        _save(self, path)

    @classmethod
    def from_dict(cls, values: object, source: str = "record") -> DecodeRecord:
        """The record in `values`. Raises ValueError, naming `source`, for an unknown or a missing key."""
        return cls(**_checked(cls, values, source))

    @classmethod
    def load(cls, path: str | Path) -> DecodeRecord:
        """Read what `save` wrote. Raises ValueError for broken JSON, an unknown or a missing key."""
        return cls.from_dict(read_json(path), str(path))


@dataclass(frozen=True)
class EarlyExitRecord:
    """The result of one test set where an exit policy chose each utterance's exit.

    corpus, system, seed, test_set, method, wer ... fallback_utterances, audio_seconds, rtf: as in DecodeRecord.
    policy: its title; target: what it was fitted to, such as "max_relative_wer 0.05".
    exits: {layer: utterances that left there}; layers: their mean layer.
    nan_exits: exits passed because their output held a NaN; late_utterances: answered after the policy's deadline.
    macs_per_second: multiply-accumulates per second of audio, those of all heads that were read included.
    last_exit_macs_per_second: of the last exit, for everything, without a policy.
    warning: what limits the result, such as speakers that the calibration set and the test set share; else "".
    """

    corpus: str
    system: str
    seed: int
    test_set: str
    method: str
    policy: str
    target: str
    wer: float
    errors: int
    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    num_utterances: int
    fallback_utterances: int
    nan_exits: int
    late_utterances: int
    exits: dict[int, int]
    layers: float
    macs_per_second: float
    last_exit_macs_per_second: float
    audio_seconds: float
    rtf: float
    commit: str
    command: str
    date: str
    warning: str = ""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON with sorted keys."""
        _save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> EarlyExitRecord:
        """Read what `save` wrote. Raises ValueError for broken JSON, an unknown or a missing key."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: object, source: str = "record") -> EarlyExitRecord:
        """The record in `values`; layers may be strings, as JSON has them."""
        values = dict(_checked(cls, values, source))
        values["exits"] = {int(layer): count for layer, count in values["exits"].items()}
        return cls(**values)


@dataclass(frozen=True)
class TradeoffPoint:
    """One policy at one setting, on a test set.

    setting: in words, such as "layer 3" or "probability 0.12".
    wer: percent, with its 95 % bootstrap interval over utterances.
    layers: mean over utterances; macs_per_second, rtf: per second of audio, everything the policy computes included.
    """

    policy: str
    setting: str
    wer: float
    wer_low: float
    wer_high: float
    layers: float
    macs_per_second: float
    rtf: float


@dataclass(frozen=True)
class Saving:
    """What a policy saves beside the last exit at a WER that may be `allowed` (0.05: 5 %) above the last exit's.

    Calibrated: the setting was chosen on the calibration set alone, and these figures are the test set's. wer: percent;
    relative_wer: its change over the last exit's (0.03: 3 % more errors) with the 95 % bootstrap interval of the paired
    difference; macs_saved, layers_saved, time_saved: shares of the last exit's.
    hindsight_macs_saved, hindsight_layers_saved: the largest ones among all settings whose WER on the test set itself
      is within what is allowed, as papers read it off the curve; None where no setting is.
    """

    policy: str
    allowed: float
    setting: str
    wer: float
    relative_wer: float
    relative_wer_low: float
    relative_wer_high: float
    macs_saved: float
    layers_saved: float
    time_saved: float
    hindsight_macs_saved: float | None
    hindsight_layers_saved: float | None


@dataclass(frozen=True)
class BudgetPoint:
    """A policy's curve against that of the fixed exits at one average cost, by linear interpolation.

    budget: share of the last exit's multiply-accumulates. difference: the policy's WER less the fixed exits' (percent
    absolute; below 0 the policy is better) with its 95 % bootstrap interval.
    """

    policy: str
    budget: float
    wer: float
    fixed_wer: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class TradeoffRecord:
    """WER against cost for every exit policy on one test set.

    calibration_set: on which all settings were fitted; method: the search whose words were scored.
    exit_layers, last_wer, last_macs_per_second, last_rtf: the model's exits, and its last one without a policy.
    points, savings, budgets: the curves and what is read off them.
    warning: as in EarlyExitRecord.
    """

    corpus: str
    system: str
    seed: int
    test_set: str
    calibration_set: str
    method: str
    exit_layers: tuple[int, ...]
    num_utterances: int
    ref_words: int
    audio_seconds: float
    last_wer: float
    last_macs_per_second: float
    last_rtf: float
    points: tuple[TradeoffPoint, ...]
    savings: tuple[Saving, ...]
    budgets: tuple[BudgetPoint, ...]
    commit: str
    command: str
    date: str
    warning: str = ""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON with sorted keys."""
        _save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> TradeoffRecord:
        """Read what `save` wrote. Raises ValueError for broken JSON, an unknown or a missing key."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: object, source: str = "record") -> TradeoffRecord:
        """The record in `values`. Raises ValueError, naming `source`, for an unknown or a missing key."""
        values = dict(_checked(cls, values, source))
        values["exit_layers"] = tuple(values["exit_layers"])
        for name, kind in (("points", TradeoffPoint), ("savings", Saving), ("budgets", BudgetPoint)):
            values[name] = tuple(kind(**_checked(kind, each, f"{source}, {name}")) for each in values[name])
        return cls(**values)


def _save(record: Any, path: str | Path) -> None:
    with atomic_write(path) as file:
        json.dump(asdict(record), file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch of training did. Losses as the loss module normalises them; keys are the exits' layers.

    seconds: wall-clock time of the epoch, the evaluation on dev included.
    frames_per_second: feature frames trained on per second.
    data_wait_share: share (0..1) of the training time spent waiting for data.
    dev_wer_per_exit, dev_transducer_wer_per_exit: percent, greedy, of the CTC and of the transducer heads; empty for
      a head that the system lacks or has not begun to train.
    gradient_norm: mean over the steps, before clipping; clipped_share: share (0..1) of the steps that were clipped.
    skipped_steps: those whose gradients were not finite; unreadable_cuts: cuts left out of their batch.
    """

    SCALARS: ClassVar = (
        "frames_per_second",
        "data_wait_share",
        "train_loss",
        "gradient_norm",
        "clipped_share",
        "skipped_steps",
        "unreadable_cuts",
    )

    PER_EXIT: ClassVar = (
        "train_loss_per_exit",
        "dev_loss_per_exit",
        "dev_wer_per_exit",
        "dev_transducer_wer_per_exit",
    )

    epoch: int
    seconds: float
    frames_per_second: float
    data_wait_share: float
    learning_rate: float
    train_loss: float
    train_loss_per_exit: dict[int, float]
    dev_loss_per_exit: dict[int, float]
    dev_wer_per_exit: dict[int, float]
    dev_transducer_wer_per_exit: dict[int, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    clipped_share: float = 0.0
    skipped_steps: int = 0
    unreadable_cuts: int = 0

    @classmethod
    def from_dict(cls, values: object, source: str = "record") -> EpochRecord:
        """The record that `values` describes; exits may be strings, as JSON has them."""
        values = dict(_checked(cls, values, source))
        for name in cls.PER_EXIT:
            values[name] = {int(layer): value for layer, value in values.get(name, {}).items()}
        return cls(**values)


def read_training_log(path: str | Path) -> list[EpochRecord]:
    """The epochs of a `training.jsonl`, in order; none where the file does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line") from error
        records.append(EpochRecord.from_dict(values, f"{path}:{number}"))
    return sorted(records, key=lambda record: record.epoch)


def append_epoch(path: str | Path, record: EpochRecord) -> None:
    """Add one epoch to a `training.jsonl`; a resumed run replaces the epochs from `record.epoch` on."""
    kept = [earlier for earlier in read_training_log(path) if earlier.epoch < record.epoch]
    with atomic_write(path) as file:
        for each in [*kept, record]:
            file.write(json.dumps(asdict(each), sort_keys=True) + "\n")
