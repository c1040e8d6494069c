"""Configuration: everything that affects the results, as frozen dataclasses.

The defaults are the published architecture (arXiv 2506.18035). A conf file (TOML) states only what differs; unknown
keys and values of the wrong type are errors. Paths, devices, workers and seeds are options of the commands, not
configuration. Every checkpoint contains the resolved configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from splitformer.errors import UserError
from splitformer.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


BLANK, SOS_EOS, UNKNOWN = "<blk>", "<sos/eos>", "<unk>"
"""The tokens 0, 1 and 2 of every vocabulary, as in icefall."""

_RENAMED = {("model", "feature_norm"): "cmvn", ("augment", "ramp_epochs"): "specaug_warmup_epochs"}
"""Keys of configurations in older checkpoints, and their present names."""


_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


class ConfigError(UserError):
    """The configuration cannot be used; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder and of its exits (arXiv 2506.18035, section 3)."""

    num_mel_bins: int = 80
    vocab_size: int = 256
    """Training replaces it with that of the lang_dir."""
    cmvn: Literal["none", "utterance"] = "none"
    """`utterance`: subtract the utterance's mean per bin and divide by the training set's standard deviation."""
    subsampling: Literal["conv1d", "conv2d"] = "conv1d"
    """`conv1d`: the published pair of Conv1d without nonlinearity; `conv2d`: two Conv2d with ReLU and a projection."""
    subsampling_channels: int = 32
    """Channels of the Conv2d front end; the Conv1d front end has `d_model`."""
    d_model: int = 256
    num_heads: int = 8
    feedforward_dim: int = 2048
    conv_kernel: int = 31
    num_layers: int = 12
    exit_layers: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    parallel_exits: tuple[int, ...] = (2, 12)
    """Exits with a parallel layer at half the frame rate; () gives the EE-baseline."""
    encoder: Literal["conformer", "unet"] = "conformer"
    """`unet`: the authors' variant with stacks of layers at lower frame rates; it has one exit."""
    unet_stacks: tuple[int, ...] = (2, 4, 5, 4, 2)
    """Layers of each stack; the rest of num_layers runs before the stacks."""
    unet_factors: tuple[int, ...] = (2, 4, 8, 4, 2)
    """Each stack takes every n-th frame."""
    parallel_gate: bool = False
    """Multiply each parallel branch by a learned scalar that starts at zero (not published)."""
    dropout: float = 0.1
    heads: tuple[Literal["ctc", "transducer"], ...] = ("ctc",)
    """Heads of every exit: CTC (published), a transducer's joiner (not published), or both."""
    decoder_dim: int = 512
    joiner_dim: int = 512
    context_size: int = 2
    """Number of tokens that the transducer's stateless decoder sees."""

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"model.heads = {list(self.heads)} must name ctc or transducer, or both once")
        if self.context_size < 1:
            raise ConfigError(f"model.context_size = {self.context_size} must be at least 1 token")
        exits = self.exit_layers
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] != self.num_layers:
            raise ConfigError(
                f"model.exit_layers = {list(exits)} must increase, start at 1 or above and end at model.num_layers = "
                f"{self.num_layers}"
            )
        if unknown := sorted(set(self.parallel_exits) - set(exits)):
            raise ConfigError(
                f"model.parallel_exits names {unknown}, which are no exits; choose from model.exit_layers = "
                f"{list(exits)}"
            )
        if self.encoder == "unet":
            self._check_unet()
        if self.d_model % self.num_heads:
            raise ConfigError(
                f"model.d_model = {self.d_model} must be a multiple of model.num_heads = {self.num_heads}"
            )
        if self.conv_kernel % 2 == 0:
            raise ConfigError(f"model.conv_kernel = {self.conv_kernel} must be odd, to keep the number of frames")

    def _check_unet(self) -> None:
        stacks, factors = self.unet_stacks, self.unet_factors
        if not stacks or len(stacks) != len(factors) or min(stacks) < 1 or min(factors) < 2:
            raise ConfigError(
                f"model.unet_stacks = {list(stacks)} and model.unet_factors = {list(factors)} must be lists of the "
                "same length; a stack has at least 1 layer, and a factor is at least 2"
            )
        if self.num_layers < sum(stacks):
            raise ConfigError(
                f"model.num_layers = {self.num_layers} must be at least {sum(stacks)}, the sum of model.unet_stacks = "
                f"{list(stacks)}"
            )
        if self.exit_layers != (self.num_layers,) or self.parallel_exits or self.subsampling != "conv1d":
            raise ConfigError(
                f"model.encoder = 'unet' has one exit, no parallel layers and its own subsampling: set "
                f"model.exit_layers = [{self.num_layers}], model.parallel_exits = [], model.subsampling = 'conv1d'"
            )


