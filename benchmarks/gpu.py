"""Check and measure training on a GPU, and write a page about it.

    ./benchmarks/gpu.sh                                          # about 15 minutes on a GPU
    ./benchmarks/gpu.sh --device cpu --quick --output PAGE       # the same checks on a CPU, at a small size
    ./benchmarks/gpu.sh --train-cuts CUTS --dev-cuts CUTS --lang-dir LANG --config CONF     # and a training to its end

Each section runs in a process of its own, so that an error, which may leave a GPU unusable for its process, ends one
section alone. A section that fails a check says so on the page, and the exit status is then 1.
"""

from __future__ import annotations

import argparse  # tyro may be absent: torch is enough
import copy
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.train import Options, Variant, Worker, processor
from splitformer.config import Config, ModelConfig, load_config
from splitformer.data.batch import TENSORS, Batch
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.files import atomic_write
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.provenance import command_line, git_commit
from splitformer.training.distributed import Ranks
from splitformer.training.fast_cpu import speed_up
from splitformer.training.optim import adamw
from splitformer.training.precision import Precision
from splitformer.training.step import Stepper

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "egs/librispeech/conf/splitformer.toml"
FRAMES_PER_SECOND, LABELS_PER_SECOND = 100, 5
SECTION_SECONDS = 900
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""largest relative difference of a loss from that of the CPU in float32"""
ALIGNMENT = {"fp32": 0.9999, "bf16": 0.99, "fp16": 0.995}
"""smallest cosine between the gradient of all parameters and that of the CPU"""


@dataclass
class Page:
    """The lines of a section, and the checks that failed in it."""

    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, *lines: str) -> None:
        self.lines += lines

    def table(self, *names: str) -> None:
        self.add(*[""] * bool(self.lines), f"| {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) - 1)}")

    def row(self, *cells: object) -> None:
        self.add(f"| {' | '.join(map(str, cells))} |")

    def check(self, holds: bool, claim: str) -> str:
        """Record a claim that must hold, and return what the page says of it."""
        if not holds:
            self.failed.append(claim)
        return "yes" if holds else "**NO**"


# ---- systems and batches


def system(quick: bool, dropout: float = 0.0, **changes: Any) -> Config:
    """Return the published system, or one of its shape that a CPU trains in seconds."""
    config = load_config(CONF)
    small = {"d_model": 64, "num_heads": 4, "feedforward_dim": 128, "vocab_size": 64} if quick else {}
    return replace(config, model=replace(config.model, dropout=dropout, **{**small, **changes}))


def make_loss(config: Config, device: torch.device, seed: int = 0) -> MultiExitLoss:
    torch.manual_seed(seed)
    loss = MultiExitLoss(AsrModel(config.model), config.loss).to(device).train()
    if device.type == "cpu":
        speed_up(loss)
    return loss


def random_batch(model: ModelConfig, utterances: int, seconds: float, seed: int = 0) -> Batch:
    """Return random features and labels, of lengths between half and all of `seconds`."""
    draw = torch.Generator().manual_seed(seed)
    longest = round(seconds * FRAMES_PER_SECOND)
    x_lens = torch.linspace(longest // 2, longest, utterances).long()
    y_lens = (x_lens * LABELS_PER_SECOND // FRAMES_PER_SECOND).clamp(min=1)
    x = torch.randn(utterances, longest, model.num_mel_bins, generator=draw)
    y = torch.randint(1, model.vocab_size, (utterances, int(y_lens.max())), generator=draw)
    batch = Batch(
        x, x_lens, y, y_lens, texts=[], cut_ids=[], durations=(x_lens / FRAMES_PER_SECOND).tolist(), errors={}
    )
    if not torch.cuda.is_available():
        return batch
    return batch._replace(**{name: getattr(batch, name).pin_memory() for name in TENSORS})


def stepper(config: Config, device: torch.device, precision: str, ranks: Ranks | None = None) -> Stepper:
    loss = make_loss(config, device)
    optimizer = adamw(loss.parameters(), config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    ranks = ranks or Ranks(0, 1, device)
    return Stepper(loss, optimizer, Precision(precision, device), ranks, config.optim.clip_grad_norm)


def take(steps: Stepper, number: int, batch: Batch) -> float:
    """Take a training step on `batch`; return its loss."""
    tokens = float(batch.y_lens.sum()) * steps.ranks.world_size
    step = steps.gradients(number, [batch], [(0, 1, number, steps.ranks.rank)], tokens)
    steps.update(step)
    return steps.read(step).loss


def finish(device: torch.device) -> float:
    """Wait for the device and return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- sections


