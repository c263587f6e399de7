"""Classification metrics at their edges, the confusion matrix, and plots without data."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from hivit_hf.classification.figures import calibration_figure, robustness_figure
from hivit_hf.classification.metrics import areas_under_curve, calibration, top_k_accuracy


CONFUSION = str(Path(__file__).parents[2] / "examples" / "metrics" / "confusion_matrix")


def test_metrics_of_edge_cases():
    assert top_k_accuracy(np.eye(3), np.arange(3), 5) == 1.0
    scores = np.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.9]])
    assert areas_under_curve(scores, np.array([[0, 1], [1, 1], [0, 1]])) == [1.0, None]
    sure = calibration(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert sure == {
        "expected_calibration_error": 0.5,
        "bins": [{"confidence": 1.0, "accuracy": 0.5, "count": 2}],
    }
    for draw in (lambda: calibration_figure([], 0.0), lambda: robustness_figure({})):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()


def test_confusion_matrix_counts_each_pair():
    numbers = np.random.default_rng(0)
    predictions, references = numbers.integers(0, 4, 200), numbers.integers(0, 4, 200)
    expected = np.zeros((5, 5), dtype=int)
    for prediction, reference in zip(predictions, references):
        expected[reference, prediction] += 1
    confusion = evaluate.load(CONFUSION, keep_in_memory=True)
    computed = confusion.compute(predictions=predictions, references=references, num_labels=5)
    assert computed == {"confusion_matrix": expected.tolist()}


def test_confusion_matrix_refuses_classes_that_do_not_exist():
    confusion = evaluate.load(CONFUSION, keep_in_memory=True)
    with pytest.raises(ValueError, match="between 0 and num_labels - 1 = 1"):
        confusion.compute(predictions=[0, 2], references=[0, 1], num_labels=2)
