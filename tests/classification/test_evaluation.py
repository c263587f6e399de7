"""Evaluation of classifiers: metrics, labels matched by name, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, Value
from PIL import Image as PILImage
from sklearn.metrics import top_k_accuracy_score

import evaluate_classification
import finetune_classification
from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.classification.evaluation import evaluate_images, load_for_evaluation, targets_for
from hivit_hf.classification.metrics import calibration
from hivit_hf.data.datasets import ImageDataset
from hivit_hf.data.transforms import EvaluationTransform
from hivit_hf.image_processing import evaluation_processor
from support.digit_folders import SMALL, evaluate_with_script, save_random_encoder
from support.refusals import refusal


def test_metrics_of_an_evaluation(classifiers, data, tmp_path, capsys):
    results = evaluate_with_script(
        classifiers[:1], data, tmp_path, "--max_eval_samples", "60", "--per_device_eval_batch_size", "16"
    )
    model, processor = load_for_evaluation(classifiers[0])
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(60))
    inputs = processor([image.convert("RGB") for image in images["image"]], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(dim=1).numpy()
    labels = np.array(images["label"])
    assert results["images"] == 60
    assert results["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean())
    assert results["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert results["samples_per_second"] > 0
    assert np.sum(results["confusion_matrix"]) == 60
    assert np.trace(results["confusion_matrix"]) == pytest.approx(60 * results["accuracy"])
    assert results["expected_calibration_error"] == pytest.approx(
        calibration(probabilities, labels)["expected_calibration_error"], abs=1e-4
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion_matrix.png", "calibration.png"}
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_are_read_as_in_training(num_channels, tmp_path):
    """Gray ones of 16 bits, which PIL's conversion clips, and networks of one channel."""
    levels, paths = np.random.default_rng(0).integers(0, 65536, (6, 16, 16)).astype(np.uint16), []
    for number, image in enumerate(levels):
        paths.append(str(tmp_path / f"{number}.png"))
        PILImage.fromarray(image // (number + 1)).save(paths[-1])
    images = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    torch.manual_seed(0)
    config = HiViTConfig(**SMALL, image_size=16, num_channels=num_channels, num_labels=4, initializer_range=0.5)
    model = HiViTForImageClassification(config).eval()
    processor = evaluation_processor(16, [0.5] * num_channels, [0.25] * num_channels)
    read = ImageDataset(images, "image", EvaluationTransform(processor), None, num_channels)
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in read])).logits
    metrics, probabilities = evaluate_images(model, processor, images, "image", logits.argmax(dim=1), batch_size=6)
    assert metrics["accuracy"] == metrics["top5_accuracy"] == 1.0
    torch.testing.assert_close(torch.from_numpy(probabilities), logits.softmax(dim=1))


def test_labels_are_matched_by_name(classifiers, data):
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(20))
    model, _ = load_for_evaluation(classifiers[0])
    model.config.id2label, model.config.label2id = {9 - i: str(i) for i in range(10)}, None  # which may be missing
    assert targets_for(model, images, "test").tolist() == [9 - label for label in images["label"]]


