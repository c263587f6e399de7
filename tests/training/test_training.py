"""The training package in small: rules with known values, a loss that falls, and errors before time is spent."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from torch.utils.data import DataLoader

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.classification.figures import confusion_matrix_figure
from hivit_hf.pretraining.step import pretrain
from hivit_hf.training.figures import figure_to_png, learning_curves
from hivit_hf.training.optim import cosine_learning_rate
from hivit_hf.training.trainer_old import FinetuneSettings, finetune


METRICS = Path(__file__).parents[2] / "examples" / "metrics"
CONFIG = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "depths": [1, 1, 1],
    "num_attention_heads": 2,
    "num_labels": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "norm_pix_loss": False,
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


def loader(images: list[dict], batch_size: int = 8, drop_last: bool = False) -> DataLoader:
    return DataLoader(images, batch_size=batch_size, drop_last=drop_last)


# -- pretrain -------------------------------------------------------------------------------------------------------


def test_pretraining_lowers_the_loss_and_records_every_epoch():
    model = HiViTForMaskedImageModeling(HiViTConfig(**CONFIG))
    history = pretrain(model, loader(bright_and_dark()), epochs=15, learning_rate=5e-3, warmup_epochs=1)
    assert [record["epoch"] for record in history] == list(range(1, 16))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    expected = cosine_learning_rate(29, total_steps=30, warmup_steps=2, base=5e-3)
    assert history[-1]["learning_rate"] == pytest.approx(expected)
    assert all(record["images_per_second"] > 0 for record in history)
    assert not model.training


def test_pretraining_is_deterministic():
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        model = HiViTForMaskedImageModeling(HiViTConfig(**CONFIG))
        history = pretrain(model, loader(bright_and_dark()), epochs=2, learning_rate=1e-3)
        losses.append([record["loss"] for record in history])
    assert losses[0] == losses[1]


def test_pretraining_stops_at_a_loss_that_is_not_finite():
    images = bright_and_dark()
    images[12]["pixel_values"] = torch.full((3, 16, 16), float("nan"))
    model = HiViTForMaskedImageModeling(HiViTConfig(**CONFIG))
    with pytest.raises(FloatingPointError, match="epoch 1, step 2"):
        pretrain(model, loader(images), epochs=3, learning_rate=1e-3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_epochs": 2}, "warmup_epochs"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"dataloader": loader(bright_and_dark(4), drop_last=True)}, "no batch"),
    ],
)
def test_pretraining_refuses_nonsense(changes, message):
    model = HiViTForMaskedImageModeling(HiViTConfig(**CONFIG))
    arguments = {"dataloader": loader(bright_and_dark()), "epochs": 2, "learning_rate": 1e-3} | changes
    with pytest.raises(ValueError, match=message):
        pretrain(model, **arguments)


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


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metric_modules_equal_scikit_learn():
    numbers = np.random.default_rng(0)
    predictions, references = numbers.integers(0, 4, 200), numbers.integers(0, 4, 200)
    accuracy = evaluate.load(str(METRICS / "accuracy"), keep_in_memory=True)
    computed = accuracy.compute(predictions=predictions, references=references)
    assert computed == {"accuracy": pytest.approx(accuracy_score(references, predictions))}
    confusion = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True)
    computed = confusion.compute(predictions=predictions, references=references, num_labels=5)
    expected = confusion_matrix(references, predictions, labels=range(5)).tolist()
    assert computed == {"confusion_matrix": expected}


def test_confusion_matrix_refuses_classes_that_do_not_exist():
    confusion = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True)
    with pytest.raises(ValueError, match="between 0 and num_labels - 1 = 1"):
        confusion.compute(predictions=[0, 2], references=[0, 1], num_labels=2)
