"""Arguments of fine-tuning classifiers: what does not fit, alone and together."""

import pytest

from hivit_hf.classification.arguments import (
    ClassificationDataArguments,
    ClassificationModelArguments,
    ClassificationTrainingArguments,
    check_together,
)


def made(**values) -> tuple:
    """The three dataclasses with these values, each where it belongs."""
    values = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", **values}
    parts, used = [], set()
    for part in (ClassificationModelArguments, ClassificationDataArguments, ClassificationTrainingArguments):
        own = {name: value for name, value in values.items() if name in part.__dataclass_fields__}
        parts.append(part(**own))
        used |= own.keys()
    assert used == values.keys()
    check_together(*parts)
    return tuple(parts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"problem_type": "multi_label"},
            "problem_type must be one of .*, got 'multi_label'",
        ),
        ({"image_size": 0}, "image_size must be a positive number, got 0"),
        ({"head_init_std": 0.0}, "head_init_std must be a positive number, got 0.0"),
        ({"lora_r": 0}, "lora_r must be a positive number, got 0"),
        ({"lora_r": 4, "init_relative_position_bias": True}, "leave out --init_relative_position_bias"),
        ({"lora_r": 4, "ema_decay": 0.9}, "--lora_r keeps the weights as they are: leave out --ema_decay"),
        ({"config_overrides": '{"image_size": 64}'}, "--config_overrides sets image_size, which have flags of their"),
        ({"config_overrides": '{"problem_type": "regression"}'}, "--config_overrides sets problem_type"),
        ({"crop_scale": [0.5]}, r"crop_scale must be two numbers such as 0.08 1.0, got \[0.5\]"),
        ({"crop_scale": [0.5, 0.4]}, "crop_scale must be two numbers"),
        ({"crop_scale": [0.5, 1.5]}, "crop_scale must be two numbers"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale must be two numbers"),
        ({"color_jitter": -0.1}, "color_jitter must not be negative"),
        ({"rotation_degrees": 200}, r"rotation_degrees must be in \[0, 180\], got 200"),
        ({"random_erasing": 1.1}, r"random_erasing must be in \[0, 1\]"),
        ({"mixup": -0.1}, "mixup must not be negative"),
        ({"cutmix": float("inf")}, "cutmix must not be negative, got inf"),
        ({"mixup_prob": 1.1}, r"mixup_prob must be in \[0, 1\]"),
        ({"mixup_switch_prob": -1}, r"mixup_switch_prob must be in \[0, 1\]"),
        ({"label_smoothing_factor": 1.0}, r"label_smoothing_factor must be in \[0, 1\)"),
        ({"crop_pct": 0.0}, r"crop_pct must be in \(0, 1\], got 0.0"),
        ({"crop_pct": 1.1}, r"crop_pct must be in \(0, 1\]"),
        ({"warmup_epochs": 20}, "warmup_epochs must be less than num_train_epochs 20, got 20"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
        ({"min_learning_rate": 1.0}, "min_learning_rate must not exceed the peak learning rate, 6.25e-05"),
        ({"warmup_learning_rate": 1.0}, "warmup_learning_rate must not exceed the peak learning rate"),
        ({"min_learning_rate": -1.0}, "min_learning_rate must not be negative"),
        (
            {"min_learning_rate": 1e-6, "lr_scheduler_type": "linear"},
            "min_learning_rate is for lr_scheduler_type cosine, but that is linear: set it to 0",
        ),
        (
            {"warmup_learning_rate": 1e-6, "lr_scheduler_type": "constant"},
            "warmup_learning_rate is for lr_scheduler_type cosine, but that is constant",
        ),
        ({"mixup": 0.8, "problem_type": "regression"}, "mixup is for one label per image: leave it out for regress"),
        ({"cutmix": 1.0, "problem_type": "multi_label_classification"}, "cutmix is for one label per image"),
        ({"label_smoothing_factor": 0.1, "problem_type": "regression"}, "label_smoothing_factor is for one label"),
        ({"label_column_name": ["a", "b"]}, "One label per image is one column, got a, b: give one --label_column_n"),
        (
            {"mixup": 0.8, "per_device_train_batch_size": 7},
            "mix images in pairs, so per_device_train_batch_size must be even, got 7: use 8, or --mixup 0 --cutmix 0",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        made(**values)


def test_defaults_are_the_published_schedule():
    _, data, training = made()
    assert (training.lr_scheduler_type, training.warmup_epochs, training.weight_decay) == ("cosine", 2, 0.05)
    assert training.count_early_layers and training.max_grad_norm == 0
    assert (data.crop_scale, data.mixup_prob, data.mixup_switch_prob) == ([0.08, 1.0], 1.0, 0.5)
    made(max_steps=5, warmup_epochs=20)  # then epochs do not limit the warmup
    made(mixup=0.8, per_device_train_batch_size=8, label_smoothing_factor=0.1)
    made(problem_type="multi_label_classification", label_column_name=["a", "b"])
