"""Fine-tuning with Trainer: layer-wise decay, schedule, mixing, starts, resumption, recipes and flags."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from huggingface_hub import HfApi
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

import finetune_classification
from digits.data import digits_dataset
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.classification.arguments_old import FinetuneRecipe
from hivit_hf.classification.initialization import load_classifier, random_classifier
from hivit_hf.classification.run_old import FinetuneRun
from hivit_hf.data.transforms import ClassificationCollator
from hivit_hf.training import trainer_old as finetune
from hivit_hf.training.initialization import resize_for
from hivit_hf.training.optim import cosine_learning_rate, layer_id, layer_table, layerwise_parameter_groups
from hivit_hf.training.recipe_old import read_recipe


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(
    path for kind in ("finetune_*", "supervised_*") for path in (EXAMPLES / "recipes").glob(f"{kind}.yaml")
)
SMOKE = EXAMPLES / "recipes" / "finetune_smoke_cpu.yaml"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """48 digits to learn from and 24 to evaluate with, of four classes, as a saved dataset."""
    splits, folder = digits_dataset(), tmp_path_factory.mktemp("data") / "digits"
    names = [str(digit) for digit in range(4)]
    parts = {}
    for name, split, count in (("train", "train", 48), ("test", "test", 24)):
        rows = [i for i, label in enumerate(splits[split]["label"]) if label < 4][:count]
        images = [splits[split][i]["image"] for i in rows]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        labels = [splits[split]["label"][i] for i in rows]
        parts[name] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture
def make_run(digits, tmp_path):
    """A function that makes a run of the smoke recipe: 3 steps of 16 images."""

    def make(**changes) -> FinetuneRun:
        return flagged_run(digits, tmp_path / "run", **changes)

    return make


def log_of(folder: Path) -> list[dict]:
    """The steps of a run's log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record for record in history if "loss" in record]


def start_folder(folder: Path, kind=HiViTForMaskedImageModeling, **changes) -> str:
    torch.manual_seed(3)
    kind(HiViTConfig(**{**NETWORK, **changes})).save_pretrained(folder)
    return str(folder)


# -- layer-wise decay -----------------------------------------------------------------------------------------------


def original_layer_ids(depths=(2, 2, 20)) -> dict[str, int]:
    """The published rule, written from the original's flat list of blocks: merges at 4 and 9 in base."""
    names, ids, block = {"hivit.embeddings.projection.weight": 0, "hivit.position_embeddings": 0}, [], 0
    for stage, depth in enumerate(depths):
        for index in range(depth * (1 if stage == 2 else 2)):
            block += 1
            names[f"hivit.stages.{stage}.layers.{index}.norm2.weight"] = block
        if stage < 2:
            names[f"hivit.stages.{stage}.merge.reduction.weight"] = block
            ids.append(block)
    assert ids == [4, 8]
    return names | {"hivit.layernorm.weight": block + 1, "classifier.weight": block + 1, "classifier.bias": block + 1}


@pytest.fixture(scope="module")
def base() -> HiViTForImageClassification:
    with torch.device("meta"):
        return HiViTForImageClassification(HiViTConfig.from_architecture("base", num_labels=1000))


def test_layer_ids_of_base_are_the_published_ones(base):
    for name, expected in original_layer_ids().items():
        assert layer_id(name, base.config) == expected, name
        assert layer_id(f"base_model.model.{name}", base.config) == expected  # as PEFT names it
    ids = {layer_id(name, base.config) for name, _ in base.named_parameters()}
    assert ids == set(range(30))
    dense = {name: layer_id(name, base.config, count_early_layers=False) for name, _ in base.named_parameters()}
    assert set(dense.values()) == set(range(22))
    for name, expected in dense.items():
        if "stages.2" in name:
            assert expected == int(name.split(".")[4]) + 1
        else:
            assert expected == (21 if name.startswith(("classifier", "hivit.layernorm")) else 0)


