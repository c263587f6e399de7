"""The steps of the digits demonstration, from pre-training to predictions in a fresh process."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import evaluate
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BitImageProcessor, EvalPrediction, logging, set_seed

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.pretraining.step import pretrain
from hivit_hf.training.trainer_old import FinetuneSettings, finetune

from .data import CLASS_NAMES, IMAGE_SIZE_PX, DigitPixels, as_it_is, few_labels


METRICS = Path(__file__).parent.parent / "metrics"
STARTS = ("pretrained", "scratch")
LABELS = ("all_labels", "few_labels")
LABELS_PER_CLASS = 10


@dataclass
class DemoSettings:
    """The numbers of the demonstration. Both starts share everything that concerns fine-tuning."""

    pretrain_epochs: int = 40
    pretrain_warmup_epochs: int = 4
    pretrain_batch_size: int = 32
    pretrain_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    all_labels_steps: int = 504
    all_labels_batch_size: int = 32
    all_labels_learning_rate: float = 5e-4
    few_labels_steps: int = 60
    few_labels_batch_size: int = 25
    few_labels_learning_rate: float = 1e-3
    evaluations_per_run: int = 6

    def fast(self) -> "DemoSettings":
        """A handful of steps: everything runs, nothing is learned."""
        return replace(
            self,
            pretrain_epochs=1,
            pretrain_warmup_epochs=0,
            all_labels_steps=2,
            few_labels_steps=2,
            evaluations_per_run=1,
        )


def digits_config() -> HiViTConfig:
    """
    A small HiViT: 32x32 px are 4x4 units of 8 px. Half of so few units are masked rather than the published three
    quarters, and narrow layers start with larger weights.
    """
    return HiViTConfig(
        image_size=IMAGE_SIZE_PX,
        patch_size=8,
        hidden_size=128,
        depths=[1, 1, 4],
        num_attention_heads=4,
        mlp_ratio=2.0,
        initializer_range=0.06,
        mask_ratio=0.5,
        norm_pix_loss=False,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_mlp_ratio=2.0,
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )


def pretrain_digits(pixels: DigitPixels, settings: DemoSettings, folder: Path) -> list[dict]:
    """Masked pre-training without any label; saves encoder and decoder, returns a record per epoch."""
    set_seed(0)
    model = HiViTForMaskedImageModeling(digits_config())
    loader = DataLoader(
        pixels.with_augmentation(),
        batch_size=settings.pretrain_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=as_it_is,
    )
    history = pretrain(
        model,
        loader,
        epochs=settings.pretrain_epochs,
        learning_rate=settings.pretrain_learning_rate,
        warmup_epochs=settings.pretrain_warmup_epochs,
        weight_decay=settings.weight_decay,
        accelerator=Accelerator(),
    )
    model.save_pretrained(folder)
    return history


def finetune_digits(
    train: DigitPixels, test: DigitPixels, start: str, labels: str, seed: int, settings: DemoSettings, pretrained: Path
) -> tuple[HiViTForImageClassification, dict]:
    """
    One run of the comparison. The seed decides the new weights, the order, the variations and which labels are known.

    Args:
        train: all training images.
        test: the hold-out, for the curve; nothing is chosen by it.
        start: one of `STARTS`.
        labels: one of `LABELS`.
        seed: of the run.
        settings: the numbers of the demonstration.
        pretrained: folder that `pretrain_digits` saved.

    Returns:
        The classifier after the last step, and the record of the run.
    """
    numbers = ("steps", "batch_size", "learning_rate")
    steps, batch_size, learning_rate = (getattr(settings, f"{labels}_{name}") for name in numbers)
    if labels == "few_labels":
        train = train.subset(few_labels(train.labels, LABELS_PER_CLASS, seed))
    set_seed(seed)
    if start == "pretrained":
        model = HiViTForImageClassification.from_pretrained(pretrained)
    else:
        model = HiViTForImageClassification(digits_config())
    accuracy = evaluate.load(str(METRICS / "accuracy"), keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return accuracy.compute(predictions=prediction.predictions.argmax(axis=1), references=prediction.label_ids)

    run = finetune(
        model,
        train.with_augmentation(),
        test,
        FinetuneSettings(
            total_steps=steps,
            warmup_steps=steps // 10,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=settings.weight_decay,
            eval_every_steps=max(1, steps // settings.evaluations_per_run),
            eval_batch_size=256,
            seed=seed,
        ),
        compute_metrics,
        data_collator=as_it_is,
        show_progress=False,  # several runs share the terminal
    )
    return model, {"seed": seed, **asdict(run)}


@contextmanager
def worker_processes() -> Iterator[ProcessPoolExecutor]:
    """One process per core for runs that do not depend on each other; each computes with one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 4), context, initializer=_prepare_worker) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the runs that wait are not begun


def _prepare_worker():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()


