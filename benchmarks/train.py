"""Speed and memory of a training step: frames per second, milliseconds, peak memory, share of waiting for data.

    python -m benchmarks.train --compare --output benchmarks/train.md                    # on this machine's CPU or GPU
    python -m benchmarks.train --precision fp32 bf16 --compile --output benchmarks/train.md       # with torch 2
    python -m benchmarks.train --train-cuts egs/CORPUS/data/fbank/train_cuts.jsonl.gz --lang-dir egs/CORPUS/data/LANG

The system is the published one, with random weights, and batches are random too unless cuts are given. Every variant
has a process of its own, so that its peak memory is its own, and the processes take their steps in turns, one at a time
on the same batch: what else the machine does changes from turn to turn, and the ratio of two times of one turn little.
Look at the ratios, which are medians over the turns; milliseconds are medians too.

`--compare` measures a network of the same shape besides, made in this file from the Conformer that torchaudio ships:
torch's attention with dropout on its weights, torch's dropout, a log_softmax and a CTC loss for each exit. It is ours,
of stock parts, and stands in for the released implementation; it is not that. `--against TREE` measures another
checkout of this repository.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from splitformer.config import Config, ModelConfig, OptimConfig, load_config
from splitformer.files import atomic_write
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import sinusoidal_positions
from splitformer.model.subsampling import Conv1dSubsampling, subsampled_lengths
from splitformer.provenance import command_line
from splitformer.training.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
FRAMES_PER_SECOND = 100
LABELS_PER_SECOND = 5
TITLE = "# The training step"
WITHOUT_OPTIMISER = float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "egs/librispeech/conf/splitformer.toml")
    parser.add_argument("--batch", type=int, default=8, help="utterances")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in each")
    parser.add_argument("--steps", type=int, default=9, help="measured, of every variant; 2 more warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16", "medium"),
        default=["fp32", "bf16"],
        help="medium: fp32 under torch.set_float32_matmul_precision('medium')",
    )
    parser.add_argument("--compile", action="store_true", help="each with torch.compile as well; torch 2 only")
    parser.add_argument("--compare", action="store_true", help="the network of torchaudio's parts as well")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout as well, in float32")
    parser.add_argument("--train-cuts", type=Path, nargs="+", help="train on these instead of random features")
    parser.add_argument("--lang-dir", type=Path, help="the tokens for --train-cuts")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that load data")
    parser.add_argument("--output", type=Path, help="write the table there, in the place of the one of this title")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Variant(**json.loads(args.worker)), args)
        return
    check(args, parser.error)
    variants = chosen(args)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(each, args.against)) for each in variants]
        for worker in tqdm(workers, desc="warm up"):
            worker.run(2)
        turns = []
        for turn in tqdm(range(args.steps), desc="turns"):
            order = workers[::-1] if turn % 2 else workers  # so that none always comes first
            done = {worker.variant: worker.run(1) for worker in order}
            turns.append([done[variant] for variant in variants])
        # what was loaded ahead while the others had their turn would hide the waiting
        workers[0].run(2 * args.num_workers)
        alone = workers[0].run(args.steps)
        facts = [worker.facts() for worker in workers]
    section = report(args, variants, turns, alone, facts)
    print("\n".join(section))
    if args.output:
        write_section(args.output, section)


def check(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    if args.compile and not hasattr(nn.Module, "compile"):
        error(f"--compile needs torch 2 and this is {torch.__version__}: leave it out, or use .venv-torch2")
    if "medium" in args.precision and torch.__version__.startswith("1."):
        error(f"--precision medium has no effect on torch {torch.__version__}: choose among fp32 and bf16")
    if args.compare:
        try:
            import torchaudio.models  # noqa: F401
        except ImportError as problem:
            error(f"--compare needs torchaudio ({problem}): leave it out, or use the environment of ./setup.sh")
    if bool(args.train_cuts) != bool(args.lang_dir):
        error("--train-cuts and --lang-dir belong together: give both or neither")
    if args.steps < 1 or args.batch < 1 or args.seconds < 1:
        error(f"--steps {args.steps}, --batch {args.batch} and --seconds {args.seconds:g} must be 1 at least")
    if args.against and not (args.against / "splitformer" / "model").is_dir():
        error(f"--against {args.against}: no checkout of this repository")


@dataclass(frozen=True)
class Variant:
    network: str
    """ours, comparison, or against"""
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        network = {"ours": "ours", "comparison": "torchaudio's parts", "against": "the other checkout"}[self.network]
        return f"{network}, {self.precision}{', compiled' if self.compiled else ''}"


def chosen(args: argparse.Namespace) -> list[Variant]:
    """The first is what the others are compared with, where there is no comparison network."""
    variants = [Variant("ours", each) for each in args.precision]
    if args.compile:
        variants += [Variant("ours", each, compiled=True) for each in args.precision]
    if args.compare:
        variants += [Variant("comparison", each) for each in args.precision]
    return variants + ([Variant("against", "fp32")] if args.against else [])


@dataclass(frozen=True)
class Steps:
    """Of one or more steps, in seconds."""

    loss: float
    """forward pass, losses and backward pass"""
    step: float
    """the same, the gradients' norm and the optimiser's step"""
    processor: float
    """that the processors spent on the former, on all threads"""
    waited: float
    frames: int


class Worker:
    """A variant in its process, which does as many steps as it is told to and says how long they took."""

    def __init__(self, variant: Variant, against: Path | None) -> None:
        self.variant = variant
        environment = dict(os.environ)
        if variant.network == "against":
            environment["PYTHONPATH"] = str(against.resolve())
        else:
            environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        command += ["--worker", json.dumps(asdict(variant))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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


def work(variant: Variant, args: argparse.Namespace) -> None:
    """A worker's side: answer each line of standard input by a line of JSON."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    config = load_config(args.config)
    batches = cut_batches(args, config) if args.train_cuts else random_batches(args, config.model)
    if args.train_cuts:
        config = next(batches)
    if variant.precision == "medium":
        torch.set_float32_matmul_precision("medium")
    precision = Precision("bf16" if variant.precision == "bf16" else "fp32", device)
    loss = (Comparison(config.model) if variant.network == "comparison" else ours(config)).to(device).train()
    if variant.compiled:
        for module in loss.modules():
            if type(module).__name__ == "ConformerLayer":
                module.compile()
    optimiser = make_optimiser(variant, loss, config.optim)
    for line in sys.stdin:
        if line.strip() == "facts":
            parameters = sum(p.numel() for p in loss.parameters())
            print(json.dumps({"peak": peak_megabytes(device), "parameters": parameters}), flush=True)
            continue
        each = [one_step(loss, next(batches), precision, optimiser) for _ in range(int(line))]
        sums = {name: sum(getattr(steps, name) for steps in each) for name in Steps.__dataclass_fields__}
        print(json.dumps(sums), flush=True)