def test_scales_and_decay_of_base(base):
    groups = layerwise_parameter_groups(base, base.config, 0.05, 2e-3, layer_decay=0.85)
    scales = {group["layer_id"]: group["scale"] for group in groups}
    assert scales[0] == pytest.approx(0.85**29) and f"{scales[0]:.4f}" == "0.0090"
    assert scales[28] == 0.85 and scales[29] == 1.0
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    exempt = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    for name, parameter in base.named_parameters():
        tables = name.endswith(("position_embeddings", "relative_position_bias_table"))
        assert (name in exempt) == (parameter.ndim == 1 or tables) and (name in exempt) != (name in decayed)
    assert all(group["lr"] == pytest.approx(2e-3 * 0.85 ** (29 - group["layer_id"])) for group in groups)
    table = layer_table(groups).splitlines()
    assert len(table) == 61
    assert table[1].split()[:4] == ["0", "0.0090", "1.795e-05", "0.05"]
    assert table[-1].split()[:4] == ["29", "1.0000", "2.000e-03", "0"]


@pytest.mark.parametrize("count_early_layers", [True, False])
def test_layer_decay_changes_the_step_that_is_taken(count_early_layers, make_run):
    """The first step of AdamW has the length of its learning rate, whatever the gradient."""
    run = make_run(
        layer_decay=0.5, count_early_layers=count_early_layers, weight_decay=0.0, max_steps=1, effective_batch_size=8
    )
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.train()
    largest = {}
    for name, parameter in run.model.named_parameters():
        layer = layer_id(name, run.config, count_early_layers)
        largest.setdefault(layer, []).append((parameter.detach() - before[name]).abs().max().item())
    last = max(largest)
    assert last == (7 if count_early_layers else 3)
    rate = run.recipe.learning_rate
    for layer, steps in largest.items():
        assert max(steps) == pytest.approx(rate * 0.5 ** (last - layer), rel=1e-2), layer


def test_the_rate_of_each_step_is_the_formula(make_run, tmp_path):
    run = make_run(
        epochs=4, warmup_epochs=1, min_learning_rate=1e-5, warmup_learning_rate=2e-5, layer_decay=0.5, max_steps=10
    )
    run.train()
    rates = [record["learning_rate"] for record in log_of(tmp_path / "run")]
    high, low, first, warmup, total = 4e-3 * 16 / 256, 1e-5, 2e-5, 3, 12
    expected = [
        first + (high - first) * step / warmup
        if step < warmup
        else low + (high - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        for step in range(10)
    ]
    # Trainer logs the first group's rate, which belongs to layer 0 of 7
    assert rates == pytest.approx([rate * 0.5**7 for rate in expected], rel=1e-6)


def test_warm_up_from_another_rate_than_zero():
    rates = [cosine_learning_rate(step, 10, 4, base=1.0, start=0.2) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    with pytest.raises(ValueError, match="start must be between 0 and base"):
        cosine_learning_rate(0, 10, 4, base=1.0, start=2.0)


# -- mixup and cutmix -----------------------------------------------------------------------------------------------


def mixed_batches(mixup, cutmix, count=400, **keywords):
    """Share of the own image in mixed images and in targets, of batches of one black and one white image."""
    batches = ClassificationCollator(2, mixup, cutmix, **keywords)
    images = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    shares, targets, cut = [], [], []
    for seed in range(count):
        items = [{"pixel_values": p, "labels": torch.tensor(i), "seed": seed} for i, p in enumerate(images)]
        batch = batches(items)
        assert_close(batch["labels"].sum(dim=1), torch.ones(2))
        shares.append(batch["pixel_values"][1].mean().item())
        targets.append(batch["labels"][1, 1].item())
        cut.append(set(batch["pixel_values"].unique().tolist()) <= {0.0, 1.0})
    return np.array(shares), np.array(targets), np.array(cut)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_distributed_as_that_of_torchvision(mixup, cutmix):
    shares, targets, cut = mixed_batches(mixup, cutmix)
    assert_close(torch.tensor(shares), torch.tensor(targets), atol=1e-6, rtol=0)
    assert cut.all() if cutmix else not cut.any()
    reference = v2.CutMix(alpha=cutmix, num_classes=2) if cutmix else v2.MixUp(alpha=mixup, num_classes=2)
    images, others = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)]), []
    for _ in range(400):
        _, mixed = reference(images, torch.tensor([0, 1]))
        others.append(mixed[1, 1].item())
    quantiles = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(targets, quantiles) - np.quantile(others, quantiles)).max() < 0.13


