"""The training loop: load, step, save, validate.

A run is a function of its seed, its configuration and its data. What a step draws at random depends only on the seed
and on the step, so that a checkpoint needs no generator states: a run that was killed and resumed ends with the same
weights as one that was not. A step is one global batch, whatever the number of ranks and of micro-batches.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from splitformer.checkpoint import load_checkpoint
from splitformer.config import Config, ConfigError
from splitformer.data.batches import Batch, evaluation_batches, load_cuts
from splitformer.data.cut_index import DataError
from splitformer.data.features import check_features
from splitformer.data.plan import EpochPlan, filled
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import DataOptions, TrainingData, default_workers
from splitformer.errors import UserError
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.cmvn import UtteranceCmvn
from splitformer.training.distributed import Ranks, StopRequest
from splitformer.training.evaluate import DevResult, evaluate
from splitformer.training.fast_cpu import speed_up
from splitformer.training.initial import start_from
from splitformer.training.inspection import Inspection, inspect
from splitformer.training.memory import DoesNotFit, DryRun, check_memory
from splitformer.training.optim import RunningAverage, adamw, learning_rate
from splitformer.training.options import RunOptions
from splitformer.training.precision import Precision
from splitformer.training.progress import EpochTotals, Progress, StepResult
from splitformer.training.run_log import BadData, RunLog, epoch_record
from splitformer.training.saving import TO_RESUME, load_newest, newest_first, remove_leftovers, save_epoch, save_step
from splitformer.training.watch import Watch

log = logging.getLogger(__name__)
MAX_DEV_WORKERS = 4
"""Loading processes of a rank for the dev sets, whose batches may be larger than those of training."""


class TrainingError(UserError):
    """Training cannot start or continue."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""


