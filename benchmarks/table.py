"""
python benchmarks/table.py [--check]

Writes the tables of README.md between its `benchmark` marks from benchmarks/results/*.json; with --check it only says
whether they are what the files hold.
"""

import argparse
import json
import sys

from measure import PRECISIONS, RESULTS


README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- benchmark: begin -->\n", "<!-- benchmark: end -->\n"


def step_time_table(record: dict) -> list[str]:
    lines = ["| masked step, forward + backward | float32, s | vs ours | MiB | bfloat16, s | vs ours | MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in record["float32"]["models"]:
        cells = [name]
        for precision in PRECISIONS:
            row = record[precision]["models"][name]
            cells += [
                f"{row['median_s']:.2f}",
                f"{row['times_slower_than_ours']:.2f}x",
                f"{row['peak_memory_mib']:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    shares = []
    for precision in PRECISIONS:
        share, rate = (record[precision][key] for key in ("share_of_matrix_product_rate", "matrix_product_gflop_per_s"))
        shares.append(f"{share:.0%} of {rate:.0f} GFLOP/s in {precision}")
    return [*lines, "", f"Of the machine's own matrix-product rate, our step reaches {' and '.join(shares)}."]


def inference_table(record: dict) -> list[str]:
    lines = ["| classification, forward | float32, s | vs ours | bfloat16, s | vs ours |", "|---|---|---|---|---|"]
    for name in record["float32"]["models"]:
        rows = [record[precision]["models"][name] for precision in PRECISIONS]
        cells = [cell for r in rows for cell in (f"{r['median_s']:.2f}", f"{r['times_slower_than_ours']:.2f}x")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"`from_pretrained` of our base takes {record['from_pretrained_s']:.2f} s."]


def tables() -> str:
    """The section of the README, from the result files."""
    step = json.loads((RESULTS / "step_time_cpu.json").read_text())
    inference = json.loads((RESULTS / "inference_cpu.json").read_text())
    hardware, versions = step["hardware"], step["versions"]
    about = (
        f"{hardware['cpu']}, {hardware['cores']} cores, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, batch {step['batch_size']}, 224 px; medians, interleaved in one "
        "process. *vs ours*: how many times slower (above 1) or faster than HiViT-B, round by round. *MiB*: what a "
        "step needs beyond the weights, gradients included. transformers' Hiera has no SDPA path and masks 60 %; "
        "bfloat16 is autocast."
    )
    return "\n".join([about, "", *step_time_table(step), "", *inference_table(inference), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="Change nothing; exit with 1 if the README is out of date."
    )
    check = parser.parse_args().check
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    updated = before + BEGIN + tables() + END + after
    if check:
        sys.exit(0 if updated == text else "README.md is out of date: run python benchmarks/table.py")
    README.write_text(updated)


if __name__ == "__main__":
    main()
