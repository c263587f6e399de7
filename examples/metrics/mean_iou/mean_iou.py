"""Mean intersection over union of class maps, as an `evaluate` metric that needs no network."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = "How well predicted class maps cover the true ones: intersection over union of each class, and the mean."
_INPUTS = """
Args:
    predictions: predicted class maps, (height, width) each; images may differ in size.
    references: true class maps.
    num_labels: number of classes.
    ignore_index: of pixels that are not labeled and do not count.

Returns:
    mean_iou: over the classes that occur in the predictions or the references, over all images together.
    mean_accuracy: the mean share of each class's true pixels that is found, over the classes that occur.
    overall_accuracy: share of the labeled pixels that are right.
    per_category_iou: of each class; None where it does not occur.
    per_category_accuracy: of each class; None where it does not occur in the references.
"""


class MeanIoU(evaluate.Metric):
    """
    Load it with `evaluate.load("examples/metrics/mean_iou")`. `compute` wants all class maps at once. Where there are
    too many, or in several processes, add up the `counts` of each image: `scores` makes the same of the sum.
    """

    def _info(self) -> evaluate.MetricInfo:
        class_map = datasets.List(datasets.List(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": class_map, "references": class_map}),
        )

    def _compute(self, predictions, references, num_labels: int, ignore_index: int = 255) -> dict:
        counts = np.zeros((num_labels, num_labels), dtype=np.int64)
        for number, (prediction, reference) in enumerate(zip(predictions, references)):
            counts += self.counts(np.asarray(prediction), np.asarray(reference), num_labels, ignore_index, number)
        return self.scores(counts)

    def counts(
        self, prediction: np.ndarray, reference: np.ndarray, num_labels: int, ignore_index: int = 255, number: int = 0
    ) -> np.ndarray:
        """
        How often each true class (row) was predicted as each class (column), of one image.

        Args:
            prediction: predicted classes (height, width).
            reference: true classes (height, width).
            num_labels: number of classes.
            ignore_index: of pixels that are not labeled and do not count.
            number: of the image, for messages.

        Returns:
            (num_labels, num_labels), int64.

        Raises:
            ValueError: for maps of different sizes and for unknown classes.
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
                f"The maps of image {number} have the class {unknown[-1]}, but there are {num_labels}, from 0 on: "
                "give the number of classes of the model."
            )
        return np.bincount(reference * num_labels + prediction, minlength=num_labels**2).reshape(num_labels, num_labels)

    def scores(self, counts: np.ndarray) -> dict:
        """
        What `compute` returns, from the sum of the `counts` of all images.

        Raises:
            ValueError: if nothing was counted.
        """
        if not counts.sum():
            raise ValueError("No pixel is labeled: all are ignore_index. Give other references.")
        hits, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        iou = _shares(hits, true + predicted - hits)
        accuracy = _shares(hits, true)
        return {
            "mean_iou": float(np.mean([share for share in iou if share is not None])),
            "mean_accuracy": float(np.mean([share for share in accuracy if share is not None])),
            "overall_accuracy": float(hits.sum() / counts.sum()),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


def _shares(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
    return [float(part / whole) if whole else None for part, whole in zip(parts, wholes)]
