"""The digits with several labels each, made from what they are."""

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List


PROPERTIES = {
    "even": {0, 2, 4, 6, 8},
    "above_four": {5, 6, 7, 8, 9},
    "hole": {0, 6, 8, 9},
    "prime": {2, 3, 5, 7},
}


def several_labels(splits: DatasetDict) -> DatasetDict:
    """The same images with the list of `PROPERTIES` that each digit has, which may be empty, as `labels`."""
    features = Features({"image": Image(), "labels": List(ClassLabel(names=list(PROPERTIES)))})

    def relabeled(split: Dataset) -> Dataset:
        labels = [[i for i, digits in enumerate(PROPERTIES.values()) if digit in digits] for digit in split["label"]]
        return Dataset.from_dict({"image": list(split["image"]), "labels": labels}, features=features)

    return DatasetDict({name: relabeled(split) for name, split in splits.items()})
