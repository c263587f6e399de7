# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures with labels: any `datasets` dataset, its labels as targets, and what training makes of both."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, LargeList, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from timm.data import Mixup, create_transform
from tqdm.auto import tqdm
from transformers import BitImageProcessor

from .augment import UnreadablePictureError, open_picture, orientation, seed_of, upright
from .stream import PICTURE_SUFFIXES, picture_of


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
MAX_PIXELS = 178_956_970  # PIL's own limit
_SHOWN = 5  # of long lists in messages


# -- reading --------------------------------------------------------------------------------------------------------


def open_splits(name: str, config: str | None = None, revision: str | None = None) -> DatasetDict:
    """
    All splits of a dataset of the Hub, of a saved dataset, or of a folder of pictures (a folder per class) or Parquet.

    Raises:
        ValueError: if there is no such dataset, or it cannot be read.
    """
    folder = Path(name)
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {name}. Check the path.")
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder that it is in.")
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = load_from_disk(name)
        elif folder.is_dir() and not any(folder.rglob("*.parquet")) and _has_pictures(folder):
            loaded = load_dataset("imagefolder", data_dir=str(folder))
        else:
            loaded = load_dataset(name, config, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(f"There is no dataset {name}, here or on the Hub: check the name.") from error
    except Exception as error:  # the many readers raise many things
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, IndexError) or "corresponds to no data" in reason:
            raise ValueError(f"The dataset {name} has a split without samples: choose another one.") from error
        raise ValueError(f"The dataset {name} cannot be read: {reason}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*"))


def choose_split(splits: DatasetDict, name: str, flag: str) -> Dataset:
    """A split by its name. ValueError names those that exist, if there is none of it or it is empty."""
    if name not in splits:
        raise ValueError(f"There is no split {name!r}: the dataset has {', '.join(splits)}. Choose with --{flag}.")
    if not len(splits[name]):
        raise ValueError(f"The split {name!r} is empty: choose another with --{flag}.")
    return splits[name]


def train_and_eval(
    splits: DatasetDict, train_split: str, eval_split: str | None, eval_fraction: float | None, seed: int
) -> tuple[Dataset, Dataset]:
    """
    What is learnt from and what is evaluated with: two splits, or one of which a share is held out.

    Raises:
        ValueError: if a split does not exist, or nothing is left of one.
    """
    train = choose_split(splits, train_split, "train_split")
    if eval_fraction is not None:
        if not 1 <= round(len(train) * eval_fraction) < len(train):
            raise ValueError(f"eval_fraction {eval_fraction} of {len(train)} pictures leaves one side empty.")
        parts = train.train_test_split(test_size=eval_fraction, seed=seed)
        return parts["train"], parts["test"]
    return train, evaluation_split(splits, eval_split)


def evaluation_split(splits: DatasetDict, given: str | None = None) -> Dataset:
    """The split to evaluate with: the given one, or 'validation', 'val' or 'test'. ValueError if there is none."""
    found = given or next((name for name in ("validation", "val", "test") if name in splits), None)
    if found is None:
        raise ValueError(
            f"There is nothing to evaluate with: the dataset has {', '.join(splits)}. Give --eval_split, or hold out a "
            "share with --eval_fraction 0.1."
        )
    return choose_split(splits, found, "eval_split")


def picture_column(dataset: Dataset, given: str | None = None) -> str:
    """The column with the pictures. ValueError if it does not exist or cannot be told."""
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = given or (pictures[0] if len(pictures) == 1 else "image" if "image" in dataset.features else None)
    if column not in dataset.features:
        what = f"There is no column {given!r}" if given else "There is no single column of pictures"
        raise ValueError(f"{what}; the columns are {', '.join(dataset.features)}. Name one with --image_column.")
    feature = dataset.features[column]
    is_bytes = isinstance(feature, Value) and "binary" in feature.dtype
    if not (isinstance(feature, (Image, dict)) or is_bytes):
        raise ValueError(f"{column!r} holds {feature}, not pictures. Name another column with --image_column.")
    return column


