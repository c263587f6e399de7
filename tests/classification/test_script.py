"""finetune_classification.py: every flag, recipes, folders, LoRA, uploads, several processes, exit codes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import HfApi
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, pipeline

import finetune_classification
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.classification.trainer import ClassificationTrainer
from hivit_hf.training.command_line import parse_arguments, read_recipe
from support.classification import (
    SMOKE,
    flags,
    log_of,
    model_folder,
    outcome,
    smoke_run,
    smoke_trainer,
)
from support.refusals import refusal


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(
    path for kind in ("finetune_*", "supervised_*") for path in (EXAMPLES / "recipes").glob(f"{kind}.yaml")
)


def command_line(*arguments) -> int:
    return finetune_classification.main(["--config", str(SMOKE), *map(str, arguments)])


# -- every flag changes what it says --------------------------------------------------------------------------------


CHANGING = {
    "drop_path_rate": 0.5, "head_init_std": 0.5, "init_relative_position_bias": True, "image_size": 64,
    "config_overrides": {**read_recipe(SMOKE)["config_overrides"], "pooler_layernorm": False},
    "train_split_name": "test", "eval_split_name": "train", "train_val_split": 0.25, "max_train_samples": 32,
    "max_eval_samples": 8, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "crop_scale": [0.3, 0.4],
    "flip_probability": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.9, "random_erasing": 1.0,
    "rotation_degrees": 90,
    "mixup": 0.8, "cutmix": 1.0, "label_smoothing_factor": 0.3, "crop_pct": 0.5, "num_train_epochs": 2,
    "warmup_epochs": 0.5, "stop_after_steps": 2, "max_steps": 2, "effective_batch_size": 8, "base_learning_rate": 1e-3,
    "learning_rate": 1e-3, "min_learning_rate": 2e-4, "weight_decay": 5.0, "adam_beta1": 0.5, "adam_beta2": 0.6,
    "adam_epsilon": 1e-2, "layer_decay": 0.5, "max_grad_norm": 1e-9, "ema_decay": 0.9, "bf16": True, "seed": 1,
    "data_seed": 5, "lr_scheduler_type": "linear", "warmup_steps": 1, "optim": "sgd",
}  # fmt: skip
QUICK = {"head_init_std", "max_eval_samples", "mixup", "max_steps", "learning_rate", "ema_decay", "optim"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHANGING])
def test_flags_change_what_happens(name, digits, plain, tmp_path):
    changed = outcome(smoke_run(digits, tmp_path, **{name: CHANGING[name]}), tmp_path)
    assert changed != plain
    if name in {"eval_split_name", "max_eval_samples", "crop_pct", "ema_decay"}:  # and nothing of the training
        assert changed["losses"] == plain["losses"]
    elif name not in {
        "layer_decay",
        "weight_decay",
        "max_grad_norm",
        "adam_epsilon",
        "optim",
        "adam_beta1",
        "adam_beta2",
    }:
        assert (changed["losses"], changed["rates"]) != (plain["losses"], plain["rates"])


def test_every_flag_is_tested():
    here = Path(__file__).parent
    tested = "".join(path.read_text() for folder in (here, here.parent / "training") for path in folder.glob("*.py"))
    for part in finetune_classification.ARGUMENTS:
        own = {item.name for item in fields(part)} - {item.name for item in fields(TrainingArguments)}
        for name in own | {name for name in part.__annotations__ if name.islower() and not name.startswith("_")}:
            assert name in tested, name


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(digits, tmp_path, capsys):
    data = ("--dataset_name", digits)
    assert command_line(*data, "--show_layer_table", "--layer_decay", "0.5") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["id", "scale", "learning"] and table[-1].startswith("  7  1.0000")
    assert table[1].startswith("  0  0.0078")
    run = (*data, "--output_dir", tmp_path / "run", "--report_to", "tensorboard", "--logging_steps", "2")
    assert command_line(*run, "--stop_after_steps", "3", "--per_device_eval_batch_size", "7") == 0
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    capsys.readouterr()
    assert command_line(*run) == 2
    assert "holds a run, at checkpoint-3: give --resume_from_checkpoint latest" in capsys.readouterr().err
    resume = ("--resume_from_checkpoint", "latest")
    assert command_line(*run, *resume, "--seed", "5") == 2
    assert "was begun with seed=0, now it is 5" in capsys.readouterr().err
    assert command_line(*data, "--output_dir", tmp_path / "none", *resume) == 2
    assert "There is no checkpoint to resume" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert command_line(*run, *resume, "--gradient_checkpointing") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", 8), "There is no flag --batch_size. Did you mean"),
        (("--epochs", 8), "There is no flag --epochs."),
        (("--label_names", "a"), "--label_names is refused: batches have their labels under 'labels'; --class_names"),
        (("--fsdp", "full_shard"), "--fsdp is refused: training is data-parallel"),
        (("--mixup", "0.8", "--per_device_train_batch_size", 1, "--effective_batch_size", 1), "must be even, got 1"),
        (("--train_split_name", "training"), "There is no split 'training'"),
        (("--dataset_name", "/nowhere"), "There is no folder /nowhere. Check the path."),
        (("--train_dir", "a"), "There is no data: give either --dataset_name, or --train_dir."),
        (("--effective_batch_size", 64), "48 training images are fewer than effective_batch_size 64"),
        (("--report_to", "nonsense"), "nonsense is not supported, only"),
        (("--do_train", "false"), "--do_train false evaluates a classifier that was trained on these labels"),
        (("--optim", "galore_adamw", "--optim_args", "rank=2"), "galore"),
    ],
)
def test_refusals_are_a_sentence(arguments, message, digits, tmp_path, capsys):
    line = ("--config", SMOKE, "--dataset_name", digits, "--output_dir", tmp_path / "run", *arguments)
    assert message.lower() in refusal(finetune_classification.main, capsys, *line).lower()


@pytest.mark.slow
def test_defaults_run(digits, tmp_path, capsys):
    start = model_folder(tmp_path / "pretrained")
    line = flags(model_name_or_path=start, dataset_name=digits, output_dir=tmp_path / "run", stop_after_steps=1)
    assert finetune_classification.main(line) == 0
    out = capsys.readouterr().out
    assert "newly initialized: the classifier, its norm" in out and "processes: 1, parameters: " in out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_folders_of_images(digits, tmp_path):
    splits = DatasetDict.load_from_disk(digits)
    for name, folder in (("train", "train"), ("test", "validation")):
        for row, item in enumerate(splits[name]):
            path = tmp_path / folder / f"digit {item['label']}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            item["image"].save(path)
    folders = {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "validation"}
    trainer = smoke_trainer(None, tmp_path / "run", **folders)
    assert trainer.labels.names == ("digit 0", "digit 1", "digit 2", "digit 3")
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (48, 24)
    held_out = smoke_trainer(None, tmp_path / "run", train_dir=tmp_path / "train", train_val_split=0.25)
    assert (len(held_out.train_dataset), len(held_out.eval_dataset)) == (36, 12)


# -- what runs leave ------------------------------------------------------------------------------------------------


def test_runs_leave_what_pipelines_load(digits, tmp_path, capsys):
    changes = {"crop_pct": 0.5, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "save_total_limit": 2}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    metrics = smoke_run(digits, tmp_path / "run", **changes, **steps)
    kept = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(kept) == 2 and "checkpoint-3" in kept
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.size["shortest_edge"] == 64 and list(processor.image_mean) == [0.5] * 3
    held_out = DatasetDict.load_from_disk(digits)["test"]
    predict = pipeline("image-classification", model=str(tmp_path / "run"))
    answers = predict([image.convert("RGB") for image in held_out["image"]], top_k=1)
    hits = [answer[0]["label"] == str(label) for answer, label in zip(answers, held_out["label"])]
    assert np.mean(hits) == pytest.approx(metrics["eval_accuracy"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(4)} and "use_cache" not in config
    written = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert written["eval_accuracy"] == metrics["eval_accuracy"]
    # the same without training
    line = flags(dataset_name=digits, output_dir=tmp_path / "again", model_name_or_path=tmp_path / "run")
    assert finetune_classification.main([*line, *flags(crop_pct=0.5, do_train=False, dataloader_num_workers=0)]) == 0
    again = json.loads((tmp_path / "again" / "eval_results.json").read_text())
    assert again["eval_accuracy"] == metrics["eval_accuracy"] and again["eval_loss"] == metrics["eval_loss"]
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_adapter_loads_in_a_pipeline(digits, tmp_path, capsys):
    start = model_folder(tmp_path / "pretrained")
    line = flags(model_name_or_path=start, dataset_name=digits, output_dir=tmp_path / "lora", lora_r=4, image_size=32)
    line += flags(num_train_epochs=2, warmup_epochs=0, per_device_train_batch_size=16, report_to="none", seed=0)
    arguments = parse_arguments(finetune_classification.ARGUMENTS, None, line)
    data = finetune_classification.make_trainer(*arguments).eval_dataset
    capsys.readouterr()
    metrics = finetune_classification.train(*arguments)
    assert capsys.readouterr().out.count("newly initialized") == 1
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    moved = tmp_path / "moved"
    (tmp_path / "lora").rename(moved)
    held_out = DatasetDict.load_from_disk(digits)["test"]
    images = [image.convert("RGB") for image in held_out["image"]]
    answers = pipeline("image-classification", model=str(moved))(images, top_k=1)
    hits = [answer[0]["label"] == str(label) for answer, label in zip(answers, held_out["label"])]
    assert np.mean(hits) == pytest.approx(metrics["eval_accuracy"])
    pixel_values = torch.stack([data[i]["pixel_values"] for i in range(24)])
    loaded = AutoModelForImageClassification.from_pretrained(moved).eval()
    with torch.no_grad():
        logits = loaded(pixel_values).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.stack([data[i]["labels"] for i in range(24)]))
        assert_close(loss.item(), metrics["eval_loss"], atol=1e-4, rtol=1e-4)
        (moved / "adapter_model.safetensors").unlink()
        (moved / "adapter_config.json").unlink()
        bare = HiViTForImageClassification.from_pretrained(moved).eval()
        assert (bare(pixel_values).logits - logits).abs().max() > 1e-3


def test_pushing(digits, tmp_path, monkeypatch):
    uploads, made = [], []
    repository = type("Repository", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **k: (made.append((name, k)), repository)[1])
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **keywords: uploads.append(keywords))
    changes = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True}
    smoke_run(digits, tmp_path, stop_after_steps=1, **changes)
    assert made[0][0] == "me/mine" and made[0][1]["private"] is True
    assert uploads[-1]["repo_id"] == "me/mine" and Path(uploads[-1]["folder_path"]) == tmp_path
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"):
        assert (tmp_path / name).exists()
    assert str(digits) not in (tmp_path / "README.md").read_text()  # no path of this machine


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_mae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "base-mae"
    HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae")).save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


PEAKS = {"finetune_base_100ep": 2e-3, "finetune_base_chest_xray": 2e-3, "finetune_smoke_cpu": 5e-4}
PEAKS |= {"finetune_digits": 5e-4}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    values = read_recipe(path)
    for key in ("title", "source", "cost", "expected_result"):
        assert values[key]
    start = {} if values.get("from_scratch") else {"model_name_or_path": "model"}
    line = ["--config", str(path), *flags(dataset_name="data", output_dir="out", **start)]
    *_, published = parse_arguments(finetune_classification.ARGUMENTS, None, line)
    assert published.learning_rate == pytest.approx(PEAKS.get(path.stem, 1e-3)) and published.seed == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_takes_two_steps(path, digits, tmp_path, base_mae, monkeypatch):
    values = read_recipe(path)
    small = {"per_device_train_batch_size": 2, "effective_batch_size": 2, "dataloader_num_workers": 0}
    small |= {"learning_rate": PEAKS.get(path.stem, 1e-3), "stop_after_steps": 2, "per_device_eval_batch_size": 2}
    small |= {"dataset_name": digits, "output_dir": tmp_path / "run", "max_eval_samples": 2, "report_to": "none"}
    if not values.get("from_scratch"):
        small["model_name_or_path"] = base_mae
    if values.get("problem_type") == "multi_label_classification":
        splits = DatasetDict.load_from_disk(digits)
        for name, split in splits.items():
            columns = [[int(label == digit) for label in split["label"]] for digit in range(3)]
            for digit, column in enumerate(columns):
                split = split.add_column(f"is_{digit}", column)
            splits[name] = split
        splits.save_to_disk(tmp_path / "several")
        small |= {"dataset_name": tmp_path / "several", "label_column_name": ["is_0", "is_1", "is_2"]}
    monkeypatch.setattr(
        ClassificationTrainer, "_save_checkpoint", lambda *arguments: None
    )  # gigabytes, and tested elsewhere
    monkeypatch.setattr(ClassificationTrainer, "save_and_push", lambda trainer, *arguments: trainer.save_state())
    assert finetune_classification.main(["--config", str(path), *flags(**small)]) == 0
    assert log_of(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) for record in log_of(tmp_path / "run"))


# -- several processes ----------------------------------------------------------------------------------------------


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(EXAMPLES / "finetune_classification.py"), "--config", str(SMOKE), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(digits, tmp_path):
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        finished = launch(
            processes,
            *flags(dataset_name=digits, output_dir=folder, auto_augment="rand-m9-mstd0.5-inc1", logging_steps=1),
            *flags(per_device_train_batch_size=16 // processes, effective_batch_size=16, ema_decay=0.5),
            "--per_device_eval_batch_size=4",  # the same number on each process, or the mean loss counts some twice
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "destroy_process_group" not in finished.stderr and "SIGABRT" not in finished.stderr
        assert finished.stdout.count(f"processes: {processes}") == 1
        results[processes] = json.loads((folder / "eval_results.json").read_text()), log_of(folder)
    (metrics, log), (metrics_of_two, log_of_two) = results[1], results[2]
    assert len(log) == 6 and len({record["loss"] for record in log}) == 6
    assert [r["loss"] for r in log_of_two] == pytest.approx([r["loss"] for r in log], rel=1e-4)
    assert metrics_of_two["eval_accuracy"] == metrics["eval_accuracy"]
    assert metrics_of_two["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_processes_leave_together(digits, tmp_path):
    finished = launch(2, *flags(dataset_name=digits, output_dir=tmp_path, effective_batch_size=64))
    assert finished.returncode != 0 and "images are fewer than effective_batch_size 64" in finished.stderr
    assert "error in process" in finished.stderr
