"""The steps of the digits demonstration, each through the script that a lab runs, on small recipes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from datasets import DatasetDict
from tqdm.auto import tqdm

import evaluate_classification
import finetune_classification
import pretrain_mim
from hivit_hf import HiViTConfig
from hivit_hf.training.command_line import INTERRUPTED

from .data import CLASS_NAMES, few_labels, write_parquet


RECIPES = Path(__file__).parents[1] / "recipes"
PRETRAINING, FINETUNING = RECIPES / "mae_digits.yaml", RECIPES / "finetune_digits.yaml"
INITIALIZATIONS = ("pretrained", "scratch")
LABELS = ("all_labels", "few_labels")
LABELS_PER_CLASS = 10

# What the fine-tunings change in the recipe; both initializations share it.
SHARED = ["--layer_decay", "1.0", "--crop_scale", "0.7", "1.0", "--crop_pct", "1.0", "--rotation_degrees", "10"]
SHARED += ["--learning_rate", "1e-3", "--label_smoothing_factor", "0.1", "--optim", "adamw_torch_fused"]
SHARED += ["--eval_strategy", "steps", "--save_strategy", "no", "--check_images", "0"]
FLAGS = {
    "all_labels": [*SHARED, "--num_train_epochs", "14", "--ema_decay", "0.99", "--eval_steps", "196"],
    "few_labels": [*SHARED, "--num_train_epochs", "15", "--warmup_epochs", "1.5", "--eval_steps", "15"],
}
FLAGS["few_labels"] += ["--per_device_train_batch_size", "25", "--effective_batch_size", "25"]
FAST_PRETRAINING = ["--num_train_epochs", "1", "--warmup_epochs", "0", "--logging_steps", "10"]
FAST_FINETUNING = ["--max_steps", "2", "--eval_steps", "2"]


@dataclass(frozen=True)
class Finetuning:
    """One run of the comparison. The seed decides new weights, order, augmentation and which labels are known."""

    labels: str  # of LABELS
    initialization: str  # of INITIALIZATIONS
    seed: int

    @property
    def name(self) -> str:
        return f"{self.labels}-{self.initialization}-{self.seed}"


def digits_config() -> HiViTConfig:
    """The network of the pre-training recipe."""
    recipe = yaml.safe_load(PRETRAINING.read_text())
    own = {name: recipe[name] for name in ("image_size", "mask_ratio", "norm_pix_loss")}
    labels = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}
    return HiViTConfig.from_architecture(recipe["architecture"], **recipe["config_overrides"], **own, **labels)


def network_flags() -> list[str]:
    """The network of the pre-training recipe, for a script that begins with random weights."""
    recipe = yaml.safe_load(PRETRAINING.read_text())
    return ["--architecture", recipe["architecture"], "--config_overrides", json.dumps(recipe["config_overrides"])]


def write_data(splits: DatasetDict, folder: Path, seeds: int) -> Path:
    """Parquet folders: `all_labels`, and `few_labels-SEED` with fewer training images."""
    write_parquet(splits, folder / "all_labels")
    for seed in range(seeds):
        few = DatasetDict(train=few_labels(splits["train"], LABELS_PER_CLASS, seed), test=splits["test"])
        write_parquet(few, folder / f"few_labels-{seed}")
    return folder


def run_quietly(main, flags: Sequence[str], log: Path | None = None):
    """
    Calls the `main` of a script, with what it prints in a file.

    Raises:
        RuntimeError: if it fails, with its last line.
        KeyboardInterrupt: if it was stopped by Ctrl-C.
    """
    if log is None:
        code = main(list(flags))
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                code = main(list(flags))
            except KeyboardInterrupt:
                raise
            except BaseException:
                traceback.print_exc()
                code = 1
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        last = "" if log is None else log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise RuntimeError(f"{main.__module__} {' '.join(flags)} failed: {last}")


def pretrain(data: Path, output: Path, flags: Sequence[str] = ()) -> list[dict]:
    """
    Masked pre-training without any label, by `pretrain_mim.py`, on a Parquet folder.

    Returns:
        The lines of its log with a loss. The model is in the folder `model` of `output`.
    """
    shutil.rmtree(output, ignore_errors=True)
    run_quietly(
        pretrain_mim.main,
        ["--config", str(PRETRAINING), "--dataset_name", str(data), "--output_dir", str(output), *flags],
    )
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def finetune(run: Finetuning, data: Path, pretrained: Path, output: Path, flags: Sequence[str] = ()) -> dict:
    """One fine-tuning by `finetune_classification.py` into the folder `output`; returns its record."""
    shutil.rmtree(output, ignore_errors=True)
    folder = data / (run.labels if run.labels == "all_labels" else f"{run.labels}-{run.seed}")
    pretrained_flags = ["--model_name_or_path", str(pretrained)]
    begin = pretrained_flags if run.initialization == "pretrained" else ["--from_scratch", *network_flags()]
    run_quietly(
        finetune_classification.main,
        [
            *("--config", str(FINETUNING), "--dataset_name", str(folder), "--eval_split_name", "test"),
            *("--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5"),
            *("--output_dir", str(output), "--seed", str(run.seed), *begin, *FLAGS[run.labels], *flags),
        ],
        log=output / "log.txt",
    )
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    evaluations = [{"step": r["step"], "accuracy": r["eval_accuracy"]} for r in history if "eval_accuracy" in r]
    seconds = next(record["train_runtime"] for record in history if "train_runtime" in record)
    return {"seed": run.seed, "history": evaluations, "accuracy": evaluations[-1]["accuracy"], "seconds": seconds}


@contextmanager
def worker_processes() -> Iterator[ProcessPoolExecutor]:
    """One process per core for runs that do not depend on each other; each computes with one thread."""
    context = multiprocessing.get_context("spawn")
    size = min(os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(size, context, initializer=_begin_worker) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the runs that wait are not begun


def _begin_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own


def begin(
    pool: ProcessPoolExecutor,
    initialization: str,
    seeds: int,
    data: Path,
    pretrained: Path,
    output: Path,
    flags: Sequence[str],
) -> dict[Finetuning, Future]:
    """Begins the fine-tunings from one initialization, with all labels and with few."""
    runs = [Finetuning(labels, initialization, seed) for labels in LABELS for seed in range(seeds)]
    return {run: pool.submit(finetune, run, data, pretrained, output / run.name, flags) for run in runs}


def wait_for(futures: dict[Finetuning, Future]) -> dict[str, dict[str, list[dict]]]:
    """The records of fine-tunings, by labels and initialization, once all have ended."""
    for future in tqdm(as_completed(futures.values()), total=len(futures), desc="fine-tuning", unit="run"):
        future.result()  # raises what the run raised, at once
    records = {labels: {start: [] for start in INITIALIZATIONS} for labels in LABELS}
    for run in sorted(futures, key=lambda run: run.seed):
        records[run.labels][run.initialization].append(futures[run].result())
    return records


def evaluate_model(model: Path, data: Path, output: Path) -> dict:
    """Accuracy, confusion matrix and calibration on the hold-out, by `evaluate_classification.py`."""
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    run_quietly(evaluate_classification.main, flags, log=output.with_suffix(".txt"))
    results = json.loads((output / "results.json").read_text())
    names = ("accuracy", "confusion_matrix", "expected_calibration_error", "samples_per_second")
    return {name: results[name] for name in names}


def predict_in_fresh_process(model_folder: Path, dataset_folder: Path) -> dict:
    """What `predict.py` predicts with the saved classifier: labels, probabilities, and the pipeline's ranking."""
    output = model_folder.parent / "predictions.json"
    script = Path(__file__).with_name("predict.py")
    subprocess.run([sys.executable, str(script), str(model_folder), str(dataset_folder), str(output)], check=True)
    return json.loads(output.read_text())


