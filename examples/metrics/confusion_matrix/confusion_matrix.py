"""Confusion matrix, as an `evaluate` metric that needs no network."""

import datasets
import evaluate
import numpy as np
import sklearn.metrics


_DESCRIPTION = "Number of references of each class that were predicted as each class."
_INPUTS = """
Args:
    predictions: predicted class indices.
    references: true class indices.
    num_labels: number of classes, so that classes which do not occur have their row and column.

Returns:
    confusion_matrix: counts as nested lists, one row per true class, one column per predicted class.
"""


class ConfusionMatrix(evaluate.Metric):
    """Load it with `evaluate.load("examples/metrics/confusion_matrix")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int], num_labels: int) -> dict[str, list[list[int]]]:
        classes = np.concatenate([np.asarray(predictions), np.asarray(references)])
        if classes.min() < 0 or classes.max() >= num_labels:
            raise ValueError(
                f"Class indices must be between 0 and num_labels - 1 = {num_labels - 1}, got {classes.min()} to "
                f"{classes.max()}. Give the number of classes of the model."
            )
        matrix = sklearn.metrics.confusion_matrix(references, predictions, labels=range(num_labels))
        return {"confusion_matrix": matrix.tolist()}