class Trainer:
    """Trains one system from cuts on disk to `exp_dir/epoch-N.pt`."""

    def __init__(self, config: Config, options: RunOptions, ranks: Ranks) -> None:
        """Set up a run that starts or resumes; UserError if it cannot do so with these options, conf and data."""
        check_options(options)
        self.options, self.ranks = options, ranks
        self.tokenizer = ranks.main_first(lambda: Tokenizer(options.lang_dir))
        self.config = replace(config, model=replace(config.model, vocab_size=self.tokenizer.vocab_size))
        self.precision = ranks.main_first(lambda: Precision(options.precision, ranks.device))
        checkpoint = self._newest_checkpoint()
        self.progress = Progress(**checkpoint.get("progress", {}))
        self.micro_batches = ranks.world_size * options.accum_grad
        self.mine = range(ranks.rank * options.accum_grad, (ranks.rank + 1) * options.accum_grad)
        workers = options.num_workers
        if workers is None:
            workers = default_workers(ranks.device, self.config, self.micro_batches)
        self.data = ranks.main_first(lambda: training_data(options, self.config, self.tokenizer, workers))
        ranks.on_main(self._check_dev_cuts)
        self.total_steps = self.data.steps_per_epoch * self.config.training.num_epochs
        deviation = None
        if not checkpoint and self.config.model.cmvn == "utterance":
            deviation = ranks.on_main(self.data.feature_deviation)
        self.loss = ranks.main_first(lambda: self._make_loss(deviation, resuming=bool(checkpoint)))
        self.optimizer = adamw(self.loss.parameters(), self.config.optim)
        self.average = RunningAverage(self.loss.model.state_dict(), self.config.training.average_period)
        if checkpoint:
            self._restore(checkpoint)
        self.ddp: MultiExitLoss | DistributedDataParallel = self.loss
        if ranks.world_size > 1:
            # buffers need not be sent: batch statistics are those of all ranks
            renamed = hasattr(DistributedDataParallel, "broadcast_buffers")  # a deprecated property, from torch 2.13
            no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.ddp = DistributedDataParallel(self.loss, **no_buffers)
        self.stop = StopRequest()
        self.watch = Watch(options.exp_dir / ".ranks", ranks.rank, ranks.world_size, options.timeout_minutes)
        self.bad_data = BadData(options.exp_dir / "bad-batches", ranks.rank)
        self.saved_at = time.monotonic()

    def train(self) -> None:
        """Run the remaining epochs.

        Raises:
          Stopped: a signal asked for it; the state is saved.
          UserError: the run cannot continue; what was done is saved where that makes sense.
        """
        num_epochs = self.config.training.num_epochs
        if self.progress.epoch >= num_epochs:
            log.info("all %d epochs are done: nothing to train", self.progress.epoch)
            return
        self._announce()
        self._check_memory()
        with self.stop, self.watch, ExitStack() as stack:
            run_log = None
            if self.ranks.is_main:
                run_log = stack.enter_context(closing(RunLog(self.options.exp_dir, self.progress.step)))
            for epoch in range(self.progress.epoch + 1, num_epochs + 1):
                totals = self._train_epoch(epoch, run_log)
                started = time.perf_counter()
                dev = self._evaluate()
                self._end_epoch(totals, dev, totals.seconds + time.perf_counter() - started, run_log)

    def inspect(self) -> Inspection:
        """Return statistics of every layer and exit for the next batch; see `splitformer.training.inspection`."""
        epoch = self.progress.epoch + 1
        plan = self.data.plan(epoch)
        batches = self.data.batches(plan, epoch, self.progress.batch, self.micro_batches, self.mine)
        return inspect(self.loss, next(batches), self.precision, self.progress.step + 1)

    # ---- setting up

    def _newest_checkpoint(self) -> dict[str, Any]:
        """Return the newest readable checkpoint, or {} for a new run. The main rank chooses it for all."""
        options = self.options
        chosen: dict[str, Any] = {}

        def choose() -> Path | None:
            existing = newest_first(options.exp_dir)
            if existing and not options.resume:
                raise TrainingError(
                    f"{options.exp_dir} has {len(existing)} checkpoint(s), up to {existing[0].name}: add --resume to "
                    "continue, or choose another --exp-dir"
                )
            remove_leftovers(options.exp_dir)
            path, contents = load_newest(options.exp_dir)
            if path is not None:
                self._check_same_run(contents, path)
            chosen.update(contents)
            return path

        path = self.ranks.on_main(choose)
        return chosen if path is None or self.ranks.is_main else load_checkpoint(path)

    def _check_same_run(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Raise if the checkpoint was trained with other tokens, another configuration or another seed."""
        before = Config.from_dict(checkpoint["config"], source=str(path)).to_dict()  # newer keys have their defaults
        differences = [
            f"{section}.{key}: {before[section][key]!r} there, {value!r} now"
            for section, table in self.config.to_dict().items()
            for key, value in table.items()
            if before[section][key] != value
        ]
        if checkpoint["seed"] != self.options.seed:
            differences.append(f"--seed: {checkpoint['seed']} there, {self.options.seed} now")
        pairs = itertools.zip_longest(checkpoint["tokens"], self.tokenizer.tokens)
        if changed := [(number, *pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]]:
            number, there, now = changed[0]
            differences.append(f"{len(changed)} tokens, the first is {number}: {there!r} there, {now!r} now")
        if differences:
            raise ConfigError(
                f"{path} was trained with other settings ({'; '.join(differences)}): restore them, or choose another "
                "--exp-dir"
            )
        if checkpoint.get("precision", self.precision.name) != self.precision.name:
            log.warning("%s was trained in %s; continuing in %s", path, checkpoint["precision"], self.precision.name)

    def _check_dev_cuts(self) -> None:
        """Raise if the first dev cuts do not have the features that the configuration describes."""
        for path in self.options.dev_cuts:
            cut = next(iter(load_cuts([path])), None)
            if cut is None or not cut.has_features:
                raise DataError(f"{path} has no cuts with stored features; the fbank stage of prepare.sh makes them")
            check_features(cut, self.config)

    def _make_loss(self, deviation: Tensor | None, resuming: bool) -> MultiExitLoss:
        """Return the model with its loss, on the device, in training mode."""
        _seed_everything(self.options.seed)
        model = AsrModel(self.config.model)
        if deviation is not None and isinstance(model.encoder.cmvn, UtteranceCmvn):
            model.encoder.cmvn.set_deviation(deviation)
        start_from(model, self.config, self.tokenizer.tokens, self.options, resuming, self.ranks.is_main)
        loss = MultiExitLoss(
            model, self.config.loss, transducer_from=self.config.loss.ctc_only_epochs * self.data.steps_per_epoch
        )
        loss.to(self.ranks.device).train()
        if self.ranks.device.type == "cpu":
            speed_up(loss)
        return loss

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.loss.model.load_state_dict(checkpoint["model"])
        self.loss.load_state_dict({**self.loss.state_dict(), **checkpoint["training_only"]})
        self.optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": checkpoint["param_groups"]})
        if checkpoint.get("scaler"):
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.average = RunningAverage(
            {name: tensor.to(self.ranks.device) for name, tensor in checkpoint["average"].items()},
            self.config.training.average_period,
            checkpoint["average_step"],
        )

    def _announce(self) -> None:
        if not self.ranks.is_main:
            return
        log.info("training data: %s", self.data.report)
        model, progress = self.config.model, self.progress
        parameters = sum(p.numel() for p in self.loss.model.parameters())
        log.info(
            f"{parameters} parameters, exits {list(model.exit_layers)}, parallel {list(model.parallel_exits)}; "
            f"{self.config.training.num_epochs} epochs of about {self.data.steps_per_epoch} steps of up to "
            f"{self.config.data.max_duration:g} s; {self.ranks.world_size} rank(s) x {self.options.accum_grad} "
            f"micro-batch(es), {self.precision.name} on {device_name(self.ranks.device)}"
            + (f"; resuming after epoch {progress.epoch}, step {progress.step}" if progress.step else "")
        )

    def _check_memory(self) -> None:
        """Check the memory of every rank, since devices may differ."""
        dry_run = DryRun(self.loss, self.optimizer, self.precision, self.ranks)
        problem: DoesNotFit | None = None
        try:
            log.info("%s", check_memory(dry_run, self.data, self.ranks.world_size, self.options.accum_grad))
        except DoesNotFit as error:
            problem = error
        self.ranks.raise_first(problem)

    # ---- an epoch

    def _train_epoch(self, epoch: int, run_log: RunLog | None) -> EpochTotals:
        progress, totals = self.progress, EpochTotals.from_dict(self.progress.totals)
        plan = self.data.plan(epoch)
        batches = self.data.batches(plan, epoch, progress.batch, self.micro_batches, self.mine)
        with tqdm(
            total=len(plan),
            initial=progress.batch,
            desc=f"epoch {epoch}/{self.config.training.num_epochs}",
            unit="step",
            disable=None if self.ranks.is_main else True,
            leave=False,
        ) as bar:
            while progress.batch < len(plan):
                step = self._step(epoch, plan, batches)
                totals.add(step, self.config.optim.clip_grad_norm)
                progress.batch += 1
                progress.totals = vars(totals)
                progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if step.bad else 0
                bar.update()
                if run_log and progress.step % 20 == 0:
                    bar.set_postfix(loss=f"{totals.per_token(totals.loss):.3f}", refresh=False)
                    run_log.add_step(progress.step, step, self.optimizer.param_groups[0]["lr"])
                if step.stop:
                    self._save_and_stop()
                if progress.skipped_in_a_row > self.options.max_skipped:
                    self.ranks.raise_first(
                        TrainingError(
                            f"{progress.skipped_in_a_row} batches in a row had no finite gradients, up to step "
                            f"{progress.step}; they are in {self.bad_data.folder}. Lower optim.base_lr, look at these "
                            "cuts, or delete the checkpoints since the trouble began and resume from an earlier one"
                        )
                    )
                if time.monotonic() - self.saved_at >= 60 * self.options.save_minutes and progress.batch < len(plan):
                    self._save_step()
        return totals

    def _evaluate(self) -> DevResult:
        batches = evaluation_batches(
            load_cuts(self.options.dev_cuts),
            self.tokenizer,
            max_duration=min(600.0, self.config.data.max_duration),
            num_workers=min(self.data.options.num_workers, MAX_DEV_WORKERS),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        heads = [h for h in self.config.model.heads if h == "ctc" or self.progress.step > self.loss.transducer_from]
        # after a signal a rank skips its remaining batches, because the result is not used
        remaining = itertools.takewhile(lambda batch: not self.stop, self._watched(batches))
        try:
            dev = evaluate(self.loss, remaining, self.tokenizer, self.ranks, heads)
        except Exception:
            self.loss.model.train()
            self._save_step()
            raise
        if self.ranks.any(bool(self.stop)):
            self._save_and_stop()
        return dev

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.watch.report("validating")
            yield batch
        self.watch.report("waiting")

    def _end_epoch(self, totals: EpochTotals, dev: DevResult, seconds: float, run_log: RunLog | None) -> None:
        p = self.progress
        self.progress = Progress(p.epoch + 1, 0, p.step, p.seconds + seconds, p.skipped_in_a_row)
        if run_log:
            self.watch.report("saving")
            epoch, rate = self.progress.epoch, self.optimizer.param_groups[0]["lr"]
            record = epoch_record(epoch, self.config.model.exit_layers, totals, dev, seconds, rate)
            # the log first: a resumed run replaces its lines, but would not write a missing one
            run_log.add_epoch(record, self.config.training.num_epochs, self.data.options.num_workers)
            save_epoch(self.options.exp_dir, epoch, self._contents(), self.config.training.average_epochs)
        self.saved_at = time.monotonic()

    # ---- a step

    def _step(self, epoch: int, plan: EpochPlan, batches: Iterator[Batch]) -> StepResult:
        """Train on one global batch: accumulate this rank's gradients, add those of all ranks, update the weights."""
        started = time.perf_counter()
        batch, step = self.progress.batch, self.progress.step + 1
        micro_batches = self._load(batches, epoch)
        waited = time.perf_counter() - started
        tokens = float(self.data.index.tokens[filled(plan.batch(batch), self.micro_batches)].sum())
        self._set_learning_rate(step)
        buffers = [buffer.clone() for buffer in self.loss.buffers()]
        sums, finite = self._accumulate(micro_batches, (self.options.seed, epoch, batch), step, tokens)
        self.precision.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.config.optim.clip_grad_norm)
        # all ranks get the same numbers, so they take the same branch
        *per_exit, loss, frames, unreadable, stops, not_finite, norm_value = torch.cat(
            [self.ranks.sum(sums), norm.detach().view(1)]
        ).tolist()
        skipped, bad = not np.isfinite([*per_exit, loss, norm_value]).all(), False
        if skipped:
            bad = self._skip(step, buffers, micro_batches, finite, not_finite > 0)
        else:
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
            self.average.update(self.loss.model.state_dict(), step)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step
        return StepResult(
            loss=loss,
            loss_per_exit=per_exit,
            norm=norm_value,
            tokens=tokens,
            frames=frames,
            unreadable=int(unreadable),
            skipped=skipped,
            bad=bad,
            stop=stops > 0,
            seconds=time.perf_counter() - started,
            waited=waited,
        )

    def _load(self, batches: Iterator[Batch], epoch: int) -> list[Batch]:
        """Return this rank's micro-batches of the next step. If any rank cannot load, save the state and raise."""
        self.watch.report("loading", epoch, self.progress.batch)
        micro_batches: list[Batch] = []
        problem: Exception | None = None
        try:
            micro_batches = list(itertools.islice(batches, len(self.mine)))
        except Exception as error:
            problem = error
        self.watch.report("computing")
        if self.ranks.any(problem is not None):
            self._save_together()
            self.ranks.raise_first(problem)
        for micro_batch in micro_batches:
            self.bad_data.name(micro_batch.errors)
        return micro_batches

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, step, self.total_steps, self.config.model.d_model)

    def _accumulate(
        self, micro_batches: list[Batch], seed: tuple[int, ...], step: int, tokens: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Add up the gradients of this rank's micro-batches, and in the last one those of all ranks.

        Returns:
          Sums over this rank: loss per exit, total loss, frames, unreadable cuts, stop requests, losses that are not
          finite. For each micro-batch, whether its loss is finite.
        """
        sums = torch.zeros(len(self.config.model.exit_layers) + 5, device=self.ranks.device)
        finite = []
        self.optimizer.zero_grad(set_to_none=True)
        for index, micro_batch in zip(self.mine, micro_batches, strict=True):
            # dropout depends on the micro-batch, so that a resumed run draws the same
            _seed_everything(*seed, index)
            batch = micro_batch.to(self.ranks.device)
            local = self.ranks.world_size > 1 and index != self.mine[-1]
            with self.ddp.no_sync() if local else nullcontext():  # type: ignore[operator]
                with self.precision.autocast():
                    loss = self.ddp(batch.x, batch.x_lens, batch.y, batch.y_lens, step, num_tokens=tokens)
                # DistributedDataParallel averages over ranks, but the gradients of micro-batches are to be added
                self.precision.scaler.scale(loss.total * self.ranks.world_size).backward()
            total = loss.total.detach()
            finite.append(torch.isfinite(total))
            frames, not_finite = batch.x_lens.sum().view(1), (~finite[-1]).view(1)
            sums += torch.cat([loss.per_exit, total.view(1), frames, sums.new_zeros(2), not_finite])
        sums[-3] = sum(len(micro_batch.errors) for micro_batch in micro_batches)
        sums[-2] = float(bool(self.stop))
        return sums, finite

    def _skip(
        self, step: int, buffers: list[Tensor], micro_batches: list[Batch], finite: list[Tensor], loss_not_finite: bool
    ) -> bool:
        """Leave out a step whose gradients are not finite; return whether the batch is bad, and then save it.

        It is not bad if float16's loss scale made the gradients overflow.
        """
        for buffer, before in zip(self.loss.buffers(), buffers, strict=True):
            buffer.copy_(before)  # batch statistics that are not finite would stay so
        overflow = self.precision.overflow()
        if overflow and not loss_not_finite:
            return False
        # if every loss was finite, any of the micro-batches may be the cause
        suspects = (batch for batch, ok in zip(micro_batches, finite, strict=True) if not loss_not_finite or not ok)
        self.bad_data.save(step, suspects)
        return True

    # ---- saving

    def _save_and_stop(self) -> None:
        """Save the state and raise Stopped, on all ranks alike."""
        self._save_together()
        raise Stopped(
            f"stopped by {self.stop.name or 'a signal to another rank'} after step {self.progress.step}; the state is "
            f"saved in {self.options.exp_dir}: {TO_RESUME}"
        )

    def _save_together(self) -> None:
        """Save the state inside an epoch. No rank ends before it is saved, because the others are killed then."""
        self._save_step()
        self.ranks.barrier()

    def _save_step(self) -> None:
        """Save the state inside an epoch; only between steps."""
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
            "scaler": self.precision.scaler.state_dict(),
            "config": self.config.to_dict(),
            "tokens": self.tokenizer.tokens,
            "progress": vars(self.progress),
            "seed": self.options.seed,
            "world_size": self.ranks.world_size,
            "accum_grad": self.options.accum_grad,
            "precision": self.precision.name,
            "device": device_name(self.ranks.device),
        }


def check_options(options: RunOptions) -> None:
    """Raise TrainingError for options that no run can have."""
    if options.seed < 0:
        raise TrainingError(f"--seed {options.seed} must be 0 or greater")
    if not options.train_cuts or not options.dev_cuts:
        raise TrainingError("--train-cuts and --dev-cuts need at least one file each")


def training_data(
    options: RunOptions, config: Config, tokenizer: Tokenizer, num_workers: int = 0, progress: bool = False
) -> TrainingData:
    """Return the training data of a run; their cuts are indexed unless they were before."""
    data = DataOptions(options.train_cuts, options.noise_cuts, options.on_the_fly, num_workers, options.index_dir)
    return TrainingData(data, config, tokenizer, options.seed, progress)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or `cpu` with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a rank)"


def _seed_everything(*key: int) -> None:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    torch.manual_seed(seed)