def compare_starts(
    pool: ProcessPoolExecutor,
    train: DigitPixels,
    test: DigitPixels,
    labels: str,
    seeds: int,
    settings: DemoSettings,
    pretrained: Path,
) -> tuple[dict, dict]:
    """Runs of both starts with each seed: the classifiers of seed 0, and the records of all runs, by start."""
    names = [(seed, start) for seed in range(seeds) for start in STARTS]
    runs = [
        pool.submit(finetune_digits, train, test, start, labels, seed, settings, pretrained) for seed, start in names
    ]
    for run in tqdm(as_completed(runs), total=len(runs), desc=f"fine-tuning, {labels.replace('_', ' ')}", unit="run"):
        run.result()  # raises what the run raised, at once
    models, records = {}, {start: [] for start in STARTS}
    for (_, start), run in zip(names, runs):
        model, record = run.result()
        models.setdefault(start, model)
        records[start].append(record)
    return models, records


@torch.no_grad()
def predict_probabilities(model: HiViTForImageClassification, pixels: DigitPixels) -> torch.Tensor:
    """Probabilities of the classes on the CPU: (number of images, 10)."""
    return model.cpu().eval()(pixels.pixel_values).logits.softmax(dim=1)


def evaluate_model(
    model: HiViTForImageClassification, processor: BitImageProcessor, test: Dataset, probabilities: torch.Tensor
) -> dict:
    """
    Accuracy from the images themselves, through evaluate's evaluator and its pipeline; and the confusion matrix.

    Args:
        model: the classifier.
        processor: its image processor.
        test: the images and labels.
        probabilities: what the model predicts for them, (number of images, 10), for the confusion matrix.
    """
    accuracy = evaluate.load(str(METRICS / "accuracy"), keep_in_memory=True)
    evaluation = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=model,
        feature_extractor=processor,
        data=test,
        metric=accuracy,
        label_mapping=model.config.label2id,
    )
    confusion = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True)
    matrix = confusion.compute(
        predictions=probabilities.argmax(dim=1).tolist(),
        references=list(test["label"]),
        num_labels=model.config.num_labels,
    )
    return evaluation | matrix


def predict_in_fresh_process(model_folder: Path, dataset_folder: Path) -> dict:
    """What `predict.py` predicts with the saved classifier: labels, probabilities, and the pipeline's ranking."""
    output = model_folder.parent / "predictions.json"
    script = Path(__file__).with_name("predict.py")
    subprocess.run([sys.executable, str(script), str(model_folder), str(dataset_folder), str(output)], check=True)
    return json.loads(output.read_text())


def compare_predictions(probabilities: torch.Tensor, fresh: dict) -> dict:
    """Whether the fresh process predicts what the training process did: (number of images, 10) against its answer."""
    labels = [CLASS_NAMES[index] for index in probabilities.argmax(dim=1).tolist()]
    from_pipeline = [ranking[0]["label"] for ranking in fresh["pipeline"]]
    difference = (probabilities - torch.tensor(fresh["probabilities"])).abs().max().item()
    return {
        "images": len(labels),
        "labels_equal": labels == fresh["labels"],
        "pipeline_labels_equal": labels == from_pipeline,
        "largest_probability_difference": difference,
    }


def example_predictions(fresh: dict, labels: torch.Tensor, count: int = 10) -> list[dict]:
    """The first image of each digit as the pipeline saw it, then the mistakes, `count` of each at most."""
    first = [(labels == digit).nonzero()[0].item() for digit in range(10)][:count]
    wrong = [i for i, name in enumerate(fresh["labels"]) if name != CLASS_NAMES[labels[i]] and i not in first][:count]
    return [{"index": i, "true": CLASS_NAMES[labels[i]], "pipeline": fresh["pipeline"][i]} for i in first + wrong]


def summarize(runs: dict) -> dict:
    """Hold-out accuracy after the last step: mean and each seed, per labels and start."""
    summary = {}
    for labels, of_start in runs.items():
        summary[labels] = {}
        for start, records in of_start.items():
            per_seed = [record["metrics"]["accuracy"] for record in records]
            summary[labels][start] = {"mean": sum(per_seed) / len(per_seed), "per_seed": per_seed}
    return summary


def judge(results: dict) -> list[dict]:
    """What the demonstration should reach, what was measured, and whether that is met (null in a fast run)."""
    accuracy, fresh = results["accuracy"], results["fresh_process"]
    few = accuracy["few_labels"]
    with_all = 100 * accuracy["all_labels"]["pretrained"]["mean"]
    lead = 100 * (few["pretrained"]["mean"] - few["scratch"]["mean"])
    equal = fresh["images"] if fresh["labels_equal"] and fresh["pipeline_labels_equal"] else 0
    minutes = results["seconds"]["total"] / 60
    return [
        _target("Pre-trained, all labels", with_all, ">=", 99.0, "{:.1f} %", results["fast"]),
        _target("Lead over scratch, 100 labels", lead, ">=", 20.0, "{:.1f} points", results["fast"]),
        _target("Whole run", minutes, "<=", 6.0, "{:.1f} minutes", results["fast"]),
        # does not depend on how long was trained, so a fast run is judged too
        _target("Same in a fresh process", equal, ">=", fresh["images"], "{:.0f} images", False),
    ]


def _target(title: str, measured: float, comparison: str, required: float, text_format: str, fast: bool) -> dict:
    met = measured >= required if comparison == ">=" else measured <= required
    return {
        "title": title,
        "measured": measured,
        "comparison": comparison,
        "required": required,
        "format": text_format,
        "met": None if fast else bool(met),
    }
