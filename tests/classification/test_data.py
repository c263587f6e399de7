"""Data of classifiers: mixup, CutMix, label smoothing; limits, columns, processors."""

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from torch.testing import assert_close
from torchvision.transforms import v2

from hivit_hf.data.transforms import ClassificationCollator
from support.classification import smoke_trainer


# -- mixup and CutMix -----------------------------------------------------------------------------------------------


def mixed_batches(mixup, cutmix, count=400, **keywords):
    """Fraction of the own image in mixed images and in targets, of batches of one black and one white image."""
    batches = ClassificationCollator(2, mixup, cutmix, **keywords)
    images = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    fractions, targets, cut = [], [], []
    for seed in range(count):
        items = [{"pixel_values": p, "labels": torch.tensor(i), "seed": seed} for i, p in enumerate(images)]
        batch = batches(items)
        assert_close(batch["labels"].sum(dim=1), torch.ones(2))
        fractions.append(batch["pixel_values"][1].mean().item())
        targets.append(batch["labels"][1, 1].item())
        cut.append(set(batch["pixel_values"].unique().tolist()) <= {0.0, 1.0})
    return np.array(fractions), np.array(targets), np.array(cut)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_distributed_as_that_of_torchvision(mixup, cutmix):
    fractions, targets, cut = mixed_batches(mixup, cutmix)
    assert_close(torch.tensor(fractions), torch.tensor(targets), atol=1e-6, rtol=0)
    assert cut.all() if cutmix else not cut.any()
    reference = v2.CutMix(alpha=cutmix, num_classes=2) if cutmix else v2.MixUp(alpha=mixup, num_classes=2)
    images, others = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)]), []
    for _ in range(400):
        _, mixed = reference(images, torch.tensor([0, 1]))
        others.append(mixed[1, 1].item())
    quantiles = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(targets, quantiles) - np.quantile(others, quantiles)).max() < 0.13


def test_both_kinds_take_turns_and_smoothing_adds_up():
    _, targets, cut = mixed_batches(0.8, 1.0, label_smoothing=0.1)
    assert 0.4 < cut.mean() < 0.6
    assert targets.min() >= 0.05 - 1e-6 and targets.max() <= 0.95 + 1e-6
    assert mixed_batches(0.8, 1.0, switch_probability=0.9)[2].mean() > 0.8
    _, targets, _ = mixed_batches(0.8, 0.0, probability=0.5)
    assert 0.4 < (targets == 1).mean() < 0.6
    items = [{"pixel_values": torch.zeros(1), "labels": torch.tensor(1), "seed": 0}]
    smoothed = ClassificationCollator(4, label_smoothing=0.2)(items)
    assert_close(smoothed["labels"], torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_evaluations_are_neither_mixed_nor_smoothed():
    items = [{"pixel_values": torch.ones(1, 4, 4) * i, "labels": torch.tensor(i)} for i in range(3)]
    batch = ClassificationCollator(4, mixup=0.8, label_smoothing=0.1)(items)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [0, 1, 2]


def test_switches_of_mixing(digits, tmp_path):
    changes = {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.25, "mixup_switch_prob": 0.75}
    mix = smoke_trainer(digits, tmp_path / "run", **changes, label_smoothing_factor=0.1).data_collator.mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.8, 1.0, 0.25, 0.75)
    assert (mix.mode, mix.label_smoothing, mix.num_classes) == ("batch", 0.1, 4)


# -- splits, columns, processors ------------------------------------------------------------------------------------


def test_limits_and_splits(digits, tmp_path):
    limited = smoke_trainer(digits, tmp_path / "a", max_train_samples=32, max_eval_samples=8)
    assert (len(limited.train_dataset), len(limited.eval_dataset)) == (32, 8)
    turned = smoke_trainer(digits, tmp_path / "b", train_split_name="test", eval_split_name="train")
    assert (len(turned.train_dataset), len(turned.eval_dataset)) == (24, 48)
    held_out = smoke_trainer(digits, tmp_path / "c", train_val_split=0.25)
    assert (len(held_out.train_dataset), len(held_out.eval_dataset)) == (36, 12)


def test_statistics_and_sizes_of_evaluations(digits, tmp_path):
    changes = {"image_size": 64, "crop_pct": 0.5, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    processor = smoke_trainer(digits, tmp_path / "run", **changes).processing_class
    assert processor.size["shortest_edge"] == 128 and processor.crop_size["height"] == 64
    assert (list(processor.image_mean), list(processor.image_std)) == (changes["image_mean"], changes["image_std"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5]}, r"image_mean and image_std need 3 numbers, got \[0.5\] and"),
        ({"auto_augment": "nonsense"}, "auto_augment 'nonsense' is no policy: try rand-m9-mstd0.5-inc1"),
        ({"image_column_name": "picture"}, "train has no column 'picture'; its columns are image, label"),
        ({"image_column_name": "label"}, "'label' holds ClassLabel.*, not images"),
        ({"label_column_name": "class"}, "train has no column 'class'; its columns are image, label"),
        ({"class_names": list("abcd")}, r"'label' has names of its own \(0, 1, 2, 3\): leave out --class_names"),
        ({"train_split_name": "training"}, "There is no split 'training': the dataset has train, test"),
        ({"eval_split_name": "dev"}, "There is no split 'dev': the dataset has train, test"),
        ({"train_val_split": 0.001}, "train_val_split 0.001 of 48 images leaves one side empty"),
        ({"problem_type": "multi_label_classification"}, "Several labels per image are a column of lists"),
        ({"config_overrides": {"num_channels": 2}}, "The network takes 2 channels, but images have 1, 3 or 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_data_that_does_not_fit(changes, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        smoke_trainer(digits, tmp_path / "run", **changes)


def test_unreadable_images_are_found_before_training(digits, tmp_path):
    splits = DatasetDict.load_from_disk(digits)
    column = [
        {"bytes": b"no image" if row == 5 else image["bytes"], "path": None}
        for row, image in enumerate(
            splits["train"].cast_column("image", splits["train"].features["image"].__class__(decode=False))["image"]
        )
    ]
    kind = splits["train"].features["image"]
    splits["train"] = splits["train"].remove_columns("image").add_column("image", column).cast_column("image", kind)
    splits.save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="Image 5 of train cannot be read"):
        smoke_trainer(tmp_path / "bad", tmp_path / "run")
    smoke_trainer(tmp_path / "bad", tmp_path / "run", check_images=0)


def test_networks_of_one_channel(digits, tmp_path):
    network = {"hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2, "patch_size": 8, "num_channels": 1}
    trainer = smoke_trainer(digits, tmp_path / "run", config_overrides=network, stop_after_steps=1)
    assert trainer.train_dataset[0]["pixel_values"].shape == trainer.eval_dataset[0]["pixel_values"].shape
    assert trainer.train_dataset[0]["pixel_values"].shape == (1, 32, 32)
    assert trainer.train().global_step == 1 and 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_each_epoch_is_augmented_differently_and_each_row_by_its_seed(digits, tmp_path):
    images = smoke_trainer(digits, tmp_path / "run").train_dataset
    first = images[0]["pixel_values"]
    assert torch.equal(images[0]["pixel_values"], first)
    images.epoch = 1
    assert not torch.equal(images[0]["pixel_values"], first)
