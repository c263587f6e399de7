# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Labels of datasets as training targets: single-label, multi-label, regression."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import ClassLabel, Dataset, LargeList, List, Value

from ..configuration_hivit import MAX_LABELS
from .datasets import check_column


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_FLAG = "label_column_name"
_SHOWN = 5  # items of a long list in messages


@dataclass(frozen=True)
class LabelEncoding:
    """
    How the labels of a dataset are encoded as targets.

    Args:
        problem_type: as in the configuration of the model.
        columns: of the labels: one, or one per class or number.
        names: of the classes or numbers, in the order of the model's outputs.
    """

    problem_type: str
    columns: tuple[str, ...]
    names: tuple[str, ...]

    def targets(self, dataset: Dataset, split: str) -> torch.Tensor:
        """
        The targets of all rows: class numbers (rows,), or zeros and ones or numbers (rows, outputs).

        Raises:
            ValueError: if a column is missing, or rows have no label or an unknown one.
        """
        for column in self.columns:
            check_column(dataset, column, split, _FLAG)
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
                raise ValueError(f"Row {row} of {split} has no list of labels; an empty list is an image without any.")
            if len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"Row {row} of {split} names a label twice, {_some(numbers)}: a list holds each label of an image "
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
                f"{len(self.names) - 1}: correct the labels, or give a name for each with --class_names."
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
) -> LabelEncoding:
    """
    The columns of a dataset's labels, and the names of the classes or numbers.

    One label per image is a column of class labels, names or numbers. Several are a column of lists of them, or
    one column of zeros and ones for each. Regression takes one or several columns of numbers, or one of lists.

    Args:
        dataset: the training split.
        problem_type: as in the configuration of the model.
        columns: the columns, if they cannot be told.
        names: of the classes, where labels are bare numbers.
        split: its name, for messages.

    Raises:
        ValueError: if there is no such column, or it does not hold labels of this problem type.
    """
    columns = tuple(columns) or (_guess_column(dataset, problem_type, split),)
    for column in columns:
        check_column(dataset, column, split, _FLAG)
    if len(columns) > 1:
        return LabelEncoding(problem_type, columns, _as_many(names, columns))
    column, feature = columns[0], dataset.features[columns[0]]
    is_list = isinstance(feature, (List, LargeList))
    if problem_type == MULTI and not is_list:
        raise ValueError(
            f"Several labels per image are a column of lists, or several columns; {column!r} of {split} holds one."
        )
    if problem_type == SINGLE and is_list:
        raise ValueError(f"{column!r} of {split} holds lists: give --problem_type multi_label_classification.")
    item = feature.feature if is_list else feature
    if not isinstance(item, (ClassLabel, Value)):
        raise ValueError(
            f"{column!r} of {split} holds {type(item).__name__} values, no labels: choose another column with "
            f"--{_FLAG}."
        )
    if problem_type == REGRESSION:
        if not isinstance(item, Value) or item.dtype == "string":
            raise ValueError(f"Regression needs numbers, but {column!r} of {split} holds {item}.")
        if not is_list:
            return LabelEncoding(problem_type, columns, _as_many(names, columns))
        width = next((len(row) for row in dataset[column] if row is not None), 0)
        return LabelEncoding(problem_type, columns, _as_many(names, tuple(f"{column}_{i}" for i in range(width))))
    return LabelEncoding(problem_type, columns, _class_names(dataset, column, item, is_list, names))


def _as_many(names: Sequence[str], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names that were given, or those of the columns."""
    if names and len(names) != len(columns):
        raise ValueError(
            f"--class_names needs {len(columns)} names, one for each of {_some(columns)}, got {_some(names)}."
        )
    return tuple(names or columns)


def _class_names(dataset: Dataset, column: str, item, is_list: bool, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(item, ClassLabel):
        if names and list(names) != item.names:
            raise ValueError(f"{column!r} has names of its own ({_some(item.names)}): leave out --class_names.")
        return tuple(item.names)
    if names:
        return tuple(names)
    values = {value for row in dataset[column] for value in ((row or []) if is_list else [row])} - {None, -1}
    if not values:
        raise ValueError(f"No row has a label in {column!r}: choose another column with --label_column_name.")
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"Labels must be names or whole numbers, but {column!r} holds {item}: try regression.")
    if max(values) >= MAX_LABELS:
        raise ValueError(
            f"{column!r} has the label {max(values)}, but class numbers run from 0 to {MAX_LABELS - 1} at most: number "
            "the classes from 0 on, or make the labels names."
        )
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
        "--label_column_name."
    )


def check_same_labels(train: Dataset, evaluation: Dataset, labels: LabelEncoding, targets: Sequence[torch.Tensor]):
    """
    ValueError if the splits, whose targets are given, do not have the same labels: other class names, or classes
    without training images. The encoding is that of `train`.
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
            f"The splits have different lists of labels: {_some(lists[0])} for training, {_some(lists[1])} for "
            "evaluation. Give both the same, in the same order."
        )
    if labels.problem_type == SINGLE:
        never = sorted(set(targets[1].unique().tolist()) - set(targets[0].unique().tolist()))
        if never:
            raise ValueError(
                f"The evaluation images have labels that no training image has: "
                f"{_some([labels.names[number] for number in never])}. Correct the splits."
            )


def _some(names: Sequence | None) -> str:
    if names is None:
        return "bare values"
    shown = ", ".join(map(str, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "none"
