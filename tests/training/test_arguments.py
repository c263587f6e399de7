"""Arguments of all trainings: what is refused and why, batches and learning rates, what a resumption must share."""

from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments

from hivit_hf.training.arguments import (
    NUMBERS,
    REFUSED,
    DataArguments,
    HiViTTrainingArguments,
    ModelArguments,
    RecipeArguments,
    identity,
)
from hivit_hf.training.command_line import parse_arguments


# Fields of `TrainingArguments` that `Trainer` handles as everywhere; test_trainer.py runs what could break here.
UNCHANGED = """
lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args adam_epsilon gradient_accumulation_steps
label_smoothing_factor fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
auto_find_batch_size logging_strategy log_on_each_node log_level log_level_replica disable_tqdm run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay eval_on_start eval_accumulation_steps
save_steps save_on_each_node push_to_hub hub_token hub_model_id hub_always_push hub_revision load_best_model_at_end
greater_is_better full_determinism seed data_seed use_cpu dataloader_pin_memory dataloader_prefetch_factor
dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
ddp_backend ddp_timeout debug skip_memory_metrics local_rank
"""


def made(**values) -> HiViTTrainingArguments:
    return HiViTTrainingArguments(**{"output_dir": "out", **values})


def test_every_field_of_transformers_is_ours_or_refused_or_known_to_work():
    ours = set(HiViTTrainingArguments.__annotations__) | set(RecipeArguments.__annotations__)
    theirs = {item.name for item in fields(TrainingArguments)}
    unchanged = set(UNCHANGED.split())
    assert not theirs - ours - set(REFUSED) - unchanged
    assert not (ours | set(REFUSED)) & unchanged
    assert theirs >= NUMBERS and all(reason.strip() == reason for reason in REFUSED.values())


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    item = next((item for item in fields(HiViTTrainingArguments) if item.name == name), None)
    if item is None:
        pytest.skip(f"this transformers has no {name}")
    default = item.default if item.default_factory is MISSING else item.default_factory()
    with pytest.raises(ValueError, match=f"--{name} is refused: ") as error:
        made(**{name: not default if isinstance(default, bool) else "something"})
    assert REFUSED[name] in str(error.value)
    made(**{name: default})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": None}, "There is nowhere to write: give --output_dir."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a positive number, got 0."),
        ({"num_train_epochs": -1}, "num_train_epochs must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
        ({"base_learning_rate": 0}, "base_learning_rate must be a positive number"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\), got 1.0"),
        ({"adam_beta2": -0.5}, r"adam_beta2 must be in \[0, 1\)"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\]"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\)"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be a positive number"),
        ({"stop_after_steps": 0}, "stop_after_steps must be a positive number"),
        ({"save_total_limit": 0}, "save_total_limit must be a positive number"),
        ({"logging_steps": 0}, "logging_steps must be a positive number"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must not be negative"),
        ({"logging_strategy": "no"}, "a loss that is not finite would remain unnoticed"),
        ({"eval_steps": 5}, "eval_steps has no effect with eval_strategy epoch: give --eval_strategy steps"),
        ({"save_steps": 5}, "save_steps has no effect with save_strategy epoch: give --save_strategy steps"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "The best checkpoint is one that was evaluated"),
        ({"early_stopping_patience": 2, "eval_strategy": "steps"}, "eval_strategy is steps and save_strategy epoch"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "eval_strategy is epoch and save_strategy steps"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "The best checkpoint is one that was evaluated"),
        ({"hub_model_id": "me/mine"}, "--hub_model_id and --hub_private_repo are for --push_to_hub"),
        ({"hub_private_repo": True}, "--hub_model_id and --hub_private_repo are for --push_to_hub"),
        ({"do_train": False, "push_to_hub": True}, "--do_train false trains no model"),
        ({"do_train": False, "resume_from_checkpoint": "latest"}, "--do_train false trains no model"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag is not a valid SchedulerType"),
        ({"optim": "adam_torch"}, "adam_torch is not a valid OptimizerNames"),
        ({"eval_strategy": "always"}, "always is not a valid IntervalStrategy"),
        (
            {"effective_batch_size": 48},
            "effective_batch_size 48 is no multiple of 32 images on 1 processes: choose per_device_train_batch_size",
        ),
        (
            {"effective_batch_size": 64, "gradient_accumulation_steps": 4},
            "effective_batch_size 64 takes 2 batches of 32 images, but gradient_accumulation_steps is 4: leave one of",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        made(**values)


@pytest.mark.parametrize(
    ("values", "steps", "images"),
    [
        ({}, 1, 32),
        ({"gradient_accumulation_steps": 3}, 3, 96),
        ({"effective_batch_size": 64}, 2, 64),
        ({"effective_batch_size": 64, "gradient_accumulation_steps": 2}, 2, 64),
        ({"effective_batch_size": 8, "per_device_train_batch_size": 8}, 1, 8),
    ],
)
def test_images_per_step_and_learning_rate(values, steps, images):
    args = made(**values, base_learning_rate=0.01)
    assert (args.gradient_accumulation_steps, args.effective_batch_size) == (steps, images)
    assert args.learning_rate == 0.01 * images / 256
    assert made(**values, learning_rate=0.5).learning_rate == 0.5


def test_defaults():
    args = made()
    assert (args.lr_scheduler_type, args.optim, args.seed, args.data_seed) == ("linear", "adamw_torch", 42, 42)
    assert (args.eval_strategy, args.save_strategy, args.report_to) == ("epoch", "epoch", ["tensorboard"])
    assert made(report_to=["none"]).report_to == [] and made(seed=3).data_seed == 3
    assert made(seed=3, data_seed=4).data_seed == 4


def test_the_best_checkpoint_is_by_the_metric_of_the_task_unless_told():
    assert made(early_stopping_patience=2).load_best_model_at_end
    assert made(early_stopping_patience=2).metric_for_best_model is None
    told = made(early_stopping_patience=2, metric_for_best_model="loss")
    assert (told.metric_for_best_model, told.greater_is_better) == ("loss", False)
    plateau = made(lr_scheduler_type="reduce_lr_on_plateau")  # which needs one that falls
    assert (plateau.metric_for_best_model, plateau.greater_is_better) == ("loss", False)


def test_switches(recwarn):
    assert made(gradient_checkpointing=True).gradient_checkpointing
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
    assert made(push_to_hub=True).hub_private_repo is None  # the account's default
    flags = ["--output_dir", "out", "--push_to_hub", "--hub_private_repo", "--no_do_train", "--do_train"]
    (args,) = parse_arguments((HiViTTrainingArguments,), None, flags)
    assert args.hub_private_repo is True and args.do_train is True
    assert made(show_layer_table=True, output_dir=None).show_layer_table


def test_what_a_resumption_must_share():
    shared = identity(made(seed=3, weight_decay=0.1), ModelArguments(model_name_or_path="model"))
    assert shared["seed"] == 3 and shared["lr_scheduler_type"] == "linear" and shared["model_name_or_path"] == "model"
    free = {"stop_after_steps": 3, "save_total_limit": 9, "logging_steps": 1, "dataloader_num_workers": 0}
    free |= {"report_to": ["none"], "output_dir": "elsewhere", "torch_compile": True, "gradient_checkpointing": True}
    free |= {"per_device_eval_batch_size": 3, "eval_strategy": "no", "show_layer_table": True}
    same = identity(made(seed=3, weight_decay=0.1, **free), ModelArguments(model_name_or_path="model"))
    assert same == shared
    changes = {"seed": 4, "weight_decay": 0.2, "layer_decay": 0.5, "ema_decay": 0.5, "bf16": True, "optim": "sgd"}
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 5, "max_steps": 9, "num_train_epochs": 3}
    changes |= {"max_grad_norm": 1.0, "effective_batch_size": 64, "learning_rate": 1.0, "adam_beta2": 0.95}
    for name, value in changes.items():
        assert identity(made(**{"seed": 3, "weight_decay": 0.1, name: value}))[name] != shared[name], name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Give either --model_name_or_path, or --from_scratch with --architecture."),
        ({"model_name_or_path": "m", "from_scratch": True}, "Give either --model_name_or_path, or --from_scratch"),
        ({"from_scratch": True}, "--from_scratch needs --architecture: one of tiny, small"),
        ({"from_scratch": True, "architecture": "huge"}, "architecture must be one of tiny, .*, got 'huge'"),
        ({"model_name_or_path": "m", "config_overrides": "{"}, "config_overrides must be a JSON object"),
        ({"model_name_or_path": "m", "drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
        (
            {"model_name_or_path": "m", "config_overrides": '{"drop_path_rate": 0.5}'},
            "--config_overrides sets drop_path_rate, which have flags of their own",
        ),
    ],
)
def test_models_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**values)
    given = ModelArguments(model_name_or_path="m", config_overrides='{"window_size": 14}')
    assert given.overrides() == {"window_size": 14}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": None}, "There is no data: give either --dataset_name, or --train_dir."),
        ({"train_dir": "t"}, "There is no data: give either --dataset_name, or --train_dir."),
        ({"eval_split_name": "test", "train_val_split": 0.1}, "Give --eval_split_name or --train_val_split, not both"),
        (
            {"dataset_name": None, "train_dir": "t", "validation_dir": "v", "train_val_split": 0.1},
            "--validation_dir or",
        ),
        ({"train_val_split": 1.0}, r"train_val_split must be in \(0, 1\)"),
        ({"max_train_samples": 0}, "max_train_samples must be a positive number"),
        ({"max_eval_samples": -3}, "max_eval_samples must be a positive number"),
        ({"check_images": -1}, "check_images must not be negative"),
        ({"image_mean": [float("nan")]}, "image_mean must be finite numbers"),
        ({"image_std": [0.0]}, "image_std must be positive numbers"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\]"),
    ],
)
def test_data_that_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"dataset_name": "data", **values})


def test_location_of_the_data():
    told = {"dataset_name": "data", "dataset_config_name": "c", "dataset_revision": "r"}
    assert DataArguments(**told).location() == {**told, "train_dir": None, "validation_dir": None}
    folders = DataArguments(train_dir="t", validation_dir="v").location()
    assert (folders["train_dir"], folders["validation_dir"], folders["dataset_name"]) == ("t", "v", None)