def test_both_kinds_take_turns_and_smoothing_adds_up():
    _, targets, cut = mixed_batches(0.8, 1.0, label_smoothing=0.1)
    assert 0.4 < cut.mean() < 0.6
    assert targets.min() >= 0.05 - 1e-6 and targets.max() <= 0.95 + 1e-6
    assert mixed_batches(0.8, 1.0, switch_probability=0.9)[2].mean() > 0.8
    _, targets, _ = mixed_batches(0.8, 0.0, probability=0.5)
    assert 0.4 < (targets == 1).mean() < 0.6
    items = [{"pixel_values": torch.zeros(1), "labels": torch.tensor(1), "seed": 0}]
    smoothed = ClassificationCollator(4, label_smoothing=0.2)(items)
    assert_close(smoothed["labels"], torch.tensor([[0.05, 0.85, 0.05, 0.05]]))


def test_evaluations_are_neither_mixed_nor_smoothed():
    items = [{"pixel_values": torch.ones(1, 4, 4) * i, "labels": torch.tensor(i)} for i in range(3)]
    batch = ClassificationCollator(4, mixup=0.8, label_smoothing=0.1)(items)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [0, 1, 2]


# -- where a classifier begins --------------------------------------------------------------------------------------


def test_from_a_pretraining_folder(tmp_path, caplog, capfd):
    folder = start_folder(tmp_path / "pretrained", use_relative_position_bias=False)
    encoder = HiViTModel.from_pretrained(folder, add_pooling_layer=False)
    start = load_classifier(folder, ["a", "b", "c"], "single_label_classification", head_init_std=2e-5)
    assert start.notes == [
        f"Not in {folder}, so they start fresh: the classifier, its norm, 2 relative position tables."
    ]
    assert "decoder" not in caplog.text + "".join(capfd.readouterr())
    model = start.model
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.use_relative_position_bias
    assert 1e-5 < model.classifier.weight.std() < 3e-5 and not model.classifier.bias.any()
    assert (model.hivit.layernorm.weight == 1).all() and not model.hivit.layernorm.bias.any()
    own = dict(model.hivit.named_parameters())
    tables = [parameter for name, parameter in own.items() if name.endswith("table")]
    assert len(tables) == 2 and not any(table.any() for table in tables)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(own[name], parameter)
    drawn = load_classifier(folder, ["a"], "regression", draw_relative_tables=True).model
    assert 0.01 < drawn.hivit.stages[2].layers[0].attention.relative_position_bias_table.std() < 0.03
    plain = load_classifier(folder, ["a"], "regression", changes={"use_relative_position_bias": False})
    assert plain.notes == [f"Not in {folder}, so they start fresh: the classifier, its norm."]


def test_from_a_classifier_folder(tmp_path):
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    folder = start_folder(tmp_path / "classifier", HiViTForImageClassification, **labels)
    head = HiViTForImageClassification.from_pretrained(folder).classifier.weight
    same = load_classifier(folder, ["a", "b"], "single_label_classification")
    assert same.notes == [] and torch.equal(same.model.classifier.weight, head)
    for names in (["a", "b", "c"], ["b", "a"]):
        other = load_classifier(folder, names, "single_label_classification")
        assert other.notes == [
            f"The classifier of {folder} has 2 labels that are not the {len(names)} of this dataset: "
            "its head starts fresh."
        ]
        assert other.model.classifier.weight.shape == (len(names), 64)
        assert not torch.equal(other.model.classifier.weight[:2], head) and not other.model.classifier.bias.any()
        assert list(other.model.config.label2id) == names


