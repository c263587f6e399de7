"""Classification metrics at their edges, and plots without data."""

import numpy as np
import pytest

from hivit_hf.classification.figures import calibration_figure, robustness_figure
from hivit_hf.classification.metrics import areas_under_curve, calibration, top_k_accuracy


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