# -- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """
    How labels become targets.

    Args:
        problem_type: as in the configuration of the model.
        columns: where they are: one column, or one per class or number.
        names: of the classes or numbers, in the order of the model's outputs.
        feature: what the column holds, if there is one: class numbers or names.
    """

    problem_type: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    feature: object = None

    def targets(self, dataset: Dataset, split: str) -> torch.Tensor:
        """
        The targets of all rows: (rows,) class numbers, or (rows, outputs) zeros and ones or numbers.

        Raises:
            ValueError: if a column is missing, rows have no label, or one that is not known.
        """
        for column in self.columns:
            _check_column(dataset, column, split)
        if len(self.columns) > 1:
            values = list(zip(*(list(dataset[column]) for column in self.columns)))
        else:
            values = list(dataset[self.columns[0]])
        if self.problem_type == SINGLE:
            return torch.tensor(self._numbers(values, split))
        if self.problem_type == REGRESSION or len(self.columns) > 1:
            return self._vectors(values, split)
        targets = torch.zeros(len(values), len(self.names))
        for row, numbers in enumerate(values):
            if numbers is None:
                raise ValueError(f"Row {row} of {split} has no list of labels; an empty list is a picture without any.")
            if len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"Row {row} of {split} names a label twice, {_some(numbers)}: a list holds each label of a picture "
                    "once. Zeros and ones belong into a column for each label."
                )
            targets[row, self._numbers(numbers, split)] = 1.0
        return targets

    def _numbers(self, values: Sequence, split: str) -> list[int]:
        """Class numbers of names or numbers."""
        missing = sum(value is None or value == -1 for value in values)
        if missing:
            raise ValueError(
                f"{missing} of {len(values)} rows of {split} have no label in {self.columns[0]!r}: choose another "
                "split."
            )
        if values and isinstance(values[0], str):
            positions = {name: number for number, name in enumerate(self.names)}
            unknown = sorted(set(values) - set(positions))
            if unknown:
                raise ValueError(
                    f"{split} has labels that are not among the {len(self.names)} classes: {_some(unknown)}. The "
                    "splits must have the same labels."
                )
            return [positions[value] for value in values]
        outside = sorted({value for value in values if not 0 <= value < len(self.names)})
        if outside:
            raise ValueError(
                f"{split} has the label {outside[-1]}, but there are {len(self.names)} classes, 0 to "
                f"{len(self.names) - 1}: correct the labels, or give a name for each with --label_names."
            )
        return [int(value) for value in values]

    def _vectors(self, values: Sequence, split: str) -> torch.Tensor:
        rows = [value if isinstance(value, (list, tuple)) else [value] for value in values]
        for index, row in enumerate(rows):
            if len(row) != len(self.names) or any(value is None or value != value for value in row):
                raise ValueError(
                    f"Row {index} of {split} must have {len(self.names)} numbers in {', '.join(self.columns)}, "
                    f"got {list(row)}: complete it or leave it out."
                )
            if self.problem_type == MULTI and any(value not in (0, 1) for value in row):
                raise ValueError(f"Row {index} of {split} must have a 0 or 1 for each class, got {list(row)}.")
        return torch.tensor(rows, dtype=torch.float32)


def find_labels(
    dataset: Dataset, problem_type: str, columns: Sequence[str] = (), names: Sequence[str] = (), split: str = "train"
) -> Labels:
    """
    Where the labels of a dataset are and what they are called.

    One label per picture is a column of class labels, names or numbers. Several are a column of lists of them, or
    one column of zeros and ones for each. Regression takes one or several columns of numbers, or one of lists.

    Args:
        dataset: the split to learn from.
        problem_type: as in the configuration of the model.
        columns: the columns, if they cannot be told.
        names: of the classes, where labels are bare numbers.
        split: its name, for messages.

    Raises:
        ValueError: if there is no such column, or it does not hold what is learnt.
    """
    columns = tuple(columns) or (_guess_column(dataset, problem_type, split),)
    for column in columns:
        _check_column(dataset, column, split)
    if len(columns) > 1:
        return Labels(problem_type, columns, _as_many(names, columns))
    column, feature = columns[0], dataset.features[columns[0]]
    is_list = isinstance(feature, (List, LargeList))
    if problem_type == MULTI and not is_list:
        raise ValueError(
            f"Several labels per picture are a column of lists, or several columns; {column!r} of {split} holds one."
        )
    if problem_type == SINGLE and is_list:
        raise ValueError(f"{column!r} of {split} holds lists: give --problem_type multi_label_classification.")
    item = feature.feature if is_list else feature
    if problem_type == REGRESSION:
        if not isinstance(item, Value) or item.dtype == "string":
            raise ValueError(f"Regression needs numbers, but {column!r} of {split} holds {item}.")
        if not is_list:
            return Labels(problem_type, columns, _as_many(names, columns))
        width = next((len(row) for row in dataset[column] if row is not None), 0)
        return Labels(problem_type, columns, _as_many(names, tuple(f"{column}_{i}" for i in range(width))))
    return Labels(problem_type, columns, _class_names(dataset, column, item, is_list, names), item)


def _as_many(names: Sequence[str], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names that were given, or those of the columns."""
    if names and len(names) != len(columns):
        raise ValueError(
            f"--label_names needs {len(columns)} names, one for each of {_some(columns)}, got {_some(names)}."
        )
    return tuple(names or columns)