def test_another_image_size_interpolates_what_depends_on_it(tmp_path):
    folder = start_folder(tmp_path / "pretrained", use_relative_position_bias=False)
    small = load_classifier(folder, ["a"], "regression", draw_relative_tables=True).model.eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for layer in small.hivit.stages[2].layers:
            layer.attention.relative_position_bias_table.mul_(100)  # so that they matter
        small.classifier.weight.mul_(50)
        expected = small(pixel_values).logits
        resize_for(small, 64)
        assert small.config.image_size == 64 and small.hivit.position_embeddings.shape[1] == 64
        assert_close(small(pixel_values).logits, expected)
    small.save_pretrained(tmp_path / "resized")
    again = HiViTForImageClassification.from_pretrained(tmp_path / "resized").eval()
    assert_close(again(pixel_values).logits, expected)
    with pytest.raises(ValueError, match="multiple of patch_size 8"):
        load_classifier(folder, ["a"], "regression", image_size=30)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"architecture": "base"}, r"recipe is for base, whose hidden_size is 512, but that of .* is 64"),
        ({"changes": {"hidden_size": 128}}, r"do not fit the network: .* more are missing or of another shape"),
        ({"changes": {"image_size": 64}}, r"do not fit the network: hivit.position_embeddings"),
    ],
)
def test_weights_that_do_not_fit(keywords, message, tmp_path):
    folder = start_folder(tmp_path / "pretrained")
    with pytest.raises(ValueError, match=message):
        load_classifier(folder, ["a"], "regression", **keywords)


def test_relative_tables_of_supervised_training_are_drawn():
    numbers = {key: value for key, value in NETWORK.items() if not key.startswith("decoder")}
    table = "relative_position_bias_table"
    for drawn in (False, True):
        start = random_classifier("tiny", ["a"], "regression", numbers, 1e-3, drawn)
        tables = torch.cat([p.flatten() for name, p in start.model.named_parameters() if name.endswith(table)])
        assert (0.015 < tables.std() < 0.02) if drawn else not tables.any()
        assert start.model.classifier.weight.std() < 2e-3


# -- recipes and flags ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_mae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "base-mae"
    HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae")).save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_takes_two_steps(path, digits, tmp_path, base_mae, monkeypatch):
    values = read_recipe(path, FinetuneRecipe)
    for key in ("title", "source", "cost", "expected_result"):
        assert values[key]
    small = {"batch_size": 2, "effective_batch_size": 2, "num_workers": 0, "max_steps": 2, "eval_batch_size": 2}
    small |= {"dataset_name": str(digits), "output_dir": str(tmp_path), "max_eval_samples": 2, "tracker": "none"}
    start = {} if values.get("from_scratch") else {"model_name_or_path": str(base_mae)}
    if values.get("problem_type") == "multi_label_classification":
        small["dataset_name"] = several_labels(digits, tmp_path / "several")
    published = FinetuneRecipe(**values, dataset_name="data", output_dir="out", **start)
    rates = {"finetune_base_100ep": 2e-3, "finetune_base_chest_xray": 2e-3, "finetune_smoke_cpu": 5e-4}
    rates["finetune_digits"] = 5e-4
    assert published.learning_rate == pytest.approx(rates.get(path.stem, 1e-3))
    recipe = replace(published, **small, base_learning_rate=published.learning_rate * 256 / 2)
    recipe.check()
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *arguments: None)  # gigabytes, and tested elsewhere
    monkeypatch.setattr(FinetuneRun, "_save", lambda run, trainer: trainer.save_state())
    FinetuneRun(recipe, say=lambda sentence: None).train()
    assert log_of(tmp_path) and all(math.isfinite(record["loss"]) for record in log_of(tmp_path))


def several_labels(digits: Path, folder: Path) -> str:
    """The digits with several labels each: whether they are even, above one, or have a hole."""
    splits = DatasetDict.load_from_disk(digits)
    names = ["even", "large", "hole"]
    features = Features({"image": Image(), "labels": List(ClassLabel(names=names))})

    def relabeled(split):
        labels = [[i for i, yes in enumerate((d % 2 == 0, d > 1, d == 0)) if yes] for d in split["label"]]
        return Dataset.from_dict({"image": list(split["image"]), "labels": labels}, features=features)

    DatasetDict({name: relabeled(split) for name, split in splits.items()}).save_to_disk(folder)
    return str(folder)


def outcome(run: FinetuneRun, folder: Path) -> dict:
    """What can differ from one run to another."""
    metrics = run.train()
    records = log_of(folder)
    return {
        "losses": [record["loss"] for record in records],
        "rates": [record["learning_rate"] for record in records],
        "accuracy": metrics.get("accuracy"),
        "eval_loss": metrics["loss"],
        "weights": sum(p.detach().double().abs().sum().item() for p in run.model.parameters()),
    }


