"""Flags and recipes of detection: what they reach, and what is refused before anything is read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback

import finetune_detection
from hivit_hf import HiViTConfig
from hivit_hf.detection.arguments import (
    DetectionDataArguments,
    DetectionModelArguments,
    DetectionTrainingArguments,
)
from hivit_hf.detection.trainer import DetectionTrainer
from hivit_hf.training.command_line import ABOUT, parse_arguments, read_recipe
from hivit_hf.training.dense import DenseTrainingArguments
from support.detection import NETWORK, SMOKE, command, trainer_for


RECIPES = sorted(SMOKE.parent.glob("detection_*.yaml"))


def arguments_of(recipe: Path, *more: str) -> tuple:
    """The arguments of a recipe; nothing is read."""
    paths = ["--train_annotations", "a.json", "--eval_annotations", "b.json", "--output_dir", "unused"]
    start = [] if read_recipe(recipe).get("from_scratch") else ["--model_name_or_path", "anything"]
    return parse_arguments(finetune_detection.ARGUMENTS, None, ["--config", str(recipe), *paths, *start, *more])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete(path):
    assert all(read_recipe(path)[name] for name in ABOUT)
    arguments_of(path)


def test_the_published_recipe_is_the_papers():
    """Windows, drop path, one layer id before the main stage, 0.9 from layer to layer."""
    model, _, training = arguments_of(SMOKE.with_name("detection_base_coco_3x.yaml"))
    expected = {"learning_rate": 1e-4, "weight_decay": 0.05, "layer_decay": 0.9, "num_train_epochs": 36}
    expected |= {"decay_epochs": [27, 33], "effective_batch_size": 16, "count_early_layers": False, "bf16": True}
    assert {name: getattr(training, name) for name in expected} == expected and model.drop_path_rate == 0.2
    config = HiViTConfig.from_architecture("base-mae", **model.overrides())
    assert config.window_size == 14 and config.global_attention_layers == [4, 9, 14, 19]
    assert not config.use_relative_position_bias


def test_the_published_schedule_is_the_default():
    training = DetectionTrainingArguments(output_dir="unused")
    assert training.decay_epochs == [27, 33] and training.num_train_epochs == 36 and training.warmup_steps == 500
    assert training.learning_rate == 1e-4 and training.gradient_accumulation_steps == 8
    assert DetectionTrainingArguments(output_dir="unused", base_learning_rate=1e-3).learning_rate == 1e-3 / 16
    assert DetectionTrainingArguments(output_dir="unused", max_steps=100, num_train_epochs=3).decay_epochs == [27, 33]


REFUSED = {
    "tiny images": (["--jitter_scale", "0.0001", "0.001"], "leaves less than 8 px of an image"),
    "rising": (["--decay_factor", "5"], "decay_factor must be in (0, 1]"),
    "frozen drops": (["--freeze_backbone", "--drop_path_rate", "0.5"], "for a backbone that is trained: set it to 0"),
    "a thousand images": (["--num_overlays", "1000"], "num_overlays must be in [0, 60]"),
    "nothing to evaluate on": (["--eval_annotations", ""], "nothing to evaluate on: give --eval_annotations"),
    "detector": (["--detector", "yolo"], "detector must be one of mask_rcnn"),
    "bad_annotations": (["--bad_annotations", "guess"], "bad_annotations must be one of"),
    "decay_epochs": (["--decay_epochs", "9"], "decay_epochs must be ascending and within"),
    "falling decay_epochs": (["--max_steps", "50", "--decay_epochs", "2", "1"], "decay_epochs must be ascending"),
    "jitter": (["--jitter_scale", "2", "1"], "jitter_scale must be two numbers"),
    "sizes": (["--eval_min_size", "200"], "must not exceed eval_max_size"),
    "detector_overrides": (["--detector_overrides", "[]"], "detector_overrides must be a JSON object"),
    "a size twice": (["--detector_overrides", '{"min_size": 3}'], "sets min_size, which has a flag of its own"),
    "drop path twice": (["--config_overrides", '{"drop_path_rate": 0.1}'], "--config_overrides sets drop_path_rate"),
    "two starts": (["--model_name_or_path", "x"], "Give either --model_name_or_path, or --from_scratch"),
    "threshold": (["--overlay_threshold", "1.5"], "overlay_threshold must be in"),
    "crop": (["--crop_size", "0"], "crop_size must be a positive"),
    "accumulation": (["--effective_batch_size", "6"], "effective_batch_size 6 is no multiple"),
    "compilation": (["--torch_compile"], "--torch_compile is refused: proposals have a new shape in every step"),
    "compilation by its mode": (["--torch_compile_mode", "default"], "--torch_compile_mode is refused: proposals"),
    "two schedules": (["--lr_scheduler_type", "cosine"], "lowers the learning rate by itself: leave out --decay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_fit_are_refused_before_anything_is_read(scenes, tmp_path, capsys, name):
    arguments, words = REFUSED[name]
    with pytest.raises(SystemExit) as raised:
        command(scenes, tmp_path / "run", *arguments)
    assert raised.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_arguments_that_do_not_fit_each_other_are_refused_before_anything_is_read(scenes, tmp_path, capsys):
    for arguments, words in (
        (["--train_annotations", ""], "nothing to train on: give --train_annotations"),
        (["--do_train", "false"], "--do_train false evaluates a trained detector: give --model_name_or_path"),
    ):
        assert command(scenes, tmp_path / "run", *arguments) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


REFUSED_BY_MODEL = {
    "words for numbers": (["--detector_overrides", '{"fpn_channels": "many"}'], "--detector_overrides does not fit"),
    "names of classes": (["--detector_overrides", '{"id2label": {"0": "a"}}'], "sets id2label, which HiViTRCNNConfig"),
    "queries": (
        ["--detector", "deformable_detr", "--detector_overrides", '{"num_queries": 0}'],
        "needs num_queries of at least 1",
    ),
    "heads": (
        ["--detector", "deformable_detr", "--detector_overrides", '{"d_model": 33}'],
        "must be a multiple of twice the",
    ),
    "levels": (
        ["--detector", "deformable_detr", "--detector_overrides", '{"num_feature_levels": 1}'],
        "num_feature_levels of at",
    ),
    "stages": (
        ["--detector", "deformable_detr", "--detector_overrides", '{"two_stage": true, "with_box_refine": false}'],
        "--detector_overrides does not fit",
    ),
    "stages of the backbone": (
        ["--config_overrides", json.dumps({**NETWORK, "out_features": ["stage3"]})],
        "--config_overrides sets out_features",
    ),
    "crop": (
        ["--detector", "deformable_detr", "--detector_overrides", "{}", "--crop_size", "60"],
        "crop_size must be a multiple of the patch size 8, got 60: take 56 or 64",
    ),
    "no warmup": (["--warmup_steps", "1000"], "warmup_steps 1000 are not fewer than the 6 steps"),
    "no warmup by steps": (["--warmup_steps", "9", "--max_steps", "9"], "warmup_steps 9 are not fewer than the 9"),
}


@pytest.mark.parametrize("name", REFUSED_BY_MODEL)
def test_flags_that_the_model_cannot_have_are_refused_in_a_sentence(scenes, tmp_path, capsys, name):
    arguments, words = REFUSED_BY_MODEL[name]
    if "deformable_detr" in arguments and "--crop_size" not in arguments:
        arguments = [*arguments, "--crop_size", "64"]
    assert command(scenes, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and not list((tmp_path / "run").glob("*"))


FLAGS = {
    "freeze_backbone": (True, lambda trainer: not trainer.model.pyramid.hivit.position_embeddings.requires_grad),
    "drop_path_rate": (0.3, lambda trainer: trainer.model.config.backbone_config.drop_path_rate == 0.3),
    "eval_min_size": (64, lambda trainer: trainer.model.rcnn.transform.min_size == (64,)),
    "eval_max_size": (96, lambda trainer: trainer.model.rcnn.transform.max_size == 96),
    "crop_size": (48, lambda trainer: trainer.train_dataset[0]["image"].shape == (3, 48, 48)),
    "image_mean": ([0.1, 0.2, 0.3], lambda trainer: trainer.model.rcnn.transform.image_mean == [0.1, 0.2, 0.3]),
    "image_std": ([0.1, 0.2, 0.3], lambda trainer: trainer.model.rcnn.transform.image_std == [0.1, 0.2, 0.3]),
    "max_train_samples": (5, lambda trainer: len(trainer.train_dataset) == 5),
    "max_eval_samples": (3, lambda trainer: len(trainer.eval_dataset) == 3),
    "detector": ("faster_rcnn", lambda trainer: not trainer.model.config.predicts_masks),
    "detector_overrides": (
        {"max_detections": 7},
        lambda trainer: trainer.model.rcnn.roi_heads.detections_per_img == 7,
    ),
    "config_overrides": (
        {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 8, "image_size": 64},
        lambda trainer: trainer.hivit_config.hidden_size == 32,
    ),
    "seed": (5, lambda trainer: trainer.train_dataset.seed == 5),
    "early_stopping_patience": (3, lambda trainer: patience_of(trainer) == 3),
}


def patience_of(trainer: DetectionTrainer) -> int | None:
    callbacks = trainer.callback_handler.callbacks
    found = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return found[0].early_stopping_patience if found else None


@pytest.mark.parametrize("name", FLAGS)
def test_flags_reach_what_they_are_about(scenes, tmp_path, name):
    value, holds = FLAGS[name]
    assert not holds(trainer_for(scenes, tmp_path / "run"))
    assert holds(trainer_for(scenes, tmp_path / "run", **{name: value}))


def test_flips_scales_and_learning_rates_reach_what_they_are_about(scenes, tmp_path):
    still = {"jitter_scale": [1.0, 1.0], "crop_size": 80}
    plain = trainer_for(scenes, tmp_path / "run", flip_probability=0.0, **still)
    flipped = trainer_for(scenes, tmp_path / "run", flip_probability=1.0, **still)
    half = trainer_for(scenes, tmp_path / "run", flip_probability=0.0, jitter_scale=[0.5, 0.5], crop_size=80)
    one, other, small = (made.train_dataset[0] for made in (plain, flipped, half))
    assert torch.equal(one["masks"].sum(2), other["masks"].sum(2)) and not torch.equal(one["image"], other["image"])
    assert small["masks"].sum() < 0.4 * one["masks"].sum()
    trainer = trainer_for(scenes, tmp_path / "run", weight_decay=0.3, learning_rate=0.5)
    assert "5.000e-01    0.3" in trainer.layer_table()


def test_every_flag_is_tested():
    elsewhere = {"from_scratch", "architecture", "model_name_or_path", "check_images", "flip_probability"}
    elsewhere |= {"train_annotations", "train_image_dir", "eval_annotations", "eval_image_dir", "bad_annotations"}
    elsewhere |= {"jitter_scale", "num_train_epochs", "warmup_steps", "decay_epochs", "decay_factor", "num_overlays"}
    elsewhere |= {"overlay_threshold", "effective_batch_size", "learning_rate", "base_learning_rate"}
    elsewhere |= {"lr_scheduler_type", "per_device_train_batch_size", "per_device_eval_batch_size"}
    elsewhere |= {"metric_for_best_model"}
    training = (DetectionTrainingArguments, DenseTrainingArguments)
    own = {name for kind in training for name in kind.__annotations__ if not name.isupper()}
    own |= {item.name for kind in (DetectionModelArguments, DetectionDataArguments) for item in fields(kind)}
    assert own == elsewhere | (set(FLAGS) - {"seed", "early_stopping_patience"})
