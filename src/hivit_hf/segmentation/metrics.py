# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Mean intersection over union of segmentation maps (mIoU), from counts of pixels; also as an `evaluate` metric."""

import datasets
import evaluate
import numpy as np


IGNORE_INDEX = 255  # in segmentation maps: pixels that are not labeled
_DESCRIPTION = "Intersection over union of predicted and true segmentation maps, of each class and in the mean."
_INPUTS = """
Args:
    predictions: predicted segmentation maps, (height, width) each; images may differ in size.
    references: true segmentation maps.
    num_labels: number of classes.
    ignore_index: of pixels that are not labeled and do not count.

Returns:
    mean_iou: over the classes that occur in the predictions or the references, over all images together.
    mean_accuracy: the mean fraction of each class's true pixels that is found, over the classes that occur.
    overall_accuracy: fraction of the labeled pixels that are right.
    per_category_iou: of each class; None where it does not occur.
    per_category_accuracy: of each class; None where it does not occur in the references.
"""


class MeanIoU(evaluate.Metric):
    """
    Mean IoU of all images at once: `MeanIoU().compute(predictions=..., references=..., num_labels=...)`. Where there
    are too many images, or in several processes, add up `pixel_counts` of each: `iou_scores` of the sum are the same.
    """

    def _info(self) -> evaluate.MetricInfo:
        segmentation_map = datasets.List(datasets.List(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": segmentation_map, "references": segmentation_map}),
        )

    def _compute(self, predictions, references, num_labels: int, ignore_index: int = IGNORE_INDEX) -> dict:
        counts = np.zeros((num_labels, num_labels), dtype=np.int64)
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            counts += pixel_counts(np.asarray(prediction), np.asarray(reference), num_labels, ignore_index, number)
        return iou_scores(counts)


def pixel_counts(
    prediction: np.ndarray, reference: np.ndarray, num_labels: int, ignore_index: int = IGNORE_INDEX, number: int = 0
) -> np.ndarray:
    """
    The confusion matrix of one image: how often each true class (row) was predicted as each class (column).

    Args:
        prediction, reference: predicted and true classes (height, width).
        num_labels, ignore_index: as of `MeanIoU`.
        number: of the image, for messages.

    Returns:
        (num_labels, num_labels), int64.

    Raises:
        ValueError: for segmentation maps of different sizes and for unknown classes.
    """
    if prediction.shape != reference.shape:
        raise ValueError(
            f"The maps of image {number} differ in size: {prediction.shape} predicted, {reference.shape} true."
        )
    labeled = reference != ignore_index
    prediction, reference = prediction[labeled].astype(np.int64), reference[labeled].astype(np.int64)
    classes = np.unique(np.concatenate([prediction, reference]))
    unknown = classes[(classes < 0) | (classes >= num_labels)]
    if len(unknown):
        raise ValueError(
            f"The maps of image {number} have the class {unknown[-1]}, but there are {num_labels}, from 0 on: give the "
            "number of classes of the model."
        )
    return np.bincount(reference * num_labels + prediction, minlength=num_labels**2).reshape(num_labels, num_labels)


def iou_scores(counts: np.ndarray) -> dict:
    """
    What `MeanIoU` returns, from the sum of the `pixel_counts` of all images.

    Raises:
        ValueError: if nothing was counted.
    """
    if not counts.sum():
        raise ValueError("No pixel is labeled: all are ignore_index. Give other references.")
    hits, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    iou = _fractions(hits, true + predicted - hits)
    accuracy = _fractions(hits, true)
    return {
        "mean_iou": float(np.mean([value for value in iou if value is not None])),
        "mean_accuracy": float(np.mean([value for value in accuracy if value is not None])),
        "overall_accuracy": float(hits.sum() / counts.sum()),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def _fractions(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
    return [float(part / whole) if whole else None for part, whole in zip(parts, wholes)]
