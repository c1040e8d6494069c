"""Records of training and decoding: the dataclasses that commands write as JSON and that reports read."""

from __future__ import annotations

import json
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json

R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Record:
    """Base of the dataclasses that are stored as JSON objects with one key per field."""

    def save(self, path: str | Path) -> None:
        """Write the record as JSON with sorted keys."""
        with atomic_write(path) as file:
            json.dump(asdict(self), file, indent=1, sort_keys=True, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote. Raises UserError for a file that is not JSON or not such a record."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls: type[R], values: object, source: str = "record") -> R:
        """Return the record with these values, as `asdict` or JSON gives them.

        Raises:
          UserError: a key is unknown or missing; the message names `source`.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source}: a {cls.__name__} is a JSON object, this is {type(values).__name__}")
        known = {each.name for each in fields(cls)}
        required = {each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING}
        unknown, missing = sorted(values.keys() - known), sorted(required - values.keys())
        if unknown or missing:
            raise UserError(
                f"{source} is not a {cls.__name__} of this version: unknown keys {unknown}, missing keys {missing}; "
                "write it again or remove it"
            )
        kinds = typing.get_type_hints(cls)
        return cls(**{name: _converted(kinds[name], value, source) for name, value in values.items()})


def _converted(kind: Any, value: Any, source: str) -> Any:
    """Return `value` as its field's type `kind`: JSON has lists for tuples, strings for keys, objects for records."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and arguments[0] is int:
        return {int(key): each for key, each in value.items()}
    if origin is tuple:
        return tuple(_converted(arguments[0], each, source) for each in value)
    if origin is None and isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict(value, f"{source}, {kind.__name__}")
    return value


# ---- decoding


@dataclass(frozen=True, kw_only=True)
class SetRecord(Record):
    """The fields that all records of a test set share."""

    corpus: str
    system: str
    """name of the configuration that was trained"""
    seed: int
    test_set: str
    method: str
    """search method, see `splitformer.decoding.methods`"""
    num_utterances: int
    ref_words: int
    audio_seconds: float
    commit: str
    """of the code that decoded"""
    command: str
    """command line that wrote the record"""
    date: str
    """ISO 8601"""
    notice: str = ""
    """what has to stand above every table with this result, such as what it cannot be compared with"""


@dataclass(frozen=True, kw_only=True)
class ScoredRecord(SetRecord):
    """Base of the records of a decoding: its errors and its time."""

    wer: float
    """percent"""
    errors: int
    insertions: int
    deletions: int
    substitutions: int
    fallback_utterances: int
    """utterances with an empty lattice, decoded greedily"""
    rtf: float
    """real-time factor: decoding time divided by `audio_seconds`"""

    def __post_init__(self) -> None:
        counts = (self.insertions, self.deletions, self.substitutions)
        if self.errors != sum(counts):
            raise ValueError(f"{self.errors} errors are not insertions + deletions + substitutions {counts}")


@dataclass(frozen=True, kw_only=True)
class DecodeRecord(ScoredRecord):
    """The result of one test set at one exit with one search method."""

    exit_layer: int
    num_layers: int
    parameters: int
    """of the encoder up to this exit and of the exit's head"""
    macs_per_second: float
    """multiply-accumulates per second of audio up to this exit, the head included"""
    epoch: int
    """the last epoch that was averaged"""
    avg: int
    """number of epochs that were averaged"""
    training_seconds: float
    """wall-clock time"""
    world_size: int
    device: str
    """that the system was trained on"""
    config: dict[str, Any]
    """the resolved configuration by sections; the section `decoding` holds the options of this decoding"""


@dataclass(frozen=True, kw_only=True)
class EarlyExitRecord(ScoredRecord):
    """The result of one test set where an exit policy chose the exit of each utterance."""

    policy: str
    target: str
    """what the policy was fitted to, such as "max_relative_wer 0.05" """
    nan_exits: int
    """exits that were skipped because their output held a NaN"""
    late_utterances: int
    """utterances that exited after the policy's deadline"""
    exits: dict[int, int]
    """{layer: number of utterances that exited there}"""
    layers: float
    """mean layer of the exits"""
    macs_per_second: float
    """multiply-accumulates per second of audio, the heads of all exits on the way included"""
    last_exit_macs_per_second: float
    """the same without a policy, for all utterances at the last exit"""
    warning: str = ""
    """what limits the result, such as speakers that calibration set and test set share"""


# ---- exit policies: WER against cost


@dataclass(frozen=True)
class TradeoffPoint(Record):
    """The result of one policy at one setting. Costs include everything that the policy computes."""

    policy: str
    setting: str
    """such as "layer 3" or "probability 0.12" """
    wer: float
    """percent; `wer_low` and `wer_high` are its 95 % bootstrap interval over utterances"""
    wer_low: float
    wer_high: float
    layers: float
    """mean over utterances"""
    macs_per_second: float
    rtf: float


@dataclass(frozen=True)
class Saving(Record):
    """Savings of a policy relative to the last exit, with a setting that was chosen on the calibration set.

    Shares are relative to the last exit: 0.03 is 3 %.
    """

    policy: str
    allowed: float
    """errors that early exits may add on the calibration set, as a share of the last exit's errors"""
    setting: str
    wer: float
    """percent"""
    relative_wer: float
    """change of the WER, as a share, with its 95 % bootstrap interval of paired differences"""
    relative_wer_low: float
    relative_wer_high: float
    macs_saved: float
    layers_saved: float
    time_saved: float
    hindsight_macs_saved: float | None
    """largest share over all settings whose WER on the test set itself is within `allowed`; None if there is none"""
    hindsight_layers_saved: float | None


@dataclass(frozen=True)
class BudgetPoint(Record):
    """A policy compared with the fixed exits at the same average cost, by linear interpolation of both curves."""

    policy: str
    budget: float
    """average cost, as a share of the last exit's multiply-accumulates"""
    wer: float
    """percent"""
    fixed_wer: float
    difference: float
    """`wer` minus `fixed_wer`, with its 95 % bootstrap interval; below 0 the policy is better"""
    difference_low: float
    difference_high: float


@dataclass(frozen=True, kw_only=True)
class TradeoffRecord(SetRecord):
    """WER against cost for every exit policy on one test set."""

    calibration_set: str
    """set on which all settings were chosen"""
    exit_layers: tuple[int, ...]
    last_wer: float
    """of the last exit without a policy, as are `last_macs_per_second` and `last_rtf`"""
    last_macs_per_second: float
    last_rtf: float
    points: tuple[TradeoffPoint, ...]
    savings: tuple[Saving, ...]
    budgets: tuple[BudgetPoint, ...]
    warning: str = ""
    """as in EarlyExitRecord"""


# ---- training


@dataclass(frozen=True)
class EpochRecord(Record):
    """One epoch of training. Losses are normalised as in the loss modules; dictionaries have layers as keys."""

    SCALARS = (
        *("frames_per_second", "data_wait_share", "train_loss", "gradient_norm", "clipped_share"),
        *("skipped_steps", "unreadable_cuts"),
    )
    PER_EXIT = ("train_loss_per_exit", "dev_loss_per_exit", "dev_wer_per_exit", "dev_transducer_wer_per_exit")

    epoch: int
    seconds: float
    """wall-clock time, the evaluation on the dev sets included"""
    frames_per_second: float
    """feature frames trained on per second"""
    data_wait_share: float
    """share of the training time spent waiting for data"""
    learning_rate: float
    train_loss: float
    train_loss_per_exit: dict[int, float]
    dev_loss_per_exit: dict[int, float]
    dev_wer_per_exit: dict[int, float]
    """WER in percent of the CTC heads, greedy search; empty without these heads"""
    dev_transducer_wer_per_exit: dict[int, float] = field(default_factory=dict)
    """the same of the transducer heads; empty before their training begins"""
    gradient_norm: float = 0.0
    """mean over the steps, before clipping"""
    clipped_share: float = 0.0
    """share of the steps whose gradients were clipped"""
    skipped_steps: int = 0
    """steps whose gradients were not finite"""
    unreadable_cuts: int = 0
    """cuts that were left out of their batch"""


def read_training_log(path: str | Path) -> list[EpochRecord]:
    """Return the epochs of a `training.jsonl` in order; none if the file does not exist.

    Raises:
      UserError: a line is not an EpochRecord.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); remove the line") from error
        records.append(EpochRecord.from_dict(values, f"{path}:{number}"))
    return sorted(records, key=lambda record: record.epoch)


def append_epoch(path: str | Path, record: EpochRecord) -> None:
    """Add an epoch to a `training.jsonl`, and drop later epochs, which a resumed run trains again."""
    kept = [earlier for earlier in read_training_log(path) if earlier.epoch < record.epoch]
    with atomic_write(path) as file:
        for each in [*kept, record]:
            file.write(json.dumps(asdict(each), sort_keys=True) + "\n")