def same_as_cpu(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """Loss at every exit, gradients and greedy words are those of the CPU."""
    config = system(options.quick)
    batch = random_batch(config.model, 4, 4.0 if options.quick else 12.0)
    expected = run_once(config, torch.device("cpu"), "fp32", batch)
    page.add(
        "Differences from the CPU in float32: the largest relative one of the loss at an exit, the cosine between the",
        "gradients of all parameters, and the utterances of which greedy search finds the same tokens at all exits.",
    )
    page.table("precision", "loss", "gradient's cosine", "same tokens", "as expected")
    for name in precisions(device):
        per_exit, gradient, tokens = run_once(config, device, name, batch)
        difference = float(((per_exit - expected[0]).abs() / expected[0].abs()).max())
        cosine = float(nn.functional.cosine_similarity(gradient, expected[1], dim=0))
        equal = sum(a == b for a, b in zip(tokens, expected[2], strict=True))
        good = (
            difference < LOSS_TOLERANCE[name] and cosine > ALIGNMENT[name] and (name != "fp32" or equal == len(tokens))
        )
        page.row(
            name, f"{difference:.1e}", f"{cosine:.6f}", f"{equal} of {len(tokens)}", page.check(good, f"{name}: as CPU")
        )


def run_once(config: Config, device: torch.device, name: str, batch: Batch) -> tuple[Tensor, Tensor, list[Any]]:
    """Return the loss of each exit, the gradient of all parameters, and the greedy tokens of each utterance."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    loss, precision = make_loss(config, device), Precision(name, device)
    with precision.autocast():
        found = loss(batch.x.to(device), batch.x_lens, batch.y, batch.y_lens)
    precision.scaler.scale(found.total).backward()
    scale = precision.scaler.get_scale() if name == "fp16" else 1.0
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in loss.parameters()]) / scale
    model = loss.model.eval()
    with torch.no_grad(), precision.autocast():
        exits = list(model.encoder(batch.x.to(device), batch.x_lens.to(device)))
        found_tokens = [ctc_greedy_search(model.ctc_log_probs(each).float(), each.lengths) for each in exits]
    tokens = [[at_exit[i].tokens for at_exit in found_tokens] for i in range(len(batch.x))]
    return found.per_exit.float().cpu(), gradient, tokens


def training_steps(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """Steps: resumed, not finite, in every precision, and without waiting for the device."""
    config = system(options.quick, dropout=0.1)
    batch = random_batch(config.model, 4, 4.0 if options.quick else 10.0)
    page.table("check", "result", "as expected")

    whole, resumed = stepper(config, device, "fp32"), stepper(config, device, "fp32")
    for number in range(1, 7):
        take(whole, number, batch)
        if number <= 3:
            take(resumed, number, batch)
    state = copy.deepcopy((resumed.loss.state_dict(), resumed.optimizer.state_dict()))
    again = stepper(config, device, "fp32")
    again.loss.load_state_dict(state[0])
    again.optimizer.load_state_dict(state[1])
    for number in range(4, 7):
        take(again, number, batch)
    difference = largest_difference(whole.loss, again.loss)
    page.row("6 steps, and 3 + 3 with the state saved between: largest difference of a weight", f"{difference:.1e}",
             page.check(difference < 1e-4, "resumed steps"))  # fmt: skip

    before = copy.deepcopy(whole.loss.state_dict())
    broken = batch._replace(x=batch.x.clone().fill_(float("nan")))
    take(whole, 7, broken)
    changed = sum(not torch.equal(a, b) for a, b in zip(before.values(), whole.loss.state_dict().values(), strict=True))
    page.row("a batch of NaN: tensors of the model that change", changed, page.check(changed == 0, "NaN leave weights"))
    after = take(whole, 8, batch)
    page.row("loss of the step after it", f"{after:.3f}", page.check(after == after, "training continues"))

    for name in precisions(device):
        steps = stepper(config, device, name)
        losses = [take(steps, number, batch) for number in range(1, 41)]
        page.row(f"40 steps on one batch in {name}: first and last loss", f"{losses[0]:.2f}, {losses[-1]:.2f}",
                 page.check(losses[-1] < 0.8 * losses[0], f"{name}: loss falls"))  # fmt: skip
    fused = bool(whole.optimizer.defaults.get("fused"))
    page.row("AdamW in one fused kernel", fused, page.check(fused or device.type == "cpu", "fused AdamW"))
    if device.type == "cuda":
        waits = waits_of_a_step(whole, batch)
        page.row("times that the host waits for the device in a step", len(waits), page.check(len(waits) <= 1, "waits"))
        page.add("", *(f"- {wait}" for wait in waits))


def waits_of_a_step(steps: Stepper, batch: Batch) -> list[str]:
    """Return where the host waits for the device while a step is launched."""
    take(steps, 9, batch)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = steps.gradients(10, [batch], [(0, 1, 10, 0)], float(batch.y_lens.sum()))
        steps.update(step)
    torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def two_ranks(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """Two ranks on one device, which exchange gradients by gloo (NCCL wants a GPU for each), train as one does."""
    config = system(options.quick)
    alone = stepper(config, device, "fp32")
    halves = [random_batch(config.model, 4, 4.0, seed) for seed in (0, 1)]
    for number in range(1, 4):
        tokens = sum(float(each.y_lens.sum()) for each in halves)
        step = alone.gradients(number, halves, [(0,), (1,)], tokens)
        alone.update(step)
        expected = alone.read(step).loss
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--rank-of", folder, "--device", str(device)]
        command += ["--quick"] * options.quick
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
        ]
        losses = [json.loads(each.communicate(timeout=SECTION_SECONDS)[0]) for each in ranks]
    page.table("", "loss of step 3")
    page.row("one rank, two micro-batches (batch statistics of each)", f"{expected:.5f}")
    page.row("two ranks (batch statistics of both)", f"{losses[0]:.5f}")
    good = losses[0] == losses[1] and abs(losses[0] - expected) < 0.02 * abs(expected)
    page.add("", f"Both ranks agree, and the losses are alike: {page.check(good, 'two ranks train as one')}.")


def rank_of_two(folder: str, rank: int, device: torch.device, quick: bool) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    config = system(quick)
    steps = stepper(config, device, "fp32", Ranks(rank, 2, device))
    batch = random_batch(config.model, 4, 4.0, seed=rank)
    tokens = sum(float(random_batch(config.model, 4, 4.0, seed).y_lens.sum()) for seed in (0, 1))
    loss = 0.0
    for number in range(1, 4):
        step = steps.gradients(number, [batch], [(rank,)], tokens)
        steps.update(step)
        loss = steps.read(step).loss
    print(json.dumps(loss), flush=True)
    time.sleep(0.5)  # gloo's thread releases its tensors
    distributed.destroy_process_group()


def throughput(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """Seconds of audio per second of training, by size of the batch."""
    config = system(options.quick, dropout=0.1)
    durations = (20.0,) if options.quick else (150.0, 300.0, 600.0, 1200.0, 2400.0)
    precision = precisions(device)[-1 if device.type == "cpu" else 1]
    size = "small" if options.quick else "published"
    page.add(
        f"The {size} system in {precision}, on random features of 7.5 to 15 s. torch.profiler counts the kernels",
        "of a step, and the share of time in which the device computes. The dry run promises the peak.",
    )
    page.table("system", "batch, s", "audio s / s", "ms a step", "kernels", "device busy", "peak GiB", "promised GiB")
    systems = {"eager": False, **({"compiled layers": True} if not options.quick else {})}
    best = 0.0
    for name, compiled in systems.items():
        for duration in durations:
            try:
                row, rate = measure(config, device, precision, duration, compiled, options.quick)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                page.row(name, f"{duration:g}", "out of memory", *["-"] * 5)
                break
            page.row(name, f"{duration:g}", *row)
            best = max(best, rate)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    page.add("", f"The best: {best:,.0f} seconds of audio per second.")


def measure(
    config: Config, device: torch.device, precision: str, duration: float, compiled: bool, quick: bool
) -> tuple[list[str], float]:
    longest = 4.0 if quick else 15.0
    batches = [random_batch(config.model, max(2, round(duration / longest)), longest, seed) for seed in range(3)]
    steps = stepper(config, device, precision)
    promised = promise(steps, batches[0])
    if compiled:
        for module in steps.loss.modules():
            if type(module).__name__ == "ConformerLayer":
                module.compile()
    for number in range(1, 4):
        take(steps, number, batches[number % 3])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, audio = [], []
    for number in range(4, 8 if quick else 16):
        batch, started = batches[number % 3], finish(device)
        step = steps.gradients(number, [batch], [(0, number)], float(batch.y_lens.sum()))
        steps.update(step)
        steps.read(step)
        times.append(finish(device) - started)
        audio.append(batch.seconds)
    kernels, busy = profile(steps, batches[0], device)
    peak = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else float("nan")
    rate = sum(audio) / sum(times)
    cells = [f"{rate:,.0f}", f"{1000 * median(times):.0f}", kernels, busy, f"{peak:.2f}", f"{promised:.2f}"]
    return cells, rate


def promise(steps: Stepper, batch: Batch) -> float:
    """Return the peak memory in GiB that the dry run promises for the batch."""
    from splitformer.training.memory import DryRun, Shape

    shape = Shape(len(batch.x), batch.x.shape[1], batch.y.shape[1])
    return DryRun(steps.loss, steps.optimizer, steps.precision, steps.ranks).peak([shape]).used / 2**30


def profile(steps: Stepper, batch: Batch, device: torch.device) -> tuple[str, str]:
    """Return the number of kernels of a step, and the share of time in which the device computes."""
    if device.type != "cuda":
        return "-", "-"
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    started = finish(device)
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for number in range(3):
            take(steps, 100 + number, batch)
        ended = finish(device)
    events = [each for each in found.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(each.time_range.elapsed_us() for each in events) / 1e6
    return f"{len(events) // 3}", f"{100 * min(1.0, busy / (ended - started)):.0f} %"


def stock_parts(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """The same network built of torchaudio's Conformer beside ours: `benchmarks/train.py`."""
    sizes = Options(device=str(device), batch=40, seconds=15.0)
    if options.quick:
        sizes = replace(sizes, config=ROOT / "egs/mini/conf/splitformer.toml", batch=2, seconds=2.0, threads=1)
    try:
        import torchaudio.models  # noqa: F401

        networks = [Variant("ours", "bf16"), Variant("comparison", "bf16")]
    except ImportError:
        networks = [Variant("ours", "bf16")]
        page.add("torchaudio is not installed: there is no comparison.")
    page.table("network", "ms a step", "frames/s", "peak MB")
    for variant in networks:
        with Worker(variant, sizes) as worker:
            worker.run(3)
            steps = 3 if options.quick else 10
            done = worker.run(steps)
            page.row(variant, f"{1000 * done.step / steps:.0f}", f"{done.frames / done.step:,.0f}",
                     f"{worker.facts()['peak']:.0f}")  # fmt: skip


def whole_run(page: Page, device: torch.device, options: argparse.Namespace) -> None:
    """A training from cuts on disk to its end, killed once on the way."""
    if not options.train_cuts:
        page.add("Not run: give --train-cuts, --dev-cuts and --lang-dir, and --config if it is not that of AN4.")
        return
    conf = options.config or ROOT / "egs/an4/conf/splitformer.toml"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "splitformer.bin.train", "--config", str(conf), "--exp-dir", folder]
        command += [
            "--train-cuts",
            *options.train_cuts,
            "--dev-cuts",
            *options.dev_cuts,
            "--lang-dir",
            options.lang_dir,
        ]
        command += ["--resume", "--save-minutes", "0.2", "--num-workers", str(min(8, os.cpu_count() or 1))]
        command += ["--set", *options.set] if options.set else []
        first = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + SECTION_SECONDS
        while not list(Path(folder).glob("epoch-1*.pt")) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        os.killpg(first.pid, 9)
        first.wait()
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        page.check(done.returncode == 0, "the run resumes and ends")
        lines = [line for line in done.stderr.splitlines() if " epoch " in line] or done.stderr.splitlines()
        page.add(
            f"Resumed after SIGKILL, and ended after {time.perf_counter() - started:.0f} s more. Its last line:", ""
        )
        page.add(f"    {lines[-1][:300] if lines else '-'}")


