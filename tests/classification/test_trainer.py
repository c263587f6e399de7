"""The trainer of classifiers: published schedule, layer decay, metrics, moving average, resumption bit for bit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

import finetune_classification
from hivit_hf import HiViTForImageClassification
from hivit_hf.classification import trainer as classification_trainer
from hivit_hf.modeling_hivit import layer_id
from hivit_hf.training.manifest import check_checkpoint
from support.classification import (
    history_of,
    log_of,
    outcome,
    saved_weights,
    smoke_arguments,
    smoke_flags,
    smoke_run,
    smoke_trainer,
)
from support.damage import NEVER_READ, damages, flip_a_bit, plants, reseal
from support.refusals import refusal


# -- learning rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_early_layers", [True, False])
def test_layer_decay_changes_the_step_that_is_taken(count_early_layers, digits, tmp_path):
    """The first step of AdamW has the length of its learning rate, whatever the gradient."""
    changes = {"layer_decay": 0.5, "weight_decay": 0.0, "stop_after_steps": 1, "effective_batch_size": 8}
    arguments = smoke_arguments(digits, tmp_path, count_early_layers=count_early_layers, **changes)
    start = finetune_classification.make_trainer(*arguments).model
    before, config = {name: parameter.detach() for name, parameter in start.named_parameters()}, start.config
    finetune_classification.train(*arguments)
    largest = {}
    for name, weights in saved_weights(tmp_path).items():
        step = (weights - before[name]).abs().max().item()
        largest.setdefault(layer_id(name, config, count_early_layers), []).append(step)
    last = max(largest)
    assert last == (7 if count_early_layers else 3)
    for layer, steps in largest.items():
        assert max(steps) == pytest.approx(arguments[2].learning_rate * 0.5 ** (last - layer), rel=1e-2), layer


def published(step: int, total: int = 12, warmup: int = 3, low: float = 1e-5, first: float = 2e-5) -> float:
    high = 4e-3 * 16 / 256
    if step < warmup:
        return first + (high - first) * step / warmup
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


PUBLISHED = {"num_train_epochs": 4, "warmup_epochs": 1, "min_learning_rate": 1e-5, "warmup_learning_rate": 2e-5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stop_after_steps": 10}, [published(step) for step in range(10)]),
        ({"max_steps": 6}, [published(step, total=6) for step in range(6)]),
        ({"warmup_steps": 5, "stop_after_steps": 7}, [published(step, warmup=5) for step in range(7)]),
        ({"warmup_steps": 0.5, "max_steps": 4}, [published(step, total=4, warmup=2) for step in range(4)]),
        ({"max_steps": 2}, [published(step, total=2, warmup=1) for step in range(2)]),
    ],
    ids=["stop_after_steps", "max_steps", "warmup_steps", "warmup_ratio", "short"],
)
def test_the_learning_rate_of_each_step_is_the_formula(changes, expected, digits, tmp_path):
    smoke_run(digits, tmp_path, **PUBLISHED, layer_decay=0.5, eval_strategy="no", **changes)
    # Trainer logs the first group's, which belongs to layer 0 of 7
    rates = [record["learning_rate"] for record in log_of(tmp_path)]
    assert rates == pytest.approx([rate * 0.5**7 for rate in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_scheduler_type": "linear"}, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "constant_with_warmup"}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            [0, 1 / 3, 2 / 3, 1, 0.8, 0.4],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_schedules_of_transformers_have_the_warmup_epochs(changes, expected, digits, tmp_path):
    smoke_run(digits, tmp_path, num_train_epochs=2, warmup_epochs=1, eval_strategy="no", **changes)
    rates = [record["learning_rate"] / (4e-3 * 16 / 256) for record in log_of(tmp_path)]
    assert rates == pytest.approx(expected, abs=1e-4)


# -- the same numbers -----------------------------------------------------------------------------------------------


def test_a_run_is_repeatable_whatever_the_workers(digits, plain, tmp_path):
    assert outcome(smoke_run(digits, tmp_path, dataloader_num_workers=2), tmp_path) == plain


def test_accumulation_gives_the_step_of_the_whole_batch(digits, plain, tmp_path):
    whole = outcome(smoke_run(digits, tmp_path, per_device_train_batch_size=16), tmp_path)
    assert whole["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert whole["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_compiled_and_checkpointed_runs_take_the_same_steps(digits, plain, tmp_path, monkeypatch):
    seen = []
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        original = getattr(HiViTForImageClassification, name, None)
        if original is not None:
            recorded = lambda model, *a, original=original, **k: (seen.append(True), original(model, *a, **k))  # noqa: E731
            monkeypatch.setattr(HiViTForImageClassification, name, recorded)
    torch._dynamo.reset()
    for changes in ({"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        folder = tmp_path / next(iter(changes))
        changed = outcome(smoke_run(digits, folder, **changes), folder)
        assert changed["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert HiViTForImageClassification.from_pretrained(folder).num_parameters()
    assert seen
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.parametrize(
    "extras",
    [
        {"num_train_epochs": 2},
        pytest.param(
            {"ema_decay": 0.9, "mixup": 0.8, "dataloader_num_workers": 2, "random_erasing": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "everything"],
)
def test_resuming_gives_the_uninterrupted_run(extras, digits, tmp_path):
    changes = {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 2, "drop_path_rate": 0.2, **extras}
    changes |= {"save_strategy": "steps", "save_steps": 2}
    whole = outcome(smoke_run(digits, tmp_path / "whole", **changes), tmp_path / "whole")
    smoke_run(digits, tmp_path / "parts", stop_after_steps=4, **changes)  # in the second epoch
    resumed = smoke_run(digits, tmp_path / "parts", resume_from_checkpoint="latest", **changes)
    assert len(whole["losses"]) == 3 * changes["num_train_epochs"]
    assert outcome(resumed, tmp_path / "parts") == whole


def test_each_epoch_has_its_own_augmentation(digits, tmp_path):
    trainer, epochs = smoke_trainer(digits, tmp_path, num_train_epochs=3, eval_strategy="no"), []
    original = trainer.train_dataset.transform
    trainer.train_dataset.transform = lambda image: (epochs.append(trainer.train_dataset.epoch), original(image))[1]
    trainer.train()
    assert epochs == [0] * 48 + [1] * 48 + [2] * 48


# -- damaged and hostile checkpoints ---------------------------------------------------------------------------------


DAMAGE = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "ema_decay": 0.9}
DAMAGE |= {"save_total_limit": 9}


def test_every_damage_of_a_checkpoint_is_a_sentence(digits, tmp_path, capsys):
    smoke_run(digits, tmp_path, stop_after_steps=2, **DAMAGE)
    checkpoint = tmp_path / "checkpoint-2"
    flags = smoke_flags(digits, tmp_path, resume_from_checkpoint=checkpoint, **DAMAGE)
    count = 0
    for name in damages(checkpoint):
        said = refusal(finetune_classification.main, capsys, *flags)
        assert name in said and str(checkpoint) in said
        count += 1
    assert count > 40


def test_no_file_of_a_checkpoint_runs_code(digits, tmp_path, capsys):
    smoke_run(digits, tmp_path, stop_after_steps=2, **DAMAGE)
    checkpoint, trace, names = tmp_path / "checkpoint-2", tmp_path / "trace", set()
    flags = smoke_flags(digits, tmp_path, resume_from_checkpoint=checkpoint, **DAMAGE)
    for name in plants(checkpoint, trace):
        if name in NEVER_READ:
            assert finetune_classification.main(flags) == 0
            (tmp_path / "all_results.json").unlink()
        else:
            assert name in refusal(finetune_classification.main, capsys, *flags)
        assert not trace.exists(), name
        names.add(name)
    assert names >= {"average.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


def test_content_of_another_kind_is_a_sentence(digits, tmp_path, capsys):
    """Files that can be read, and do not fit."""
    smoke_run(digits, tmp_path, stop_after_steps=2, **DAMAGE)
    checkpoint = tmp_path / "checkpoint-2"
    flags = smoke_flags(digits, tmp_path, resume_from_checkpoint=checkpoint, **DAMAGE)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (checkpoint / name).read_bytes()
        for other in ({}, [], {"state": 7}):
            torch.save(other, checkpoint / name)
            reseal(checkpoint)
            refusal(finetune_classification.main, capsys, *flags)
        (checkpoint / name).write_bytes(content)


def test_a_damaged_checkpoint_is_left_for_the_one_before_it(digits, tmp_path, capsys):
    whole = outcome(smoke_run(digits, tmp_path / "whole", **DAMAGE), tmp_path / "whole")
    smoke_run(digits, tmp_path / "parts", stop_after_steps=5, **DAMAGE)
    (tmp_path / "parts" / "latest").touch()
    flip_a_bit(tmp_path / "parts" / "checkpoint-5" / "optimizer.pt")
    capsys.readouterr()
    resumed = smoke_run(digits, tmp_path / "parts", resume_from_checkpoint="latest", **DAMAGE)
    said = capsys.readouterr().out
    assert "checkpoint-5 is damaged: optimizer.pt is not what was saved (its checksum differs)." in said
    assert "Resuming from checkpoint-4, the newest whole one." in said
    assert outcome(resumed, tmp_path / "parts") == whole


def test_a_damaged_best_checkpoint_is_not_loaded(digits, tmp_path, monkeypatch):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = smoke_trainer(digits, tmp_path, early_stopping_patience=2, save_total_limit=6, **changes)
    load = trainer._load_best_model

    def damaged():
        flip_a_bit(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        load()

    monkeypatch.setattr(trainer, "_load_best_model", damaged)
    with pytest.raises(ValueError, match=r"checkpoint-\d is damaged: model.safetensors is not what was saved"):
        trainer.train()


def test_checkpoints_beyond_the_limit_and_those_that_a_kill_left(digits, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / ".checkpoint-7.deleted").mkdir()
    smoke_run(digits, tmp_path, save_total_limit=2, **changes)
    left = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]
    assert all(check_checkpoint(tmp_path / name)["step"] == int(name[-1]) for name in left)


# -- moving average, early stopping ---------------------------------------------------------------------------------


def test_the_moving_average_is_evaluated_and_kept(digits, tmp_path):
    start = smoke_trainer(digits, tmp_path / "start").model
    before = {name: parameter.detach() for name, parameter in start.named_parameters()}
    metrics = smoke_run(digits, tmp_path / "slow", ema_decay=0.999999)
    during = next(record["eval_loss"] for record in history_of(tmp_path / "slow") if "eval_loss" in record)
    assert during == pytest.approx(metrics["eval_loss"], rel=1e-6)
    saved = saved_weights(tmp_path / "slow")
    # torch's average begins as a copy after the first step, and stays there
    assert max((weights - before[name]).abs().max().item() for name, weights in saved.items()) < 2e-3
    last = saved_weights(tmp_path / "slow" / "checkpoint-3")
    assert any(not torch.equal(weights, saved[name]) for name, weights in last.items())
    smoke_run(digits, tmp_path / "fast", ema_decay=1e-9)
    last = saved_weights(tmp_path / "fast" / "checkpoint-3")
    for name, weights in saved_weights(tmp_path / "fast").items():
        assert_close(weights, last[name], atol=1e-6, rtol=1e-5)


def test_early_stopping_keeps_the_best(digits, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1])
    compute = lambda prediction: {"accuracy": next(accuracies)}  # noqa: E731
    monkeypatch.setattr(classification_trainer, "metrics_of", lambda *arguments: (compute, "accuracy", True))
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    smoke_run(digits, tmp_path, num_train_epochs=6, early_stopping_patience=2, save_total_limit=6, **changes)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["best_global_step"] == 2
    best = saved_weights(tmp_path / "checkpoint-2")
    assert all(torch.equal(weights, best[name]) for name, weights in saved_weights(tmp_path).items())


def test_the_metric_of_the_best_checkpoint(digits, tmp_path):
    task = smoke_trainer(digits, tmp_path / "a", early_stopping_patience=2).args
    assert (task.metric_for_best_model, task.greater_is_better) == ("accuracy", True)
    told = smoke_trainer(digits, tmp_path / "b", early_stopping_patience=2, metric_for_best_model="loss").args
    assert (told.metric_for_best_model, told.greater_is_better) == ("loss", False)


# -- other problems -------------------------------------------------------------------------------------------------


def several_labels(digits, folder) -> str:
    """The digits with several labels each: whether they are even, above one, or have a hole."""
    splits = DatasetDict.load_from_disk(digits)
    names = ["even", "large", "hole"]
    features = Features({"image": Image(), "labels": List(ClassLabel(names=names))})

    def relabeled(split):
        labels = [[i for i, yes in enumerate((d % 2 == 0, d > 1, d == 0)) if yes] for d in split["label"]]
        return Dataset.from_dict({"image": list(split["image"]), "labels": labels}, features=features)

    DatasetDict({name: relabeled(split) for name, split in splits.items()}).save_to_disk(folder)
    return str(folder)


@pytest.mark.slow
def test_several_labels(digits, tmp_path):
    """The metrics are those of scikit-learn, and the network learns."""
    data = several_labels(digits, tmp_path / "several")
    changes = {"problem_type": "multi_label_classification", "crop_scale": [0.8, 1.0], "flip_probability": 0.0}
    changes |= {"num_train_epochs": 20, "base_learning_rate": 0.02}
    trainer = smoke_trainer(data, tmp_path / "data", **changes)
    assert trainer.model.config.problem_type == "multi_label_classification"
    names = trainer.labels.names
    assert names == ("even", "large", "hole") and trainer.args.metric_for_best_model == "mean_auc"
    metrics = smoke_run(data, tmp_path / "run", **changes)
    assert metrics["eval_mean_auc"] > 0.7
    pixel_values = torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(24)])
    targets = torch.stack([trainer.eval_dataset[i]["labels"] for i in range(24)]).numpy()
    model = HiViTForImageClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        scores = model(pixel_values).logits.numpy()
    for index, name in enumerate(names):
        expected = roc_auc_score(targets[:, index], scores[:, index])
        assert metrics[f"eval_auc_{name}"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_mean_auc"] == pytest.approx(roc_auc_score(targets, scores), abs=1e-6)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores), torch.tensor(targets))
    assert metrics["eval_loss"] == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.slow
def test_columns_of_zeros_and_ones_and_numbers(digits, tmp_path):
    """One column per label, and one per number."""
    splits = DatasetDict.load_from_disk(digits)

    def columns(split):
        even = [int(d % 2 == 0) for d in split["label"]]
        ink = [float(np.asarray(image).mean()) / 40 - 2 for image in split["image"]]
        split = split.remove_columns("label").add_column("even", even)
        return split.add_column("odd", [1 - e for e in even]).add_column("ink", ink)

    DatasetDict({name: columns(split) for name, split in splits.items()}).save_to_disk(tmp_path / "data")
    changes = {"crop_scale": [0.9, 1.0], "flip_probability": 0.0, "num_train_epochs": 15, "base_learning_rate": 0.02}
    several = {"problem_type": "multi_label_classification", "label_column_name": ["even", "odd"]}
    metrics = smoke_run(tmp_path / "data", tmp_path / "a", **several, **changes)
    assert set(metrics) >= {"eval_mean_auc", "eval_auc_even", "eval_auc_odd"} and metrics["eval_mean_auc"] > 0.6
    number = {"problem_type": "regression", "label_column_name": "ink"}
    spread = smoke_trainer(tmp_path / "data", tmp_path / "b", **number).eval_dataset.targets.std().item()
    metrics = smoke_run(tmp_path / "data", tmp_path / "b", **number, **changes)
    assert metrics["eval_rmse"] < spread and metrics["eval_r2"] > 0.1
    assert metrics["eval_mae"] <= metrics["eval_rmse"]


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_losses_of_other_problems_are_accumulated_as_means(problem_type, digits, tmp_path):
    data = several_labels(digits, tmp_path / "several")
    if problem_type == "regression":
        splits = DatasetDict.load_from_disk(data)
        for name, split in splits.items():
            splits[name] = split.add_column("number", [float(len(row)) for row in split["labels"]])
        splits.save_to_disk(tmp_path / "numbers")
        data = str(tmp_path / "numbers")
    changes = {"problem_type": problem_type, "stop_after_steps": 1}
    changes |= {"label_column_name": "number" if problem_type == "regression" else "labels"}
    losses = []
    for size in (8, 16):
        folder = tmp_path / f"run{size}"
        smoke_run(data, folder, per_device_train_batch_size=size, **changes)
        losses.append(log_of(folder)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