def _class_names(dataset: Dataset, column: str, item, is_list: bool, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(item, ClassLabel):
        if names and list(names) != item.names:
            raise ValueError(f"{column!r} has names of its own ({_some(item.names)}): leave out --label_names.")
        return tuple(item.names)
    if names:
        return tuple(names)
    values = {value for row in dataset[column] for value in ((row or []) if is_list else [row])} - {None, -1}
    if not values:
        raise ValueError(f"No row has a label in {column!r}: choose another column with --label_column.")
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"Labels must be names or whole numbers, but {column!r} holds {item}: try regression.")
    return tuple(str(number) for number in range(max(values) + 1))


def _guess_column(dataset: Dataset, problem_type: str, split: str) -> str:
    for name in ("label", "labels", "fine_label", "target"):
        if name in dataset.features:
            return name
    found = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(found) == 1 and problem_type == SINGLE:
        return found[0]
    raise ValueError(
        f"{split} has no column that is surely the label; its columns are {', '.join(dataset.features)}. Name it with "
        "--label_column."
    )


def _check_column(dataset: Dataset, column: str, split: str):
    if column not in dataset.features:
        raise ValueError(
            f"{split} has no column {column!r}; its columns are {', '.join(dataset.features)}. Name the labels with "
            "--label_column."
        )


def check_same_labels(train: Dataset, evaluation: Dataset, labels: Labels, targets: Sequence[torch.Tensor]):
    """
    ValueError if the splits do not have the same labels: other lists of names, or classes that are never learnt.

    Args:
        train, evaluation: the splits.
        labels: how labels become targets, from `train`.
        targets: of both splits.
    """
    if labels.problem_type == REGRESSION:
        return
    lists = []
    for dataset in (train, evaluation):
        feature = dataset.features[labels.columns[0]]
        feature = getattr(feature, "feature", None) or feature
        lists.append(feature.names if isinstance(feature, ClassLabel) else None)
    if lists[0] != lists[1]:
        raise ValueError(
            f"The splits have different lists of labels: {_some(lists[0])} to learn from, {_some(lists[1])} to "
            "evaluate with. Give both the same, in the same order."
        )
    if labels.problem_type == SINGLE:
        never = sorted(set(targets[1].unique().tolist()) - set(targets[0].unique().tolist()))
        if never:
            raise ValueError(
                f"The pictures to evaluate with have labels that none to learn from has: "
                f"{_some([labels.names[number] for number in never])}. Correct the splits."
            )