CHANGING = {
    "drop_path_rate": 0.5, "head_init_std": 0.5, "draw_relative_tables": True, "model": {"pooler_layernorm": False},
    "image_size": 64, "train_split": "test", "eval_split": "train", "eval_fraction": 0.25, "max_train_samples": 32,
    "max_eval_samples": 8, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "crop_scale": [0.3, 0.4],
    "flip_probability": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.9, "random_erasing": 1.0,
    "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.3, "crop_pct": 0.5, "epochs": 2, "warmup_epochs": 0.5,
    "max_steps": 2, "effective_batch_size": 8, "base_learning_rate": 1e-3, "min_learning_rate": 2e-4,
    "weight_decay": 5.0, "adam_betas": [0.5, 0.6], "layer_decay": 0.5, "clip_norm": 1e-9, "ema_decay": 0.9,
    "mixed_precision": "bf16", "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("plain")
    return outcome(flagged_run(digits, folder), folder)


def flagged_run(digits: Path, folder: Path, **changes) -> FinetuneRun:
    numbers = {
        "dataset_name": str(digits),
        "output_dir": str(folder),
        "epochs": 1,
        "batch_size": 8,
        "log_every_steps": 1,
    }
    numbers |= {"effective_batch_size": 16, "warmup_epochs": 0}
    recipe = FinetuneRecipe(**{**read_recipe(SMOKE, FinetuneRecipe), **numbers, **changes})
    if "model" in changes:
        recipe = replace(recipe, model=json.dumps({**json.loads(read_model()), **changes["model"]}))
    recipe.check()
    return FinetuneRun(recipe, say=lambda sentence: None)


def read_model() -> str:
    return json.dumps(read_recipe(SMOKE, FinetuneRecipe)["model"])


@pytest.mark.parametrize("name", CHANGING)
def test_flags_change_what_happens(name, digits, plain, tmp_path):
    changed = outcome(flagged_run(digits, tmp_path, **{name: CHANGING[name]}), tmp_path)
    assert changed != plain
    only_evaluation = {"eval_split", "max_eval_samples", "crop_pct", "ema_decay"}
    if name in only_evaluation:  # and nothing of the training
        assert changed["losses"] == plain["losses"]
    elif name not in ("layer_decay", "weight_decay", "clip_norm", "adam_betas", "base_learning_rate"):
        assert (changed["losses"], changed["rates"]) != (plain["losses"], plain["rates"])


def test_a_run_is_repeatable_whatever_the_workers(digits, plain, tmp_path):
    again = outcome(flagged_run(digits, tmp_path, num_workers=2, auto_augment=None), tmp_path)
    assert again == plain


def test_accumulation_gives_the_step_of_the_whole_batch(digits, plain, tmp_path):
    whole = outcome(flagged_run(digits, tmp_path, batch_size=16), tmp_path)
    assert whole["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert whole["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)


def test_switches_of_mixing(make_run):
    run = make_run(mixup=0.8, cutmix=1.0, mixup_probability=0.25, mixup_switch_probability=0.75, label_smoothing=0.1)
    mix = run._trainer(run._training_arguments()).data_collator.mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.8, 1.0, 0.25, 0.75)
    assert (mix.mode, mix.label_smoothing, mix.num_classes) == ("batch", 0.1, 4)


