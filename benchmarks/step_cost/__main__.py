"""What a step of each method costs, as a multiple of a step of SGD: FLOPs, time, memory, bytes communicated.

    OMP_NUM_THREADS=1 python -m benchmarks.step_cost --quick         # under three minutes on two cores
    python -m benchmarks.step_cost --models resnet50 --threads 2 --repetitions 8
    python -m benchmarks.step_cost --models resnet50 --threads 2 --keep-memory --name cpu_kept_memory --counts cpu
    python -m benchmarks.step_cost --report                          # table and plot again, from the stored times

All modes take turns within each repetition, in an order drawn anew, with SGD at both ends and after every second: a
step's time counts only as a ratio to the mean of the steps of SGD before and after it. Times add to
results/times_<name>.csv as they are taken, so that a run may be stopped, and continued. On a CPU
processor time (of all threads) is stored beside wall-clock time: where others use the machine too, it is what the step
itself took. Counts do not depend on the machine's load, and are made once: `--repetitions 0` makes only them.

On a CPU, memory comes from glibc as every user of PyTorch gets it there: large tensors are fresh pages each time, and
SGD's one large pass feels that most. `--keep-memory` keeps in the process what is freed, as PyTorch does on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from pathlib import Path

import torch

from benchmarks.step_cost.bench import Bench, keep_freed_memory, seeds
from benchmarks.step_cost.counts import count_flops, count_memory, count_traffic
from benchmarks.step_cost.modes import MODELS, MODES
from benchmarks.step_cost.report import RESULTS, append, read, report
from esam_dist.ranks import Ranks


def measure_times(bench: Bench, modes: list[str], repetitions: int, first: int, path: Path, model: str) -> None:
    """Append one row for each step to `path`."""
    others = [mode for mode in modes if mode != "sgd"]
    for repetition, seed in enumerate(seeds(repetitions), first):
        for mode in with_sgd_between(random.Random(repetition).sample(others, len(others))):
            if mode == "looksam, step between":
                bench.step("looksam, perturbed step", seed)
            began, cpu_began = time.perf_counter(), time.process_time()
            bench.step(mode, seed)
            cpu, wall = time.process_time() - cpu_began, time.perf_counter() - began
            append(path, {"model": model, "repetition": repetition, "mode": mode, "wall": wall, "cpu": cpu})
        print(f"{model}: repetition {repetition} done", flush=True)


def with_sgd_between(modes: list[str]) -> list[str]:
    """SGD first, after every second of `modes`, and last."""
    parts = [modes[start : start + 2] for start in range(0, len(modes), 2)]
    return ["sgd", *(mode for part in parts for mode in (*part, "sgd"))]


def machine_of(options: argparse.Namespace, device: torch.device) -> str:
    """What the figures hold for, in a line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    extras = ["freed memory kept"] if options.keep_memory else []
    extras += ["channels_last"] if options.channels_last else []
    extras += [f"compiled: {options.compile}"] if options.compile else []
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
    parser.add_argument("--compile", choices=["network", "blocks"], help="default: not at all")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps what is freed (Linux, CPU)")
    parser.add_argument("--name", help="of the results; default: the device")
    parser.add_argument("--counts", help="the results whose counts hold for these too; default: these")
    parser.add_argument("--quick", action="store_true", help="cifar_resnet18, a batch of 4, 3 repetitions; name quick")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batch_size, options.repetitions = ["cifar_resnet18"], 4, 3
    if options.threads:
        torch.set_num_threads(options.threads)
    device, name = torch.device(options.device), options.name or ("quick" if options.quick else options.device)
    if options.keep_memory:
        keep_freed_memory()
    RESULTS.mkdir(exist_ok=True)
    for model_name in [] if options.report else options.models:
        measure(model_name, options, device, name)
    report(name, options.counts or name)


def measure(model_name: str, options: argparse.Namespace, device: torch.device, name: str) -> None:
    """Time, then count what has not been counted before."""
    model, modes = MODELS[model_name], ["sgd", *(mode for mode in options.modes if mode != "sgd")]
    bench = Bench(model, options, options.batch_size or model.batch_size, Ranks(device=device))
    # Momentum, and what libraries set up once; compiled, every mode meets shapes and draws of its own.
    for mode in modes if options.compile else ["sgd"]:
        bench.step(mode, 0)
    times = RESULTS / f"times_{name}.csv"
    first = 1 + max((int(row["repetition"]) for row in read(times) if row["model"] == model_name), default=-1)
    measure_times(bench, modes, options.repetitions, first, times, model_name)
    counts = RESULTS / f"counts_{options.counts or name}.csv"
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
