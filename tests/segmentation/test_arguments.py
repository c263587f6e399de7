"""Arguments of segmentation: refusals at once, flags that reach what they are about, recipes with published numbers."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import EarlyStoppingCallback

import finetune_segmentation
from hivit_hf.segmentation.arguments import (
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationTrainingArguments,
)
from hivit_hf.segmentation.data import SegmentationDataset, TrainingCrop
from hivit_hf.segmentation.trainer import SegmentationTrainer
from hivit_hf.training.arguments import HiViTTrainingArguments
from hivit_hf.training.command_line import parse_arguments
from support.segmentation import SCENES, flags_of, run, trainer_for


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--per_device_train_batch_size", "1", "--effective_batch_size", "1"], "cannot be trained on one image"),
        (["--class_names", "sky"], "two classes or more"),
        (["--class_names", "sky", "sea", "sky"], "sky is there more than once"),
        (["--eval_stride", "40"], "leaves gaps between windows of 32 px"),
        (["--auxiliary_weight", "-1"], "auxiliary_weight must not be negative"),
        (["--head_channels", "0"], "head_channels must be a positive number"),
        (["--eval_scales", "0"], "eval_scales must be positive"),
        (["--scale_range", "2", "1"], "scale_range must be two numbers"),
        (["--max_class_fraction", "1.1"], "max_class_fraction must be in [0, 1]"),
        (["--layer_decay", "1.5"], "layer_decay must be in"),
        (["--warmup_steps", "9"], "warmup_steps must be less than max_steps 4"),
        (["--max_steps", "0"], "max_steps must be a positive number"),
        (["--num_train_epochs", "3"], "Give --max_steps or --num_train_epochs, not both"),
        (["--poly_power", "0"], "poly_power must be a positive number"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "leave out --lr_scheduler_kwargs"),
        (["--num_overlays", "-1"], "num_overlays must not be negative"),
        (["--per_device_eval_batch_size", "2"], "images of many sizes are evaluated one by one"),
        (["--label_smoothing_factor", "0.1"], "the model computes its own loss"),
        (["--config_overrides", '{"drop_path_rate": 0.1}'], "have flags of their own"),
        (["--config_overrides", '{"image_size": 32}'], "sets image_size, which follows from --crop_size"),
        (["--freeze_backbone", "true", "--drop_path_rate", "0.5"], "for a backbone that is trained: set it to 0"),
        (["--class_names", *map(str, range(256))], "has 256 names, but as 255 is not labeled in segmentation maps"),
        (["--do_reduce_labels", "true", "--class_names", *map(str, range(255))], "can be 254 with --do_reduce_labels"),
        (["--do_train", "false", "--resume_from_checkpoint", "latest"], "leave out --resume_from_checkpoint"),
        (["--do_train", "false", "--push_to_hub", "true"], "trains no model"),
        (["--from_scratch", "true"], "Give either --model_name_or_path, or --from_scratch"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("nowhere", tmp_path, "--model_name_or_path", "anything", *flags)
    assert exit_info.value.code == 2 and sentence in capsys.readouterr().err


def test_evaluations_of_random_weights_are_refused(tmp_path, capsys):
    flags = ["--do_train", "false", "--from_scratch", "true", "--architecture", "tiny"]
    assert run("nowhere", tmp_path / "run", *flags) == 2
    assert "evaluates a trained segmentation model: give --model_name_or_path" in capsys.readouterr().err


def crop_of(trainer: SegmentationTrainer) -> TrainingCrop:
    return trainer.train_dataset.transform


def learning_rates(trainer: SegmentationTrainer) -> list[float]:
    """Learning rates of the heads, relative to the peak, step by step."""
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    return [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(0, 400, 10)]


def early_stopping(trainer: SegmentationTrainer) -> EarlyStoppingCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)), None)


def betas(trainer: SegmentationTrainer) -> tuple[float, float]:
    return trainer.create_optimizer().defaults["betas"]


NETWORK = {"window_size": 2, "depths": [1, 1, 1], "patch_size": 8}
FLAGS = {
    "freeze_backbone": (True, lambda made: not made.model.backbone.hivit.position_embeddings.requires_grad),
    "drop_path_rate": (0.3, lambda made: made.model.config.backbone_config.drop_path_rate == 0.3),
    "head_channels": (12, lambda made: made.model.decode_head.classifier.in_channels == 12),
    "auxiliary_weight": (
        0.3,
        lambda made: made.model.config.auxiliary_loss_weight == 0.3 and made.model.auxiliary_head,
    ),
    "auxiliary_channels": (12, lambda made: made.model.config.auxiliary_channels == 12),
    "config_overrides": (NETWORK, lambda made: made.hivit_config.window_size == 2),
    "image_mean": (
        [0.1, 0.2, 0.3],
        lambda made: crop_of(made).mean == list(made.processing_class.image_mean) == [0.1, 0.2, 0.3],
    ),
    "image_std": (
        [0.1, 0.2, 0.3],
        lambda made: crop_of(made).std == list(made.processing_class.image_std) == [0.1, 0.2, 0.3],
    ),
    "do_reduce_labels": (True, lambda made: made.train_dataset.do_reduce_labels and made.eval_dataset.do_reduce_labels),
    "crop_size": (
        48,
        lambda made: (
            crop_of(made).crop_size == made.hivit_config.image_size == made.processing_class.size["width"] == 48
        ),
    ),
    "scale_range": ([0.7, 0.8], lambda made: crop_of(made).scale_range == (0.7, 0.8)),
    "max_class_fraction": (0.6, lambda made: crop_of(made).max_class_fraction == 0.6),
    "flip_probability": (0.4, lambda made: crop_of(made).flip_probability == 0.4),
    "photometric": (True, lambda made: crop_of(made).distort is not None),
    "train_split_name": ("test", lambda made: len(made.train_dataset) == 2),
    "eval_split_name": ("train", lambda made: len(made.eval_dataset) == 10),
    "train_val_split": (0.3, lambda made: len(made.train_dataset) == 7 and len(made.eval_dataset) == 3),
    "class_names": (list("abcdefghijklm"), lambda made: made.model.config.num_labels == len(made.class_names) == 13),
    "max_train_samples": (5, lambda made: len(made.train_dataset) == 5),
    "max_eval_samples": (1, lambda made: len(made.eval_dataset) == 1),
    "eval_size": (50, lambda made: made.predict_image.keywords["shorter_side"] == 50),
    "eval_stride": (20, lambda made: made.predict_image.keywords["stride"] == 20),
    "eval_scales": ([1.0, 0.6], lambda made: made.predict_image.keywords["scales"] == [1.0, 0.6]),
    "eval_flip": (True, lambda made: made.predict_image.keywords["flip"]),
    "seed": (5, lambda made: made.train_dataset.seed == made.args.data_seed == 5),
    "max_steps": (200, lambda made: made.args.max_steps == 200 and learning_rates(made)[20:] == [0.0] * 20),
    "warmup_steps": (100, lambda made: learning_rates(made)[5] == 0.5 * (1 - 50 / 320)),
    "poly_power": (2.0, lambda made: learning_rates(made)[16] == 0.25),
    "lr_scheduler_type": ("constant", lambda made: learning_rates(made)[16] == 1.0),
    "stop_after_steps": (3, lambda made: made.args.stop_after_steps == 3 and made.args.max_steps == 320),
    "per_device_train_batch_size": (4, lambda made: made.args.gradient_accumulation_steps == 1),
    "effective_batch_size": (8, lambda made: made.args.gradient_accumulation_steps == 4),
    "learning_rate": (0.5, lambda made: "5.000e-01" in made.layer_table()),
    "layer_decay": (0.1, lambda made: "0.1000" in made.layer_table()),
    "weight_decay": (0.3, lambda made: "0.3" in made.layer_table()),
    "adam_beta1": (0.5, lambda made: betas(made) == (0.5, 0.999)),
    "adam_beta2": (0.6, lambda made: betas(made) == (0.9, 0.6)),
    "max_grad_norm": (0.5, lambda made: made.args.max_grad_norm == 0.5),
    "bf16": (True, lambda made: made.args.bf16),
    "torch_compile": (True, lambda made: made.args.torch_compile),
    "dataloader_num_workers": (1, lambda made: made.get_eval_dataloader().num_workers == 1),
    "eval_steps": (3, lambda made: made.args.eval_steps == made.args.save_steps == 3),
    "save_steps": (6, lambda made: made.args.save_steps == 6),
    "save_strategy": ("no", lambda made: made.args.save_strategy == "no"),
    "save_total_limit": (5, lambda made: made.args.save_total_limit == 5),
    "logging_steps": (7, lambda made: made.args.logging_steps == 7),
    "report_to": ("tensorboard", lambda made: made.args.report_to == ["tensorboard"]),
    "early_stopping_patience": (
        3,
        lambda made: early_stopping(made) and early_stopping(made).early_stopping_patience == 3,
    ),
    "gradient_checkpointing": (True, lambda made: made.args.gradient_checkpointing),
    "metric_for_best_model": ("mean_accuracy", lambda made: made.args.metric_for_best_model == "mean_accuracy"),
    "num_overlays": (3, lambda made: made.args.num_overlays == 3),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_reach_what_they_are_about(small_scenes, tmp_path, name):
    value, holds = FLAGS[name]
    assert not holds(trainer_for(small_scenes, tmp_path / "run"))
    assert holds(trainer_for(small_scenes, tmp_path / "run", **{name: value}))


def test_lengths_are_steps_or_epochs(tmp_path):
    names = {"model_name_or_path": "anything", "dataset_name": "somewhere", "class_names": ["sky", "sea"]}
    lengths = {}
    flags_for = {"default": {}, "epochs": {"num_train_epochs": 3}, "by_epoch": {"eval_strategy": "epoch"}}
    for name, flags in flags_for.items():
        values = names | {"output_dir": tmp_path} | flags
        *_, args = parse_arguments(finetune_segmentation.ARGUMENTS, None, flags_of(values))
        lengths[name] = args.max_steps, args.num_train_epochs, args.learning_rate, args.eval_steps, args.save_steps
    assert lengths["default"][0] == 80_000 and lengths["default"][2:] == (1e-3, 8000, 8000)
    assert lengths["epochs"][:2] == (-1, 3) and lengths["by_epoch"][3] is None


def test_columns_and_checks_are_those_that_were_asked_for(small_scenes, tmp_path, monkeypatch):
    renamed = load_from_disk(small_scenes).rename_columns({"image": "photo", "annotation": "classes"})
    renamed.save_to_disk(tmp_path / "data")
    columns = {"image_column_name": "photo", "label_column_name": "classes"}
    for limit, rows in ((0, []), (1, [0]), (1000, [0, 1])):
        checked = []
        monkeypatch.setattr(
            SegmentationDataset, "check", lambda self, row, to=checked: to.append(row) if self.name == "eval" else None
        )
        trainer_for(str(tmp_path / "data"), tmp_path / str(limit), **columns, check_images=limit)
        assert checked == rows


def test_folders_of_images_and_maps(small_scenes, tmp_path):
    splits = {"train": "train", "validation": "test"}
    for name, split in splits.items():
        lines = []
        for number, row in enumerate(load_from_disk(small_scenes)[split]):
            files = {"file_name": f"images/{number}.png", "annotation_file_name": f"maps/{number}.png"}
            for path, image in zip(files.values(), (row["image"], row["annotation"])):
                (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / name / path)
            lines.append(json.dumps(files) + "\n")
        (tmp_path / name / "metadata.jsonl").write_text("".join(lines))
    folders = {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "validation"}
    found = trainer_for(None, tmp_path / "run", **folders)
    expected = trainer_for(small_scenes, tmp_path / "other")
    assert (len(found.train_dataset), len(found.eval_dataset)) == (10, 2)
    for one, other in zip(found.eval_dataset, expected.eval_dataset):
        assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["pixel_values"], other["pixel_values"])


def test_every_flag_is_tested():
    # whole runs, and what they begin with: test_script.py
    elsewhere = {"architecture", "model_name_or_path", "from_scratch", "dataset_name", "do_train", "ema_decay"}
    elsewhere |= {"image_column_name", "label_column_name", "check_images", "show_layer_table", "num_train_epochs"}
    elsewhere |= {"per_device_eval_batch_size", "eval_strategy"}
    # what all trainings share: tests/data, tests/training
    elsewhere |= {"output_dir", "resume_from_checkpoint", "hub_private_repo", "include_num_input_tokens_seen"}
    elsewhere |= {"train_dir", "validation_dir", "dataset_config_name", "dataset_revision", "do_eval"}
    elsewhere |= {"base_learning_rate", "optim", "logging_first_step", "logging_nan_inf_filter", "label_names"}
    elsewhere |= {"remove_unused_columns", "restore_callback_states_from_checkpoint", "hub_strategy"}
    own = {item.name for kind in (SegmentationModelArguments, SegmentationDataArguments) for item in fields(kind)}
    for kind in (SegmentationTrainingArguments, HiViTTrainingArguments):
        own |= {name for name in vars(kind)["__annotations__"] if not name.startswith("_")}
    own -= {"REFUSED", "count_early_layers"}
    assert own <= elsewhere | set(FLAGS) and not elsewhere & set(FLAGS)


def test_recipes_hold_the_published_numbers(tmp_path):
    recipe = Path(SCENES).with_name("segmentation_base_ade20k.yaml")
    values = {"config": recipe, "dataset_name": "ade", "model_name_or_path": "base", "output_dir": tmp_path}
    model, data, training = parse_arguments(finetune_segmentation.ARGUMENTS, None, flags_of(values))
    assert len(set(data.class_names)) == 150 and data.class_names[12] == "person" and data.do_reduce_labels
    assert (training.learning_rate, training.layer_decay) == (1e-3, 0.75)
    assert (training.max_steps, training.warmup_steps) == (80000, 750)
    assert (data.crop_size, training.effective_batch_size, model.drop_path_rate) == (640, 32, 0.1)
    assert model.head_channels == 1024 and training.poly_power == 1.0 and training.weight_decay == 0.05
