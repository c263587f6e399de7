"""Figures of evaluations: confusion matrices."""

import pytest

from hivit_hf.classification.figures import confusion_matrix_figure
from hivit_hf.training.figures import figure_to_png


def test_a_confusion_matrix_is_drawn():
    figure = confusion_matrix_figure([[3, 1], [0, 4]], ["a", "b"])
    assert figure_to_png(figure, dots_per_inch=50).startswith(b"\x89PNG")


def test_a_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match="must be 3 x 3"):
        confusion_matrix_figure([[1, 0], [0, 1]], ["a", "b", "c"])
