"""Measure a training step: frames per second, milliseconds, peak memory, share of waiting for data.

    python -m benchmarks.train --compare --output benchmarks/train.md                    # on this machine's CPU or GPU
    python -m benchmarks.train --precision fp32 bf16 --compile --output benchmarks/train.md       # with torch 2
    python -m benchmarks.train --train-cuts egs/CORPUS/data/fbank/train_cuts.jsonl.gz --lang-dir egs/CORPUS/data/LANG

The system is the published one with random weights. Batches are random, too, unless cuts are given. Each variant runs
in a process of its own, so that its peak memory is its own. The processes take turns, one step at a time on the same
batch, because the load of the machine changes from turn to turn, but hardly changes the ratio of two times of one turn.
Compare the ratios, which are medians over the turns.

`--compare` also measures a network of the same shape, built in this file from torchaudio's Conformer: attention with
dropout on its weights, torch's dropout, and a log_softmax and a CTC loss for each exit. It approximates the
released implementation. `--against TREE` measures another checkout of this repository.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

# another checkout (--against) has these, too; everything else is imported where it is used
from splitformer.config import Config, ModelConfig, OptimConfig, load_config
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import sinusoidal_positions
from splitformer.model.subsampling import Conv1dSubsampling, subsampled_lengths
from splitformer.training.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
FRAMES_PER_SECOND = 100
LABELS_PER_SECOND = 5
TITLE = "# The training step"
WITHOUT_OPTIMIZER = float("nan")


@dataclass(frozen=True)
class Options:
    """Measure speed and memory of a training step."""

    config: Path = ROOT / "egs/librispeech/conf/splitformer.toml"
    """conf file (TOML)"""
    batch: int = 8
    """utterances in a batch"""
    seconds: float = 10.0
    """seconds of audio in each utterance"""
    steps: int = 9
    """measured steps of each variant; 2 more warm up"""
    threads: int = os.cpu_count() or 1
    """threads on a CPU"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: tuple[Literal["fp32", "bf16", "medium"], ...] = ("fp32", "bf16")
    """medium is fp32 under torch.set_float32_matmul_precision('medium')"""
    compile: bool = False
    """also measure each precision with torch.compile (torch 2)"""
    compare: bool = False
    """also measure a network built from torchaudio's Conformer"""
    against: Path | None = None
    """also measure this other checkout, in the first precision"""
    train_cuts: tuple[Path, ...] = ()
    """train on these cuts instead of random features"""
    lang_dir: Path | None = None
    """tokens for --train-cuts"""
    num_workers: int = 1
    """data loading processes"""
    operations: bool = False
    """count the operations of a step instead of measuring it"""
    output: Path | None = None
    """file to write the table to; it replaces the table with the same title"""


def run(options: Options) -> None:
    check(options)
    if options.operations:
        print("\n".join(operations(options)))
        return
    from tqdm import tqdm

    variants = chosen(options)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(each, options)) for each in variants]
        for worker in tqdm(workers, desc="warm up"):
            worker.run(2)
        turns = []
        for turn in tqdm(range(options.steps), desc="turns"):
            order = workers[::-1] if turn % 2 else workers  # so that none always comes first
            done = {worker.variant: worker.run(1) for worker in order}
            turns.append([done[variant] for variant in variants])
        # batches that were loaded ahead during other workers' turns would hide the waiting
        workers[0].run(2 * options.num_workers)
        alone = workers[0].run(options.steps)
        facts = [worker.facts() for worker in workers]
    section = report(options, variants, turns, alone, facts)
    print("\n".join(section))
    if options.output:
        write_section(options.output, section)


def check(options: Options) -> None:
    from splitformer.errors import UserError

    version = torch.__version__
    if options.compile and not hasattr(nn.Module, "compile"):
        raise UserError(f"--compile needs torch 2, and this is {version}: leave it out, or use .venv-torch2")
    if "medium" in options.precision and version.startswith("1."):
        raise UserError(f"--precision medium has no effect on torch {version}: choose fp32 or bf16")
    if options.compare:
        try:
            import torchaudio.models  # noqa: F401
        except ImportError as problem:
            raise UserError(f"--compare needs torchaudio ({problem}): leave it out, or use .venv") from problem
    if bool(options.train_cuts) != bool(options.lang_dir):
        raise UserError("--train-cuts and --lang-dir belong together: give both or neither")
    if min(options.steps, options.batch, options.seconds) < 1:
        given = f"--steps {options.steps}, --batch {options.batch} and --seconds {options.seconds:g}"
        raise UserError(f"{given} must be at least 1")
    if options.against and not (options.against / "splitformer" / "model").is_dir():
        raise UserError(f"--against {options.against}: this is not a checkout of this repository")


