"""Labeled datasets of every kind, and what is refused in one sentence, before training where it can be."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage

import finetune_classification
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.data import datasets as labeled
from hivit_hf.data.datasets import ImageDataset, image_column, open_splits, opening, train_and_eval
from hivit_hf.data.decoding import UnreadableImageError
from hivit_hf.data.labels import find_labels
from hivit_hf.data.seeding import seeded
from hivit_hf.data.transforms import ClassificationCollator, training_transform
from support.refusals import refusal


BATCH = "per_device_train_batch_size"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SMOKE = Path(__file__).parents[2] / "examples" / "recipes" / "finetune_smoke_cpu.yaml"
CLASSES = ClassLabel(names=["cat", "dog"])


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 20, 24, 3), dtype=np.uint8))


def table(labels: list, feature=CLASSES, **columns) -> Dataset:
    features = Features({"image": Image(), "label": feature, **{name: Value("int64") for name in columns}})
    return Dataset.from_dict({"image": images(len(labels)), "label": labels, **columns}, features=features)


def saved(folder: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def finetune(capsys, tmp_path, data: str, *flags) -> str:
    """What the script says when it refuses. It must be one sentence, with code 2, and nothing trained."""
    arguments = ["--config", SMOKE, "--dataset_name", data, "--output_dir", tmp_path / "run"]
    said = refusal(finetune_classification.main, capsys, *arguments, *flags)
    assert not list(tmp_path.glob("run/checkpoint-*"))
    return said


@pytest.fixture
def good(tmp_path) -> str:
    return saved(tmp_path / "good", train=table([0, 1] * 20), test=table([0, 1] * 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_column_name", "kind"], "train has no column 'kind'; its columns are image, label"),
        (["--image_column_name", "photo"], "train has no column 'photo'; its columns are image, label"),
        (["--image_column_name", "label"], "'label' holds ClassLabel(names=['cat', 'dog']), not images. Name another"),
        (["--train_split_name", "training"], "There is no split 'training': the dataset has train, test"),
        (["--eval_split_name", "val"], "There is no split 'val'"),
        (["--train_val_split", "0.01"], "train_val_split 0.01 of 40 images leaves one side empty"),
        (["--train_val_split", "1.5"], "train_val_split must be in (0, 1), got 1.5"),
        (["--train_val_split", "0.5", "--eval_split_name", "test"], "not both"),
        (["--mixup", "0.8", f"--{BATCH}", "1"], f"images in pairs, so {BATCH} must be even, got 1: use 2"),
        (["--cutmix", "1", f"--{BATCH}", "7", "--effective_batch_size", "7"], f"{BATCH} must be even, got 7: use 8"),
        (["--problem_type", MULTI], "Several labels per image are a column of lists, or several columns; 'label'"),
        (["--problem_type", REGRESSION], "Regression needs numbers, but 'label' of train holds ClassLabel"),
        (["--problem_type", MULTI, "--mixup", "1"], "mixup is for one label per image: leave it out"),
        (["--problem_type", REGRESSION, "--label_smoothing_factor", "0.1"], "label_smoothing_factor is for one label"),
        (["--problem_type", "several"], "problem_type must be one of single_label_classification"),
        (["--label_column_name", "a", "b"], "One label per image is one column, got a, b"),
        (["--class_names", "a", "b"], "'label' has names of its own (cat, dog): leave out --class_names"),
        (["--auto_augment", "rnd-m9"], "auto_augment 'rnd-m9' is no policy: try rand-m9-mstd0.5-inc1"),
        (
            ["--per_device_train_batch_size", "64", "--effective_batch_size", "64"],
            "40 training images are fewer than effective_batch_size 64: lower it",
        ),
        (["--per_device_train_batch_size", "12"], "effective_batch_size 32 is no multiple of 12 images on 1 processes"),
        (["--image_size", "30"], "image_size must be a positive multiple of patch_size 8"),
        (["--image_mean", "0.5"], "image_mean and image_std need 3 numbers"),
        (["--lora_r", "100"], "lora_r 100 is more than the 64 channels: try 8 or 16"),
        (["--lora_r", "4", "--ema_decay", "0.9"], "--lora_r keeps the weights as they are"),
        (["--layer_decay", "1.5"], "layer_decay must be in (0, 1], got 1.5"),
        (["--crop_pct", "2"], "crop_pct must be in (0, 1], got 2.0"),
        (["--num_train_epochs", "0"], "epochs must be a positive number, got 0.0"),
        (["--warmup_epochs", "2"], "warmup_epochs must be less than num_train_epochs 2.0"),
        (["--min_learning_rate", "1"], "min_learning_rate must not exceed the peak learning rate"),
        (["--warmup_learning_rate", "1"], "warmup_learning_rate must not exceed the peak learning rate"),
        (["--weight_decay", "-1"], "weight_decay must not be negative"),
        (["--bf16", "bf61"], "argument --bf16: Truthy value expected: got bf61"),
        (["--report_to", "wandbb"], "wandbb is not supported, only"),
        (["--config_overrides", "{"], "config_overrides must be a JSON object"),
        (["--config_overrides", '{"drop_path_rate": 0.1}'], "--config_overrides sets drop_path_rate, which have flags"),
        (["--config_overrides", '{"hiden_size": 64}'], "no keyword 'hiden_size'"),
        (["--architecture", "huge"], "architecture must be one of tiny, small, base, large, base-mae, got 'huge'"),
        (["--hub_model_id", "me/mine"], "are for --push_to_hub: give it too"),
        (["--model_name_or_path", "somewhere"], "Give either --model_name_or_path, or --from_scratch"),
        (["--flip_probability", "2"], "flip_probability must be in [0, 1]"),
        (["--mixup_prob", "2"], "mixup_prob must be in [0, 1]"),
        (["--mixup_switch_prob", "-1"], "mixup_switch_prob must be in [0, 1]"),
        (["--adam_beta1", "1.5"], "adam_beta1 must be in [0, 1), got 1.5"),
        (["--crop_scale", "0.5"], "crop_scale must be two numbers"),
        (["--image_std", "0", "1", "1"], "image_std must be positive"),
        (["--early_stopping_patience", "0"], "early_stopping_patience must be a positive number"),
        (["--resume_from_checkpoint", "latest"], "There is no checkpoint to resume"),
        (["--config", "none.yaml"], "The recipe none.yaml cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be(flags, message, good, tmp_path, capsys):
    assert message in finetune(capsys, tmp_path, good, *flags)


def test_initializations_that_cannot_be(good, tmp_path, capsys):
    numbers = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "depths": [1, 1, 1], "num_attention_heads": 2}
    HiViTForMaskedImageModeling(
        HiViTConfig(**numbers, decoder_hidden_size=16, decoder_num_attention_heads=2)
    ).save_pretrained(tmp_path / "small")
    base = SMOKE.parent / "finetune_base_100ep.yaml"
    (tmp_path / "empty").mkdir()
    for weights, message in [
        (tmp_path / "small", "The recipe is for base, whose hidden_size is 512, but that of"),
        (tmp_path / "empty", "There is no model at"),
        (tmp_path / "none", "There is no folder"),
    ]:
        arguments = ("--config", base, "--model_name_or_path", weights, "--dataloader_num_workers", "0")
        assert message in finetune(capsys, tmp_path, good, *arguments)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (lambda: table([0, None] * 10), lambda: table([0, 1]), "10 of 20 rows of train have no label in 'label'"),
        (lambda: table([0, 1] * 10), lambda: table([-1, -1]), "2 of 2 rows of eval have no label in 'label'"),
        (
            lambda: table([0, 1] * 10),
            lambda: table([0, 1], ClassLabel(names=["dog", "cat"])),
            "The splits have different lists of labels: cat, dog for training, dog, cat for evaluation",
        ),
        (
            lambda: table(["cat", "dog"] * 10, Value("string")),
            lambda: table(["bird", "dog"], Value("string")),
            "eval has labels that are not among the 2 classes: bird",
        ),
        (lambda: table([0, 0] * 10), lambda: table([0, 1]), "labels that no training image has: dog"),
        (
            lambda: table([0, 1] * 10, Value("int64")),
            lambda: table([0, 7], Value("int64")),
            "eval has the label 7, but there are 2 classes, 0 to 1",
        ),
        (lambda: table([[0], [1]] * 10, List(CLASSES)), lambda: table([[0]], List(CLASSES)), "holds lists: give --pro"),
        (lambda: table([0, 1] * 10).remove_columns("label"), lambda: table([0]), "no column that is surely the label"),
        (lambda: table([0.5, 1.0] * 10, Value("float32")), lambda: table([0]), "try regression"),
        (
            lambda: table([0, 10**15] * 10, Value("int64")),
            lambda: table([0], Value("int64")),
            "'label' has the label 1000000000000000, but class numbers run from 0 to 999999 at most",
        ),
        (
            lambda: table([{"a": 1}] * 20, {"a": Value("int64")}),
            lambda: table([{"a": 1}], {"a": Value("int64")}),
            "'label' of train holds dict values, no labels: choose another column",
        ),
    ],
    ids=range(11),
)
def test_labels_that_cannot_be(train, test, message, tmp_path, capsys):
    data = saved(tmp_path / "data", train=train(), test=test())
    assert message in finetune(capsys, tmp_path, data)


def test_more_labels_than_names(tmp_path, capsys):
    data = saved(tmp_path / "data", train=table([0, 1, 2] * 10, Value("int64")), test=table([0, 1], Value("int64")))
    said = finetune(capsys, tmp_path, data, "--class_names", "cat", "dog")
    assert "train has the label 2, but there are 2 classes, 0 to 1: correct the labels" in said


@pytest.mark.parametrize(
    ("labels", "columns", "message"),
    [
        ([[0], None], [], "Row 1 of train has no list of labels; an empty list is an image without any"),
        ([[0], [5]], [], "train has the label 5, but there are 2 classes"),
        ([[0, 1], [1, 1]], [], "Row 1 of train names a label twice, 1, 1: a list holds each label of an image once"),
        ([[0], [1]], ["a", "b"], "Row 1 of train must have a 0 or 1 for each class, got [0, 3]"),
    ],
)
def test_several_labels_that_cannot_be(labels, columns, message, tmp_path, capsys):
    split = table(labels, List(Value("int64")), a=[0, 0], b=[1, 3])
    flags = ["--label_column_name", *columns] if columns else ["--class_names", "x", "y"]
    data = saved(tmp_path / "data", train=split, test=split)
    assert message in finetune(capsys, tmp_path, data, "--problem_type", MULTI, *flags)


def broken_folder(folder: Path, count: int = 12) -> Path:
    """A folder of images, cats and dogs; the tenth dog is damaged, the eleventh empty."""
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for index, pixels in enumerate(images(count)):
            PILImage.fromarray(pixels).save(folder / "train" / name / f"{index:02}.png")
    damaged = folder / "train" / "dog" / "10.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (folder / "train" / "dog" / "11.png").write_bytes(b"")
    return folder


def test_images_that_do_not_decode(tmp_path, capsys):
    folder = broken_folder(tmp_path / "data")
    flags = ["--train_val_split", "0.2", "--per_device_train_batch_size", "2", "--effective_batch_size", "2"]
    said = finetune(capsys, tmp_path, str(folder), *flags)
    assert "of train" in said or "of eval" in said
    assert "10.png) cannot be read, damaged" in said or "11.png) cannot be read, no bytes" in said
    for workers in (0, 2):  # found while training
        late = finetune(
            capsys, tmp_path, str(folder), *flags, "--check_images", "0", "--dataloader_num_workers", workers
        )
        assert "cannot be read" in late and late.startswith("error: Image")


def test_folders_parquet_and_saved_datasets_are_read_alike(tmp_path):
    folder = tmp_path / "folder"
    rows = table([0, 1] * 6)
    for name in ("train", "test"):
        for index, row in enumerate(rows):
            path = folder / name / CLASSES.names[row["label"]] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for name in ("train", "test"):
        rows.to_parquet(tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet")
    saved(tmp_path / "saved", train=rows, test=rows)
    for kind in ("folder", "parquet", "saved"):
        splits = open_splits(str(tmp_path / kind))
        train, evaluation = train_and_eval(splits, "train", None, None, 0)
        labels = find_labels(train, SINGLE)
        assert labels.names == ("cat", "dog") and image_column(train) == "image"
        assert sorted(labels.targets(train, "train").tolist()) == [0] * 6 + [1] * 6
        assert len(evaluation) == 12
        data = ImageDataset(train, "image", np.asarray)
        shapes = {data[i]["pixel_values"].shape for i in range(12)}
        assert shapes == {(20, 24, 3)}
    for name, message in [
        (str(tmp_path / "none"), "There is no folder"),
        (str(SMOKE), "is a file: give the folder"),
        ("nobody/nothing", "cannot be read|There is no dataset"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_splits(name)
    rows.select([]).to_parquet(tmp_path / "empty" / "test.parquet")
    rows.select([]).save_to_disk(tmp_path / "empty_saved")
    for name in ("empty", "empty_saved"):
        with pytest.raises(ValueError, match=rf"{name} has a split without samples: choose another|'train' is empty"):
            train_and_eval(open_splits(str(tmp_path / name)), "train", "train", None, 0)
    with pytest.raises(ValueError, match="nothing to evaluate with: the dataset has train"):
        train_and_eval(DatasetDict(train=rows), "train", None, None, 0)
    with pytest.raises(ValueError, match="The split 'test' is empty"):
        train_and_eval(DatasetDict(train=rows, test=table([])), "train", None, None, 0)


def test_folders_of_training_and_validation_images(tmp_path):
    for number, (folder, name) in enumerate([("train", "cat"), ("train", "dog"), ("mine", "dog")]):
        (tmp_path / folder / name).mkdir(parents=True)
        PILImage.fromarray(images(3)[number]).save(tmp_path / folder / name / f"{number}.png")
    folders = {"train_dir": str(tmp_path / "train"), "validation_dir": str(tmp_path / "mine")}
    splits = open_splits(**folders)
    assert splits["train"]["label"][:] == [0, 1] and splits["validation"]["label"][:] == [1]
    assert splits["validation"].features["label"].names == ["cat", "dog"]
    assert set(open_splits(train_dir=folders["train_dir"])) == {"train"}
    for wrong in ({}, {"dataset_name": "x", **folders}):
        with pytest.raises(ValueError, match="by --dataset_name, or by --train_dir and --validation_dir"):
            open_splits(**wrong)
    with pytest.raises(ValueError, match=r"There is no folder .*none"):
        open_splits(train_dir=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no folder of images: give other datasets by --dataset_name"):
        open_splits(train_dir=folders["train_dir"], validation_dir=str(tmp_path / "empty"))


def test_a_dataset_of_the_hub_is_asked_for_by_configuration_and_revision(tmp_path, monkeypatch, capsys):
    asked = []

    def load(name, config, revision):
        asked.append((name, config, revision))
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(labeled, "load_dataset", load)
    said = finetune(capsys, tmp_path, "some/data", "--dataset_config_name", "small", "--dataset_revision", "abc")
    assert asked == [("some/data", "small", "abc")]
    assert said == "error: The dataset some/data cannot be read: no network"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "cannot be prepared, as the disk of .* is full: free space there"),
        (
            pickle.UnpicklingError("Weights only load failed. Re-run with `weights_only` False"),
            "damaged, or holds p",
        ),
        (tarfile.ReadError("bad checksum"), "cannot be read: bad checksum"),
        (ValueError("Must pass at least one table"), "has a split without samples"),
    ],
)
def test_what_readers_of_datasets_raise_is_a_sentence(error, message):
    with pytest.raises(ValueError, match=f"The dataset x .*{message}") as refusal, opening("x"):
        raise DatasetGenerationError("An error occurred while generating the dataset") from error
    assert "weights_only" not in str(refusal.value) and "generating" not in str(refusal.value)


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ValueError, match="cannot be searched for images: File name too long") as refusal:
        open_splits(name)
    assert len(str(refusal.value)) < 300


def test_labels_become_targets():
    names = table(["b", "a", "b"], Value("string"))
    assert find_labels(names, SINGLE).targets(names, "train").tolist() == [1, 0, 1]
    lists = table([["b", "a"], [], ["b"]], List(Value("string")))
    labels = find_labels(lists, MULTI)
    assert labels.names == ("a", "b") and labels.targets(lists, "train").tolist() == [[1, 1], [0, 0], [0, 1]]
    numbers = table([[0.5, 1.5], [2.0, -1.0]], List(Value("float32")))
    labels = find_labels(numbers, REGRESSION)
    assert labels.names == ("label_0", "label_1")
    assert labels.targets(numbers, "train").tolist() == [[0.5, 1.5], [2.0, -1.0]]
    bare = table([1, 0, 2], Value("int64"))
    assert find_labels(bare, SINGLE).names == ("0", "1", "2")
    assert find_labels(bare, SINGLE, (), ["x", "y", "z"]).names == ("x", "y", "z")
    incomplete = table([0.5, None], Value("float32"))
    with pytest.raises(ValueError, match=r"Row 1 of train must have 1 numbers in label, got \[None\]"):
        find_labels(incomplete, REGRESSION).targets(incomplete, "train")


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    transform = training_transform(16, [0.5] * 3, [0.5] * 3, [0.2, 1], 0.5, "rand-m9-mstd0.5-inc1", 0.0, 0.5)
    data = ImageDataset(table([0, 1]), "image", transform, torch.tensor([0, 1]), seed=1)
    first = data[0]["pixel_values"]
    torch.rand(3), np.random.rand(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(data[0]["pixel_values"], first)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert not torch.equal(data[1]["pixel_values"], first)
    data.epoch = 1
    assert not torch.equal(data[0]["pixel_values"], first)
    with seeded(5):
        one = torch.rand(2), np.random.rand()
    with seeded(5):
        assert torch.equal(torch.rand(2), one[0]) and np.random.rand() == one[1]


def test_crops_are_rotated_up_to_an_angle():
    image = PILImage.fromarray(np.full((16, 16, 3), 255, np.uint8))

    def corners(degrees: float) -> list[float]:
        transform = training_transform(16, [0.0] * 3, [1.0] * 3, [1, 1], 0.0, None, 0.0, 0.0, degrees)
        return [float(transform(image)[0, 0, 0]) for _ in range(20)]

    assert corners(0) == [1.0] * 20
    assert corners(2).count(1.0) > 10 > corners(180).count(1.0)


def test_gray_palette_and_turned_images(tmp_path):
    image = PILImage.fromarray(images(1)[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("L").save(tmp_path / "gray.png")
    files = sorted(str(path) for path in tmp_path.iterdir())
    data = ImageDataset(Dataset.from_dict({"image": files}).cast_column("image", Image()), "image", np.asarray)
    shapes = {os.path.basename(f): data[i]["pixel_values"].shape for i, f in enumerate(files)}
    assert shapes == {"gray.png": (20, 24, 3), "palette.png": (20, 24, 3), "turned.jpg": (24, 20, 3)}
    os.remove(files[0])
    with pytest.raises(UnreadableImageError, match="Image 0 of train"):
        data[0]


def test_an_odd_batch_cannot_be_mixed():
    items = [{"pixel_values": torch.zeros(1, 2, 2), "labels": torch.tensor(0), "seed": i} for i in range(3)]
    with pytest.raises(ValueError, match="mix images in pairs, got a batch of 3: make it even"):
        ClassificationCollator(2, mixup=0.8)(items)


def test_a_head_for_a_classifier_of_other_labels_is_announced(tmp_path, capsys):
    numbers = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "depths": [1, 1, 1], "num_attention_heads": 2}
    HiViTForImageClassification(HiViTConfig(**numbers, num_labels=7)).save_pretrained(tmp_path / "seven")
    data = saved(tmp_path / "good", train=table([0, 1] * 20), test=table([0, 1] * 4))
    arguments = ["--model_name_or_path", str(tmp_path / "seven"), "--dataset_name", data, f"--{BATCH}", "8"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--stop_after_steps", "1", "--dataloader_num_workers", "0"]
    assert finetune_classification.main(arguments) == 0
    assert "has 7 labels that are not the 2 of this dataset: its head is re-initialized" in capsys.readouterr().out


def test_a_missing_image_is_named(tmp_path, capsys):
    split = Dataset.from_dict(
        {"image": [*images(39), None], "label": [0, 1] * 20}, features=Features({"image": Image(), "label": CLASSES})
    )
    said = finetune(capsys, tmp_path, saved(tmp_path / "data", train=split, test=table([0, 1])))
    assert "Image 39 of train cannot be read" in said


def test_names_for_columns():
    dataset = table([0, 1], a=[0, 1], b=[1, 0])
    assert find_labels(dataset, MULTI, ["a", "b"], ["Fine", "Bad"]).names == ("Fine", "Bad")
    assert find_labels(dataset, REGRESSION, ["a"], ["Age"]).names == ("Age",)
    with pytest.raises(ValueError, match=r"--class_names needs 2 names, one for each of a, b, got Fine"):
        find_labels(dataset, MULTI, ["a", "b"], ["Fine"])