def test_moving_average_is_what_is_kept(make_run, tmp_path):
    slow, fast = make_run(ema_decay=0.999999), make_run(ema_decay=1e-9)
    before = {name: p.detach().clone() for name, p in slow.model.named_parameters()}
    metrics = slow.train()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    on_the_way = next(record["eval_loss"] for record in history if "eval_loss" in record)  # after the last step too
    assert on_the_way == pytest.approx(metrics["loss"], rel=1e-6)
    saved = HiViTForImageClassification.from_pretrained(tmp_path / "run")
    moved = 0
    for name, parameter in saved.named_parameters():
        moved = max(moved, (parameter - before[name]).abs().max().item())
    assert moved < 2e-3  # torch's average begins as a copy after the first step, and stays there
    raw = HiViTForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert any(not torch.equal(p, saved.get_parameter(name)) for name, p in raw.named_parameters())
    fast.recipe.output_dir = str(tmp_path / "fast")
    fast.train()
    fast_model = HiViTForImageClassification.from_pretrained(tmp_path / "fast")
    last = HiViTForImageClassification.from_pretrained(tmp_path / "fast" / "checkpoint-3")
    for name, parameter in last.named_parameters():
        assert_close(fast_model.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


def test_runs_leave_what_pipelines_load(make_run, tmp_path, digits):
    run = make_run(crop_pct=0.5, image_mean=[0.5] * 3, image_std=[0.25] * 3, keep_last=2, evaluate_every_steps=1)
    metrics = run.train()
    kept = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(kept) == 2 and "checkpoint-3" in kept
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.size["shortest_edge"] == 64 and list(processor.image_mean) == [0.5] * 3
    held_out = DatasetDict.load_from_disk(digits)["test"]
    predict = pipeline("image-classification", model=str(tmp_path / "run"))
    answers = predict([image.convert("RGB") for image in held_out["image"]], top_k=1)
    hits = [answer[0]["label"] == str(label) for answer, label in zip(answers, held_out["label"])]
    assert np.mean(hits) == pytest.approx(metrics["accuracy"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(4)} and "use_cache" not in config
    written = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert written["eval_accuracy"] == metrics["accuracy"]


def test_early_stopping_keeps_the_best(make_run, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1])
    compute = lambda prediction: {"accuracy": next(accuracies)}  # noqa: E731
    monkeypatch.setattr(finetune, "metrics_of", lambda *arguments: (compute, "accuracy", True))
    run = make_run(epochs=6, evaluate_every_steps=1, early_stopping_patience=2, keep_last=6, ema_decay=0.5)
    run.train()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["best_global_step"] == 2
    from safetensors.torch import load_file

    average = load_file(tmp_path / "run" / "checkpoint-2" / "average.safetensors")
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[name], average[f"module.{name}"]) for name in kept)


@pytest.mark.parametrize("extras", [{}, {"ema_decay": 0.9, "mixup": 0.8, "num_workers": 2, "random_erasing": 0.5}])
def test_resuming_gives_the_uninterrupted_run(extras, digits, tmp_path):
    numbers = {"epochs": 3, "evaluate_every_steps": 2, "drop_path_rate": 0.2, **extras}
    whole = outcome(flagged_run(digits, tmp_path / "whole", **numbers), tmp_path / "whole")
    flagged_run(digits, tmp_path / "parts", max_steps=4, **numbers).train()  # in the second of three epochs
    parts = outcome(flagged_run(digits, tmp_path / "parts", resume="latest", **numbers), tmp_path / "parts")
    assert len(whole["losses"]) == 9
    assert parts == whole


def test_each_epoch_augments_anew(make_run):
    run, epochs = make_run(epochs=3), []
    original = run.train_images.transform
    run.train_images.transform = lambda image: (epochs.append(run.train_images.epoch), original(image))[1]
    run.train()
    assert epochs == [0] * 48 + [1] * 48 + [2] * 48


