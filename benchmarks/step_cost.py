"""What a step of each method costs, as a multiple of a step of SGD: FLOPs, time, memory, bytes communicated.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --quick         # under three minutes on two cores
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --models resnet50 --repetitions 8
    python benchmarks/step_cost.py --report                          # table and plot again, from the stored times

All modes take turns within each repetition, in an order drawn anew, with SGD at both ends: a step's time counts only
as a ratio to SGD's in the same repetition. Times add to benchmarks/results/step_cost_times_<name>.csv as they are
taken, so that a run may be stopped, and continued. On a CPU the time is processor time (of all threads): on a machine
that others use too, it is what the step itself took. Wall-clock time is stored beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, benchmarks/ is no package

from benchmarks.live_bytes import LiveBytes
from esam_dist.clock import PhaseClock
from esam_dist.data import Batch
from esam_dist.engine.native import NativeEngine
from esam_dist.esam import Memory, esam_step
from esam_dist.models import Classifier, build_model
from esam_dist.randomness import seed_step
from esam_dist.ranks import Ranks
from esam_dist.rule import Rule

RESULTS = Path(__file__).parent / "results"
RHO = 0.05


def sharp(name: str, **choices: Any) -> Rule:
    """A rule that perturbs, at the usual radius."""
    return Rule(name, rho=RHO, radius=RHO, **choices)


def esam(beta: float = 0.5, gamma: float = 0.5, **choices: Any) -> Rule:
    """ESAM at the paper's beta and gamma, or others."""
    return sharp("esam", beta=beta, gamma=gamma, **choices)


LOOKSAM = sharp("looksam", descent="looksam", alpha=0.2)
MODES: dict[str, Rule] = {
    "sgd": Rule(),
    "sam": sharp("sam"),
    "asam": sharp("asam", adaptive_eta=0.01),
    "gsam": sharp("gsam", descent="gsam", alpha=0.2),
    "looksam, perturbed step": LOOKSAM,
    "looksam, step between": sharp("looksam", descent="looksam", alpha=0.2, reuses=True),
    "msam": sharp("msam"),
    "esam (paper): tensor, forward": esam(),
    "esam: element, forward": esam(swp="element"),
    "esam: tensor, head": esam(score="head"),
    "esam: tensor, loss": esam(score="loss"),
    "esam: tensor, random": esam(score="random"),
    "esam: norm, head": esam(swp="norm", score="head"),
    "esam: suffix, head": esam(swp="suffix", score="head"),
    "esam: suffix 0.25, head": esam(0.25, swp="suffix", score="head"),
    "esam: global, scores": esam(scope="global"),
    "esam: global, thresholds": esam(scope="global", transport="thresholds"),
    "esam: global, capacity 1.25": esam(scope="global", capacity_factor=1.25),
    "recycled 0.25, random": esam(1.0, 0.25, score="random", descent="recycled"),
    "recycled 0.25, exact": esam(1.0, 0.25, score="random", descent="recycled_exact"),
    "recycled 0.25, head": esam(1.0, 0.25, score="head", descent="recycled"),
    "recycled 0.25, forward": esam(1.0, 0.25, descent="recycled"),
}


@dataclass(frozen=True)
class Model:
    """A network to measure, and on what."""

    build: Callable[[], nn.Module]
    pixels: int
    num_classes: int
    batch_size: int


def vit_small() -> nn.Module:
    """ViT-S/16 (Touvron et al. 2021, table 1), which torchvision does not name: 22 million parameters."""
    return torchvision.models.VisionTransformer(  # type: ignore[no-any-return]
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )


MODELS = {
    "cifar_resnet18": Model(lambda: build_model("cifar_resnet18", 10), 32, 10, 32),
    "resnet50": Model(lambda: build_model("resnet50", 1000), 224, 1000, 16),
    "vit_small": Model(vit_small, 224, 1000, 16),
}