def test_bare_numbers_are_named_as_in_finetuning(data, tmp_path, capsys):
    """In reverse, so that a name in the wrong place would show."""
    names = [f"digit {number}" for number in range(9, -1, -1)]
    splits = DatasetDict.load_from_disk(data / "few").cast_column("label", Value("int64"))
    splits.save_to_disk(tmp_path / "few")
    recipe = {"from_scratch": True, "architecture": "tiny", "config_overrides": json.dumps(SMALL), "image_size": 16}
    recipe |= {"num_train_epochs": 1, "warmup_epochs": 0, "dataloader_num_workers": 0, "class_names": names}
    recipe |= {"per_device_train_batch_size": 50, "effective_batch_size": 50}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    arguments = ["--config", str(tmp_path / "recipe.json"), "--dataset_name", str(tmp_path / "few")]
    assert finetune_classification.main([*arguments, "--output_dir", str(tmp_path / "model")]) == 0
    trained = json.loads((tmp_path / "model" / "eval_results.json").read_text())["eval_accuracy"]
    evaluated = evaluate_with_script([str(tmp_path / "model")], tmp_path, tmp_path / "out", "--class_names", *names)
    assert evaluated["accuracy"] == pytest.approx(trained)
    both = [str(tmp_path / "model")] * 2
    greedy = ("--soup", "greedy", "--soup_split_name", "test", "--class_names", *names)
    accuracy = evaluate_with_script(both, tmp_path, tmp_path / "soup", *greedy)["soup"]["accuracy"]
    assert accuracy[both[0]] == pytest.approx(trained)
    model, _ = load_for_evaluation(both[0])
    assert targets_for(model, splits["test"], "test", None, names).tolist() == list(splits["test"]["label"])
    assert targets_for(model, splits["test"], "test", None, names[::-1]).tolist() == [
        9 - label for label in splits["test"]["label"]
    ]
    arguments = ("--model_name_or_path", both[0], "--dataset_name", tmp_path / "few")
    arguments += ("--output_dir", tmp_path / "other")
    said = refusal(evaluate_classification.main, capsys, *arguments)
    assert "the label '0', which the model does not know; its labels are digit 9, digit 8, digit 7, digit 6" in said
    assert "name them with --class_names" in said
    assert "there are 2 classes, 0 to 1" in refusal(
        evaluate_classification.main, capsys, *arguments, "--class_names", *names[:2]
    )


def test_results_of_two_evaluations_do_not_mix(classifiers, data, tmp_path, capsys):
    evaluate_with_script(classifiers[:1], data, tmp_path, "--max_eval_samples", "10")
    before = (tmp_path / "results.json").read_bytes()
    arguments = ("--model_name_or_path", classifiers[1], "--dataset_name", data / "digits", "--output_dir", tmp_path)
    said = refusal(evaluate_classification.main, capsys, *arguments)
    assert "holds results.json of a model or another run, which is not overwritten" in said
    assert (tmp_path / "results.json").read_bytes() == before
    for name in ("calibration.png", "soup/config.json"):
        folder = tmp_path / f"other-{Path(name).stem}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        said = refusal(evaluate_classification.main, capsys, *arguments[:-1], folder)
        assert f"holds {name} of a model or another run" in said and (folder / name).read_text() == "mine"


def test_bad_input(classifiers, data, tmp_path, capsys):
    digits, output = data / "digits", ("--output_dir", tmp_path / "out")
    encoder = save_random_encoder(tmp_path / "encoder")
    for arguments, message in [
        ((*classifiers, "--dataset_name", digits, *output), "make a soup: add --soup uniform"),
        ((classifiers[0], "--soup", "uniform", "--dataset_name", digits, *output), "needs two folders or more, got 1"),
        ((*classifiers, "--soup", "greedy", "--dataset_name", digits, *output), "There is no split 'validation'"),
        ((classifiers[0], encoder, "--soup", "uniform", "--dataset_name", digits, *output), "is no classifier"),
        ((encoder, "--dataset_name", digits, *output), "is no classifier: fine-tune it first"),
        ((classifiers[0], "--dataset_name", data / "several", *output), "holds lists: give --problem_type"),
        ((classifiers[0], "--dataset_name", digits, "--eval_split_name", "val", *output), "There is no split 'val'"),
        (
            (classifiers[0], "--dataset_name", digits, "--per_device_eval_batch_size", "0", *output),
            "per_device_eval_batch_size must be a positive number, got 0",
        ),
        ((tmp_path / "none", "--dataset_name", digits, *output), "There is no folder"),
    ]:
        said = refusal(evaluate_classification.main, capsys, "--model_name_or_path", *arguments)
        assert message in said
