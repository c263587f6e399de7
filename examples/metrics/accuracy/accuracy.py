"""Accuracy, as an `evaluate` metric that needs no network."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_DESCRIPTION = "Fraction of the predictions that equal their reference."
_INPUTS = """
Args:
    predictions: predicted class indices.
    references: true class indices.

Returns:
    accuracy: between 0 and 1.
"""


class Accuracy(evaluate.Metric):
    """Load it with `evaluate.load("examples/metrics/accuracy")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