def compare_predictions(here: dict, fresh: dict) -> dict:
    """Whether a fresh process predicts what this one does; both as of `predict.predict`."""
    from_pipeline = [ranking[0]["label"] for ranking in fresh["pipeline"]]
    difference = (torch.tensor(here["probabilities"]) - torch.tensor(fresh["probabilities"])).abs().max().item()
    return {
        "images": len(here["labels"]),
        "labels_equal": here["labels"] == fresh["labels"],
        "pipeline_labels_equal": here["labels"] == from_pipeline,
        "largest_probability_difference": difference,
    }


def example_predictions(fresh: dict, labels: Sequence[int], count: int = 10) -> list[dict]:
    """The first image of each digit as the pipeline predicts it, then the mistakes, `count` of each at most."""
    first = [list(labels).index(digit) for digit in range(10)][:count]
    wrong = [i for i, name in enumerate(fresh["labels"]) if name != CLASS_NAMES[labels[i]] and i not in first][:count]
    return [{"index": i, "true": CLASS_NAMES[labels[i]], "pipeline": fresh["pipeline"][i]} for i in first + wrong]


def summarize(runs: dict) -> dict:
    """Hold-out accuracy after the last step: mean and each seed, per labels and initialization."""
    summary = {}
    for labels, records_of in runs.items():
        per_seed = {start: [record["accuracy"] for record in records] for start, records in records_of.items()}
        summary[labels] = {start: {"mean": sum(v) / len(v), "per_seed": v} for start, v in per_seed.items()}
    return summary
