"""
python tests/kill_test.py [--kills 20] [--processes 1 2] [--formats parquet tar] [--workers 0 2]

Trains a small network once without interruption, and once with SIGKILL at random moments and
--resume_from_checkpoint latest after each; then compares both: samples, crops, masks and losses of every step, and the
final weights, bit for bit. Also kills 0, 1 and 2 steps after a resumption.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


ROOT = Path(__file__).parents[1]
SHARDS, IMAGES = 8, 160


def jpeg(number: int) -> bytes:
    """An image that is like no other."""
    generator = np.random.default_rng(number)
    blocks = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks.repeat(12, 0).repeat(12, 1)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_images(folder: Path, layout: str) -> Path:
    """153 images in 8 files: Parquet with two row groups each, or tars; the last one is smaller than the others."""
    folder.mkdir(parents=True)
    bounds = [IMAGES * shard // SHARDS for shard in range(SHARDS)] + [IMAGES - 7]
    for shard in range(SHARDS):
        numbers = range(bounds[shard], bounds[shard + 1])
        if layout == "parquet":
            rows = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in numbers]
            pq.write_table(pa.table({"image": rows}), folder / f"{shard}.parquet", row_group_size=10)
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in numbers:
                data = jpeg(number)
                entry = tarfile.TarInfo(f"{number:05d}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder


def command(data: Path, output: Path, processes: int, workers: int, steps: int) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = {
        "config": ROOT / "examples" / "recipes" / "smoke_cpu.yaml",
        "dataset_name": data,
        "output_dir": output,
        "dataloader_num_workers": workers,
        "per_device_train_batch_size": 16 // (2 * processes),
        "images_per_epoch": IMAGES,
        "num_train_epochs": steps * 16 / IMAGES,
        "save_steps": 7,
        "resume_from_checkpoint": "latest",
        "log_samples": "true",
        "drop_path_rate": 0.1,
    }
    return [*launcher, str(ROOT / "examples" / "pretrain_mim.py"), *(f"--{k}={v}" for k, v in flags.items())]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen):
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{errors.decode()[-3000:]}")


def kill(process: subprocess.Popen):
    """The launcher and all that it has started, as a power cut would."""
    launcher = psutil.Process(process.pid)
    for victim in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate()


def records(output: Path) -> list[dict[int, list[dict]]]:
    """For each rank: step -> its records, one for every time that it was taken."""
    found = []
    for path in sorted(output.glob("samples_rank*.jsonl")):
        steps: dict[int, list[dict]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], []).append(record)
        found.append(steps)
    return found


def num_logged(output: Path) -> int:
    path = output / "samples_rank00000.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(reference: Path, interrupted: Path) -> tuple[int, int]:
    """Steps and repeated steps that were compared. AssertionError if any differs, or the final weights do."""
    repeated = 0
    expected, found = records(reference), records(interrupted)
    assert len(expected) == len(found)
    for ours, theirs in zip(expected, found):
        assert set(ours) == set(theirs), "the steps differ"
        for step, again in theirs.items():
            repeated += len(again) - 1
            assert all(record == ours[step][0] for record in again), f"step {step} differs"
    for name in ("model/model.safetensors", "checkpoints/latest"):
        assert (reference / name).read_bytes() == (interrupted / name).read_bytes(), f"{name} differs"
    return len(expected[0]), repeated


def kill_test(scratch: Path, layout: str, processes: int, workers: int, kills: int, seed: int = 0) -> dict:
    """One combination. Returns what was done; AssertionError if the interrupted run was not exact."""
    steps, moments = 50 + 50 * kills, random.Random(seed)
    data = write_images(scratch / "data", layout)
    began = time.perf_counter()
    finish(start(command(data, scratch / "reference", processes, workers, steps)))
    output, done = scratch / "interrupted", 0
    while done < kills:
        process, before = start(command(data, output, processes, workers, steps)), num_logged(output)
        # by turns at any time, startup included, and 0, 1, 2 or some more steps after the first new one
        any_time = done % 4 == 0
        new_steps = 40 if any_time else 1 + moments.choice([0, 1, 2, moments.randrange(25)])
        deadline = time.monotonic() + (moments.uniform(0.5, 12) if any_time else 600)
        while num_logged(output) < before + new_steps and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0 if any_time else moments.uniform(0, 0.1))
        if process.poll() is not None:
            finish(process)
            break
        kill(process)
        done += 1
    finish(start(command(data, output, processes, workers, steps)))
    compared, repeated = compare(scratch / "reference", output)
    combination = {"format": layout, "processes": processes, "workers": workers, "kills": done}
    return {**combination, "steps": compared, "repeated_steps": repeated, "seconds": round(time.perf_counter() - began)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each combination.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="Numbers of ranks.")
    parser.add_argument("--formats", nargs="+", default=["parquet", "tar"], help="Formats of the data.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="Numbers of data loading workers.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    arguments = parser.parse_args()
    for layout, processes, workers in product(arguments.formats, arguments.processes, arguments.workers):
        with tempfile.TemporaryDirectory() as scratch:
            result = kill_test(Path(scratch), layout, processes, workers, arguments.kills, arguments.seed)
        print("exact:", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