def precisions(device: torch.device) -> list[str]:
    return ["fp32", "bf16", "fp16"] if device.type == "cuda" else ["fp32", "bf16"]


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.float() - y.float()).abs().max()) for x, y in pairs)


SECTIONS: dict[str, tuple[str, Callable[[Page, torch.device, argparse.Namespace], None]]] = {
    "same": ("The same as on a CPU", same_as_cpu),
    "steps": ("Training steps", training_steps),
    "ranks": ("Two ranks on one device", two_ranks),
    "throughput": ("Throughput", throughput),
    "stock": ("Beside stock parts", stock_parts),
    "run": ("A training to its end", whole_run),
}


# ---- the page


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure training on a GPU, and write a page about it.")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu")
    parser.add_argument("--quick", action="store_true", help="a small system and few steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/gpu.md", help="page to write")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="sections to run")
    parser.add_argument("--train-cuts", nargs="+", default=[], help="for a training to its end")
    parser.add_argument("--dev-cuts", nargs="+", default=[])
    parser.add_argument("--lang-dir")
    parser.add_argument("--config", type=Path, help="conf of that training (default: that of AN4)")
    parser.add_argument("--set", nargs="+", default=[], help="SECTION.KEY=VALUE of that conf")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; give --device cpu --quick for the same checks on a CPU")
    if options.rank_of:
        rank_of_two(options.rank_of, options.rank, device, options.quick)
        return 0
    if options.section:
        page = Page()
        SECTIONS[options.section][1](page, device, options)
        print(json.dumps(vars(page)))
        return 0
    lines, failed = heading(device), []
    for name in options.only:
        started = time.perf_counter()
        page = run_section(name)
        seconds = time.perf_counter() - started
        lines += ["", f"## {SECTIONS[name][0]}", "", *page.lines, "", f"({seconds:.0f} s)"]
        failed += [f"{SECTIONS[name][0]}: {claim}" for claim in page.failed]
        print(
            f"{SECTIONS[name][0]}: {'FAILED: ' + '; '.join(page.failed) if page.failed else 'passed'}, {seconds:.0f} s",
            flush=True,
        )
    if failed:
        lines += ["", "## Failed", "", *(f"- {each}" for each in failed)]
    with atomic_write(options.output) as file:
        file.write("\n".join(lines) + "\n")
    print(options.output)
    return 1 if failed else 0


def run_section(name: str) -> Page:
    """Run a section in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--section", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECTION_SECONDS)
        return Page(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, IndexError, ValueError, TypeError) as error:
        return Page([f"The section ended without a result: {type(error).__name__}."], ["it ended without a result"])


def heading(device: torch.device) -> list[str]:
    name = processor()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, {memory:.0f} GiB"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    made_by = f"{versions}, commit {git_commit(ROOT)}, {today}; made by"
    return [f"# Training on {name}", "", made_by, "", f"    {command_line(ROOT)}"]


if __name__ == "__main__":
    sys.exit(main())
