"""Mean IoU: as scikit-learn's, by hand, refusals."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, recall_score
from torch.testing import assert_close

from hivit_hf.segmentation.metrics import MeanIoU, iou_scores, pixel_counts


def test_mean_iou_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    true = [generator.integers(0, 4, size) for size in ((7, 5), (4, 9))]
    guessed = [np.where(generator.random(t.shape) < 0.6, t, generator.integers(0, 4, t.shape)) for t in true]
    true[0][:2] = 255
    scores = MeanIoU().compute(predictions=guessed, references=true, num_labels=5)
    # of the images one by one, as in runs, it is the same
    assert iou_scores(sum(pixel_counts(g, t, 5) for g, t in zip(guessed, true))) == scores
    flat_true, flat_guessed = (np.concatenate([maps.ravel() for maps in values]) for values in (true, guessed))
    labeled = flat_true != 255
    expected = jaccard_score(flat_true[labeled], flat_guessed[labeled], average=None)
    recall = recall_score(flat_true[labeled], flat_guessed[labeled], average=None)
    assert_close(scores["per_category_iou"][:4], expected.tolist())
    assert scores["per_category_iou"][4] is None and scores["per_category_accuracy"][4] is None
    assert_close(scores["mean_iou"], expected.mean().item())
    assert_close(scores["mean_accuracy"], recall.mean().item())
    assert_close(scores["overall_accuracy"], (flat_true == flat_guessed)[labeled].mean().item())


def test_mean_iou_by_hand():
    true, guessed = [[0, 0, 1, 1], [0, 0, 1, 9]], [[0, 0, 0, 1], [2, 0, 1, 1]]
    scores = MeanIoU().compute(predictions=[guessed], references=[true], num_labels=3, ignore_index=9)
    assert scores["per_category_iou"] == [3 / 5, 2 / 3, 0.0]  # class 2 occurs in the prediction only
    assert scores["per_category_accuracy"] == [3 / 4, 2 / 3, None]


@pytest.mark.parametrize(
    ("guessed", "true", "sentence"),
    [
        ([[0, 1]], [[0, 1, 1]], "maps of image 0 differ in size"),
        ([[0, 3]], [[0, 1]], "have the class 3, but there are 3"),
        ([[0, 1]], [[255, 255]], "No pixel is labeled"),
    ],
)
def test_mean_iou_refuses(guessed, true, sentence):
    with pytest.raises(ValueError, match=sentence):
        MeanIoU().compute(predictions=[guessed], references=[true], num_labels=3)


def test_counts_of_mean_iou_refuse_negative_classes():
    sound, negative = np.array([[0, 1]]), np.array([[0, -2]])
    for maps in ((sound, negative), (negative, sound)):
        with pytest.raises(ValueError, match="image 7 have the class -2, but there are 3, from 0 on"):
            pixel_counts(*maps, 3, number=7)
