"""
python benchmarks/finetuning.py [--pretrain_epochs 20] [--seeds 1]

What the examples reach on scikit-learn's digits, through their command lines: probes of pre-trained and of random
features, fine-tuning, several labels, LoRA, and damaged images. Writes benchmarks/results/finetuning_digits_cpu.json.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import set_seed


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import evaluate_classification  # noqa: E402  they lie in a folder that is not installed
import finetune_classification  # noqa: E402
import linear_probe  # noqa: E402
from digits.data import digits_dataset, write_parquet  # noqa: E402
from digits.experiment import digits_config, pretrain  # noqa: E402
from digits.labels import several_labels  # noqa: E402
from hivit_hf import HiViTForMaskedImageModeling  # noqa: E402
from measure import write  # noqa: E402


# Digits are neither mirrored nor small in their images.
FLAGS = ["--config", str(EXAMPLES / "recipes" / "finetune_digits.yaml")]
MULTI = ["--problem_type", "multi_label_classification"]


def prepare(folder: Path, epochs: int) -> Path:
    """Both datasets, a pre-trained and a random start."""
    data = digits_dataset()
    data.save_to_disk(folder / "digits")
    several_labels(data).save_to_disk(folder / "several")
    parquet = write_parquet(data, folder / "parquet")
    pretrain(parquet, folder / "run", ["--num_train_epochs", str(epochs)])
    (folder / "run" / "model").rename(folder / "pretrained")
    set_seed(0)
    HiViTForMaskedImageModeling(digits_config()).save_pretrained(folder / "random")
    shutil.copy(folder / "pretrained" / "preprocessor_config.json", folder / "random")
    return folder


def probe(folder: Path, start: str) -> dict:
    output = folder / f"probe-{start}"
    arguments = ["--model_name_or_path", str(folder / start), "--dataset_name", str(folder / "digits")]
    assert linear_probe.main([*arguments, "--output_dir", str(output), "--dataloader_num_workers", "0"]) == 0
    return json.loads((output / "results.json").read_text())["accuracy"]


def finetune(folder: Path, start: str, data: str, seed: int, *flags: str) -> dict:
    output = folder / f"{start}-{data}-{seed}-{len(flags)}"
    arguments = [*FLAGS, "--model_name_or_path", str(folder / start), "--dataset_name", str(folder / data)]
    arguments += ["--output_dir", str(output), "--seed", str(seed), *flags]
    assert finetune_classification.main(arguments) == 0
    return json.loads((output / "eval_results.json").read_text())


def runs(folder: Path, seeds: int, metric: str, data: str, *flags: str) -> dict:
    """A metric after fine-tuning from both starts: mean and each seed."""
    found = {}
    for start in ("pretrained", "random"):
        each = [finetune(folder, start, data, seed, *flags)[f"eval_{metric}"] for seed in range(seeds)]
        found[start] = {"mean": statistics.mean(each), "per_seed": each}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain_epochs", type=int, default=20, help="Epochs of masked pre-training.")
    parser.add_argument("--seeds", type=int, default=1, help="Runs of each fine-tuning.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a network this small stalls when threads wait for each other
    started = time.perf_counter()
    with TemporaryDirectory() as name:
        folder = prepare(Path(name), arguments.pretrain_epochs)
        results = {
            "pretrain_epochs": arguments.pretrain_epochs,
            "probes": {start: probe(folder, start) for start in ("pretrained", "random")},
            "finetuned_accuracy": runs(folder, arguments.seeds, "accuracy", "digits"),
            "several_labels_mean_auc": runs(
                folder, arguments.seeds, "mean_auc", "several", *MULTI, "--num_train_epochs", "2"
            ),
            "lora_accuracy": runs(folder, arguments.seeds, "accuracy", "digits", "--lora_r", "8"),
        }
        evaluated = ["--model_name_or_path", str(folder / "pretrained-digits-0-0"), "--robustness"]
        evaluated += ["--dataset_name", str(folder / "digits"), "--output_dir", str(folder / "evaluated")]
        assert evaluate_classification.main(evaluated) == 0
        report = json.loads((folder / "evaluated" / "results.json").read_text())
    names = ("accuracy", "expected_calibration_error", "robustness")
    results["evaluation"] = {name: report[name] for name in names}
    results["seconds"] = time.perf_counter() - started
    print(write("finetuning_digits_cpu", results, "cpu"))


if __name__ == "__main__":
    main()
