"""Overlays: colors of classes, faint background, the figure."""

import numpy as np
from PIL import Image as PILImage

from hivit_hf.segmentation.metrics import IGNORE_INDEX
from hivit_hf.segmentation.overlays import draw_segmentation, overlay
from hivit_hf.training.figures import palette
from support.segmentation import NAMES


def test_overlays_show_classes_in_their_colors():
    colors = palette([*NAMES, *map(str, range(147))], opacity=0.5)
    assert len({tuple(color) for color in colors.tolist()}) == 150 and colors.shape == (150, 4)
    image = PILImage.new("RGB", (8, 6), (100, 100, 100))
    labels = np.full((6, 8), IGNORE_INDEX)
    labels[:3] = 2
    drawn = np.asarray(overlay(image, labels, colors)).astype(int)
    assert (drawn[3:] == 100).all() and np.abs(drawn[0, 0] - (100 + colors[2, :3].astype(int)) / 2).max() <= 1


def test_pixels_that_are_not_labeled_stay_as_they_are():
    image = PILImage.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    for labels in (np.full((16, 16), IGNORE_INDEX), np.where(np.eye(16), 0, IGNORE_INDEX)):
        drawn = np.asarray(overlay(image, labels, palette(NAMES)))
        assert (drawn == np.asarray(image))[labels == IGNORE_INDEX].all()


def test_the_figure_has_a_row_per_image_and_names_what_occurs():
    image, labels = PILImage.new("L", (8, 6)), np.full((6, 8), IGNORE_INDEX)
    labels[:3] = 2
    figure = draw_segmentation([(image, labels, np.zeros_like(labels))] * 2, NAMES)
    assert len(figure.axes) == 6 and [cell.get_title() for cell in figure.axes[:3]] == [
        "image",
        "ground truth",
        "prediction",
    ]
    legend = {text.get_text(): patch.get_facecolor() for text, patch in _entries(figure.legends[0])}
    assert list(legend) == ["sky", "sea"]
    for name, color in legend.items():
        assert np.allclose(color[:3], palette(NAMES)[NAMES.index(name), :3] / 255)


def _entries(legend):
    return zip(legend.get_texts(), legend.get_patches())


def test_background_is_faint_in_overlays():
    image, labels = PILImage.new("RGB", (8, 6), (90, 200, 40)), np.zeros((6, 8), dtype=np.int64)
    for name, faint in (("sky", False), ("background", True), ("Other", True)):
        drawn = np.asarray(overlay(image, labels, palette([name, "sea"]))).astype(int)
        assert (np.abs(drawn - np.asarray(image).astype(int)).max() < 50) == faint
