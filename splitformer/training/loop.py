"""The training loop: load, step, save, validate."""

from __future__ import annotations

import functools
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from splitformer.checkpoint import (
    CheckpointError,
    RunningAverage,
    epoch_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from splitformer.config import Config, ConfigError, LossConfig
from splitformer.data.datamodule import Batch, TrainingData, evaluation_batches, feature_deviation, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.losses.multi_exit import MultiExitLoss, TransducerLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import UtteranceNorm
from splitformer.results import EpochRecord, append_epoch
from splitformer.training.distributed import Ranks
from splitformer.training.evaluate import DevResult, evaluate
from splitformer.training.schedule import learning_rate

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RunOptions:
    """Circumstance of a run: where, on what, from where on."""

    exp_dir: Path
    train_cuts: list[Path]
    dev_cuts: list[Path]
    lang_dir: Path
    seed: int
    num_workers: int
    resume: bool


@dataclass
class Progress:
    """How far the run has come; saved in every checkpoint."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains one system from cuts on disk to `exp_dir/epoch-N.pt`."""

    def __init__(
        self,
        config: Config,
        options: RunOptions,
        ranks: Ranks,
        transducer_loss: Callable[[AsrModel, LossConfig], TransducerLoss] | None = None,
    ) -> None:
        """`transducer_loss` makes the loss of a system with transducer heads; it comes from the caller because it needs
        k2, and this module does not."""
        self.options, self.ranks = options, ranks
        self.tokenizer = Tokenizer(options.lang_dir)
        self.config = _with_vocabulary(config, self.tokenizer.vocab_size)
        checkpoint = _latest_checkpoint(options, self.config)
        if checkpoint and checkpoint["tokens"] != self.tokenizer.tokens:
            raise TrainingError(f"{options.exp_dir} was trained with other tokens than those of {options.lang_dir}")
        self.progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()
        if self.is_finished:
            return
        self.data = TrainingData(
            load_cuts(options.train_cuts),
            self.tokenizer,
            self.config.data,
            self.config.augment,
            seed=options.seed,
            num_workers=options.num_workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=ranks.is_main,
        )
        self.total_steps = self.data.steps_per_epoch * self.config.training.num_epochs

        _seed_everything(options.seed)
        model = AsrModel(self.config.model)
        if checkpoint is None and isinstance(model.encoder.feature_norm, UtteranceNorm):
            model.encoder.feature_norm.set_deviation(feature_deviation(load_cuts(options.train_cuts)))
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
        self.loss = MultiExitLoss(
            model,
            self.config.loss,
            transducer_loss(model, self.config.loss) if transducer_loss else None,
            transducer_from=self.config.loss.ctc_only_epochs * self.data.steps_per_epoch,
        )
        if checkpoint:
            self.loss.load_state_dict({**self.loss.state_dict(), **checkpoint["training_only"]})
        self.loss.to(ranks.device).train()
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.loss.parameters(),
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            foreach=True,  # one pass over all parameters: a tenth of a step on a CPU
        )
        self.average = RunningAverage(model.state_dict(), self.config.training.average_period)
        if checkpoint:
            self.optimizer.load_state_dict(
                {"state": checkpoint["optimizer"], "param_groups": checkpoint["param_groups"]}
            )
            self.average = RunningAverage(
                {name: tensor.to(ranks.device) for name, tensor in checkpoint["average"].items()},
                self.config.training.average_period,
                checkpoint["average_step"],
            )
        self.wrapped: nn.Module = self.loss
        if ranks.world_size > 1:
            # rank 0's batch statistics are those that are saved; copying them at every step would buy nothing
            self.wrapped = DistributedDataParallel(self.loss, broadcast_buffers=False)
        self.tensorboard = SummaryWriter(str(options.exp_dir / "tensorboard")) if ranks.is_main else None

    @property
    def is_finished(self) -> bool:
        return self.progress.epoch >= self.config.training.num_epochs

    def train(self) -> None:
        """Run the epochs that are left."""
        if self.is_finished:
            log.info("all %d epochs are done: nothing to train", self.progress.epoch)
            return
        self._announce()
        for epoch in range(self.progress.epoch + 1, self.config.training.num_epochs + 1):
            # each epoch starts from its own seed, so that a resumed run sees what an uninterrupted one would
            _seed_everything(self.options.seed * 100003 + epoch)
            started = time.perf_counter()
            training = self._train_epoch(epoch)
            self.progress.epoch = epoch
            if self.ranks.is_main:
                dev = self._evaluate()
                seconds = time.perf_counter() - started
                self.progress.seconds += seconds
                # the log first: a resumed run replaces its lines, but would not write a missing one
                self._record(training, dev, seconds)
                self._save()

    def _train_epoch(self, epoch: int) -> EpochTotals:
        totals = EpochTotals(len(self.config.model.exit_layers))
        with tqdm(
            total=self.data.steps_per_epoch,
            desc=f"epoch {epoch}/{self.config.training.num_epochs}",
            unit="step",
            disable=None if self.ranks.is_main else True,
            leave=False,
        ) as bar:
            for batch in totals.time_waiting(self.data.epoch(epoch)):
                loss = self._step(batch.to(self.ranks.device))
                totals.add(batch, loss)
                bar.update()
                if self.tensorboard and self.progress.step % 20 == 0:
                    bar.set_postfix(loss=f"{totals.loss:.3f}", refresh=False)
                    self.tensorboard.add_scalar("train/loss_step", float(loss.total.detach()), self.progress.step)
        return totals

    def _step(self, batch: Batch) -> Any:
        self.progress.step += 1
        rate = learning_rate(self.config.optim, self.progress.step, self.total_steps, self.config.model.d_model)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _autocast(self.ranks.device):
            loss = self.wrapped(batch.x, batch.x_lens, batch.y, batch.y_lens, self.progress.step)
        if not torch.isfinite(loss.total):
            raise TrainingError(
                f"the loss is {float(loss.total)} at step {self.progress.step}, per exit {loss.per_exit.tolist()}; "
                f"cuts: {' '.join(batch.cut_ids)}; lower optim.base_lr or look at these cuts"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.config.optim.clip_grad_norm)
        self.optimizer.step()
        self.average.update(self.loss.model.state_dict(), self.progress.step)
        if self.tensorboard and self.progress.step % 20 == 0:
            self.tensorboard.add_scalar("train/gradient_norm", float(norm), self.progress.step)
            self.tensorboard.add_scalar("train/learning_rate", rate, self.progress.step)
        return loss

    def _evaluate(self) -> DevResult:
        batches = evaluation_batches(
            load_cuts(self.options.dev_cuts),
            self.tokenizer,
            max_duration=min(600.0, self.config.data.max_duration),
            num_workers=self.options.num_workers,
        )
        heads = [h for h in self.config.model.heads if h == "ctc" or self.progress.step > self.loss.transducer_from]
        return evaluate(self.loss, batches, self.tokenizer, self.ranks.device, heads)

    def _save(self) -> None:
        exp_dir, epoch = self.options.exp_dir, self.progress.epoch
        optimizer = self.optimizer.state_dict()
        save_checkpoint(
            exp_dir / f"epoch-{epoch}.pt",
            {
                "model": self.loss.model.state_dict(),
                "training_only": self.loss.training_only_state(),
                "average": self.average.state,
                "average_step": self.average.step,
                "optimizer": optimizer["state"],
                "param_groups": optimizer["param_groups"],
                "config": self.config.to_dict(),
                "tokens": self.tokenizer.tokens,
                "progress": vars(self.progress),
                "seed": self.options.seed,
                "world_size": self.ranks.world_size,
                "device": device_name(self.ranks.device),
            },
        )
        for old, path in epoch_checkpoints(exp_dir).items():  # average and resume need no more than these
            if old < epoch - self.config.training.average_epochs:
                path.unlink()

    def _record(self, training: EpochTotals, dev: DevResult, seconds: float) -> None:
        exits = self.config.model.exit_layers
        record = EpochRecord(
            epoch=self.progress.epoch,
            seconds=seconds,
            frames_per_second=training.frames * self.ranks.world_size / training.seconds,
            data_wait_share=training.waited / training.seconds,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            train_loss=training.loss,
            train_loss_per_exit=dict(zip(exits, training.loss_per_exit, strict=True)),
            dev_loss_per_exit=dev.loss_per_exit,
            dev_wer_per_exit=dev.wer_per_exit.get("ctc", {}),
            dev_transducer_wer_per_exit=dev.wer_per_exit.get("transducer", {}),
        )
        append_epoch(self.options.exp_dir / "training.jsonl", record)
        assert self.tensorboard is not None
        for name in ("frames_per_second", "data_wait_share", "train_loss"):
            self.tensorboard.add_scalar(f"epoch/{name}", getattr(record, name), record.epoch)
        for name in EpochRecord.PER_EXIT:
            for layer, value in getattr(record, name).items():
                self.tensorboard.add_scalar(f"{name}/{layer:02d}", value, record.epoch)
        self.tensorboard.flush()
        told = [f"dev loss {list(dev.loss_per_exit.values())[-1]:.3f}"] if dev.loss_per_exit else []
        for head, by_layer in dev.wer_per_exit.items():
            wers = " ".join(f"{layer}:{wer:.1f}" for layer, wer in by_layer.items())
            told.append(f"dev WER% by exit{' (transducer)' if head == 'transducer' else ''} {wers}")
        log.info(
            "epoch %d/%d  loss %.3f  %s  lr %.1e  %.0f s  %.0f frames/s  data %.0f%%",
            record.epoch,
            self.config.training.num_epochs,
            record.train_loss,
            "  ".join(told),
            record.learning_rate,
            seconds,
            record.frames_per_second,
            100 * record.data_wait_share,
        )

    def _announce(self) -> None:
        if not self.ranks.is_main:
            return
        parameters = sum(p.numel() for p in self.loss.model.parameters())
        log.info("training data: %s", self.data.report)
        log.info(
            "%d parameters, exits %s, parallel %s; %d epochs of about %d steps; %d rank(s) on %s%s",
            parameters,
            list(self.config.model.exit_layers),
            list(self.config.model.parallel_exits),
            self.config.training.num_epochs,
            self.data.steps_per_epoch,
            self.ranks.world_size,
            device_name(self.ranks.device),
            f"; going on after epoch {self.progress.epoch}" if self.progress.epoch else "",
        )


