# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Datasets: what a name or folder is, opening, splits, image columns, and items for `Trainer`."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset, Value, config, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from tqdm.auto import tqdm

from ..image_processing import first_line
from .decoding import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    UnreadableImageError,
    image_of,
    open_image,
    orientation,
    upright,
)
from .seeding import seed_of, seeded


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KINDS = {"parquet": {".parquet"}, "webdataset": {".tar"}, "imagefolder": IMAGE_SUFFIXES}  # the first one found counts


def find_dataset(name: str) -> tuple[str, list[str]]:
    """
    What the name of a dataset stands for. The one place that decides it, for datasets in memory and for streams.

    Returns:
        `"hub"`, `"saved"` (by `save_to_disk`), a key of `KINDS` for a folder with such files, or `"other"` for a folder
        without; and the sorted paths of these files.

    Raises:
        ValueError: for a file, and for a path where nothing is.
    """
    try:
        return _find_dataset(name)
    except OSError as error:
        raise ValueError(f"{name[:200]} cannot be searched for images: {error.strerror}. Check the path.") from error


def _find_dataset(name: str) -> tuple[str, list[str]]:
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder that it is in.")
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise ValueError(f"There is no folder {name}. Check the path.")
        return "hub", []
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return "saved", []
    files = {kind: [] for kind in KINDS}
    for path in folder.rglob("*"):
        for kind, suffixes in KINDS.items():
            if path.suffix.lower() in suffixes:
                files[kind].append(str(path))
    return next(((kind, sorted(paths)) for kind, paths in files.items() if paths), ("other", []))


def open_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
) -> DatasetDict:
    """
    All splits of a dataset of the Hub, of a saved dataset, of a folder (of images in a folder per class, of Parquet
    files, or of tars), or of the two folders of images `train_dir` and `validation_dir`.

    Raises:
        ValueError: if there is no such dataset, or it cannot be read.
    """
    folders = {split: folder for split, folder in (("train", train_dir), ("validation", validation_dir)) if folder}
    if bool(dataset_name) == bool(folders):
        raise ValueError("Give the images by --dataset_name, or by --train_dir and --validation_dir.")
    name = dataset_name or " and ".join(folders.values())
    for folder in folders.values():
        if find_dataset(os.path.abspath(folder))[0] != "imagefolder":
            raise ValueError(f"{folder} is no folder of images: give other datasets by --dataset_name.")
    kind = "imagefolder" if folders else find_dataset(dataset_name)[0]
    with opening(name):
        if folders:
            data_files = {split: os.path.join(folder, "**") for split, folder in folders.items()}
            loaded = load_dataset(kind, data_files=data_files)
        elif kind == "saved":
            loaded = load_from_disk(name)
        elif kind == "imagefolder":
            loaded = load_dataset(kind, data_dir=name)
        else:
            loaded = load_dataset(name, dataset_config_name, revision=dataset_revision)
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