@dataclass(frozen=True)
class Variant:
    network: Literal["ours", "comparison", "against"]
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        network = {"ours": "ours", "comparison": "torchaudio Conformer", "against": "other checkout"}[self.network]
        return f"{network}, {self.precision}{', compiled' if self.compiled else ''}"


def chosen(options: Options) -> list[Variant]:
    """Return the variants; without a comparison network, the first is the reference."""
    variants = [Variant("ours", each) for each in options.precision]
    if options.compile:
        variants += [Variant("ours", each, compiled=True) for each in options.precision]
    if options.compare:
        variants += [Variant("comparison", each) for each in options.precision]
    return variants + ([Variant("against", options.precision[0])] if options.against else [])


@dataclass(frozen=True)
class Steps:
    """Times of one or more steps, in seconds."""

    loss: float  # forward pass, losses and backward pass
    step: float  # the same, gradient norm and optimizer step
    processor: float  # processor time of `loss`, over all threads
    waited: float  # for data
    frames: int


class Worker:
    """A process that measures one variant, as many steps at a time as it is asked for."""

    def __init__(self, variant: Variant, options: Options) -> None:
        self.variant = variant
        tree = options.against if variant.network == "against" and options.against else ROOT
        request = json.dumps({"variant": asdict(variant), "options": asdict(options)}, default=str)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tree.resolve())},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, steps: int) -> Steps:
        return Steps(**self._ask(str(steps)))

    def facts(self) -> dict[str, Any]:
        return self._ask("facts")

    def _ask(self, question: str) -> dict[str, Any]:
        try:
            print(question, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            sys.exit(f"benchmarks.train: the process of '{self.variant}' ended; see above")


def work(request: dict[str, Any]) -> None:
    """Answer each line of standard input with a line of JSON, as a worker."""
    variant, options = Variant(**request["variant"]), Options(**request["options"])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    config = load_config(options.config)
    batches = cut_batches(options, config) if options.train_cuts else random_batches(options, config.model)
    if options.train_cuts:
        config = next(batches)
    if variant.precision == "medium":
        torch.set_float32_matmul_precision("medium")
    precision = Precision("bf16" if variant.precision == "bf16" else "fp32", device)
    loss = (Comparison(config.model) if variant.network == "comparison" else ours(config, device)).to(device).train()
    if variant.compiled:
        for module in loss.modules():
            if type(module).__name__ == "ConformerLayer":
                module.compile()
    optimizer = make_optimizer(variant, loss, config.optim)
    for line in sys.stdin:
        if line.strip() == "facts":
            parameters = sum(p.numel() for p in loss.parameters())
            print(json.dumps({"peak": peak_megabytes(device), "parameters": parameters}), flush=True)
            continue
        each = [one_step(loss, next(batches), precision, optimizer) for _ in range(int(line))]
        sums = {name: sum(getattr(steps, name) for steps in each) for name in Steps.__dataclass_fields__}
        print(json.dumps(sums), flush=True)


def ours(config: Config, device: torch.device) -> nn.Module:
    """Return the model with its loss as training uses it."""
    loss = MultiExitLoss(AsrModel(config.model), config.loss)
    if device.type == "cpu":
        try:
            from splitformer.training.fast_cpu import speed_up
        except ModuleNotFoundError:  # an older checkout, whose model has the fast layers itself
            return loss
        speed_up(loss)
    return loss


def make_optimizer(variant: Variant, loss: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | None:
    if variant.network == "against":  # an older checkout may have none to share
        return None
    if variant.network == "comparison":
        return torch.optim.AdamW(loss.parameters(), betas=(config.beta1, config.beta2))
    from splitformer.training.optim import adamw

    return adamw(loss.parameters(), config)


def one_step(loss: nn.Module, batch: Batch, precision: Precision, optimizer: torch.optim.Optimizer | None) -> Steps:
    waited, tensors = batch
    device = precision.device
    started, processor = clock(device), time.process_time()
    x, x_lens, y, y_lens = (each.to(device, non_blocking=True) for each in tensors)
    with precision.autocast():
        total = loss(x, x_lens, y, y_lens).total
    total.backward()
    after_loss, processor = clock(device), time.process_time() - processor
    if optimizer is not None:
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
    for parameter in loss.parameters():
        parameter.grad = None
    ended = clock(device)
    return Steps(
        loss=after_loss - started,
        step=ended - started if optimizer is not None else WITHOUT_OPTIMIZER,
        processor=processor,
        waited=waited,
        frames=int(tensors[1].sum()),
    )


class Operations(TorchDispatchMode):
    """Counts torch's operations below autograd, without views and what runs on the host: about a GPU's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in results)
        self.count += not is_view and not re.match(r"aten\.(empty|_local_scalar_dense)", str(func))
        return func(*args, **(kwargs or {}))


def operations(options: Options) -> list[str]:
    """Return a table of the operations of one step with torch's own layers, which run on a GPU."""
    config = load_config(options.config)
    _, (x, x_lens, y, y_lens) = next(random_batches(replace(options, num_workers=0), config.model))
    rows = ["| precision | forward, loss | backward | norm, optimizer | together |", "| --- |" + 4 * " ---: |"]
    for name in options.precision:
        torch.manual_seed(0)
        loss = MultiExitLoss(AsrModel(config.model), config.loss).train()
        optimizer = make_optimizer(Variant("ours", name), loss, config.optim)
        assert optimizer is not None
        counts = []
        for _ in range(2):  # the first step sets up the optimizer
            counts = []
            for part in ("forward", "backward", "update"):
                with Operations() as mode:
                    if part == "forward":
                        with Precision("bf16" if name == "bf16" else "fp32", torch.device("cpu")).autocast():
                            total = loss(x, x_lens, y, y_lens).total
                    elif part == "backward":
                        total.backward()
                    else:
                        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                        optimizer.step()
                counts.append(mode.count)
            optimizer.zero_grad(set_to_none=True)
        rows.append(f"| {name} | {' | '.join(map(str, [*counts, sum(counts)]))} |")
    return rows


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_megabytes(device: torch.device) -> float:
    """Return the peak memory: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Batch = tuple[float, Sequence[Tensor]]
"""seconds of waiting; x, x_lens, y, y_lens"""


class RandomBatches(Dataset[tuple[Tensor, ...]]):
    """Random features and labels of one length."""

    def __init__(self, batch: int, seconds: float, model: ModelConfig) -> None:
        self.batch, self.seconds, self.model = batch, seconds, model

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(number)
        frames, labels = round(self.seconds * FRAMES_PER_SECOND), math.ceil(self.seconds * LABELS_PER_SECOND)
        return (
            torch.randn(self.batch, frames, self.model.num_mel_bins, generator=draw),
            torch.full((self.batch,), frames),
            torch.randint(1, self.model.vocab_size, (self.batch, labels), generator=draw),
            torch.full((self.batch,), labels),
        )


def random_batches(options: Options, model: ModelConfig) -> Iterator[Batch]:
    loader = DataLoader(
        RandomBatches(options.batch, options.seconds, model),
        batch_size=None,
        num_workers=options.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from waited_for(iter(loader))


def cut_batches(options: Options, config: Config) -> Iterator[Any]:
    """Yield the configuration with the number of tokens of the lang_dir, and then the batches of training."""
    from splitformer.data.batch import TENSORS
    from splitformer.data.tokenizer import Tokenizer
    from splitformer.data.training import DataOptions, TrainingData

    tokenizer = Tokenizer(options.lang_dir)
    config = replace(config, data=replace(config.data, max_duration=options.batch * options.seconds))
    yield replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in options.train_cuts]
        source = DataOptions(paths, num_workers=options.num_workers, index_dir=Path(folder))
        data = TrainingData(source, config, tokenizer, seed=42)
        epoch = 0
        while True:
            epoch += 1
            for waited, batch in waited_for(data.batches(data.plan(epoch), epoch, 0, 1, range(1))):
                yield waited, [getattr(batch, name) for name in TENSORS]


def waited_for(batches: Iterator[Any]) -> Iterator[tuple[float, Any]]:
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield time.perf_counter() - asked, batch


@dataclass
class Total:
    total: Tensor


class Comparison(nn.Module):
    """The published shape from torchaudio's Conformer: one per block, and one of a single layer on every second frame
    beside the blocks that have it; a linear head, log_softmax and CTC loss for each exit in turn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        def conformer(layers: int) -> nn.Module:
            return Conformer(
                config.d_model, config.num_heads, config.feedforward_dim, layers, config.conv_kernel, config.dropout
            )

        self.subsampling = Conv1dSubsampling(config.num_mel_bins, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        starts = (0, *config.exit_layers)
        self.blocks = nn.ModuleList(conformer(end - start) for start, end in zip(starts, config.exit_layers))
        self.parallel = nn.ModuleDict({str(layer): conformer(1) for layer in config.parallel_exits})
        self.heads = nn.ModuleList(nn.Linear(config.d_model, config.vocab_size) for _ in config.exit_layers)
        self.exit_layers = config.exit_layers

    def forward(self, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor) -> Total:
        x, lengths = self.subsampling(x), subsampled_lengths(x_lens)
        x = self.dropout(x + sinusoidal_positions(x))
        losses = []
        for layer, block, head in zip(self.exit_layers, self.blocks, self.heads):
            out, _ = block(x, lengths)
            if str(layer) in self.parallel:
                half, _ = self.parallel[str(layer)](x[:, ::2], torch.div(lengths + 1, 2, rounding_mode="floor"))
                out = out + half.repeat_interleave(2, dim=1)[:, : out.size(1)]
            x = out
            log_probs = head(x).float().log_softmax(dim=-1).transpose(0, 1)
            losses.append(nn.functional.ctc_loss(log_probs, y, lengths, y_lens, reduction="sum"))
        return Total(torch.stack(losses).mean() / y_lens.sum())


def report(
    options: Options,
    variants: list[Variant],
    turns: list[list[Steps]],
    alone: Steps,
    facts: list[dict[str, Any]],
) -> list[str]:
    """Return the lines of the section."""
    from splitformer.provenance import command_line

    references = {
        each: next((i for i, v in enumerate(variants) if v == Variant("comparison", each)), None)
        for each in options.precision
    }
    first = references[options.precision[0]] if options.compare else 0
    if options.train_cuts:
        names = " ".join(path.name for path in options.train_cuts)
        data = f"batches of up to {options.batch * options.seconds:g} s of {names}"
    else:
        data = f"batches of {options.batch} x {options.seconds:g} s of random features"
    lines = [
        f"## {title(options)}",
        "",
        f"{facts[0]['parameters'] / 1e6:.1f} M parameters, {data}, {options.steps} turns; made by",
        "",
        f"    {command_line(ROOT)}",
        "",
        f"Ratios are to '{variants[first]}', medians of paired times; in brackets the smallest and the largest.",
        "CPU time of forward and backward is less sensitive to load.",
        "",
        "| variant | forward + backward (ratio) | ms | CPU time (ratio) | whole step (ratio) | ms | frames/s "
        "| peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for i, variant in enumerate(variants):
        to_first = [turn[i].loss / turn[first].loss for turn in turns]
        cells = [
            f"{median(to_first):.2f} ({min(to_first):.2f}-{max(to_first):.2f})" if i != first else "1",
            f"{1000 * median(turn[i].loss for turn in turns):.0f}",
            f"{median(turn[i].processor / turn[first].processor for turn in turns):.2f}" if i != first else "1",
        ]
        if math.isnan(turns[0][i].step):
            cells += ["-", "-", "-"]
        else:
            to_first = [turn[i].step / turn[first].step for turn in turns]
            cells += [
                f"{median(to_first):.2f}" if i != first else "1",
                f"{1000 * median(turn[i].step for turn in turns):.0f}",
                f"{median(turn[i].frames / turn[i].step for turn in turns):.0f}",
            ]
        lines.append(f"| {variant} | {' | '.join(cells)} | {facts[i]['peak']:.0f} |")
    share = alone.waited / (alone.waited + alone.step)
    lines += [
        "",
        f"'{variants[0]}', run alone for {options.steps} steps with {options.num_workers} data worker(s), "
        f"spends {100 * share:.1f} % of its time waiting for data{'' if options.train_cuts else ' (random features)'}.",
    ]
    return lines


def title(options: Options) -> str:
    where = processor() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    threads = f", {options.threads} thread(s)" if options.device == "cpu" else ""
    cuts = ", cuts" if options.train_cuts else ""
    compiled = ", torch.compile" if options.compile else ""
    return f"torch {torch.__version__}, {where}{threads}{cuts}{compiled}"


def processor() -> str:
    """Return the name of the processor, its family and its model."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, " + (
        f"model {fields.get('model', '?')})"
    )


def write_section(path: Path, section: list[str]) -> None:
    """Replace the section with the same title, or append it."""
    from splitformer.files import atomic_write

    text = path.read_text(encoding="utf-8") if path.exists() else f"{TITLE}\n"
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    new = "\n".join(section) + "\n"
    places = [i for i, each in enumerate(sections) if each.splitlines()[0] == section[0]]
    sections = [each.rstrip("\n") + "\n" for each in sections]
    if places:
        sections[places[0]] = new
    else:
        sections.append(new)
    with atomic_write(path) as file:
        file.write("\n".join([head.rstrip("\n") + "\n", *sections]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        from splitformer.cli import command

        sys.exit(command(run))
