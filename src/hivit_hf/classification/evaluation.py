# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of classifiers: accuracy, class probabilities, throughput."""

import time
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.datasets import ImageDataset
from ..data.labels import SINGLE, find_labels
from ..data.transforms import ClassificationCollator, EvaluationTransform
from ..image_processing import load_processor
from ..training.initialization import read_config, reading_weights, silent_transformers
from .metrics import top_k_accuracy


def load_for_evaluation(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A classifier of one label per image, with its adapter if it has one, and its image processor.

    Raises:
        ValueError: if there is none.
    """
    config = read_config(name)
    if config.problem_type not in (None, SINGLE):
        raise ValueError(f"{name} is for {config.problem_type}, but evaluations are of one label per image.")
    if not any("ImageClassification" in kind for kind in config.architectures or []):
        raise ValueError(f"{name} is no classifier: fine-tune it first (examples/finetune_classification.py).")
    with reading_weights(name):
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval()
    with silent_transformers():
        processor = load_processor(name, config)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), processor


def targets_for(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    split: str,
    column: str | None = None,
    names: Sequence[str] = (),
) -> torch.Tensor:
    """
    The labels of a dataset as class numbers of the model (images,), matched by name.

    Args:
        split: name of the dataset, for messages.
        column: of the labels, if it cannot be told.
        names: of the classes, where labels are bare numbers.

    Raises:
        ValueError: for a label that the model does not have.
    """
    labels = find_labels(dataset, SINGLE, [column] if column else (), names, split)
    targets = labels.targets(dataset, split)
    known = {str(name): number for number, name in model.config.id2label.items()}  # label2id may be missing
    used = [labels.names[number] for number in targets.unique().tolist()]
    unknown = [name for name in used if name not in known]
    if unknown:
        some = ", ".join(sorted(known, key=known.get)[:5])
        raise ValueError(
            f"{split} has the label {unknown[0]!r}, which the model does not know; its labels are {some}. Evaluate "
            "with the dataset that it was trained for; if its labels are bare numbers, name them with --class_names as "
            "in the training."
        )
    table = torch.tensor([known.get(name, -1) for name in labels.names])
    return table[targets]


@torch.no_grad()
def evaluate_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    batch_size: int = 32,
) -> tuple[dict[str, float], np.ndarray]:
    """
    Top-1 and top-5 accuracy, and throughput with decoding.

    Returns:
        The metrics, and the probabilities (images, classes).
    """
    channels = model.config.num_channels
    images = ImageDataset(dataset, column, EvaluationTransform(processor), num_channels=channels, name="eval")
    loader = DataLoader(images, batch_size=batch_size, collate_fn=ClassificationCollator())
    start = time.perf_counter()
    logits = [model(pixel_values=batch["pixel_values"].to(model.device)).logits.cpu() for batch in loader]
    scores = torch.cat(logits).numpy()
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    seconds = time.perf_counter() - start
    metrics = {
        "accuracy": top_k_accuracy(probabilities, targets.numpy(), 1),
        "top5_accuracy": top_k_accuracy(probabilities, targets.numpy(), 5),
        "total_time_in_seconds": seconds,
        "samples_per_second": len(images) / seconds,
        "latency_in_seconds": seconds / len(images),
    }
    return metrics, probabilities
