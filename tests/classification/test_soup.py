"""Model soups: uniform and greedy averages, and classifiers that cannot be averaged."""

import shutil
from pathlib import Path

import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import BitImageProcessor

import evaluate_classification
from digits.data import digits_processor
from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.classification.evaluation import evaluate_images, load_for_evaluation, targets_for
from hivit_hf.classification.soup import soup
from support.digit_folders import evaluate_with_script
from support.refusals import refusal


def test_uniform_soup_is_the_mean(classifiers, data, tmp_path):
    results = evaluate_with_script(classifiers, data, tmp_path, "--soup", "uniform", "--max_eval_samples", "10")
    assert results["soup"]["ingredients"] == classifiers
    states = [load_file(Path(folder) / "model.safetensors") for folder in classifiers]
    stirred = load_file(tmp_path / "soup" / "model.safetensors")
    for name, tensor in stirred.items():
        assert_close(tensor, torch.stack([state[name] for state in states]).mean(dim=0))
    assert load_for_evaluation(str(tmp_path / "soup"))[1].size == digits_processor().size


def test_greedy_soup_takes_what_does_no_harm(classifiers, data, tmp_path):
    results = evaluate_with_script(
        classifiers, data, tmp_path, "--soup", "greedy", "--soup_split_name", "train", "--max_eval_samples", "10"
    )
    scores, taken = results["soup"]["accuracy"], results["soup"]["ingredients"]
    assert scores[taken[0]] == max(scores.values())
    held_out = DatasetDict.load_from_disk(data / "few")["train"]
    model, processor = load_for_evaluation(str(tmp_path / "soup"))
    metrics, _ = evaluate_images(model, processor, held_out, "image", targets_for(model, held_out, "train"))
    assert metrics["accuracy"] >= max(scores.values())
    states = [load_file(Path(folder) / "model.safetensors") for folder in taken]
    assert_close(model.classifier.weight.data, torch.stack([s["classifier.weight"] for s in states]).mean(dim=0))


def test_greedy_soup_leaves_out_what_harms(classifiers):
    weights = [load_file(Path(folder) / "model.safetensors")["classifier.weight"] for folder in classifiers]
    best = (weights[0] + weights[1]) / 2
    tried = []

    def closeness(model, processor) -> float:
        assert processor.size == digits_processor().size
        tried.append(-(model.classifier.weight - best).abs().sum().item())
        return tried[-1]

    model, _, made = soup([classifiers[i] for i in (2, 0, 1)], "greedy", closeness)
    assert set(made["ingredients"]) == set(classifiers[:2])
    assert_close(model.classifier.weight.data, best)
    assert len(tried) == 5


def test_soups_of_other_networks(classifiers, data, tmp_path, capsys):
    other = HiViTForImageClassification(
        HiViTConfig(image_size=32, patch_size=8, hidden_size=32, depths=[1, 1, 2], num_attention_heads=2)
    )
    other.save_pretrained(tmp_path / "other")
    arguments = ("--model_name_or_path", classifiers[0], tmp_path / "other", "--soup", "uniform")
    arguments += ("--dataset_name", data / "digits", "--output_dir", tmp_path / "out")
    assert "have other networks or labels" in refusal(evaluate_classification.main, capsys, *arguments)


def test_soups_of_classifiers_with_other_transforms(classifiers, data, tmp_path, capsys):
    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    usual |= {"size": {"height": 32, "width": 32}}
    for field, changes in (
        ("image_mean", {"image_mean": [0.4, 0.5, 0.5]}),
        ("image_std", {"image_std": [0.5, 0.5, 0.4]}),
        ("size", {"size": {"height": 36, "width": 36}}),
        ("crop_size", {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}),
    ):
        other = tmp_path / field
        shutil.copytree(classifiers[0], other)
        BitImageProcessor(**usual | changes).save_pretrained(other)
        arguments = ("--model_name_or_path", classifiers[0], other, "--soup", "uniform")
        arguments += ("--dataset_name", data / "digits", "--output_dir", tmp_path / "out")
        said = refusal(evaluate_classification.main, capsys, *arguments)
        assert f"{classifiers[0]} and {other} have image processors of another {field}, " in said
    same = BitImageProcessor(**usual, crop_size={"height": 7, "width": 7})  # which it leaves out
    same.save_pretrained(other)
    assert soup([classifiers[0], str(other)], "uniform", None)[2]["ingredients"] == [classifiers[0], str(other)]