def ours(config: Config) -> nn.Module:
    return MultiExitLoss(AsrModel(config.model), config.loss)


def make_optimiser(variant: Variant, loss: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | None:
    if variant.network == "against":  # it may have none to share
        return None
    if variant.network == "comparison":
        return torch.optim.AdamW(loss.parameters(), betas=(config.beta1, config.beta2))
    from splitformer.training.optimizer import adamw

    return adamw(loss.parameters(), config)


def one_step(loss: nn.Module, batch: Batch, precision: Precision, optimiser: torch.optim.Optimizer | None) -> Steps:
    waited, tensors = batch
    device = precision.device
    started, processor = clock(device), time.process_time()
    x, x_lens, y, y_lens = (each.to(device, non_blocking=True) for each in tensors)
    with precision.autocast():
        total = loss(x, x_lens, y, y_lens).total
    total.backward()
    after_loss, processor = clock(device), time.process_time() - processor
    if optimiser is not None:
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimiser.step()
    for parameter in loss.parameters():
        parameter.grad = None
    ended = clock(device)
    return Steps(
        loss=after_loss - started,
        step=ended - started if optimiser is not None else WITHOUT_OPTIMISER,
        processor=processor,
        waited=waited,
        frames=int(tensors[1].sum()),
    )


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_megabytes(device: torch.device) -> float:
    """The most that was held: of the GPU's memory by tensors, of the machine's by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Batch = tuple[float, Sequence[Tensor]]
"""seconds that it was waited for; x, x_lens, y, y_lens"""


class RandomBatches(Dataset[tuple[Tensor, ...]]):
    """Features and labels of one length, as many batches as are asked for."""

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


def random_batches(args: argparse.Namespace, model: ModelConfig) -> Iterator[Batch]:
    loader = DataLoader(
        RandomBatches(args.batch, args.seconds, model),
        batch_size=None,
        num_workers=args.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    yield from waited_for(iter(loader))


def cut_batches(args: argparse.Namespace, config: Config) -> Iterator[Any]:
    """First the configuration, with as many tokens as the lang folder has; then training's own batches."""
    from dataclasses import replace

    from splitformer.data.batches import TENSORS
    from splitformer.data.tokenizer import Tokenizer
    from splitformer.data.training import DataOptions, TrainingData

    tokenizer = Tokenizer(args.lang_dir)
    config = replace(config, data=replace(config.data, max_duration=args.batch * args.seconds))
    yield replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        data = TrainingData(DataOptions(args.train_cuts, num_workers=args.num_workers), config, tokenizer, Path(folder), 42)
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
    """The published shape of stock parts: a Conformer of torchaudio for each block, and one of a single layer on every
    second frame beside the blocks that have it; a linear head, log_softmax and CTC loss for each exit in turn."""

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
    args: argparse.Namespace,
    variants: list[Variant],
    turns: list[list[Steps]],
    alone: Steps,
    facts: list[dict[str, Any]],
) -> list[str]:
    """The section's lines."""
    references = {
        each: next((i for i, v in enumerate(variants) if v == Variant("comparison", each)), None)
        for each in args.precision
    }
    first = references[args.precision[0]] if args.compare else 0
    if args.train_cuts:
        data = f"batches of up to {args.batch * args.seconds:g} s of {' '.join(path.name for path in args.train_cuts)}"
    else:
        data = f"batches of {args.batch} x {args.seconds:g} s of random features"
    lines = [
        f"## {title(args)}",
        "",
        f"{facts[0]['parameters'] / 1e6:.1f} M parameters, {data}, {args.steps} turns; made by",
        "",
        f"    {command_line(ROOT)}",
        "",
        f"Ratios are to '{variants[first]}', medians of paired times; in brackets the smallest and the largest.",
        "Processor: what loss and gradients took of the processors' time, which other programs stretch less.",
        "",
        "| variant | loss, gradients: ratio | ms | processor: ratio | whole step: ratio | ms | frames/s | peak MB |",
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
        f"'{variants[0]}', by itself for {args.steps} steps, waits for data {100 * share:.1f} % of its time, with "
        f"{args.num_workers} process(es) that load{'' if args.train_cuts else ' (random features)'}.",
    ]
    return lines


def title(args: argparse.Namespace) -> str:
    where = processor() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    threads = f", {args.threads} thread(s)" if args.device == "cpu" else ""
    cuts = ", cuts" if args.train_cuts else ""
    compiled = ", torch.compile" if args.compile else ""
    return f"torch {torch.__version__}, {where}{threads}{cuts}{compiled}"


def processor() -> str:
    """Its name; where that says little, as in virtual machines, family and model too."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, " + (
        f"model {fields.get('model', '?')})"
    )


def write_section(path: Path, section: list[str]) -> None:
    """Put the section in the place of the one of its title, else behind the others of the file."""
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
    main()
