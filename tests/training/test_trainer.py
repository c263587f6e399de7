"""The trainer of all tasks: layer-wise learning rates with any optimizer, schedules, batches, moving average, stops."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Trainer

from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.modeling_hivit import layer_id
from hivit_hf.training.arguments import HiViTTrainingArguments
from hivit_hf.training.trainer import AVERAGE, HiViTTrainer
from support.classification import Colors, log_of


CONFIG = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}
CONFIG |= {"num_labels": 2}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


@pytest.fixture
def make(tmp_path):
    """A function that makes a trainer of 16 images in batches of 8, two steps per epoch."""

    def make_trainer(count: int = 16, trainer_class=HiViTTrainer, **changes) -> HiViTTrainer:
        values = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "num_train_epochs": 2}
        values |= {"learning_rate": 1e-3, "logging_steps": 1, "report_to": ["none"], "dataloader_num_workers": 0}
        args = HiViTTrainingArguments(**{**values, "seed": 0, **changes})
        torch.manual_seed(0)
        model = HiViTForImageClassification(HiViTConfig(**CONFIG))
        data = {"train_dataset": Colors(count), "eval_dataset": Colors(11), "compute_metrics": accuracy}
        trainer = trainer_class(args, model=model, **data)
        trainer.save_folder = Path(args.output_dir)
        return trainer

    return make_trainer


def finish(trainer: HiViTTrainer) -> dict[str, float]:
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_and_push("image-classification")
    return metrics


def rates(trainer: HiViTTrainer) -> list[float]:
    """The learning rates of the steps, as fractions of the peak."""
    return [record["learning_rate"] / trainer.args.learning_rate for record in log_of(trainer.save_folder)]


# -- whole trainings ------------------------------------------------------------------------------------------------


def test_bright_and_dark_are_told_apart(make, capsys):
    trainer = make(num_train_epochs=15, learning_rate=3e-3, eval_strategy="steps", eval_steps=10)
    metrics = finish(trainer)
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.3
    assert "processes: 1, parameters: " in capsys.readouterr().out
    history = json.loads((trainer.save_folder / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in history if "eval_loss" in record] == [10, 20, 30, 30]
    assert "use_cache" not in json.loads((trainer.save_folder / "config.json").read_text())


def test_a_loss_that_is_not_finite_stops_the_training(make):
    trainer = make()
    for item in trainer.train_dataset:
        item["pixel_values"] = torch.full((3, 16, 16), math.nan)
    with pytest.raises(FloatingPointError, match=r"The loss is nan in step 1. Lower the learning rate, lengthen the"):
        trainer.train()


def test_fewer_images_than_a_step_takes(make):
    with pytest.raises(ValueError, match="16 training images are fewer than effective_batch_size 32: lower it, and"):
        make(effective_batch_size=32).train()


@pytest.mark.parametrize("how", ["FSDP", "DeepSpeed"])
def test_sharded_training_is_refused(how, make, monkeypatch):
    def create(trainer, original=Trainer.create_accelerator_and_postprocess):
        original(trainer)
        setattr(trainer, f"is_{how.lower()}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=r"FSDP and DeepSpeed are refused: training is data-parallel \(torchrun\)"):
        make()


def test_one_process_does_not_take_several_gpus(make, monkeypatch):
    monkeypatch.setattr(HiViTTrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match=r"One process has 4 GPUs: start with torchrun --nproc_per_node 4, or set"):
        make()


# -- optimizers, schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_any_optimizer_has_the_layers_learning_rates(optim, make):
    trainer = make(optim=optim, layer_decay=0.5, weight_decay=0.1, max_steps=1)
    finish(trainer)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__.lower().startswith(optim.split("_")[0])
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    for group in optimizer.param_groups:
        layers = {layer_id(names[id(parameter)], trainer.hivit_config, False) for parameter in group["params"]}
        assert len(layers) == 1
        assert group["initial_lr"] == pytest.approx(1e-3 * 0.5 ** (2 - layers.pop()))
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 and group["weight_decay"] else 0.0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_options_of_optimizers(make):
    trainer = make(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    defaults = trainer.create_optimizer().defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.5, 0.6), 1e-3)
    assert make(optim="sgd", optim_args="momentum=0.7").create_optimizer().defaults["momentum"] in (0.7, 0, 0.0)


def test_optimizers_that_group_by_themselves_are_refused(make, monkeypatch):
    for found in ((lambda: None, {}), (torch.optim.SGD, {"params": []}), (torch.optim.SGD, {"optimizer_dict": {}})):
        trainer = make(layer_decay=0.5)
        monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda args, model, found=found: found)
        with pytest.raises(ValueError, match="groups the parameters by itself, without layer_decay: take another one"):
            trainer.create_optimizer()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 0.75, 0.5, 0.25]),
        ({"warmup_steps": 2}, [0, 0.5, 1, 0.5]),
        ({"warmup_steps": 0.5}, [0, 0.5, 1, 0.5]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 0.5, 1, 1]),
        ({"lr_scheduler_type": "cosine", "max_steps": 2}, [1, 0.5]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
            [1, 0.75 + 2**0.5 / 8, 0.75, 0.75 - 2**0.5 / 8],
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 1.0}'}, [1, 1, 1, 1]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}, [1, 0.5625, 0.25, 0.0625]),
        ({"max_steps": 3}, [1, 2 / 3, 1 / 3]),
        ({"stop_after_steps": 3}, [1, 0.75, 0.5]),
    ],
    ids=str,
)
def test_schedules(changes, expected, make):
    trainer = make(**changes, eval_strategy="no", save_strategy="no")
    finish(trainer)
    assert rates(trainer) == pytest.approx(expected, abs=1e-4)


def test_plateaus_are_of_the_loss(make):
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}}
    changes["lr_scheduler_kwargs"]["threshold"] = 2.0  # no loss is that low
    trainer = make(**changes, num_train_epochs=3)
    finish(trainer)
    assert rates(trainer) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_schedules_whose_options_do_not_fit(make):
    trainer = make(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"minimum": 1.0})
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs {'minimum': 1.0} do not fit lr_scheduler_type cos"):
        trainer.train()


# -- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "fits", "used"),
    [(8, 8, 8), (8, 5, 4), (7, 5, 4), (6, 3, 2), *(pytest.param(n, 2, 2, marks=pytest.mark.slow) for n in (6, 8))],
)
def test_smaller_batches_where_memory_ends_keep_the_images_per_step(first, fits, used, make, monkeypatch):
    images, tried = [], []

    def step(trainer, model, inputs, number=None, original=HiViTTrainer.training_step):
        tried.append(len(inputs["pixel_values"]))
        if len(inputs["pixel_values"]) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        images.append(len(inputs["pixel_values"]))
        return original(trainer, model, inputs, number)

    monkeypatch.setattr(HiViTTrainer, "training_step", step)
    effective = 4 * first
    changes = {"per_device_train_batch_size": first, "effective_batch_size": effective, "auto_find_batch_size": True}
    trainer = make(count=2 * effective, num_train_epochs=1, eval_strategy="no", **changes)
    assert trainer.train().global_step == 2
    assert set(images) == {used} and sum(images) == 2 * effective
    assert trainer.args.gradient_accumulation_steps == effective // used
    assert tried[0] == first


def test_smaller_batches_give_the_same_training(make, monkeypatch):
    whole = finish(make(eval_strategy="no"))

    def step(trainer, model, inputs, number=None, original=HiViTTrainer.training_step):
        if len(inputs["pixel_values"]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(trainer, model, inputs, number)

    monkeypatch.setattr(HiViTTrainer, "training_step", step)
    parts = finish(make(eval_strategy="no", auto_find_batch_size=True))
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


def test_whole_batches_only_and_all_images_in_evaluations(make):
    trainer = make(count=21, num_train_epochs=1, per_device_eval_batch_size=4)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(len(prediction.label_ids)) or {}
    assert trainer.steps_per_epoch() == 2 and trainer.args.dataloader_drop_last is False
    finish(trainer)
    assert seen == [11, 11]


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"effective_batch_size": 8}])
def test_accumulation_gives_the_step_of_the_whole_batch(changes, make):
    whole = finish(make())
    trainer = make(per_device_train_batch_size=4, **changes)
    assert (trainer.args.gradient_accumulation_steps, trainer.args.effective_batch_size) == (2, 8)
    assert finish(trainer)["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


# -- length, stops, checkpoints -------------------------------------------------------------------------------------


def test_stopping_after_steps_saves_and_resumes_to_the_whole_training(make, tmp_path):
    whole = finish(make(num_train_epochs=3, ema_decay=0.9))
    parts = {"output_dir": str(tmp_path / "parts"), "num_train_epochs": 3, "ema_decay": 0.9}
    parts |= {"save_strategy": "steps"}  # whose 500 are never reached
    first = make(stop_after_steps=3, **parts)
    first.train()
    checkpoint = first.save_folder / "checkpoint-3"
    assert first.state.global_step == 3 and (checkpoint / AVERAGE).exists()
    second = make(**parts)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.evaluate()["eval_loss"] == whole["eval_loss"]
    assert second.state.global_step == 6


def test_the_best_checkpoint_is_kept_and_training_stops_early(make):
    accuracies = iter([0.5, 0.9, 0.3, 0.2, 0.1, 0.1])
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    changes |= {"metric_for_best_model": "accuracy", "ema_decay": 0.5, "save_total_limit": 6}
    trainer = make(num_train_epochs=3, early_stopping_patience=2, **changes)
    trainer.compute_metrics = lambda prediction: {"accuracy": next(accuracies)}
    finish(trainer)
    assert (trainer.state.global_step, trainer.state.best_global_step) == (4, 2)
    average = load_file(trainer.save_folder / "checkpoint-2" / AVERAGE)
    kept = load_file(trainer.save_folder / "model.safetensors")
    assert all(torch.equal(kept[name], average[f"module.{name}"]) for name in kept)


def test_a_metric_that_does_not_exist(make):
    trainer = make(metric_for_best_model="acuracy", load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"There is no metric_for_best_model acuracy; the metrics are .*accuracy"):
        trainer.train()


def test_moving_averages_are_evaluated_and_kept(make):
    trainer = make(ema_decay=0.5, num_train_epochs=1, eval_strategy="no", learning_rate=0.1)
    weights, expected = [], None
    name = "classifier.weight"

    def step(optimizer, *arguments):
        weights.append(trainer.model.get_parameter(name).detach().clone())

    trainer.create_optimizer().register_step_post_hook(step)
    finish(trainer)
    expected = weights[0] * 0.5 + weights[1] * 0.5  # torch's average begins as a copy after the first step
    assert_close(load_file(trainer.save_folder / "model.safetensors")[name], expected)
    assert_close(load_file(trainer.save_folder / "checkpoint-2" / "model.safetensors")[name], weights[1])


# -- other arguments of transformers that could break here -----------------------------------------------------------


WORKING = [
    {"eval_on_start": True, "ema_decay": 0.9},
    {"eval_delay": 1, "run_name": "a", "project": "b", "log_level": "error", "log_level_replica": "error"},
    {"eval_accumulation_steps": 1, "torch_empty_cache_steps": 1, "per_device_eval_batch_size": 2},
    {"debug": "underflow_overflow", "skip_memory_metrics": False, "logging_strategy": "epoch"},
    {"save_strategy": "best", "metric_for_best_model": "accuracy", "load_best_model_at_end": True, "ema_decay": 0.9},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"bf16": True, "disable_tqdm": True, "data_seed": 1},
    {"eval_strategy": "steps", "eval_steps": 0.5, "save_strategy": "steps", "save_steps": 0.5, "logging_steps": 0.5},
    {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_pin_memory": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", WORKING, ids=lambda changes: next(iter(changes)))
def test_arguments_of_transformers(changes, make):
    plain, changed = finish(make()), finish(make(**changes))
    assert 0 <= changed["eval_accuracy"] <= 1
    if not {"ema_decay", "bf16"} & changes.keys():
        assert changed["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_compiled_networks_take_the_same_steps(make):
    plain = finish(make())
    torch._dynamo.reset()
    compiled = finish(make(torch_compile=True, torch_compile_backend="eager"))  # inductor takes a minute of C++
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_trackers(make):
    trainer = make(report_to=["tensorboard"], logging_steps=2)
    finish(trainer)
    assert list(trainer.save_folder.rglob("events.out.tfevents*"))
    assert [record["step"] for record in log_of(trainer.save_folder)] == [1, 2, 4]
