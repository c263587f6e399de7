# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of classifiers with `evaluate`: accuracy, class probabilities, throughput."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from evaluate.evaluator.image_classification import ImageClassificationEvaluator
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.datasets import ImageDataset
from ..data.labels import SINGLE, find_labels
from ..data.transforms import ClassificationCollator, EvaluationTransform
from ..image_processing import load_processor
from ..training.initialization import read_config, silent_transformers
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
    with silent_transformers():
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval()
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
        model: the classifier.
        dataset: the images.
        split: its name, for messages.
        column: of the labels, if it cannot be told.
        names: of the classes, where labels are bare numbers.

    Raises:
        ValueError: for a label that the model does not have.
    """
    labels = find_labels(dataset, SINGLE, [column] if column else (), names, split)
    targets = labels.targets(dataset, split)
    known = {str(name): int(number) for name, number in model.config.label2id.items()}
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


class TopAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy from the scores of all classes, as an `evaluate` metric that needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy.",
            citation="",
            inputs_description="predictions: scores of all classes; references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        return {"accuracy": top_k_accuracy(scores, labels, 1), "top5_accuracy": top_k_accuracy(scores, labels, 5)}


class ScoringEvaluator(ImageClassificationEvaluator):
    """
    The "image-classification" evaluator, with the probabilities of all classes rather than the best class only.

    Args:
        num_labels: number of classes of the model.
        batch_size: images per forward pass.
    """

    def __init__(self, num_labels: int, batch_size: int):
        super().__init__("image-classification")
        self.PIPELINE_KWARGS = {"top_k": num_labels, "batch_size": batch_size, "function_to_apply": "softmax"}
        self.probabilities: np.ndarray | None = None  # of the last evaluation, (images, classes)

    def predictions_processor(self, predictions: list[list[dict]], label_mapping: dict[str, int]) -> dict:
        rows = [sorted(prediction, key=lambda answer: label_mapping[answer["label"]]) for prediction in predictions]
        self.probabilities = np.array([[answer["score"] for answer in row] for row in rows], dtype=np.float32)
        return {"predictions": self.probabilities.tolist()}


def evaluate_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    batch_size: int = 32,
) -> tuple[dict[str, float], np.ndarray]:
    """
    Top-1 and top-5 accuracy, and throughput with decoding, through `evaluate` and a pipeline.

    Returns:
        The metrics, and the probabilities (images, classes).
    """
    # the model's class numbers, whatever the dataset's are
    data = dataset.select_columns([column]).add_column("target", targets.tolist())
    evaluator = ScoringEvaluator(model.config.num_labels, batch_size)
    numbers = evaluator.compute(
        model_or_pipeline=model,
        feature_extractor=processor,
        data=data,
        metric=TopAccuracy(),
        input_column=column,
        label_column="target",
        label_mapping=model.config.label2id,
        device=model.device.index if model.device.type != "cpu" else -1,
    )
    return {name: float(value) for name, value in numbers.items()}, evaluator.probabilities


@torch.no_grad()
def accuracy_of(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    batch_size: int = 64,
) -> float:
    """Top-1 accuracy of a classifier, without a pipeline."""
    channels = model.config.num_channels
    images = ImageDataset(dataset, column, EvaluationTransform(processor), targets, channels, name="eval")
    hits = 0
    for batch in DataLoader(images, batch_size=batch_size, collate_fn=ClassificationCollator()):
        predicted = model(pixel_values=batch["pixel_values"].to(model.device)).logits.argmax(dim=1)
        hits += (predicted.cpu() == batch["labels"]).sum().item()
    return hits / len(images)