_EMPTY = ("corresponds to no data", "Must pass at least one table")  # as `datasets` says it


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Inside, whatever the many readers raise about the dataset `name` becomes a ValueError of one sentence."""
    try:
        yield
    except DatasetNotFoundError as error:
        raise ValueError(f"There is no dataset {name}, here or on the Hub: check the name.") from error
    except Exception as error:
        cause = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:  # which says nothing itself
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            raise ValueError(
                f"The dataset {name} cannot be prepared, as the disk of {config.HF_DATASETS_CACHE} is full: free space "
                "there, or set HF_DATASETS_CACHE to another folder."
            ) from error
        reason = first_line(cause).removesuffix(".")
        if isinstance(cause, IndexError) or any(words in reason for words in _EMPTY):
            raise ValueError(f"The dataset {name} has a split without samples: choose another one.") from error
        raise ValueError(f"The dataset {name} cannot be read: {reason}") from error


def choose_split(splits: Mapping[str, Dataset], name: str, flag: str) -> Dataset:
    """A split by its name. ValueError names those that exist, if there is none of it or it is empty."""
    if name not in splits:
        raise ValueError(f"There is no split {name!r}: the dataset has {', '.join(splits)}. Choose with --{flag}.")
    if not len(splits[name]):
        raise ValueError(f"The split {name!r} is empty: choose another with --{flag}.")
    return splits[name]


def train_and_eval(
    splits: DatasetDict, train_split_name: str, eval_split_name: str | None, train_val_split: float | None, seed: int
) -> tuple[Dataset, Dataset]:
    """
    The training and the validation images: two splits, or one of which the fraction `train_val_split` is split off.

    Raises:
        ValueError: if a split does not exist, or nothing is left of one.
    """
    train = choose_split(splits, train_split_name, "train_split_name")
    if train_val_split is None:
        return train, evaluation_split(splits, eval_split_name)
    if not 1 <= round(len(train) * train_val_split) < len(train):
        raise ValueError(f"train_val_split {train_val_split} of {len(train)} images leaves one side empty.")
    parts = train.train_test_split(test_size=train_val_split, seed=seed)
    return parts["train"], parts["test"]


def evaluation_split(splits: DatasetDict, given: str | None = None) -> Dataset:
    """The split to evaluate with: the given one, or 'validation', 'val' or 'test'. ValueError if there is none."""
    found = given or next((name for name in ("validation", "val", "test") if name in splits), None)
    if found is None:
        raise ValueError(
            f"There is nothing to evaluate with: the dataset has {', '.join(splits)}. Give --eval_split_name, or split "
            "a fraction off the training images with --train_val_split 0.1."
        )
    return choose_split(splits, found, "eval_split_name")


def check_column(dataset: Dataset | IterableDataset, column: str, name: str, flag: str):
    """ValueError if a dataset, called `name`, has no such column; it names those that exist, and the flag."""
    if column not in (dataset.features or {}):
        found = ", ".join(dataset.features or {}) or "none"
        raise ValueError(f"{name} has no column {column!r}; its columns are {found}. Name another one with --{flag}.")


def image_column(dataset: Dataset | IterableDataset, given: str | None = None, name: str = "train") -> str:
    """The column with the images. ValueError if it does not exist, holds none, or there is more than one such."""
    features, flag = dataset.features or {}, "image_column_name"
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    column = given or (images[0] if len(images) == 1 else "image" if "image" in features else None)
    if column is None:
        found = ", ".join(features) or "none"
        raise ValueError(f"{name} has no single column of images; its columns are {found}. Name one with --{flag}.")
    check_column(dataset, column, name, flag)
    feature = features[column]
    is_bytes = isinstance(feature, Value) and "binary" in feature.dtype
    if not (isinstance(feature, (Image, dict)) or is_bytes):
        raise ValueError(f"{column!r} holds {feature}, not images. Name another column with --{flag}.")
    return column


class ImageDataset(torch.utils.data.Dataset):
    """
    Images of a dataset with their targets, as items for `Trainer`: `pixel_values` (channels, H, W), `labels` where
    there are targets, and `seed` where the transform is random.

    An item depends on the seed, the epoch and its row alone, not on processes, workers or resumption.

    Args:
        dataset: one split.
        column: of its images.
        transform: from an upright PIL image to pixels (channels, H, W).
        targets: (rows, ...), one per image; None for images without.
        num_channels: 1, 3 or 4.
        seed: of the randomness of `transform`; None if it has none.
        name: of the split, for messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        transform: Callable,
        targets: torch.Tensor | None = None,
        num_channels: int = 3,
        seed: int | None = None,
        name: str = "train",
    ):
        is_feature = isinstance(dataset.features[column], Image)
        dataset = dataset.select_columns([column])
        self.dataset = dataset.cast_column(column, Image(decode=False)) if is_feature else dataset
        self.column, self.transform, self.targets, self.num_channels = column, transform, targets, num_channels
        self.seed, self.name, self.epoch = seed, name, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, row: int):
        """The upright PIL image of a row. Raises UnreadableImageError, which names the row."""
        return self.image_and_orientation(row)[0]

    def image_and_orientation(self, row: int) -> tuple:
        """As `image`, and the EXIF orientation of its file (1 is upright). Raises as it does."""
        try:
            data, path = image_of(self.dataset[row], self.column)
            image = open_image(data, MAX_PIXELS)
            return upright(image, self.num_channels), orientation(image)
        except UnreadableImageError as error:
            value = self.dataset[row][self.column]
            path = value.get("path") if isinstance(value, dict) else None
            named = f" ({path})" if path else ""
            raise UnreadableImageError(
                f"Image {row} of {self.name}{named} cannot be read, {error}: repair it or leave it out."
            ) from error

    def check(self, row: int):
        """Raises ValueError, which names the row, if it cannot be trained on."""
        self.image(row)

    def __getitem__(self, row: int) -> dict:
        image = self.image(row)
        item = {} if self.targets is None else {"labels": self.targets[row]}
        if self.seed is None:
            return item | {"pixel_values": self.transform(image)}
        seed = seed_of(self.seed, self.epoch, row)
        with seeded(seed):
            return item | {"pixel_values": self.transform(image), "seed": seed}


def check_images(images: ImageDataset, limit: int):
    """
    Decodes up to `limit` images, spread evenly, so that bad ones are found before training.

    Raises:
        ValueError: which cannot be read.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)).tolist()
    bad = []
    for row in tqdm(rows, desc=f"checking {images.name}", unit="image", delay=2):
        try:
            images.check(row)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f" {len(bad) - 1} more of {len(rows)} are bad too." if len(bad) > 1 else ""
        raise ValueError(bad[0] + more)


def sample_rows(length: int, limit: int | None, seed: int) -> list[int]:
    """All rows, or `limit` of them at random, ascending."""
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:limit].tolist())