def test_compiled_and_checkpointed_runs_take_the_same_steps(digits, plain, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        HiViTForImageClassification,
        "gradient_checkpointing_enable",
        lambda self, *arguments, original=HiViTForImageClassification.gradient_checkpointing_enable, **keywords: (
            seen.append(True),
            original(self, *arguments, **keywords),
        ),
    )
    eager = partial(TrainingArguments, torch_compile_backend="eager")  # the other one takes a minute of C++
    for name in ("gradient_checkpointing", "compile"):
        if name == "compile":
            monkeypatch.setattr(finetune, "TrainingArguments", lambda torch_compile, **k: eager(**k))
        changed = outcome(flagged_run(digits, tmp_path / name, **{name: True}), tmp_path / name)
        assert changed["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert HiViTForImageClassification.from_pretrained(tmp_path / name).num_parameters()
    assert seen
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


# -- other problems, adapters, the Hub -----------------------------------------------------------------------------


def test_several_labels(digits, tmp_path):
    """The answers of a run are those of scikit-learn, and it learns."""
    data = several_labels(digits, tmp_path / "several")
    changes = {"dataset_name": data, "problem_type": "multi_label_classification", "crop_scale": [0.8, 1.0]}
    changes |= {"epochs": 20, "flip_probability": 0.0, "base_learning_rate": 0.02}
    run = flagged_run(digits, tmp_path / "run", **changes)
    assert run.config.problem_type == "multi_label_classification" and run.labels.names == ("even", "large", "hole")
    metrics = run.train()
    assert metrics["mean_auc"] > 0.7
    pixel_values = torch.stack([run.eval_images[i]["pixel_values"] for i in range(24)])
    targets = torch.stack([run.eval_images[i]["labels"] for i in range(24)]).numpy()
    model = HiViTForImageClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        scores = model(pixel_values).logits.numpy()
    for index, name in enumerate(run.labels.names):
        assert metrics[f"auc_{name}"] == pytest.approx(roc_auc_score(targets[:, index], scores[:, index]), abs=1e-6)
    assert metrics["mean_auc"] == pytest.approx(roc_auc_score(targets, scores), abs=1e-6)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores), torch.tensor(targets))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_columns_of_zeros_and_ones_and_numbers(digits, tmp_path):
    """One column per label, and one per number."""
    splits = DatasetDict.load_from_disk(digits)

    def columns(split):
        even = [int(d % 2 == 0) for d in split["label"]]
        ink = [float(np.asarray(image).mean()) / 40 - 2 for image in split["image"]]
        return (
            split.remove_columns("label")
            .add_column("even", even)
            .add_column("odd", [1 - e for e in even])
            .add_column("ink", ink)
        )

    DatasetDict({name: columns(split) for name, split in splits.items()}).save_to_disk(tmp_path / "data")
    changes = {"dataset_name": str(tmp_path / "data"), "crop_scale": [0.9, 1.0], "flip_probability": 0.0}
    changes |= {"epochs": 15, "base_learning_rate": 0.02}
    several = flagged_run(
        digits, tmp_path / "a", problem_type="multi_label_classification", label_column=["even", "odd"], **changes
    )
    metrics = several.train()
    assert set(metrics) >= {"mean_auc", "auc_even", "auc_odd"} and metrics["mean_auc"] > 0.6
    numbers = flagged_run(digits, tmp_path / "b", problem_type="regression", label_column="ink", **changes)
    metrics = numbers.train()
    spread = numbers.eval_images.targets.std().item()
    assert metrics["rmse"] < spread and metrics["r2"] > 0.1 and metrics["mae"] <= metrics["rmse"]


def test_an_adapter_loads_in_a_pipeline(digits, tmp_path):
    start = start_folder(tmp_path / "pretrained")
    changes = {"model_name_or_path": start, "from_scratch": False, "architecture": None, "lora_rank": 4}
    run = flagged_run(digits, tmp_path / "lora", epochs=2, **changes)
    run.recipe.model = "{}"
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    metrics = run.train()
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    moved = tmp_path / "moved"
    (tmp_path / "lora").rename(moved)
    held_out = DatasetDict.load_from_disk(digits)["test"]
    images = [image.convert("RGB") for image in held_out["image"]]
    answers = pipeline("image-classification", model=str(moved))(images, top_k=1)
    hits = [answer[0]["label"] == str(label) for answer, label in zip(answers, held_out["label"])]
    assert np.mean(hits) == pytest.approx(metrics["accuracy"])
    pixel_values = torch.stack([run.eval_images[i]["pixel_values"] for i in range(8)])
    loaded = AutoModelForImageClassification.from_pretrained(moved).eval()
    with torch.no_grad():
        assert_close(loaded(pixel_values).logits, run.model.eval()(pixel_values=pixel_values).logits)
        (moved / "adapter_model.safetensors").unlink()
        (moved / "adapter_config.json").unlink()
        bare = HiViTForImageClassification.from_pretrained(moved).eval()
        assert (bare(pixel_values).logits - loaded(pixel_values).logits).abs().max() > 1e-3


def test_pushing(digits, tmp_path, monkeypatch):
    uploads, made = [], []
    repository = type("Repository", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **k: (made.append((name, k)), repository)[1])
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **keywords: uploads.append(keywords))
    changes = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True}
    flagged_run(digits, tmp_path, max_steps=1, **changes).train()
    assert made[0][0] == "me/mine" and made[0][1]["private"] is True
    assert uploads[-1]["repo_id"] == "me/mine" and Path(uploads[-1]["folder_path"]) == tmp_path
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"):
        assert (tmp_path / name).exists()


