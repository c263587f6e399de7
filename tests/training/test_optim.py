"""Optimization: layer-wise learning rates and weight decay, cosine schedule."""

import math

import pytest
import torch

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.modeling_hivit import layer_id
from hivit_hf.training.optim import (
    cosine_learning_rate,
    layer_table,
    layerwise_parameter_groups,
    parameter_groups,
)


CONFIG = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}
CONFIG |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


# -- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (35, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))), (60, 0.55), (110, 0.1)],
)
def test_cosine_learning_rate_at_known_steps(step, expected):
    rate = cosine_learning_rate(step, total_steps=110, warmup_steps=10, base=1.0, minimum=0.1)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_cosine_learning_rate_without_warmup_starts_at_the_base():
    assert cosine_learning_rate(0, total_steps=10, warmup_steps=0, base=0.3) == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0, "total_steps": 10, "warmup_steps": 10, "base": 1.0}, "warmup_steps"),
        ({"step": 0, "total_steps": 10, "warmup_steps": -1, "base": 1.0}, "warmup_steps"),
        ({"step": 11, "total_steps": 10, "warmup_steps": 0, "base": 1.0}, "step must"),
        ({"step": 0, "total_steps": 10, "warmup_steps": 0, "base": 1.0, "minimum": 2.0}, "minimum"),
    ],
)
def test_cosine_learning_rate_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        cosine_learning_rate(**arguments)


def test_warmup_from_another_learning_rate_than_zero():
    rates = [cosine_learning_rate(step, 10, 4, base=1.0, start=0.2) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    with pytest.raises(ValueError, match="start must be between 0 and base"):
        cosine_learning_rate(0, 10, 4, base=1.0, start=2.0)


# -- weight decay ---------------------------------------------------------------------------------------------------


def test_parameter_groups_decay_matrices_only():
    model = HiViTForMaskedImageModeling(HiViTConfig(**CONFIG))
    decayed, exempt = parameter_groups(model, weight_decay=0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in exempt["params"])
    grouped = [id(parameter) for group in (decayed, exempt) for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert id(model.decoder.position_embeddings) not in grouped  # frozen


def test_parameter_groups_exempt_biases_of_any_shape():
    model = torch.nn.Module()
    model.bias = torch.nn.Parameter(torch.zeros(2, 2))
    (group,) = parameter_groups(model, weight_decay=0.05)
    assert group["weight_decay"] == 0.0


def test_parameter_groups_refuse_frozen_models_and_negative_decay():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), 0.05)
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(torch.nn.Linear(2, 2), -0.1)


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


# -- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.75, 1.0])
def test_timms_optimizers_decay_the_same_layers(decay):
    from timm.optim import create_optimizer_v2

    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    options = {"lr": 0.1, "weight_decay": 0.05, "layer_decay": decay}
    theirs = create_optimizer_v2(model, opt="adamw", **options).param_groups
    ours = layerwise_parameter_groups(model, model.config, 0.05, 0.1, decay)
    found = {
        id(p): [group["lr"] * group.get("lr_scale", 1), group["weight_decay"]]
        for group in theirs
        for p in group["params"]
    }
    assert len(found) == len(list(model.parameters()))
    for group in ours:
        for parameter in group["params"]:
            assert found[id(parameter)] == pytest.approx([group["lr"], group["weight_decay"]])


def test_the_coarse_layers_are_those_of_dense_tasks():
    model = HiViTForImageClassification(HiViTConfig(**CONFIG))
    for name, _ in model.named_parameters():
        assert model.group_matcher(coarse=True)(name) == layer_id(name, model.config, count_early_layers=False)