@dataclass(frozen=True)
class LossConfig:
    """The training loss: a weighted mean of the losses at all exits (arXiv 2309.09546, equation 2)."""

    exit_weights: tuple[float, ...] = ()
    """One weight per exit, in the order of model.exit_layers; () gives all the same weight."""
    ctc_scale: float = 0.2
    """Final weight of CTC beside a transducer, after warm-up; it starts at 1. Without a transducer it is 1."""
    simple_scale: float = 0.5
    """Final weight of the simple (smoothed) transducer loss, after warm-up (arXiv 2206.13236, section 2.3)."""
    lm_scale: float = 0.25
    """Weight of the LM part alone in the smoothed simple loss (section 2.2)."""
    am_scale: float = 0.0
    """Weight of the AM part alone."""
    prune_range: int = 5
    """Number of symbols per frame for which the joiner is computed."""
    ctc_only_epochs: int = 0
    """Number of epochs that train only CTC first: a transducer learns slowly with an untrained encoder."""
    warm_steps: int = 2000
    """Warm-up in transducer steps: the scales go from simple 1, pruned 0.1 and CTC 1 to their final values."""

    def __post_init__(self) -> None:
        if self.prune_range < 2:
            raise ConfigError(f"loss.prune_range = {self.prune_range} must be at least 2")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate schedule. A step is one global batch, whatever the number of ranks."""

    schedule: Literal["noam", "cosine"] = "noam"
    base_lr: float = 1.0
    """noam: factor of d_model^-0.5 (Vaswani et al. 2017, equation 3); cosine: the peak"""
    warmup_steps: int = 4400
    """noam: steps of warm-up: one epoch of 960 hours in batches of 64. (The authors' code divides each batch into four
    steps.)"""
    warmup_fraction: float = 0.08
    """cosine: share of all steps in which the rate rises linearly"""
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 5.0e-4
    clip_grad_norm: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Features and batches, and which utterances enter them."""

    features: Literal["fbank", "linear-mel"] = "fbank"
    """`fbank`: Kaldi's log-mel filterbank; `linear-mel`: that of the released code, without logarithm."""
    max_duration: float = 1200.0
    """Seconds of audio in one global batch, padding included; ranks share it."""
    num_buckets: int = 30
    min_utterance_seconds: float = 0.2
    max_utterance_seconds: float = 25.0


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (arXiv 1904.08779) as in `lhotse.dataset.SpecAugment`, and noise."""

    time_warp_factor: int = 80
    num_feature_masks: int = 2
    features_mask_size: int = 27
    num_frame_masks: int = 10
    frames_mask_size: int = 100
    max_frames_mask_fraction: float = 0.15
    p: float = 0.9
    specaug_warmup_epochs: int = 0
    """Number of epochs over which `p` rises linearly: strong masks delay the start of CTC learning."""
    noise_p: float = 0.0
    """Probability that an utterance is mixed with noise of --noise-cuts (not published)."""
    noise_snr: tuple[float, ...] = (10.0, 20.0)
    """Range in decibels of the signal-to-noise ratio, drawn uniformly for each utterance."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_p <= 1.0:
            raise ConfigError(f"augment.noise_p = {self.noise_p} must be a probability between 0 (no noise) and 1")
        if len(self.noise_snr) != 2 or self.noise_snr[0] > self.noise_snr[1]:
            raise ConfigError(
                f"augment.noise_snr = {list(self.noise_snr)} must be a range of decibels, such as [10, 20]"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the training, and averaging of its weights."""

    num_epochs: int = 200
    average_epochs: int = 30
    """default of bin/average --avg: number of last epochs, over whose steps the weights are averaged"""
    average_period: int = 10
    """steps between two updates of the running average of the weights"""

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"training.num_epochs = {self.num_epochs} must be at least 1")


@dataclass(frozen=True)
class Config:
    """The configuration of a system, in sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.loss.ctc_only_epochs and set(self.model.heads) != {"ctc", "transducer"}:
            raise ConfigError(
                f"loss.ctc_only_epochs = {self.loss.ctc_only_epochs} needs both heads, but model.heads = "
                f"{list(self.model.heads)}"
            )
        weights, exits = self.loss.exit_weights, self.model.exit_layers
        if weights and (len(weights) != len(exits) or min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(
                f"loss.exit_weights = {list(weights)} must be {len(exits)} numbers, one per exit of "
                f"model.exit_layers = {list(exits)}, none negative and not all zero"
            )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain dictionaries and lists, for checkpoints and JSON."""
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], source: str = "configuration") -> Config:
        """Return the configuration of `to_dict`; absent keys have their defaults.

        Raises:
          ConfigError: a section or key is unknown, a value has the wrong type, or values contradict each other.
        """
        built = {}
        for name, (section, values) in _typed(tables, source).items():
            try:
                built[name] = section(**values)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
        return cls(**built)


def _renamed(section: str, table: Any) -> Any:
    """Return `table` with present names for the keys of older checkpoints."""
    if not isinstance(table, Mapping):
        return table
    return {_RENAMED.get((section, key), key): value for key, value in table.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a conf file and apply overrides `section.key=value`, with values in TOML (bare words are strings).

    A conf may start with `base = "other.toml"`, a file beside it whose values it overrides.

    Raises:
      ConfigError: see `Config.from_dict`; also, a file is missing or is not TOML.
    """
    tables = _read_tables(Path(path))
    given: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {override!r}: expected section.key=value, such as optim.base_lr=0.03")
        given.setdefault(section, {})[name] = _parse_value(text.strip())
    _typed(tables, str(path))
    _typed(given, "--set")  # an error in an override names --set, not the conf
    source = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
    return Config.from_dict(_merged(tables, given), source=source)


def _read_tables(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of `path` merged into those of its base; `derived` are the files based on it so far."""
    try:
        tables: dict[str, Any] = tomllib.loads(read_text(path))
    except FileNotFoundError:
        beside = sorted(p.stem for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"there is no conf {path}; its folder has {', '.join(beside) or 'none'}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    base = tables.pop("base", None)
    if base is None:
        return tables
    if path in derived:
        raise ConfigError(f"{path} is its own base, through {', '.join(map(str, derived))}")
    return _merged(_read_tables(path.parent / str(base), (*derived, path)), tables)


def _merged(tables: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tables` with the values of `others` in place of theirs."""
    merged = dict(tables)
    for section, table in others.items():
        both = isinstance(table, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = {**merged[section], **table} if both else table
    return merged


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _typed(tables: Mapping[str, Any], source: str) -> dict[str, tuple[type, dict[str, Any]]]:
    """Return {section: (its class, its values in the types of the fields)}. Raises ConfigError for unknown names."""
    sections: dict[str, type] = typing.get_type_hints(Config)
    typed = {}
    for name, table in tables.items():
        table = _renamed(name, table)
        if not isinstance(table, Mapping):
            raise ConfigError(f"{source}: {name} = {table!r} is outside a section; write it under [section]")
        if name not in sections:
            raise ConfigError(
                f"{source}: unknown section [{name}]{_meant(name, sections)}; sections are {', '.join(sections)}"
            )
        hints, values = typing.get_type_hints(sections[name]), {}
        for key, value in table.items():
            if key not in hints:
                near = _meant(key, hints, f"{name}.")
                raise ConfigError(f"{source}: unknown key {name}.{key}{near}; [{name}] has {', '.join(hints)}")
            values[key] = _coerce(value, hints[key], f"{source}: {name}.{key}")
        typed[name] = (sections[name], values)
    return typed


def _meant(name: str, choices: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, choices, 1)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r} must be a list, each item {_TYPES.get(item, 'a name')}")
        return tuple(_coerce(v, item, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r} must be {_TYPES[hint]}")
    return value