class Bench:
    """One network and its batch; `step` is what is measured."""

    def __init__(self, model: Model, options: argparse.Namespace, batch_size: int, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self._ranks = ranks
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        module = Classifier(model.build(), options.precision).to(ranks.device, memory_format=layout)
        if options.compile:
            module.compile(dynamic=False)
        # At rate 0 every mode meets the same weights, and does the same work.
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
        self._engine = NativeEngine(module, optimizer, ranks)
        images = torch.randn(batch_size, 3, model.pixels, model.pixels, device=ranks.device)
        labels = torch.randint(model.num_classes, (batch_size,), device=ranks.device)
        self._batch = Batch(images.contiguous(memory_format=layout), labels)
        self._memory: dict[str, Memory] = defaultdict(Memory)

    def step(self, mode: str, seed: int) -> None:
        """One step, with all that it has set going."""
        esam_step(
            self._engine,
            self._batch,
            MODES[mode],
            lr=0.0,
            ranks=self._ranks,
            seed=(seed,),
            clock=PhaseClock(self._ranks.device),
            memory=self._memory[mode.split(",", maxsplit=1)[0]],
        )
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def count_buckets(self) -> list[int]:
        """The sizes in bytes of the gradients that DDP averages from now on; it then averages nothing."""
        sizes: list[int] = []

        def count(_, bucket):  # DDP cannot read annotations that are text
            sizes.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        assert self._engine._ddp is not None
        self._engine._ddp.register_comm_hook(None, count)
        return sizes

    def forget(self, mode: str) -> None:
        """Drop what the mode carries from step to step."""
        self._memory.pop(mode.split(",", maxsplit=1)[0], None)


def seeds(count: int) -> list[int]:
    """Seeds whose first draw, the cut of a suffix, falls into each of `count` equal parts of [0, 1) once, shuffled:
    so that few repetitions stand for all cuts.
    """
    found: dict[int, int] = {}
    for seed in range(1000 * count):
        found.setdefault(int(count * float(torch.rand((), generator=seed_step(seed)))), seed)
        if len(found) == count:
            break
    chosen = list(found.values())
    random.Random(0).shuffle(chosen)
    return chosen


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives, DDP's own (in C++) not among them."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[1] if "gather" in str(func) else args[0]
            self.total += sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended_ranks(device: torch.device, world_size: int = 8) -> Iterator[Ranks]:
    """A job in which this process alone is real: collectives return at once, so that their traffic can be counted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield Ranks(world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def count_flops(model: Model, options: argparse.Namespace, device: torch.device, modes: list[str]) -> dict[str, float]:
    """FLOPs of a step by mode, per sample: at a batch of 8, to which they are proportional; a mean over draws."""
    bench = Bench(model, options, 8, Ranks(device=device))
    flops = {}
    for mode in modes:
        draws = seeds(2 if options.quick else 8) if MODES[mode].beta < 1.0 and MODES[mode].swp != "element" else [0]
        if mode == "looksam, step between":
            bench.step("looksam, perturbed step", 0)
        with FlopCounterMode(display=False) as counter:
            for seed in draws:
                bench.step(mode, seed)
        flops[mode] = counter.get_total_flops() / (8 * len(draws))
    return flops


def count_traffic(model: Model, options: argparse.Namespace, device: torch.device, modes: list[str]) -> dict[str, int]:
    """Bytes that one rank hands to collectives in a step, by mode, at a batch of 4."""
    traffic = {}
    with pretended_ranks(device) as ranks:
        bench = Bench(model, options, 4, ranks)
        gradient = bench.count_buckets()
        for _ in range(2):  # after its first step DDP forms its buckets anew, and tells the other ranks
            bench.step("sgd", 0)
        for mode in modes:
            if mode == "looksam, step between":
                bench.step("looksam, perturbed step", 0)
            gradient.clear()
            with Traffic() as other:
                bench.step(mode, 0)
            traffic[mode] = sum(gradient) + other.total
    return traffic


def count_memory(bench: Bench, modes: list[str], device: torch.device) -> dict[str, int]:
    """The most bytes that a step holds beyond weights and momentum, by mode; for a draw from the middle."""
    middle = min(range(100), key=lambda seed: abs(float(torch.rand((), generator=seed_step(seed))) - 0.5))
    peaks = {}
    for mode in modes:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            bench.step("looksam, perturbed step" if "looksam" in mode else mode, 0)
            torch.cuda.reset_peak_memory_stats()
            bench.step(mode, middle)
            peaks[mode] = torch.cuda.max_memory_allocated() - before
        else:
            with LiveBytes() as live:
                if "looksam" in mode:
                    bench.step("looksam, perturbed step", 0)
                live.reset_peak()
                bench.step(mode, middle)
            peaks[mode] = live.peak
        bench.forget(mode)
    return peaks


def measure_times(bench: Bench, modes: list[str], repetitions: int, first: int, path: Path, model: str) -> None:
    """Append one row for each step to `path`."""
    others = [mode for mode in modes if mode != "sgd"]
    for repetition, seed in enumerate(seeds(repetitions), first):
        order = ["sgd", *random.Random(repetition).sample(others, len(others)), "sgd"]
        for mode in order:
            if mode == "looksam, step between":
                bench.step("looksam, perturbed step", seed)
            began, cpu_began = time.perf_counter(), time.process_time()
            bench.step(mode, seed)
            cpu, wall = time.process_time() - cpu_began, time.perf_counter() - began
            append(path, {"model": model, "repetition": repetition, "mode": mode, "wall": wall, "cpu": cpu})
        print(f"{model}: repetition {repetition} done", flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with the names above it if it is the first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(times: list[dict[str, str]], counts: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One row for each model and mode: ratios to SGD in the same repetition, and what was counted."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in times:
        groups[row["model"], row["repetition"]][row["mode"]].append(row)
    ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (model, _), by_mode in groups.items():
        if len(by_mode["sgd"]) < 2:  # stopped in the middle
            continue
        for clock in ("cpu", "wall"):
            base = statistics.mean(float(row[clock]) for row in by_mode["sgd"])
            for mode, rows in by_mode.items():
                ratios[model, mode, clock] += [float(row[clock]) / base for row in rows]
    summary = []
    for row in counts:
        key = row["model"], row["mode"]
        sgd = next(other for other in counts if other["model"] == row["model"] and other["mode"] == "sgd")
        known: dict[str, Any] = {
            "model": row["model"],
            "mode": row["mode"],
            "flop_ratio": float(row["flops_per_sample"]) / float(sgd["flops_per_sample"]),
        }
        for clock in ("cpu", "wall"):
            values = ratios[(*key, clock)]
            quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [math.nan] * 3
            names = (f"{clock}_q1", f"{clock}_median", f"{clock}_q3", f"{clock}_mean")
            known |= dict(zip(names, [*quartiles, statistics.mean(values or [math.nan])], strict=True))
        known |= {
            "repetitions": len(ratios[(*key, "cpu")]) // (2 if row["mode"] == "sgd" else 1),
            "extra_memory_bytes": int(row["peak_bytes"]) - int(sgd["peak_bytes"]),
            "memory_ratio": int(row["peak_bytes"]) / int(sgd["peak_bytes"]),
            "traffic_bytes": int(row["traffic_bytes"]),
        }
        summary.append(known)
    return summary


def table(summary: list[dict[str, Any]], model: str) -> str:
    """One model's rows in Markdown."""
    lines = [
        "| mode | FLOPs / SGD | time / SGD: median (quartiles) | mean | memory above SGD | traffic / gradient |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for row in summary if row["model"] == model]
    for row in rows:
        measured = f"{row['cpu_median']:.2f} ({row['cpu_q1']:.2f}-{row['cpu_q3']:.2f})"
        others = row["traffic_bytes"] - rows[0]["traffic_bytes"]
        traffic = (
            "1"
            if others == 0
            else f"1 + {others} B"
            if others < 1e6
            else f"{1 + others / rows[0]['traffic_bytes']:.2f}"
        )
        lines.append(
            f"| {row['mode']} | {row['flop_ratio']:.2f} | {measured} | {row['cpu_mean']:.2f} "
            f"| {row['extra_memory_bytes'] / 2**20:+.0f} MiB | {traffic} |"
        )
    return "\n".join(lines)


def plot(summary: list[dict[str, Any]], path: Path, title: str) -> None:
    """Measured ratio beside FLOP ratio, by mode, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in summary))
    modes = list(dict.fromkeys(row["mode"] for row in summary))
    figure, panels = pyplot.subplots(1, len(models), sharey=True, squeeze=False, figsize=(3 + 3.6 * len(models), 7))
    for panel, model in zip(panels[0], models, strict=True):
        for row in (row for row in summary if row["model"] == model):
            y = modes.index(row["mode"])
            panel.plot(row["flop_ratio"], y, "D", color="white", markeredgecolor="tab:blue", zorder=3)
            panel.plot([row["cpu_q1"], row["cpu_q3"]], [y, y], "-", color="tab:orange", linewidth=5, alpha=0.4)
            panel.plot(row["cpu_median"], y, "o", color="tab:orange", markersize=5, zorder=2)
        panel.set(title=model, xlabel="cost of a step / SGD", xlim=(0.4, 2.6))
        panel.grid(axis="x", alpha=0.4)
        for ratio in (1.0, 2.0):
            panel.axvline(ratio, color="grey", linewidth=0.8)
    panels[0][0].set_yticks(range(len(modes)), modes)
    panels[0][0].invert_yaxis()
    handles = [
        pyplot.Line2D([], [], marker="D", linestyle="", color="white", markeredgecolor="tab:blue", label="FLOPs"),
        pyplot.Line2D([], [], marker="o", color="tab:orange", label="measured: median and quartiles"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)


def report(name: str) -> None:
    """Table and plot from the stored times and counts."""
    times, counts = read(RESULTS / f"step_cost_times_{name}.csv"), read(RESULTS / f"step_cost_counts_{name}.csv")
    summary = summarise(times, counts)
    path = RESULTS / f"step_cost_{name}.csv"
    path.unlink(missing_ok=True)
    for row in summary:
        append(path, row)
    models = list(dict.fromkeys(row["model"] for row in summary))
    machine = counts[0]["machine"]
    tables = "\n\n".join(f"### {model}\n\n{table(summary, model)}" for model in models)
    path.with_suffix(".md").write_text(f"{machine}\n\n{tables}\n")
    plot(summary, path.with_suffix(".png"), machine)
    print(f"{machine}\n\n{tables}")


def machine_of(options: argparse.Namespace, device: torch.device) -> str:
    """What the figures hold for, in a line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    extras = [word for word, on in (("channels_last", options.channels_last), ("compiled", options.compile)) if on]
    return ", ".join(
        [name, f"{torch.get_num_threads()} thread(s)", f"torch {torch.__version__}", options.precision, *extras]
    )


def main() -> None:
    """Parse, count, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--batch-size", type=int, help="default: by model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: what torch finds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", help="of the results; default: the device")
    parser.add_argument("--quick", action="store_true", help="cifar_resnet18, a batch of 4, 3 repetitions; name quick")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batch_size, options.repetitions = ["cifar_resnet18"], 4, 3
    if options.threads:
        torch.set_num_threads(options.threads)
    device, name = torch.device(options.device), options.name or ("quick" if options.quick else options.device)
    RESULTS.mkdir(exist_ok=True)
    for model_name in [] if options.report else options.models:
        measure(model_name, options, device, name)
    report(name)


def measure(model_name: str, options: argparse.Namespace, device: torch.device, name: str) -> None:
    """Time, then count what has not been counted before."""
    model, modes = MODELS[model_name], ["sgd", *(mode for mode in options.modes if mode != "sgd")]
    bench = Bench(model, options, options.batch_size or model.batch_size, Ranks(device=device))
    bench.step("sgd", 0)  # momentum, and what libraries set up once
    times = RESULTS / f"step_cost_times_{name}.csv"
    first = 1 + max((int(row["repetition"]) for row in read(times) if row["model"] == model_name), default=-1)
    measure_times(bench, modes, options.repetitions, first, times, model_name)
    counts = RESULTS / f"step_cost_counts_{name}.csv"
    counted = {row["mode"] for row in read(counts) if row["model"] == model_name}
    missing = [mode for mode in modes if mode not in counted]
    if missing:
        flops, traffic = count_flops(model, options, device, missing), count_traffic(model, options, device, missing)
        peaks = count_memory(bench, missing, device)
        for mode in missing:
            known = {"flops_per_sample": int(flops[mode]), "peak_bytes": peaks[mode], "traffic_bytes": traffic[mode]}
            append(counts, {"model": model_name, "mode": mode, **known, "machine": machine_of(options, device)})
        print(f"{model_name}: counted", flush=True)


if __name__ == "__main__":
    main()
