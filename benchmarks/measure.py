"""What the benchmark scripts share: interleaved timing, the matrix-product rate, peak memory, the result file."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm


RESULTS = Path(__file__).parent / "results"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def interleave(contenders: dict[str, Callable[[], float | None]], rounds: int, name: str) -> dict[str, list[float]]:
    """
    Runs all contenders, `rounds` times after one round of warm-up that does not count, each round in another order: a
    contender can be slower after a certain other one.

    A contender returns its own seconds, or None to have the whole call timed. Returns the seconds of each round.
    """
    seconds = {contender: [] for contender in contenders}
    order, shuffler = list(contenders.items()), random.Random(0)
    for round_index in tqdm(range(rounds + 1), desc=name, unit="round"):
        shuffler.shuffle(order)
        for contender, run in order:
            synchronize()
            start = time.perf_counter()
            own = run()
            synchronize()
            if round_index:
                seconds[contender].append(time.perf_counter() - start if own is None else own)
    return seconds


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median seconds of each contender, and the median of (its seconds / the reference's), round by round."""
    return {
        contender: {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "times_slower_than_ours": statistics.median(t / r for t, r in zip(times, seconds[reference])),
        }
        for contender, times in seconds.items()
    }


def matrix_product(dtype: torch.dtype, device: str, size: int = 2048, repeats: int = 10) -> Callable[[], float]:
    """A contender that multiplies square matrices; its seconds are those of one product of 2 * size**3 operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        synchronize()
        return (time.perf_counter() - start) / repeats

    return run


def peak_allocated_mib(run: Callable[[], object]) -> float:
    """
    The most memory that tensors took on the CPU at once during `run`, beyond what they took before, MiB.

    It adds up the profiler's record of every allocation: exact and repeatable, where resident memory depends on what
    the allocator happened to keep.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = allocated = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak / 2**20


def hardware(device: str) -> dict[str, str | int]:
    """What ran the benchmark."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    found = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit(root: Path) -> str:
    """The commit of a checkout, and `-dirty` if code or recipes differ from it: not for results of other benchmarks."""
    described, changed = (
        subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()
        for words in (["describe", "--always"], ["status", "--porcelain", "--", "*.py", "*.yaml", "*.js"])
    )
    return described + ("-dirty" if changed else "")


def write(name: str, results: dict, device: str) -> Path:
    """Writes `results/NAME.json` with the command, commit, versions and hardware that led to it."""
    root = Path(__file__).parents[1]
    record = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], root), *sys.argv[1:]]),
        "commit": commit(root),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "hardware": hardware(device),
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
