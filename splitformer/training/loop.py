"""The training loop: load, step, save, validate.

A run is a function of its seed, its configuration and its data. What a step draws at random depends only on the seed
and on the step, so that a checkpoint needs no generator states: a run that was killed and resumed ends with the same
weights as one that was not. A step is one global batch, whatever the number of ranks and of micro-batches.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from splitformer.checkpoint import load_checkpoint
from splitformer.config import Config, ConfigError
from splitformer.data.batch import Batch
from splitformer.data.batches import evaluation_batches, load_cuts
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
from splitformer.training.memory import DoesNotFit, DryRun, check_memory, out_of_memory
from splitformer.training.optim import RunningAverage, adamw, learning_rate
from splitformer.training.options import RunOptions
from splitformer.training.precision import Precision
from splitformer.training.progress import EpochTotals, Progress, StepResult
from splitformer.training.run_log import BadData, RunLog, StepLines, epoch_record
from splitformer.training.saving import TO_RESUME, load_newest, newest_first, remove_leftovers, save_epoch, save_step
from splitformer.training.step import Numbers, Step, Stepper, seed_everything, silence
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
        self.stepper = Stepper(self.loss, self.optimizer, self.precision, ranks, self.config.optim.clip_grad_norm)
        self.stop = StopRequest()
        self.watch = Watch(options.exp_dir / ".ranks", ranks.rank, ranks.world_size, options.timeout_minutes)
        self.bad_data = BadData(options.exp_dir / "bad-batches", ranks.rank)
        self.data_problem: Exception | None = None
        """why this rank cannot load its data any more"""
        self.memory_problem = ""
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
                exits, minutes = self.config.model.exit_layers, self.options.log_minutes
                lines = StepLines(exits, self.total_steps, minutes, self.ranks.device)
                run_log = stack.enter_context(closing(RunLog(self.options.exp_dir, self.progress.step, lines)))
            for epoch in range(self.progress.epoch + 1, num_epochs + 1):
                totals = self._train_epoch(epoch, run_log)
                started = time.perf_counter()
                dev = self._evaluate()
                self._end_epoch(totals, dev, totals.seconds + time.perf_counter() - started, run_log)

    def inspect(self) -> Inspection:
        """Return statistics of every layer and exit for the next batch; see `splitformer.training.inspection`."""
        epoch = self.progress.epoch + 1
        plan = self.data.plan(epoch)
        with closing(self.data.batches(plan, epoch, self.progress.batch, self.micro_batches, self.mine)) as batches:
            batch = next(batches)
        return inspect(self.loss, batch, self.precision, self.progress.step + 1)

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
        changed_length = before["training"].pop("num_epochs") != self.config.training.num_epochs
        differences = [
            f"{section}.{key}: {before[section][key]!r} there, {value!r} now"
            for section, table in self.config.to_dict().items()
            for key, value in table.items()
            if key in before[section] and before[section][key] != value
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
        if changed_length:
            log.info("training now ends after epoch %d, with the schedule of that", self.config.training.num_epochs)
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
        seed_everything(self.options.seed)
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
        # how the optimizer computes depends on this device, not on that of the checkpoint
        defaults = self.optimizer.defaults
        kernels = {name: defaults[name] for name in ("fused", "foreach") if name in defaults}
        groups = [{**group, **kernels} for group in checkpoint["param_groups"]]
        self.optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": groups})
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
        name = f"epoch {epoch}/{self.config.training.num_epochs}"
        # closed, because its loading processes ignore the signal by which Python would end them at exit
        with closing(self._steps(epoch, plan)) as steps, tqdm(
            total=len(plan),
            initial=progress.batch,
            desc=name,
            unit="step",
            disable=None if self.ranks.is_main else True,
            leave=False,
        ) as bar:
            for step in steps:
                totals.add(step, self.config.optim.clip_grad_norm)
                progress.batch += 1
                progress.step += 1
                progress.totals = vars(totals)
                progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if step.bad else 0
                bar.update()
                if run_log and progress.step % 20 == 0:
                    bar.set_postfix(loss=f"{totals.per_token(totals.loss):.3f}", refresh=False)
                    run_log.add_step(progress.step, step, self._learning_rate(progress.step))
                if run_log and bar.disable:  # there is no terminal
                    place = f"{name}, batch {progress.batch}/{len(plan)}"
                    run_log.lines.add(step, progress.step, place, self._learning_rate(progress.step))
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
                if step.exact and self._save_is_due() and progress.batch < len(plan):
                    self._save_step()
        return totals

    def _steps(self, epoch: int, plan: EpochPlan) -> Generator[StepResult, None, None]:
        """Train on the remaining batches of `plan`, and yield the result of each.

        If the device decides which steps count, the gradients of the next step are launched before a result is read,
        unless the state after the step is needed.
        """
        waiting: Step | None = None
        waited = 0.0
        started = time.perf_counter()
        with closing(self.data.batches(plan, epoch, self.progress.batch, self.micro_batches, self.mine)) as batches:
            for batch in range(self.progress.batch, len(plan)):
                asked = time.perf_counter()
                micro_batches = self._load(batches, epoch, batch)
                waited += time.perf_counter() - asked
                number = self.progress.step + (1 if waiting is None else 2)
                step = self._gradients(epoch, plan, batch, number, micro_batches)
                if waiting is not None:
                    numbers = self.stepper.read(waiting)
                    exact = step is None or numbers.stops > 0 or numbers.without_data > 0
                    if exact:
                        self.stepper.undo()
                    yield self._result(waiting, numbers, exact, time.perf_counter() - started, waited)
                    waiting, waited, started = None, 0.0, time.perf_counter()
                if step is None:
                    self._end_without_memory()
                for group in self.optimizer.param_groups:
                    group["lr"] = self._learning_rate(number)
                self.stepper.update(step)
                needed = self.average.due(number) or self._save_is_due() or batch + 1 == len(plan)
                if self.stepper.deferred and not needed:
                    waiting = step
                    continue
                yield self._result(step, self.stepper.read(step), True, time.perf_counter() - started, waited)
                waited, started = 0.0, time.perf_counter()

    def _load(self, batches: Iterator[Batch], epoch: int, batch: int) -> list[Batch]:
        """Return this rank's micro-batches of a step.

        If they cannot be loaded, they are silence, because the other ranks wait in the step for this one. They learn
        there that it has no data, which costs less than a question before every step.
        """
        self.watch.report("loading", epoch, batch)
        if self.data_problem is None:
            try:
                micro_batches = list(itertools.islice(batches, len(self.mine)))
            except Exception as error:
                self.data_problem = error
        if self.data_problem is not None:
            micro_batches = [silence(self.config.model.num_mel_bins) for _ in self.mine]
        self.watch.report("computing")
        for micro_batch in micro_batches:
            self.bad_data.name(micro_batch.errors)
        return micro_batches

    def _gradients(
        self, epoch: int, plan: EpochPlan, batch: int, number: int, micro_batches: list[Batch]
    ) -> Step | None:
        """Launch the gradients of step `number`; return None if the memory is too small."""
        seeds = [(self.options.seed, epoch, batch, index) for index in self.mine]
        tokens = float(self.data.index.tokens[filled(plan.batch(batch), self.micro_batches)].sum())
        try:
            return self.stepper.gradients(
                number, micro_batches, seeds, tokens, bool(self.stop), self.data_problem is not None
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.memory_problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    def _result(self, step: Step, numbers: Numbers, exact: bool, seconds: float, waited: float) -> StepResult:
        """Return the result of a step that is done. If a rank had no data, save the state before the step and raise."""
        if numbers.without_data:
            self._save_together()
            self.ranks.raise_first(self.data_problem)
        bad = False
        if not numbers.finite:
            bad = not self.precision.overflow() or numbers.not_finite > 0
            if bad:
                self.bad_data.save(step.number, step.suspects(numbers))
        elif self.average.due(step.number):
            self.average.update(self.loss.model.state_dict(), step.number)
        return StepResult(
            loss=numbers.loss,
            loss_per_exit=numbers.per_exit,
            norm=numbers.norm,
            tokens=step.tokens,
            frames=numbers.frames,
            unreadable=int(numbers.unreadable),
            skipped=not numbers.finite,
            bad=bad,
            stop=numbers.stops > 0,
            exact=exact,
            seconds=seconds,
            waited=waited,
        )

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.config.optim, step, self.total_steps, self.config.model.d_model)

    def _end_without_memory(self) -> NoReturn:
        """Save the state after the last step and raise. The other ranks do not know; they wait for this one."""
        self.stepper.undo()
        self._save_step(by_this_rank=True)
        raise TrainingError(
            f"the memory of rank {self.ranks.rank} ran out after step {self.progress.step} ({self.memory_problem}). "
            f"The state is saved. Add --accum-grad {2 * self.options.accum_grad}, which computes the same batches in "
            f"smaller parts, or stop other programs that use this memory; {TO_RESUME}"
        )

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
            with closing(batches):
                dev = evaluate(self.loss, remaining, self.tokenizer, self.ranks, heads, self.precision.autocast)
        except (Exception, SystemExit):  # on all ranks, whichever has the error
            self._save_together()
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

    def _save_is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= 60 * self.options.save_minutes

    def _save_step(self, by_this_rank: bool = False) -> None:
        """Save the state inside an epoch; only between steps. All ranks have the same; the main one saves it."""
        if self.ranks.is_main or by_this_rank:
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
