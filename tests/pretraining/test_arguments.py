"""Arguments of pre-training: recipes, refusals before anything is read, the command line, files of Accelerate."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file

import pretrain_mim
from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.pretraining.arguments import PretrainingArguments, PretrainingDataArguments, PretrainingModelArguments
from hivit_hf.training.command_line import ABOUT, parse_arguments, read_recipe
from hivit_hf.training.manifest import read_manifest


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [*sorted((EXAMPLES / "recipes").glob("mae_*.yaml")), EXAMPLES / "recipes" / "smoke_cpu.yaml"]
CLASSES = (PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments)
SMALL = {"hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2}
SMALL |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_takes_two_steps(path, data, tmp_path):
    """With a narrow network; that of the recipe is made without memory."""
    values = read_recipe(path)
    for key in ABOUT:
        assert values[key]
    argv = [f"--config={path}", "--per_device_train_batch_size=1", "--dataloader_num_workers=0"]
    argv += ["--stop_after_steps=2", "--torch_compile=false", f"--dataset_name={data}", f"--output_dir={tmp_path}"]
    argv += ["--max_eval_samples=2", "--report_to=none"]
    model_args, data_args, training_args = parse_arguments(CLASSES, None, argv)
    assert path.stem in ("smoke_cpu", "mae_digits") or training_args.peak_learning_rate == pytest.approx(
        1e-4 * 4096 / 256
    )
    with torch.device("meta"):
        HiViTForMaskedImageModeling(model_args.config())
    model_args = replace(model_args, config_overrides=json.dumps(SMALL))
    training_args = replace(training_args, effective_batch_size=2)
    accelerator = Accelerator(cpu=True, mixed_precision=training_args.mixed_precision)
    assert pretrain_mim.prepare(accelerator, model_args, data_args, training_args).train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert math.isfinite(log[0]["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "nothing to read: give either --dataset_name, or --train_dir"),
        ({"train_dir": "images"}, "nothing to read: give either --dataset_name, or --train_dir"),
        ({"output_dir": None}, "nowhere to write: give --output_dir"),
        ({"dataset_weights": [1.0, 2.0]}, "1 datasets need as many weights"),
        ({"dataset_weights": [0.0]}, "dataset_weights must be positive"),
        ({"bf16": True, "fp16": True}, "Give --bf16 or --fp16, not both"),
        ({"report_to": "wandbb"}, "report_to must be one of all, .* tensorboard, wandb, .* none, got 'wandbb'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a positive number, got 0"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate must be a positive number"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must not be negative"),
        ({"flip_probability": 2.0}, r"flip_probability must be in \[0, 1\]"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\), got 1.0"),
        ({"warmup_epochs": 8}, "warmup_epochs must be less than num_train_epochs 8.0, got 8.0"),
        ({"max_steps": 6}, "warmup_epochs 2.0 are 6 steps, but max_steps is 6"),
        ({"crop_scale": [0.5]}, "crop_scale must be two numbers such as 0.2 1.0"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale must be two numbers such as 0.2 1.0"),
        ({"images_per_epoch": 0}, "images_per_epoch must be a positive number, got 0"),
        ({"image_mean": [0.5]}, "image_mean needs 3 numbers"),
        ({"keep_every_steps": 7}, "keep_every_steps 7 must be a multiple of save_steps 5"),
        ({"seed": -1}, r"seed must be in \[0, 4294967296\), got -1"),
        ({"image_mean": [float("nan"), 0, 0]}, "image_mean must be finite numbers"),
        ({"train_split_name": "nonsense"}, "has no sub-folder 'nonsense'. Leave the split out to read all of it"),
        ({"allow_recipe_change": True}, "is about resumptions: give --resume_from_checkpoint as well"),
        ({"allow_topology_change": True}, "is about resumptions: give --resume_from_checkpoint as well"),
        ({"dataset_revision": "v1"}, "dataset_revision is of datasets of the Hub, but .* are folders"),
        ({"dataset_config_name": "small"}, "dataset_config_name is of datasets of the Hub, but .* are folders"),
        ({"label_column_name": "label"}, "give --eval_dataset_name as well"),
        ({"eval_dataset_name": "one", "validation_dir": "two"}, "--eval_dataset_name or --validation_dir, not both"),
        ({"hub_model_id": "me/run"}, "--hub_model_id is for --push_to_hub"),
        ({"config_overrides": "{"}, "config_overrides must be a JSON object"),
        ({"config_overrides": "[1]"}, "config_overrides must be a JSON object"),
        ({"per_device_train_batch_size": "8.5"}, "per_device_train_batch_size.*: invalid int value: '8.5'"),
        ({"dataloader_num_workers": True}, "dataloader_num_workers.*: invalid int value: 'True'"),
        ({"base_learning_rate": "fast"}, "base_learning_rate.*: invalid float value: 'fast'"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\)"),
        ({"image_std": [0, 1, 1]}, "image_std must be positive"),
        ({"weight_decay": float("nan")}, "weight_decay must not be negative, got nan"),
        ({"min_learning_rate": 1}, "min_learning_rate must not exceed the peak learning rate, 0.000625"),
        ({"config_overrides": '{"mask_ratio": 0.5}'}, "--config_overrides sets mask_ratio, which have flags of their"),
        ({"config_overrides": '{"hiden_size": 64}'}, "no keyword 'hiden_size'"),
        ({"architecture": "huge"}, "architecture must be one of .*, got 'huge'"),
        ({"mask_ratio": 0.99}, "leaves none"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\)"),
        ({"effective_batch_size": 12}, "effective_batch_size 12 is no multiple of 8 images on 1 processes"),
        ({"dataloader_num_workers": 40}, "16 shards, but 1 .* with 40 workers each need 40: use --.*num_workers 16"),
        ({"image_column_name": "photo"}, "no column 'photo'"),
        ({"clip_norm": 1.0}, "There is no flag --clip_norm"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(changes, message, make_run, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        make_run(**changes)
    said = str(refused.value)
    if refused.type is SystemExit:
        assert refused.value.code == 2
        said = capsys.readouterr().err
    assert re.search(message, said)
    assert not (tmp_path / "run").exists()


def test_a_stream_without_a_length_is_refused():
    with pytest.raises(ValueError, match=r"give --images_per_epoch \(ImageNet-1k: 1281167\)"):
        PretrainingDataArguments(dataset_name=["one/name"])


def test_the_length_of_the_schedule(make_arguments):
    *_, by_epochs = make_arguments()
    *_, by_steps = make_arguments(max_steps=100, learning_rate=0.5)
    assert (by_epochs.num_steps(48), by_epochs.num_warmup_steps(48)) == (24, 6)
    assert (by_steps.num_steps(48), by_steps.num_warmup_steps(48)) == (100, 6)
    assert (by_epochs.peak_learning_rate, by_steps.peak_learning_rate) == (0.01 * 16 / 256, 0.5)


def test_images_from_folders(make_arguments, data):
    _, data_args, _ = make_arguments(dataset_name=None, train_dir=str(data), validation_dir=str(data))
    assert [source.name for source in data_args.train_sources()] == [data_args.eval_source().name] == [str(data)]


def test_an_output_folder_that_cannot_be_written(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\). Choose another"):
        make_run(output_dir=str(tmp_path / "file" / "run")).train()


def test_recipe_files(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    flags = [f"--config={path}", "--output_dir=run", "--images_per_epoch=8", "--warmup_epochs=0"]
    for text, message in [
        ("num_train_epochs: [", "cannot be read"),
        ("just text", "must hold keys and values, got a str"),
        ("num_train_epoch: 3", "has the key num_train_epoch, which is no flag. Did you mean num_train_epochs"),
        ("epochs: 3", "has the key epochs, which is no flag"),
    ]:
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse_arguments(CLASSES, None, flags)
        assert message in capsys.readouterr().err
    path.write_text(
        "base_learning_rate: 1e-4\nconfig_overrides: {patch_size: 8}\ndataset_name: one/name\nnum_train_epochs: 3\n"
    )
    model_args, data_args, training_args = parse_arguments(CLASSES, None, flags)
    assert data_args.dataset_name == ["one/name"] and training_args.num_train_epochs == 3.0
    assert training_args.base_learning_rate == 1e-4 and model_args.config().patch_size == 8


def test_the_target_pixels_are_normalized_or_not(make_arguments):
    assert make_arguments()[0].config().norm_pix_loss
    assert not make_arguments(norm_pix_loss=False)[0].config().norm_pix_loss


def test_the_command_line(data, tmp_path, capsys, monkeypatch):
    recipe = ["--config", str(EXAMPLES / "recipes" / "smoke_cpu.yaml"), "--dataset_name", str(data)]
    arguments = [*recipe, "--output_dir", str(tmp_path / "run"), "--stop_after_steps", "3", "--max_eval_samples", "4"]
    assert pretrain_mim.main([*arguments, "--num_train_epochs", "5"]) == 0
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert manifest["arguments"]["num_train_epochs"] == 5
    capsys.readouterr()
    assert pretrain_mim.main(arguments) == 2
    assert "error: " in capsys.readouterr().err
    for flags, message in [
        (["--report_to", "wandb"], "error: report_to wandb is not installed: pip install wandb"),
        (["--warmup_epochs", "50"], "warmup_epochs must be less than num_train_epochs"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            pretrain_mim.main([*recipe, "--output_dir", str(tmp_path / "other"), *flags])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert pretrain_mim.main([*recipe, "--output_dir", str(tmp_path / "deepspeed")]) == 2
    assert "error: Pre-training does not run with DeepSpeed: take DDP or FSDP2" in capsys.readouterr().err
    assert not (tmp_path / "deepspeed").exists()
    assert sys.modules["pretrain_mim"].__doc__.count("--resume_from_checkpoint latest") == 1


def test_accelerate_files():
    kinds = {path.stem: load_config_from_file(str(path)) for path in (EXAMPLES / "accelerate").glob("*.yaml")}
    assert {name: config.num_processes for name, config in kinds.items()} == {
        "one_gpu": 1,
        "eight_gpus": 8,
        "two_nodes": 16,
        "fsdp2": 8,
    }
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert kinds["two_nodes"].num_machines == 2
