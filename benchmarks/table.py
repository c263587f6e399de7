"""
python benchmarks/table.py [--check]

Writes the tables of README.md and of the pages of examples/ between their marks from benchmarks/results/*.json; with
--check it only says whether they are what the files hold.
"""

import argparse
import json
import sys
from functools import partial

from measure import PRECISIONS, RESULTS


ROOT = RESULTS.parents[1]


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
    fractions = []
    for precision in PRECISIONS:
        fraction, rate = (
            record[precision][key] for key in ("fraction_of_matrix_product_rate", "matrix_product_gflop_per_s")
        )
        fractions.append(f"{fraction:.0%} of {rate:.0f} GFLOP/s in {precision}")
    return [*lines, "", f"Of the machine's own matrix-product rate, our step reaches {' and '.join(fractions)}."]


def inference_table(record: dict) -> list[str]:
    lines = ["| classification, forward | float32, s | vs ours | bfloat16, s | vs ours |", "|---|---|---|---|---|"]
    for name in record["float32"]["models"]:
        rows = [record[precision]["models"][name] for precision in PRECISIONS]
        cells = [cell for r in rows for cell in (f"{r['median_s']:.2f}", f"{r['times_slower_than_ours']:.2f}x")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"`from_pretrained` of our base takes {record['from_pretrained_s']:.2f} s."]


def deployment_table() -> str:
    """How far ONNX files are from PyTorch, and how long exported models take."""
    onnx, hub, browser = (json.loads((RESULTS / f"{name}_cpu.json").read_text()) for name in ("onnx", "hub", "browser"))
    lines = ["| ONNX of | largest difference from PyTorch | MB |", "|---|---|---|"]
    for model, exports in onnx["differences"].items():
        for export, found in exports.items():
            lines.append(f"| {model}: {export} | {found['largest_difference']:.1e} | {found['megabytes']:.1f} |")
    sizes = {"speed_batch_1": 1, "speed": onnx["batch_size"]}
    fractions = {
        name: " and ".join(f"{onnx[key][name]['times_slower_than_ours']:.2f} at batch {sizes[key]}" for key in sizes)
        for name in ("onnxruntime", "PyTorch, eager")
    }
    cost = onnx["demo_int8"]
    lines += [
        "",
        f"- **onnxruntime against PyTorch** on the base classifier, float32, medians of ratios to PyTorch's time with "
        f"SDPA, round by round: {fractions['onnxruntime']}; PyTorch with eager attention: "
        f"{fractions['PyTorch, eager']}.",
        f"- **8-bit** demo classifier: {cost['accuracy_int8']:.1%} of {cost['images']} held-out images, float32 "
        f"{cost['accuracy_float32']:.1%}.",
        f"- **Exporting** the base classifier takes {hub['export_without_onnx_s']:.1f} s, with its checked ONNX file "
        f"{hub['export_s']:.0f} s; **loading** it with its own code {hub['load_s']:.1f} s, after the imports.",
        f"- **The browser page**, from loopback, is ready after {browser['ready_ms'] / 1000:.1f} s. The "
        f"demo's classifier then takes {browser['classification_ms']:.0f} ms, at first "
        f"{browser['first_classification_ms']:.0f} ms.",
    ]
    return "\n".join([*lines, ""])


def tables() -> str:
    """The section of the README on the network, from the result files."""
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


def reading() -> str:
    """How fast images are read and how well sorted ones are shuffled, from the result files."""
    sets = json.loads((RESULTS / "loader_cpu.json").read_text())["sets"]
    small, large = (sets[size]["ours_is_faster_by"]["ImageFolder"] for size in ("500x375", "4000x3000"))
    sorted_set = json.loads((RESULTS / "shuffling_cpu.json").read_text())["sets"]["one row group per file"]
    peaks = sorted_set["peak_mib"]
    mixed, alone = (sorted_set["classes_of_40_in_a_batch"][way] for way in ("mixed", "one after the other"))
    return (
        "- **Reading** takes libjpeg-turbo's own reduction where a crop is smaller than the image: "
        f"{small:.1f} times the images per CPU second of torchvision's ImageFolder on files of 500x375 px, "
        f"{large:.1f} times on 12 megapixels (`benchmarks/results/loader_cpu.json`).\n"
        "- **Data that are sorted by class** are mixed: a reader has up to 48 row groups open at once (8 shards of "
        "other streams), within 256 MiB. Of ten Parquet files of four classes each, sorted, a batch of 256 that one "
        f"reader reads has {mixed['1 readers']:.1f} of the 40 classes, and {alone['1 readers']:.1f} if shards are read "
        f"one after the other, at {sorted_set['mixed_is_faster_by']:.2f} times the images per CPU second and "
        f"{peaks['mixed'] / peaks['one after the other']:.2f} times the memory of the process "
        "(`benchmarks/results/shuffling_cpu.json`).\n"
    )