def _some(names: Sequence | None) -> str:
    if names is None:
        return "bare values"
    shown = ", ".join(map(str, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "none"


# -- pictures -------------------------------------------------------------------------------------------------------


class LabelledPictures(torch.utils.data.Dataset):
    """
    Pictures of a dataset with their targets, as items for `Trainer`.

    What becomes of a picture depends on the seed, the epoch and its row alone, not on processes, workers, resumptions.

    Args:
        dataset: one split.
        column: where its pictures are.
        transform: from an upright PIL picture to pixels (channels, H, W).
        targets: one per row; None for pictures without.
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

    def picture(self, row: int):
        """The upright PIL picture of a row. Raises UnreadablePictureError, which names the row."""
        return self.picture_and_orientation(row)[0]

    def picture_and_orientation(self, row: int) -> tuple:
        """As `picture`, and how its file lies (EXIF, 1 is upright). Raises as it does."""
        try:
            data, path = picture_of(self.dataset[row], self.column)
            picture = open_picture(data, MAX_PIXELS)
            return upright(picture, self.num_channels), orientation(picture)
        except UnreadablePictureError as error:
            value = self.dataset[row][self.column]
            path = value.get("path") if isinstance(value, dict) else None
            named = f" ({path})" if path else ""
            raise UnreadablePictureError(
                f"Picture {row} of {self.name}{named} cannot be read, {error}: repair it or leave it out."
            ) from error

    def check(self, row: int):
        """Raises ValueError, which names the row, if it cannot be learnt from."""
        self.picture(row)

    def __getitem__(self, row: int) -> dict:
        picture = self.picture(row)
        item = {} if self.targets is None else {"labels": self.targets[row]}
        if self.seed is None:
            return item | {"pixel_values": self.transform(picture)}
        seed = seed_of(self.seed, self.epoch, row)
        with seeded(seed):
            return item | {"pixel_values": self.transform(picture), "seed": seed}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All randomness inside, of Python, numpy and torch, depends on the seed; outside nothing has happened."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def check_pictures(pictures: LabelledPictures, limit: int):
    """
    Decodes up to `limit` pictures, spread evenly, so that bad ones are found before training.

    Raises:
        ValueError: which cannot be read.
    """
    rows = np.unique(np.linspace(0, len(pictures) - 1, min(limit, len(pictures))).astype(int)).tolist()
    bad = []
    for row in tqdm(rows, desc=f"checking {pictures.name}", unit="picture", delay=2):
        try:
            pictures.check(row)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f" {len(bad) - 1} more of {len(rows)} are bad too." if len(bad) > 1 else ""
        raise ValueError(bad[0] + more)


class Evaluating:
    """The transform of evaluations: what the image processor that is saved with the model does."""

    def __init__(self, processor: BitImageProcessor):
        self.processor = processor

    def __call__(self, picture) -> torch.Tensor:
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]


def training_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: Sequence[float],
    flip_probability: float,
    auto_augment: str | None,
    color_jitter: float,
    random_erasing: float,
) -> Callable:
    """
    timm's transform, as the published fine-tuning uses it: random crop (bicubic) and flip, a policy or colour jitter,
    then erasing of random boxes with noise.

    Raises:
        ValueError: if the policy cannot be read.
    """
    try:
        return create_transform(
            image_size,
            is_training=True,
            scale=tuple(crop_scale),
            hflip=flip_probability,
            auto_augment=auto_augment,
            color_jitter=color_jitter or None,
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"auto_augment {auto_augment!r} is no policy: try rand-m9-mstd0.5-inc1.") from error


class Batches:
    """
    Makes batches of items. While training, the targets of one-label problems may be mixed and smoothed into
    probabilities (B, classes), whose rows add up to one; the mixing depends on the items' seeds alone.

    Args:
        num_classes: of the model.
        mixup, cutmix: alphas, 0 for none; as timm's `Mixup` in batch mode.
        probability: share of the batches that are mixed.
        switch_probability: share of the mixed batches that are cut rather than blended.
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, None, probability, switch_probability, "batch", True, label_smoothing, num_classes
            )

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Raises ValueError for an odd number of items that shall be mixed: they are mixed in pairs."""
        batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
        if "labels" not in items[0]:
            return batch
        labels = torch.stack([item["labels"] for item in items])
        if "seed" in items[0]:
            if self.mix is not None:
                if len(items) % 2:
                    raise ValueError(
                        f"mixup and cutmix mix pictures in pairs, got a batch of {len(items)}: make it even."
                    )
                with seeded(seed_of(*(item["seed"] for item in items))):
                    batch["pixel_values"], labels = self.mix(batch["pixel_values"], labels)
            elif self.label_smoothing:
                one_hot = torch.nn.functional.one_hot(labels, self.num_classes)
                labels = one_hot * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return batch | {"labels": labels}
