"""
python benchmarks/demonstration.py [--demo demo_output]

Keeps the results of a run of `make demo`: accuracy of each seed, and minutes, under the instructions that the processor
had. `make demo-avx2` runs the demonstration as on a processor without AVX-512. Writes
benchmarks/results/demonstration_cpu.json, beside the results of the other kind.
"""

import argparse
import json
from pathlib import Path

from measure import RESULTS, write


NAME = "demonstration_cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo_output"), help="Output folder of `make demo`.")
    metrics_file = parser.parse_args().demo / "metrics.json"
    if not metrics_file.exists():
        parser.error(f"There is no {metrics_file}: run `make demo` first, or give --demo.")
    metrics = json.loads(metrics_file.read_text())
    if metrics["fast"]:
        parser.error(f"{metrics_file} is of a fast run: run `make demo` without --fast.")

    path = RESULTS / f"{NAME}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    names = ("accuracy", "seconds", "versions", "device")
    runs[metrics["device"]["instructions"]] = {name: metrics[name] for name in names}
    write(NAME, {"runs": runs}, "cpu")
    for instructions, run in runs.items():
        accuracy = run["accuracy"]
        each = " ".join(f"{100 * value:.2f}" for value in accuracy["all_labels"]["pretrained"]["per_seed"])
        few = accuracy["few_labels"]
        lead = 100 * (few["pretrained"]["mean"] - few["scratch"]["mean"])
        minutes = run["seconds"]["total"] / 60
        print(f"{instructions}: all labels {each} %, lead with 100 labels {lead:.1f} points, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
