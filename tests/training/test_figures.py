"""Figures: learning curves, and PNG files."""

import pytest

from hivit_hf.training.figures import figure_to_png, learning_curves


def test_figures_are_png_files():
    figure = learning_curves({"one": [([1, 2], [3, 4]), ([1, 2], [5, 6])]}, "step", "loss")
    assert figure_to_png(figure, dots_per_inch=50).startswith(b"\x89PNG")


def test_learning_curves_draw_each_run_and_their_mean():
    figure = learning_curves({"one": [([1, 2], [3, 4]), ([1, 2], [5, 8])]}, "step", "loss")
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn == [[3, 4], [5, 8], [4, 6]]


def test_curves_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        learning_curves({}, "step", "loss")
    with pytest.raises(ValueError, match="share their x values"):
        learning_curves({"one": [([1], [1]), ([2], [1])]}, "step", "loss")