class EpochTotals:
    """Sums over the steps of one epoch on this rank."""

    def __init__(self, exits: int) -> None:
        self.frames = self.tokens = 0
        self.seconds = self.waited = 0.0
        self._loss_per_exit = torch.zeros(exits)
        self._loss = 0.0

    def time_waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass `batches` on, noting how long each took to come and the time of all in all."""
        started = asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()
        self.seconds = time.perf_counter() - started

    def add(self, batch: Batch, loss: Any) -> None:
        tokens = int(batch.y_lens.sum())
        self.frames += int(batch.x_lens.sum())
        self.tokens += tokens
        self._loss += float(loss.total.detach()) * tokens
        self._loss_per_exit += loss.per_exit.cpu() * tokens

    @property
    def loss(self) -> float:
        """per label token"""
        return self._loss / max(self.tokens, 1)

    @property
    def loss_per_exit(self) -> list[float]:
        return (self._loss_per_exit / max(self.tokens, 1)).tolist()


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu` with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a rank)"


def _with_vocabulary(config: Config, vocab_size: int) -> Config:
    tables = config.to_dict()
    tables["model"]["vocab_size"] = vocab_size
    return Config.from_dict(tables)


def _latest_checkpoint(options: RunOptions, config: Config) -> dict[str, Any] | None:
    """The newest readable checkpoint of `exp_dir` where the run goes on, None where it starts."""
    found = epoch_checkpoints(options.exp_dir)
    if not found:
        return None
    if not options.resume:
        raise TrainingError(
            f"{options.exp_dir} holds {len(found)} checkpoint(s), up to epoch {max(found)}: add --resume to go on, "
            "or choose another --exp-dir"
        )
    for path in reversed(found.values()):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; going back to the one before", error)
            continue
        _check_same_config(checkpoint["config"], config.to_dict(), path)
        if checkpoint["seed"] != options.seed:
            raise TrainingError(f"{path} was trained with --seed {checkpoint['seed']}, not {options.seed}")
        return checkpoint
    raise TrainingError(f"no checkpoint of {options.exp_dir} can be read: delete epoch-*.pt there to start anew")


def _check_same_config(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    differences = [
        f"{section}.{key}: {old.get(section, {}).get(key)!r} there, {value!r} now"
        for section, table in new.items()
        for key, value in table.items()
        if old.get(section, {}).get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"{path} was trained with another configuration ({'; '.join(differences)}): restore it, or choose another "
            "--exp-dir"
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 products where the device has instructions for them, float32 elsewhere.

    On a CPU with AVX512-BF16 or AMX a step of a small model takes about half the time.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
    else:
        supported = bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    return torch.autocast(device.type, dtype=torch.bfloat16) if supported else nullcontext()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says of the processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()