# -- the command line -----------------------------------------------------------------------------------------------


def command_line(*arguments) -> int:
    return finetune_classification.main(["--recipe", str(SMOKE), *map(str, arguments)])


def test_the_command_line(digits, tmp_path, capsys):
    data = ("--dataset_name", digits)
    assert command_line(*data, "--show_layer_table", "--layer_decay", "0.5") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["id", "scale", "learning"] and table[-1].startswith("  7  1.0000")
    assert table[1].startswith("  0  0.0078")
    run = (*data, "--output_dir", tmp_path / "run", "--tracker", "tensorboard", "--log_every_steps", "2")
    assert command_line(*run, "--max_steps", "3", "--eval_batch_size", "7") == 0
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    capsys.readouterr()
    assert command_line(*run) == 2
    assert "holds a run, at checkpoint-3: give --resume latest" in capsys.readouterr().err
    assert command_line(*run, "--resume", "latest", "--seed", "5") == 2
    assert "was begun with seed=0, now it is 5" in capsys.readouterr().err
    assert command_line(*data, "--output_dir", tmp_path / "none", "--resume", "latest") == 2
    assert "There is no checkpoint to resume" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert command_line(*run, "--resume", "latest", "--gradient_checkpointing") == 0


def test_defaults_run(digits, tmp_path, capsys):
    start = start_folder(tmp_path / "pretrained")
    arguments = ["--model_name_or_path", start, "--dataset_name", str(digits), "--output_dir", str(tmp_path / "run")]
    assert finetune_classification.main([*arguments, "--max_steps", "1", "--effective_batch_size", "32"]) == 0
    assert "start fresh: the classifier, its norm" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_every_flag_is_tested():
    tested = Path(__file__).read_text() + (Path(__file__).parent / "test_labeled.py").read_text()
    for field in fields(FinetuneRecipe):
        assert field.name in tested, field.name


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(digits, tmp_path):
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
        command = [*launcher, str(EXAMPLES / "finetune_classification.py"), "--recipe", str(SMOKE)]
        command += [
            "--dataset_name",
            str(digits),
            "--output_dir",
            str(folder),
            "--auto_augment",
            "rand-m9-mstd0.5-inc1",
        ]
        command += ["--batch_size", str(16 // processes), "--effective_batch_size", "16", "--log_every_steps", "1"]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "destroy_process_group" not in finished.stderr and "SIGABRT" not in finished.stderr
        assert f"processes: {processes}" in finished.stdout
        results[processes] = json.loads((folder / "eval_results.json").read_text()), log_of(folder)
    (metrics, log), (metrics_of_two, log_of_two) = results[1], results[2]
    assert len(log) == 6 and len({record["loss"] for record in log}) == 6
    assert [r["loss"] for r in log_of_two] == pytest.approx([r["loss"] for r in log], rel=1e-4)
    assert metrics_of_two["eval_accuracy"] == metrics["eval_accuracy"]
    assert metrics_of_two["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_one_process_does_not_take_several_gpus(make_run, monkeypatch):
    run = make_run()
    args = run._training_arguments()
    args._n_gpu = 4
    monkeypatch.setattr(run, "_training_arguments", lambda: args)
    with pytest.raises(ValueError, match=r"One process sees 4 GPUs: start with torchrun --nproc_per_node 4, or set"):
        run.train()


def test_a_checkpoint_of_another_folder_must_be_of_the_same_recipe(make_run, tmp_path):
    make_run(max_steps=2).train()
    other = {"resume": str(tmp_path / "run" / "checkpoint-2"), "output_dir": str(tmp_path / "other")}
    begun = json.loads((tmp_path / "run" / "recipe.json").read_text())
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(begun | {"jitter_scale": [0.1, 2.0]}))
    with pytest.raises(ValueError, match="run holds another kind of run: resume it with the script that began it"):
        make_run(**other).train()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match=r"run was begun with base_learning_rate=.*, now it is 0.123: a resumption"):
        make_run(**other, base_learning_rate=0.123).train()


def test_networks_of_one_channel_are_trained_and_evaluated(make_run):
    run = make_run(model={"num_channels": 1})
    assert run.model.config.num_channels == 1
    assert 0 <= run.train()["accuracy"] <= 1
