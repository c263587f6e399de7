"""The training package in small: rules with known values, a loss that falls, and errors before time is spent."""

import pytest
import torch

from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.classification.figures import confusion_matrix_figure
from hivit_hf.training.figures import figure_to_png, learning_curves
from hivit_hf.training.trainer_old import FinetuneSettings, finetune


CONFIG = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "depths": [1, 1, 1],
    "num_attention_heads": 2,
    "num_labels": 2,
}
SETTINGS = {
    "total_steps": 30,
    "warmup_steps": 3,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "eval_every_steps": 10,
    "eval_batch_size": 8,
    "seed": 0,
}


def bright_and_dark(count: int = 16) -> list[dict]:
    """Images of one color: label 1 is bright, label 0 is dark."""
    return [
        {"pixel_values": torch.full((3, 16, 16), 0.8 if i % 2 else -0.8) + 0.01 * i, "labels": i % 2}
        for i in range(count)
    ]


# -- finetune -------------------------------------------------------------------------------------------------------


def accuracy_of(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def test_finetuning_learns_bright_and_dark():
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    result = finetune(model, bright_and_dark(), bright_and_dark(8), FinetuneSettings(**SETTINGS), accuracy_of)
    assert [record["step"] for record in result.history] == [10, 20, 30]
    assert result.metrics["accuracy"] == result.history[-1]["accuracy"] == 1.0
    assert result.metrics["loss"] < 0.3
    assert result.seconds > 0
    assert not model.training


def test_finetuning_evaluates_all_images_after_the_last_step():
    """11 images are not a multiple of the batch size 8."""
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    settings = FinetuneSettings(**SETTINGS | {"total_steps": 4, "warmup_steps": 1, "eval_every_steps": 3})
    result = finetune(
        model, bright_and_dark(), bright_and_dark(11), settings, lambda p: {"images": float(len(p.label_ids))}
    )
    assert [(record["step"], record["images"]) for record in result.history] == [(3, 11), (4, 11)]
    assert "use_cache" not in model.config.to_dict()


def test_finetuning_stops_at_a_loss_that_is_not_finite():
    images = bright_and_dark(8)
    images[0]["pixel_values"] = torch.full((3, 16, 16), float("nan"))
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    with pytest.raises(FloatingPointError, match="step 1"):
        finetune(model, images, bright_and_dark(8), FinetuneSettings(**SETTINGS), accuracy_of)


@pytest.mark.parametrize(
    "changes", [{"total_steps": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"warmup_steps": 30}]
)
def test_finetuning_refuses_nonsense(changes):
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    with pytest.raises(ValueError, match=next(iter(changes))):
        finetune(model, bright_and_dark(), bright_and_dark(8), FinetuneSettings(**SETTINGS | changes), accuracy_of)


def test_finetuning_refuses_empty_datasets():
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        finetune(model, bright_and_dark(), [], FinetuneSettings(**SETTINGS), accuracy_of)


# -- monitor --------------------------------------------------------------------------------------------------------


def test_figures_are_png_files():
    figures = [
        learning_curves({"one": [([1, 2], [3, 4]), ([1, 2], [5, 6])]}, "step", "loss"),
        confusion_matrix_figure([[3, 1], [0, 4]], ["a", "b"]),
    ]
    for figure in figures:
        assert figure_to_png(figure, dots_per_inch=50).startswith(b"\x89PNG")


def test_learning_curves_draw_each_run_and_their_mean():
    figure = learning_curves({"one": [([1, 2], [3, 4]), ([1, 2], [5, 8])]}, "step", "loss")
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn == [[3, 4], [5, 8], [4, 6]]


def test_figures_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one run"):
        learning_curves({}, "step", "loss")
    with pytest.raises(ValueError, match="share their x values"):
        learning_curves({"one": [([1], [1]), ([2], [1])]}, "step", "loss")
    with pytest.raises(ValueError, match="must be 3 x 3"):
        confusion_matrix_figure([[1, 0], [0, 1]], ["a", "b", "c"])
