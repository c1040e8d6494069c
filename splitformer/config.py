"""Configuration: what changes a published number, as frozen dataclasses.

The defaults are the published system (arXiv 2506.18035). A conf file (TOML) states only what departs
from them; an unknown key or a value of the wrong type is fatal. Paths, devices, workers and seeds are flags of the
commands, never configuration. The resolved configuration travels inside every checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from splitformer.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


BLANK, SOS_EOS, UNKNOWN = "<blk>", "<sos/eos>", "<unk>"
"""The tokens 0, 1 and 2 of every vocabulary, as in icefall."""

_RENAMED = {("model", "feature_norm"): "cmvn", ("augment", "ramp_epochs"): "specaug_warmup_epochs"}
"""Keys of configurations in older checkpoints, and their present names."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder and of its exits (arXiv 2506.18035, section 3)."""

    num_mel_bins: int = 80
    vocab_size: int = 256  # replaced by the lang_dir's own when training starts
    cmvn: Literal["none", "utterance"] = "none"
    """`utterance`: subtract the utterance's mean per bin, divide by the training set's deviation."""
    subsampling: Literal["conv1d", "conv2d"] = "conv1d"
    """`conv1d`: the published pair of linear Conv1d; `conv2d`: two Conv2d with ReLU, then a projection."""
    subsampling_channels: int = 32
    """Channels of the Conv2d front end; the Conv1d front end has `d_model`."""
    d_model: int = 256
    num_heads: int = 8
    feedforward_dim: int = 2048
    conv_kernel: int = 31
    num_layers: int = 12
    exit_layers: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    parallel_exits: tuple[int, ...] = (2, 12)
    """Exits with a parallel layer at half the frame rate; () is the EE-baseline."""
    encoder: Literal["conformer", "unet"] = "conformer"
    """`unet`: the authors' variant with stacks of layers at lower frame rates, each added back; it has one exit."""
    unet_stacks: tuple[int, ...] = (2, 4, 5, 4, 2)
    """Layers of each stack; what remains of num_layers runs before them, on every second feature frame."""
    unet_factors: tuple[int, ...] = (2, 4, 8, 4, 2)
    """Of the frames before the stacks, each stack takes one in so many."""
    parallel_gate: bool = False
    """Multiply each parallel branch by a learned scalar that starts at zero (ours, not published)."""
    dropout: float = 0.1
    heads: tuple[Literal["ctc", "transducer"], ...] = ("ctc",)
    """What every exit ends in: the published CTC, a transducer's joiner (ours), or both."""
    decoder_dim: int = 512
    joiner_dim: int = 512
    context_size: int = 2
    """Tokens that the transducer's stateless decoder sees."""

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"model.heads = {list(self.heads)} must name ctc, transducer, or each of them once")
        if self.context_size < 1:
            raise ConfigError(f"model.context_size = {self.context_size} must be at least 1 token")
        exits = self.exit_layers
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] != self.num_layers:
            raise ConfigError(
                f"model.exit_layers = {list(exits)} must rise, start at 1 or above and end at model.num_layers = "
                f"{self.num_layers}"
            )
        strangers = sorted(set(self.parallel_exits) - set(exits))
        if strangers:
            raise ConfigError(
                f"model.parallel_exits names {strangers}, which are no exits; choose among model.exit_layers = "
                f"{list(exits)}"
            )
        if self.encoder == "unet":
            self._check_unet()
        if self.d_model % self.num_heads:
            raise ConfigError(
                f"model.d_model = {self.d_model} must be a multiple of model.num_heads = {self.num_heads}"
            )
        if self.conv_kernel % 2 == 0:
            raise ConfigError(f"model.conv_kernel = {self.conv_kernel} must be odd, so that frames keep their place")

    def _check_unet(self) -> None:
        stacks, factors = self.unet_stacks, self.unet_factors
        if not stacks or len(stacks) != len(factors) or min(stacks) < 1 or min(factors) < 2:
            raise ConfigError(
                f"model.unet_stacks = {list(stacks)} and model.unet_factors = {list(factors)} must be lists of one "
                "length, of whole numbers; a stack has at least 1 layer, a factor is at least 2"
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
    """One weight per exit, in the order of model.exit_layers; () weighs all alike."""
    ctc_scale: float = 0.2
    """Weight of CTC beside the transducer once that is warm; it falls from 1. Without a transducer it is 1."""
    simple_scale: float = 0.5
    """Weight of the simple (smoothed) transducer loss once it is warm (arXiv 2206.13236, section 2.3)."""
    lm_scale: float = 0.25
    """Smoothing of the simple loss by its LM part alone, and by its AM part alone (section 2.2)."""
    am_scale: float = 0.0
    prune_range: int = 5
    """Symbols per frame for which the joiner is computed."""
    ctc_only_epochs: int = 0
    """Train CTC alone for so many epochs: a transducer learns slowly before the encoder hears anything."""
    warm_steps: int = 2000
    """Steps of the transducer in which the scales go to their final values, from simple 1, pruned 0.1, CTC 1."""

    def __post_init__(self) -> None:
        if self.prune_range < 2:
            raise ConfigError(f"loss.prune_range = {self.prune_range} must be at least 2, or no path is left")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate schedule; step counts are in global batches, whatever the number of ranks."""

    schedule: Literal["noam", "cosine"] = "noam"
    base_lr: float = 1.0
    """noam: the factor before d_model^-0.5 (Vaswani et al. 2017, equation 3); cosine: the peak."""
    warmup_steps: int = 4400
    """noam only; one epoch of 960 hours in batches of 64, as the authors' code has it"""
    warmup_fraction: float = 0.08
    """cosine only: the share of all steps in which the rate rises linearly"""
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 5.0e-4
    clip_grad_norm: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Features, batches and the utterances that enter them."""

    features: Literal["fbank", "linear-mel"] = "fbank"
    """`fbank`: Kaldi's log-mel filterbank, by either program; `linear-mel`: the released code's, without logarithm."""
    max_duration: float = 1200.0
    """Seconds of audio in one global batch, padding included; each rank takes its share."""
    num_buckets: int = 30
    min_utterance_seconds: float = 0.2
    max_utterance_seconds: float = 25.0


@dataclass(frozen=True)
class AugmentConfig:
    """SpecAugment (arXiv 1904.08779), as `lhotse.dataset.SpecAugment` has it; and noise under the speech."""

    time_warp_factor: int = 80
    num_feature_masks: int = 2
    features_mask_size: int = 27
    num_frame_masks: int = 10
    frames_mask_size: int = 100
    max_frames_mask_fraction: float = 0.15
    p: float = 0.9
    specaug_warmup_epochs: int = 0
    """The probability `p` rises linearly over this many epochs: strong masks delay the moment when CTC takes off."""
    noise_p: float = 0.0
    """Probability that an utterance is mixed with noise; the noise is that of --noise-cuts (ours, not published)."""
    noise_snr: tuple[float, ...] = (10.0, 20.0)
    """Decibels, from and to: the energy of the speech over that of the noise, drawn evenly for each utterance."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_p <= 1.0:
            raise ConfigError(f"augment.noise_p = {self.noise_p} is a probability, from 0 (no noise) to 1")
        if len(self.noise_snr) != 2 or self.noise_snr[0] > self.noise_snr[1]:
            raise ConfigError(
                f"augment.noise_snr = {list(self.noise_snr)} must be two numbers of decibels, from and to, such as "
                "[10, 20]"
            )


@dataclass(frozen=True)
class TrainingConfig:
    num_epochs: int = 200
    average_epochs: int = 30
    """bin/average's default --avg: the mean of the weights over all steps of the last so many epochs"""
    average_period: int = 10
    """steps between two updates of the running mean of the weights"""

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"training.num_epochs = {self.num_epochs} must be at least 1")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.loss.ctc_only_epochs and set(self.model.heads) != {"ctc", "transducer"}:
            raise ConfigError(
                f"loss.ctc_only_epochs = {self.loss.ctc_only_epochs} needs both heads, and model.heads = "
                f"{list(self.model.heads)}"
            )
        weights, exits = self.loss.exit_weights, self.model.exit_layers
        if weights and (len(weights) != len(exits) or min(weights) < 0 or sum(weights) <= 0):
            raise ConfigError(
                f"loss.exit_weights = {list(weights)} must be {len(exits)} numbers, one per exit of "
                f"model.exit_layers = {list(exits)}, none negative and not all zero"
            )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dictionaries and lists, for checkpoints and JSON."""
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], source: str = "configuration") -> Config:
        """Inverse of `to_dict`; keys that are absent keep their defaults.

        Raises:
          ConfigError: an unknown section or key, a value of the wrong type, or values that contradict each other.
        """
        tables = {name: _renamed(name, table) for name, table in tables.items()}
        sections = {f.name: typing.cast(type, typing.get_type_hints(cls)[f.name]) for f in dataclasses.fields(cls)}
        built = {}
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ConfigError(f"{source}: {name} = {table!r} stands outside a section; write it under [section]")
            if name not in sections:
                raise ConfigError(f"{source}: unknown section [{name}]; sections are {', '.join(sections)}")
            built[name] = _build(sections[name], name, table, source)
        return cls(**built)


def _renamed(section: str, table: Any) -> Any:
    """`table` with present names for the keys of older checkpoints."""
    if not isinstance(table, Mapping):
        return table
    return {_RENAMED.get((section, key), key): value for key, value in table.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a conf file and apply `section.key=value` overrides, whose values are TOML (bare words count as strings).

    A conf may begin with `base = "other.toml"`, a file beside it from which it departs.

    Raises:
      ConfigError: see `Config.from_dict`; also a file that is missing or is not TOML.
    """
    tables = _read_tables(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {override!r}: expected section.key=value, such as optim.base_lr=0.03")
        tables.setdefault(section, {})[name] = _parse_value(text.strip())
    return Config.from_dict(tables, source=str(path))


def _read_tables(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of `path`, laid over those of its base; `derived` are the files that name it as theirs."""
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.stem for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"no conf {path}; there are: {', '.join(beside) or 'none'}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    base = tables.pop("base", None)
    if base is None:
        return tables
    if path in derived:
        raise ConfigError(f"{path} is its own base, by way of {', '.join(map(str, derived))}")
    merged = _read_tables(path.parent / str(base), (*derived, path))
    for section, table in tables.items():
        both = isinstance(table, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = {**merged[section], **table} if both else table
    return merged


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(kind: type, section: str, table: Mapping[str, Any], source: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"{source}: unknown key {section}.{key}; [{section}] has {', '.join(hints)}")
        values[key] = _coerce(value, hints[key], f"{source}: {section}.{key}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


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
            raise ConfigError(f"{where} = {value!r} must be a list of {getattr(item, '__name__', 'names')}")
        return tuple(_coerce(v, item, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r} must be a {hint.__name__}")
    return value
