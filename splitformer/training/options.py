"""The options of a training run that do not belong to its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class RunOptions:
    """Paths and resources of a run; the configuration holds the hyperparameters."""

    exp_dir: Path
    """folder for epoch-N.pt, training.jsonl and tensorboard/"""
    train_cuts: tuple[Path, ...]
    """manifests, or folders in Lhotse's Shar format"""
    dev_cuts: tuple[Path, ...]
    """manifests, or folders in Lhotse's Shar format"""
    lang_dir: Path
    """folder with bpe.model and tokens.txt"""
    seed: int = 42
    """seed of weights, batches, augmentation and dropout"""
    num_workers: int | None = None
    """data loading processes of each rank; by default a GPU's share of the cores, up to 16, and 1 on a CPU"""
    index_dir: Path | None = None
    """folder for indexes of the cuts, which all runs share; by default a hidden folder beside the cuts"""
    on_the_fly: bool = False
    """compute features of the training data from audio"""
    noise_cuts: tuple[Path, ...] = ()
    """noise to mix into the training data with probability augment.noise_p"""
    resume: bool = False
    """resume from the newest checkpoint, if there is one"""
    init_from: Path | None = None
    """checkpoint whose weights to start from, as far as they fit"""
    freeze_encoder_layers: int = 0
    """do not train the front end and the first N layers; needs --init-from"""
    accum_grad: int = 1
    """micro-batches into which a rank divides its share of a batch; more take less memory"""
    precision: PrecisionName = "auto"
    """number format of matrix products; auto chooses by device"""
    save_minutes: float = 15.0
    """minutes between checkpoints inside an epoch; 0 saves after every step"""
    log_minutes: float = 1.0
    """minutes between lines about the progress in the log, where there is no terminal; 0 logs every step"""
    max_skipped: int = 10
    """largest number of consecutive batches without finite gradients; one more ends the run"""
    timeout_minutes: float = 30.0
    """minutes after which ranks stop waiting for one another"""
