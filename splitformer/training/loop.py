"""The training loop: load, step, save, validate.

A run is a function of its seed, its configuration and its data. What a step draws at random depends on the seed and on
the step alone, so that a checkpoint needs no generator's state: a run that was killed and goes on ends with the weights
of one that was not. A step is one global batch, whatever the number of ranks and of accumulated parts.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from splitformer.checkpoint import load_checkpoint
from splitformer.config import Config, ConfigError, LossConfig
from splitformer.data.batches import Batch, evaluation_batches, load_cuts
from splitformer.data.on_the_fly import options_on_the_fly
from splitformer.data.plan import EpochPlan, filled
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import TrainingData
from splitformer.errors import UserError
from splitformer.losses.multi_exit import MultiExitLoss, TransducerLoss
from splitformer.model.asr import AsrModel
from splitformer.model.cmvn import UtteranceCmvn
from splitformer.report.records import EpochRecord, append_epoch
from splitformer.training.averaging import RunningAverage
from splitformer.training.bad_data import BadData
from splitformer.training.distributed import Ranks
from splitformer.training.evaluate import DevResult, evaluate
from splitformer.training.fast_cpu import speed_up
from splitformer.training.initial import start_from
from splitformer.training.inspection import Activation, ExitStatistics, inspect
from splitformer.training.memory import DoesNotFit, DryRun, check_memory
from splitformer.training.optimizer import adamw
from splitformer.training.precision import Precision
from splitformer.training.progress import EpochTotals, Progress, StepResult
from splitformer.training.saving import load_newest, newest_first, remove_leftovers, save_epoch, save_step
from splitformer.training.schedule import learning_rate
from splitformer.training.stopping import Stopped, StopRequest
from splitformer.training.watch import Watch

log = logging.getLogger(__name__)

MUCH_WAITING = 0.1
"""share of the time waiting for data above which the log says what helps"""


class TrainingError(UserError):
    """Training cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RunOptions:
    """Circumstance of a run: where, on what, from where on, in how many parts."""

    exp_dir: Path
    train_cuts: list[Path]
    dev_cuts: list[Path]
    lang_dir: Path
    seed: int
    num_workers: int
    resume: bool
    accum_grad: int = 1
    """parts in which a rank takes its share of a global batch, one after the other"""
    precision: str = "auto"
    save_minutes: float = 15.0
    """between two checkpoints inside an epoch; 0: after every step"""
    max_skipped: int = 10
    """batches in a row without finite gradients after which the run ends"""
    inspect: bool = False
    """the run is looked at (`Trainer.inspect`), not trained"""
    timeout_minutes: float = 30.0
    """after which a rank gives up waiting for the others"""
    on_the_fly: bool = False
    """features of training data are computed from audio"""
    noise_cuts: tuple[Path, ...] = ()
    """what augment.noise_p of the utterances are mixed with"""
    init_from: Path | None = None
    """a checkpoint whose weights the run starts from"""
    freeze_encoder_layers: int = 0
    """the front end and so many layers keep the weights that they start with"""


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
        self.precision = Precision(options.precision, ranks.device)
        checkpoint = self._checkpoint()
        self.progress = Progress(**checkpoint.get("progress", {}))
        if self.is_finished and not options.inspect:
            return
        self.parts = ranks.world_size * options.accum_grad
        self.mine = range(ranks.rank * options.accum_grad, (ranks.rank + 1) * options.accum_grad)
        self.data = self._training_data()
        self.total_steps = self.data.steps_per_epoch * self.config.training.num_epochs
        _seed_everything(options.seed)
        model = AsrModel(self.config.model)
        if not checkpoint and isinstance(model.encoder.cmvn, UtteranceCmvn):
            deviation = self.data.feature_deviation() if ranks.is_main else None
            model.encoder.cmvn.set_deviation(ranks.from_main(deviation))
        start_from(
            model,
            self.config,
            self.tokenizer.tokens,
            options.exp_dir,
            init_from=options.init_from,
            freeze_encoder_layers=options.freeze_encoder_layers,
            resuming=bool(checkpoint),
            is_main=ranks.is_main,
        )
        self.loss = MultiExitLoss(
            model,
            self.config.loss,
            transducer_loss(model, self.config.loss) if transducer_loss else None,
            transducer_from=self.config.loss.ctc_only_epochs * self.data.steps_per_epoch,
        )
        self.loss.to(ranks.device).train()
        if ranks.device.type == "cpu":
            speed_up(self.loss)
        self.optimizer = adamw(self.loss.parameters(), self.config.optim)
        self.average = RunningAverage(model.state_dict(), self.config.training.average_period)
        if checkpoint:
            self._restore(checkpoint)
        self.wrapped: nn.Module = self.loss
        if ranks.world_size > 1:
            # batch statistics are those of all ranks: the buffers are the same without being sent
            self.wrapped = DistributedDataParallel(self.loss, broadcast_buffers=False)
        self.tensorboard: SummaryWriter | None = None  # while it trains
        self.stop = StopRequest()
        self.watch = Watch(ranks.rank, ranks.world_size, options.timeout_minutes)
        self.saved_at = time.monotonic()
        self.bad_data = BadData(options.exp_dir / "bad-batches", ranks.rank)
        self.inside_step = False

    @property
    def is_finished(self) -> bool:
        return self.progress.epoch >= self.config.training.num_epochs

    def train(self) -> None:
        """Run the epochs that are left.

        Raises:
          Stopped: a signal asked for it; the state is saved.
          TrainingError, CheckpointError, DataError, PrecisionError: the run cannot go on; what was done is saved.
        """
        if self.is_finished:
            log.info("all %d epochs are done: nothing to train", self.progress.epoch)
            return
        self._announce()
        self._dry_run()
        with self.stop, self.watch, ExitStack() as at_the_end:
            if self.ranks.is_main:
                folder = str(self.options.exp_dir / "tensorboard")
                self.tensorboard = at_the_end.enter_context(SummaryWriter(folder, purge_step=self.progress.step + 1))
            for epoch in range(self.progress.epoch + 1, self.config.training.num_epochs + 1):
                totals = self._train_epoch(epoch)
                started = time.perf_counter()
                dev = self._evaluate()
                self._end_epoch(totals, dev, totals.seconds + time.perf_counter() - started)

    def inspect(self) -> tuple[list[Activation], list[ExitStatistics]]:
        """What the next batch does to the model as it is: see `splitformer.training.inspection`."""
        epoch = self.progress.epoch + 1
        batches = self.data.batches(self.data.plan(epoch), epoch, self.progress.batch, self.parts, self.mine)
        return inspect(self.loss, next(batches), self.precision, self.progress.step + 1)

    def _dry_run(self) -> None:
        """Every rank for itself, as they may have unlike devices; all leave where one has too little memory."""
        dry_run = DryRun(self.loss, self.optimizer, self.config.model, self.precision, self.ranks)
        problem = ""
        try:
            peak = check_memory(dry_run, self.data, self.ranks.world_size, self.options.accum_grad)
        except DoesNotFit as error:
            problem = str(error)
        else:
            log.info("%s", peak)
        failed = int(self.ranks.sum(torch.tensor([float(bool(problem))], device=self.ranks.device)).item())
        if failed:
            raise TrainingError(problem or f"{failed} of the other ranks have too little memory, see there")

    def _train_epoch(self, epoch: int) -> EpochTotals:
        progress, totals = self.progress, EpochTotals(**self.progress.totals)
        plan = self.data.plan(epoch)
        batches = self.data.batches(plan, epoch, progress.batch, self.parts, self.mine)
        with tqdm(
            total=len(plan),
            initial=progress.batch,
            desc=f"epoch {epoch}/{self.config.training.num_epochs}",
            unit="step",
            disable=None if self.ranks.is_main else True,
            leave=False,
        ) as bar:
            while progress.batch < len(plan):
                try:
                    step = self._step(epoch, plan, batches)
                except Exception:
                    if not self.inside_step:
                        self._save_step()
                    raise
                totals.add(step, self.config.optim.clip_grad_norm)
                progress.batch += 1
                progress.totals = vars(totals)
                progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if step.bad else 0
                bar.update()
                if self.tensorboard and progress.step % 20 == 0:
                    bar.set_postfix(loss=f"{totals.per_token(totals.loss):.3f}", refresh=False)
                    self.tensorboard.add_scalar("train/loss_step", step.loss, progress.step)
                    self.tensorboard.add_scalar("train/gradient_norm", step.norm, progress.step)
                    self.tensorboard.add_scalar(
                        "train/learning_rate", self.optimizer.param_groups[0]["lr"], progress.step
                    )
                if step.stop:
                    self._stop()
                if progress.skipped_in_a_row > self.options.max_skipped:
                    raise TrainingError(
                        f"{progress.skipped_in_a_row} batches in a row had no finite gradients, up to step "
                        f"{progress.step}; they are in {self.bad_data.folder}. Lower optim.base_lr, look at these "
                        "cuts, or go on from a checkpoint that is older than the trouble"
                    )
                if time.monotonic() - self.saved_at >= 60 * self.options.save_minutes and progress.batch < len(plan):
                    self._save_step()
        return totals

    def _step(self, epoch: int, plan: EpochPlan, batches: Iterator[Batch]) -> StepResult:
        """One global batch: this rank's parts of it, the gradients of all ranks, the optimiser's step."""
        started = time.perf_counter()
        progress, number, device = self.progress, self.progress.batch, self.ranks.device
        numbers = filled(plan.batch(number), self.parts)
        tokens = float(self.data.index.tokens[numbers].sum())
        step = progress.step + 1
        rate = learning_rate(self.config.optim, step, self.total_steps, self.config.model.d_model)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        buffers = [buffer.clone() for buffer in self.loss.buffers()]
        # per exit, the whole, frames, unreadable cuts, stop requests, losses that are not finite
        sums = torch.zeros(len(self.config.model.exit_layers) + 5, device=device)
        waited, parts, finite = 0.0, [], []
        self.optimizer.zero_grad(set_to_none=True)
        self.inside_step = False
        for part in self.mine:
            self.watch.report("loading", epoch, number)
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.watch.report("computing")
            parts.append(batch)
            self.bad_data.name_faults(batch)
            self.inside_step = True
            # dropout is a function of the part, so that a run that goes on draws what one without a break would
            _seed_everything(self.options.seed, epoch, number, part)
            on_device = batch.to(device)
            last = part == self.mine[-1]
            with nullcontext() if last or self.ranks.world_size == 1 else self.wrapped.no_sync():  # type: ignore
                with self.precision.autocast():
                    loss = self.wrapped(
                        on_device.x, on_device.x_lens, on_device.y, on_device.y_lens, step, num_tokens=tokens
                    )
                # DistributedDataParallel takes the mean over ranks; the parts of a batch are to be added
                self.precision.backward(loss.total * self.ranks.world_size)
            total = loss.total.detach()
            finite.append(torch.isfinite(total))
            sums += torch.cat(
                [
                    loss.per_exit,
                    total.view(1),
                    on_device.x_lens.sum().view(1),
                    sums.new_tensor([len(batch.faults), 0.0]),
                    (~finite[-1]).float().view(1),
                ]
            )
        sums[-2] = float(bool(self.stop))
        self.precision.unscale(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.config.optim.clip_grad_norm)
        # the only place of a step where the host waits for the device
        *per_exit, total_loss, frames, faults, stops, not_finite, norm_value = torch.cat(
            [self.ranks.sum(sums), norm.detach().view(1)]
        ).tolist()
        # all ranks see the same sums and the same norm, and so decide alike
        skipped = not np.isfinite([*per_exit, total_loss, norm_value]).all()
        bad = False
        if not skipped:
            self.precision.step(self.optimizer)
            self.average.update(self.loss.model.state_dict(), step)
        else:
            for buffer, before in zip(self.loss.buffers(), buffers, strict=True):
                buffer.copy_(before)  # batch statistics that are not finite would never be again
            scale_overflow = self.precision.overflow()
            bad = not_finite > 0 or not scale_overflow
            if bad:
                # where every loss was finite, any part may have made the gradients what they are
                self.bad_data.keep(
                    step, (part for part, ok in zip(parts, finite, strict=True) if not_finite == 0 or not ok)
                )
        self.optimizer.zero_grad(set_to_none=True)
        progress.step = step
        self.inside_step = False
        return StepResult(
            loss=total_loss,
            loss_per_exit=per_exit,
            norm=norm_value,
            tokens=tokens,
            frames=frames,
            faults=int(faults),
            skipped=skipped,
            bad=bad,
            stop=stops > 0,
            seconds=time.perf_counter() - started,
            waited=waited,
        )

    def _evaluate(self) -> DevResult:
        batches = evaluation_batches(
            load_cuts(self.options.dev_cuts),
            self.tokenizer,
            max_duration=min(600.0, self.config.data.max_duration),
            num_workers=self.options.num_workers,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        heads = [h for h in self.config.model.heads if h == "ctc" or self.progress.step > self.loss.transducer_from]
        # asked to stop, a rank leaves the rest of its batches: the result is not used
        going_on = itertools.takewhile(lambda batch: not self.stop, self._watched(batches))
        try:
            dev = evaluate(self.loss, going_on, self.tokenizer, self.ranks, heads)
        except Exception:
            self.loss.model.train()
            self._save_step()
            raise
        if self.ranks.sum(torch.tensor([float(bool(self.stop))], device=self.ranks.device)).item():
            self._stop()
        return dev

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.watch.report("validating")
            yield batch
        self.watch.report("waiting")

    def _end_epoch(self, totals: EpochTotals, dev: DevResult, seconds: float) -> None:
        p = self.progress
        self.progress = Progress(p.epoch + 1, 0, p.step, p.seconds + seconds, p.skipped_in_a_row)
        if self.ranks.is_main:
            self.watch.report("saving")
            # the log first: a run that goes on replaces its lines, but would not write a missing one
            self._record(totals, dev, seconds)
            keep_epochs = self.config.training.average_epochs
            save_epoch(self.options.exp_dir, self.progress.epoch, self._contents(), keep_epochs)
        self.saved_at = time.monotonic()

    def _stop(self) -> None:
        """Save and leave, on all ranks alike."""
        self._save_step()
        raise Stopped(
            f"stopped by {self.stop.name or 'a signal to another rank'} after step {self.progress.step}; the state is "
            f"saved in {self.options.exp_dir}, and --resume goes on from there"
        )

    def _save_step(self) -> None:
        """Save the state inside the epoch; between steps alone."""
        if self.ranks.is_main:
            self.watch.report("saving")
            save_step(self.options.exp_dir, self.progress.epoch + 1, self.progress.step, self._contents())
        self.saved_at = time.monotonic()

    def _contents(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        return {
            "model": self.loss.model.state_dict(),
            "training_only": self.loss.training_only_state(),
            "average": self.average.state,
            "average_step": self.average.step,
            "optimizer": optimizer["state"],
            "param_groups": optimizer["param_groups"],
            "scaler": self.precision.state(),
            "config": self.config.to_dict(),
            "tokens": self.tokenizer.tokens,
            "progress": vars(self.progress),
            "seed": self.options.seed,
            "world_size": self.ranks.world_size,
            "accum_grad": self.options.accum_grad,
            "precision": self.precision.name,
            "device": device_name(self.ranks.device),
        }

    def _checkpoint(self) -> dict[str, Any]:
        """The newest readable checkpoint of `exp_dir` where the run goes on, empty where it starts.

        The main rank chooses, and all read what it has chosen.
        """
        options = self.options
        found = newest_first(options.exp_dir)
        if found and not options.resume:
            raise TrainingError(
                f"{options.exp_dir} holds {len(found)} checkpoint(s), up to {found[0].name}: add --resume to go on, or "
                "choose another --exp-dir"
            )
        path, checkpoint = None, {}
        if self.ranks.is_main:
            remove_leftovers(options.exp_dir)
            path, checkpoint = load_newest(options.exp_dir)
        path = self.ranks.from_main(path)
        if path is None:
            return {}
        if not self.ranks.is_main:
            checkpoint = load_checkpoint(path)
        if checkpoint["tokens"] != self.tokenizer.tokens:
            raise TrainingError(f"{options.exp_dir} was trained with other tokens than those of {options.lang_dir}")
        then = Config.from_dict(checkpoint["config"], source=str(path))  # fields that are newer have their defaults
        _check_same_config(then.to_dict(), self.config.to_dict(), path)
        if checkpoint["seed"] != options.seed:
            raise TrainingError(f"{path} was trained with --seed {checkpoint['seed']}, not {options.seed}")
        if checkpoint.get("precision", self.precision.name) != self.precision.name:
            log.warning("%s was trained in %s; going on in %s", path, checkpoint["precision"], self.precision.name)
        return checkpoint

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.loss.model.load_state_dict(checkpoint["model"])
        self.loss.load_state_dict({**self.loss.state_dict(), **checkpoint["training_only"]})
        self.optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": checkpoint["param_groups"]})
        self.precision.restore(checkpoint.get("scaler", {}))
        self.average = RunningAverage(
            {name: tensor.to(self.ranks.device) for name, tensor in checkpoint["average"].items()},
            self.config.training.average_period,
            checkpoint["average_step"],
        )

    def _training_data(self) -> TrainingData:
        """The main rank indexes the cuts, and the others find what it has made."""
        options = self.options
        if not self.ranks.is_main:
            self.ranks.barrier()
        data = TrainingData(
            options.train_cuts,
            self.tokenizer,
            self.config.data,
            self.config.augment,
            options.exp_dir / "train-cuts",
            options.seed,
            options.num_workers,
            progress=self.ranks.is_main,
            on_the_fly=options_on_the_fly(self.config) if options.on_the_fly else None,
            noise_cuts=options.noise_cuts,
        )
        if self.ranks.is_main:
            self.ranks.barrier()
        return data

    def _record(self, totals: EpochTotals, dev: DevResult, seconds: float) -> None:
        exits = self.config.model.exit_layers
        per_exit = totals.loss_per_exit or [0.0] * len(exits)
        record = EpochRecord(
            epoch=self.progress.epoch,
            seconds=seconds,
            frames_per_second=totals.frames / max(totals.seconds, 1e-9),
            data_wait_share=totals.waited / max(totals.seconds, 1e-9),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            train_loss=totals.per_token(totals.loss),
            train_loss_per_exit={layer: totals.per_token(x) for layer, x in zip(exits, per_exit, strict=True)},
            dev_loss_per_exit=dev.loss_per_exit,
            dev_wer_per_exit=dev.wer_per_exit.get("ctc", {}),
            dev_transducer_wer_per_exit=dev.wer_per_exit.get("transducer", {}),
            gradient_norm=totals.per_good_step(totals.norm),
            clipped_share=totals.per_good_step(totals.clipped),
            skipped_steps=totals.skipped,
            unreadable_cuts=totals.faults,
        )
        append_epoch(self.options.exp_dir / "training.jsonl", record)
        assert self.tensorboard is not None
        for name in EpochRecord.SCALARS:
            self.tensorboard.add_scalar(f"epoch/{name}", getattr(record, name), record.epoch)
        for name in EpochRecord.PER_EXIT:
            for layer, value in getattr(record, name).items():
                self.tensorboard.add_scalar(f"{name}/{layer:02d}", value, record.epoch)
        self.tensorboard.flush()
        told = [f"dev loss {list(dev.loss_per_exit.values())[-1]:.3f}"] if dev.loss_per_exit else []
        for head, by_layer in dev.wer_per_exit.items():
            wers = " ".join(f"{layer}:{wer:.1f}" for layer, wer in by_layer.items())
            told.append(f"dev WER% by exit{' (transducer)' if head == 'transducer' else ''} {wers}")
        if record.skipped_steps:
            told.append(f"{record.skipped_steps} steps skipped")
        if record.unreadable_cuts:
            told.append(f"{record.unreadable_cuts} cuts unreadable")
        log.info(
            "epoch %d/%d  loss %.3f  %s  lr %.1e  |g| %.2f (%.0f%% clipped)  %.0f s  %.0f frames/s  data %.0f%%",
            record.epoch,
            self.config.training.num_epochs,
            record.train_loss,
            "  ".join(told),
            record.learning_rate,
            record.gradient_norm,
            100 * record.clipped_share,
            record.seconds,
            record.frames_per_second,
            100 * record.data_wait_share,
        )
        if record.data_wait_share > MUCH_WAITING:
            log.warning(
                "%.0f%% of the time went by waiting for data: raise --num-workers (now %d a rank), or put the features "
                "on a faster disk",
                100 * record.data_wait_share,
                self.options.num_workers,
            )

    def _announce(self) -> None:
        if not self.ranks.is_main:
            return
        parameters = sum(p.numel() for p in self.loss.model.parameters())
        log.info("training data: %s", self.data.report)
        log.info(
            "%d parameters, exits %s, parallel %s; %d epochs of about %d steps of up to %g s; %d rank(s) x %d part(s), "
            "%s on %s%s",
            parameters,
            list(self.config.model.exit_layers),
            list(self.config.model.parallel_exits),
            self.config.training.num_epochs,
            self.data.steps_per_epoch,
            self.config.data.max_duration,
            self.ranks.world_size,
            self.options.accum_grad,
            self.precision.name,
            device_name(self.ranks.device),
            f"; going on after epoch {self.progress.epoch}, step {self.progress.step}" if self.progress.step else "",
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu` with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a rank)"


def _with_vocabulary(config: Config, vocab_size: int) -> Config:
    tables = config.to_dict()
    tables["model"]["vocab_size"] = vocab_size
    return Config.from_dict(tables)


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


def _seed_everything(*key: int) -> None:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    torch.manual_seed(seed)