def dense_table() -> str:
    """Backbones at the sizes of segmentation and detection, from the result file."""
    record = json.loads((RESULTS / "dense_cpu.json").read_text())
    sizes = [key for key, value in record.items() if isinstance(value, dict) and "models" in value]
    columns = [f"{size}, s | windows take | MiB | with backward" for size in sizes]
    lines = [f"| one image, forward | {' | '.join(columns)} |", "|---|" + "---|---|---|---|" * len(sizes)]
    for name in record[sizes[0]]["models"]:
        cells = [name]
        for size in sizes:
            row = record[size]["models"][name]
            fraction = 1 / row["times_slower_than_ours"]
            memory = (f"{row[f'peak_{kind}_mib']:.0f}" for kind in ("forward", "step"))
            cells += [f"{row['median_s']:.2f}", f"{fraction:.2f} of it", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    biased = json.loads((RESULTS / "dense_bias_cpu.json").read_text())["800x1344"]["models"]
    windows, everywhere = (biased[f"HiViT-B, {kind}"] for kind in ("windows", "global"))
    lines += [
        "",
        "Fused attention writes no matrix of all pairs of units, so windows save time and no memory. The relative "
        "position bias, which segmenters have, is such a matrix: with it, forward and backward of 800x1344 take "
        f"{windows['peak_step_mib']:.0f} MiB with windows and {everywhere['peak_step_mib']:.0f} MiB without, and a "
        f"forward pass takes {everywhere['times_slower_than_ours']:.2f} times as long without.",
    ]
    return "\n".join([*lines, ""])


def scene_table(task: str) -> str:
    """What a segmenter or a detector has pretrained from scenes, from the result file."""
    record = json.loads((RESULTS / "scene_tasks_cpu.json").read_text())[task]
    starts = {
        "pretrained": "trained from the demonstration's weights",
        "exchanged": "the same heads, on random weights",
        "untrained": "trained from random weights",
    }
    names = [name for name in record["pretrained"] if name != "processor_s"]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---|" + "---|" * len(names)]
    for start, about in starts.items():
        lines.append(f"| {about} | {' | '.join(f'{record[start][name]:.2f}' for name in names)} |")
    minutes = record["pretrained"]["processor_s"] / 60
    return "\n".join([*lines, "", f"One run each, of {minutes:.1f} minutes on one core.", ""])


def digits_tables() -> str:
    """The section of examples/README.md, from the result file."""
    record = json.loads((RESULTS / "finetuning_digits_cpu.json").read_text())
    runs = len(record["finetuned_accuracy"]["pretrained"]["per_seed"])
    about = (
        f"scikit-learn's 1,797 digits, a quarter of them held out; the network of the demonstration, after "
        f"{record['pretrain_epochs']} epochs of masked pre-training and with random weights; "
        f"{'one run' if runs == 1 else f'means of {runs} runs'} each."
    )
    lines = [about, "", "| features | L-BFGS, pre-trained | random | LARS, pre-trained | random | kNN | random |"]
    lines.append("|---|---|---|---|---|---|---|")
    pretrained, random = (record["probes"][start] for start in ("pretrained", "random"))
    for name in pretrained:
        cells = [f"{100 * probes[name][m]:.1f} %" for m in ("lbfgs", "lars", "knn") for probes in (pretrained, random)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| after fine-tuning | pre-trained | random |", "|---|---|---|"]
    for key, name in (
        ("finetuned_accuracy", "accuracy, `finetune_digits.yaml`"),
        ("several_labels_mean_auc", "mean area under the curve of four labels, 2 epochs"),
        ("lora_accuracy", "accuracy with `--lora_r 8`"),
    ):
        values = [record[key][start]["mean"] for start in ("pretrained", "random")]
        unit = "{:.3f}" if key.endswith("auc") else "{:.1%}"
        lines.append(f"| {name} | {' | '.join(unit.format(value).replace('%', ' %') for value in values)} |")
    damage = record["evaluation"]["robustness"]
    half, shuffled = 100 * damage["patch drop"]["0.5"], 100 * damage["patch shuffle"]["4"]
    error = 100 * record["evaluation"]["expected_calibration_error"]
    lines += [
        "",
        f"With half of the units masked, the fine-tuned classifier has an accuracy of {half:.1f} %, with all of them "
        f"shuffled of {shuffled:.1f} %; its expected calibration error is {error:.1f} %.",
    ]
    return "\n".join([*lines, ""])


PAGES = {
    ROOT / "README.md": {"benchmark": tables, "reading": reading, "dense": dense_table, "deployment": deployment_table},
    ROOT / "examples" / "README.md": {"digits": digits_tables},
    ROOT / "examples" / "segmentation.md": {"scenes": partial(scene_table, "segmentation")},
    ROOT / "examples" / "detection.md": {"scenes": partial(scene_table, "detection")},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit with 1 if a page is out of date.")
    check = parser.parse_args().check
    for page, sections in PAGES.items():
        text = updated = page.read_text()
        for mark, section in sections.items():
            begin, end = (f"<!-- {mark}: {side} -->\n" for side in ("begin", "end"))
            before, rest = updated.split(begin)
            updated = before + begin + section() + end + rest.split(end)[1]
        if check and updated != text:
            sys.exit(f"{page.relative_to(ROOT)} is out of date: run python benchmarks/table.py")
        page.write_text(updated)


if __name__ == "__main__":
    main()
