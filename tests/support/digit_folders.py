"""Folders of digits, encoders and classifiers, for the tests of probing and evaluation."""

import json
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import set_seed

import evaluate_classification
from digits.data import digits_dataset, digits_processor
from digits.experiment import digits_config
from digits.labels import several_labels
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling


SMALL = {"patch_size": 8, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}


def save_digits(folder: Path) -> Path:
    """The digits as saved datasets: all, a few, and with several labels per image."""
    splits = digits_dataset()
    splits.save_to_disk(folder / "digits")
    few = {name: splits[name].select(range(count)) for name, count in (("train", 200), ("test", 80))}
    DatasetDict(few).save_to_disk(folder / "few")
    several_labels(splits).save_to_disk(folder / "several")
    return folder


def save_random_encoder(folder: Path) -> Path:
    """A pre-training network of digits with random weights, and its processor."""
    set_seed(0)
    HiViTForMaskedImageModeling(digits_config()).save_pretrained(folder)
    digits_processor().save_pretrained(folder)
    return folder


def save_classifiers(folder: Path) -> list[str]:
    """Three small classifiers of digits that differ a little, the last one a lot."""
    names = {i: str(i) for i in range(10)}
    config = HiViTConfig(**SMALL, image_size=32, id2label=names, label2id={name: i for i, name in names.items()})
    set_seed(0)
    first, folders = HiViTForImageClassification(config), []
    for index, noise in enumerate((0.0, 0.01, 0.5)):
        model = HiViTForImageClassification(config)
        model.load_state_dict({k: v + noise * torch.randn_like(v) for k, v in first.state_dict().items()})
        model.save_pretrained(folder / str(index))
        digits_processor().save_pretrained(folder / str(index))
        folders.append(str(folder / str(index)))
    return folders


def evaluate_with_script(models: list[str], data: Path, output: Path, *flags: str) -> dict:
    """The results.json of `evaluate_classification.py` on the dataset `few`."""
    arguments = ["--model_name_or_path", *models, "--dataset_name", str(data / "few")]
    assert evaluate_classification.main([*arguments, "--output_dir", str(output), *flags]) == 0
    return json.loads((output / "results.json").read_text())
