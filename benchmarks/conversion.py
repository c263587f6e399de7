"""
python benchmarks/conversion.py [--optimizer_gib 0.65]

Converts a base masked autoencoder, in a checkpoint as the original training writes it, and takes the time after imports
and the private memory beyond them; the file itself is mapped, and its pages belong to the system's cache. Writes
benchmarks/results/conversion_cpu.json, or conversion_large_file_cpu.json with more than 10 GiB of optimizer state.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from measure import write


CONVERSION = Path(__file__).parents[1] / "conversion"
CHILD = """
import json, sys, threading, time
sys.path.insert(0, sys.argv[1])
import convert

def mib(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) / 1024

before, peak, done = {n: mib(n) for n in ("RssAnon", "VmRSS")}, {}, threading.Event()
def watch():
    while not done.wait(0.002):
        for name in before:
            peak[name] = max(peak.get(name, 0), mib(name) - before[name])
watcher = threading.Thread(target=watch); watcher.start()
start = time.perf_counter()
code = convert.main(sys.argv[2:])
seconds = time.perf_counter() - start
done.set(); watcher.join()
print(json.dumps({"code": code, "seconds": seconds, "private_mib": peak["RssAnon"], "resident_mib": peak["VmRSS"]}))
"""


def make_checkpoint(folder: Path, optimizer_gib: float) -> tuple[Path, int]:
    """A file with weights and optimizer state; also the bytes of the weights."""
    model = HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae"))
    model.save_pretrained(folder / "model")
    command = [sys.executable, CONVERSION / "convert.py", folder / "model", folder / "original", "--to_original"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    content = torch.load(folder / "original" / "checkpoint.pth", mmap=True)
    size = int(optimizer_gib * 2**28) * 4
    with open(folder / "state", "wb") as file:
        file.truncate(size)
    state = torch.UntypedStorage.from_file(str(folder / "state"), shared=True, nbytes=size)
    content["optimizer"] = torch.tensor([]).set_(state)
    torch.save(content, folder / "checkpoint.pth")
    (folder / "state").unlink()
    return folder / "checkpoint.pth", sum(p.numel() * p.element_size() for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer_gib", type=float, default=0.65, help="Optimizer state in the file, in GiB.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of conversions, of which medians are taken.")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        checkpoint, weight_bytes = make_checkpoint(folder, arguments.optimizer_gib)
        runs = []
        for number in range(arguments.rounds):
            command = [sys.executable, "-c", CHILD, CONVERSION, checkpoint, folder / f"converted_{number}"]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(finished.stdout.splitlines()[-1]))
            assert runs[-1]["code"] == 0, finished.stderr
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "code"}
        results = {
            "file_bytes": checkpoint.stat().st_size,
            "weights_mib": weight_bytes / 2**20,
            "rounds": arguments.rounds,
            **medians,
            "private_memory_over_weights": medians["private_mib"] / (weight_bytes / 2**20),
            "resident_memory_over_weights": medians["resident_mib"] / (weight_bytes / 2**20),
        }
        print(json.dumps(results, indent=1))
        name = "conversion_large_file_cpu" if arguments.optimizer_gib > 10 else "conversion_cpu"
        print("written:", write(name, results, "cpu"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
