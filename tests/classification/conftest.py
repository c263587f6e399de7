"""Folders that the tests of classifiers share."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from digits.data import digits_dataset
from support.classification import outcome, smoke_run
from support.digit_folders import save_classifiers, save_digits


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The digits as saved datasets: all, a few, and with several labels per image."""
    return save_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory) -> list[str]:
    return save_classifiers(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """48 digits to train on and 24 for validation, of four classes, as a saved dataset."""
    splits, folder = digits_dataset(), tmp_path_factory.mktemp("data") / "digits"
    names = [str(digit) for digit in range(4)]
    parts = {}
    for name, split, count in (("train", "train", 48), ("test", "test", 24)):
        rows = [i for i, label in enumerate(splits[split]["label"]) if label < 4][:count]
        images = [splits[split][i]["image"] for i in rows]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        labels = [splits[split]["label"][i] for i in rows]
        parts[name] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def plain(digits, tmp_path_factory) -> dict:
    """The outcome of the smoke recipe on the digits."""
    folder = tmp_path_factory.mktemp("plain")
    return outcome(smoke_run(digits, folder), folder)
