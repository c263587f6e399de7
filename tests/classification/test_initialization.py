"""Initialization of classifiers: pre-trainings, other classifiers, random weights, other image sizes, LoRA."""

import json

import pytest
import torch
from torch.testing import assert_close

from hivit_hf import HiViTForImageClassification, HiViTModel
from hivit_hf.classification.arguments import ClassificationModelArguments, ClassificationTrainingArguments
from hivit_hf.classification.initialization import add_lora, initialize_classifier
from hivit_hf.data.labels import LabelEncoding
from hivit_hf.training.initialization import Initialization, resize_for
from support.classification import NETWORK, model_folder


BIAS = "relative_position_bias_table"


def initialize(name: str | None, names=("a", "b", "c"), do_train: bool = True, seed: int = 0, **changes):
    """The classifier of these arguments, in training with one label per image unless told."""
    if "config_overrides" in changes:
        changes["config_overrides"] = json.dumps(changes["config_overrides"])
    model_args = ClassificationModelArguments(model_name_or_path=name, **changes)
    labels = LabelEncoding(model_args.problem_type, ("label",), tuple(names))
    training_args = ClassificationTrainingArguments(output_dir="out", do_train=do_train, seed=seed)
    return initialize_classifier(model_args, labels, training_args)


def test_from_a_pretraining(tmp_path, caplog, capfd):
    folder = model_folder(tmp_path / "pretrained", use_relative_position_bias=False)
    encoder = HiViTModel.from_pretrained(folder, add_pooling_layer=False)
    made = initialize(folder, head_init_std=2e-5)
    assert isinstance(made, Initialization) and made.notes == [
        f"Not in {folder}, so they are newly initialized: the classifier, its norm, 2 relative position biases."
    ]
    assert "decoder" not in caplog.text + "".join(capfd.readouterr())
    model = made.model
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.use_relative_position_bias
    assert 1e-5 < model.classifier.weight.std() < 3e-5 and not model.classifier.bias.any()
    assert (model.hivit.layernorm.weight == 1).all() and not model.hivit.layernorm.bias.any()
    own = dict(model.hivit.named_parameters())
    tables = [parameter for name, parameter in own.items() if name.endswith(BIAS)]
    assert len(tables) == 2 and not any(table.any() for table in tables)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(own[name], parameter)
    random = initialize(folder, problem_type="regression", init_relative_position_bias=True).model
    assert 0.01 < random.hivit.stages[2].layers[0].attention.relative_position_bias_table.std() < 0.03
    bare = initialize(folder, problem_type="regression", config_overrides={"use_relative_position_bias": False})
    assert bare.notes == [f"Not in {folder}, so they are newly initialized: the classifier, its norm."]


def test_from_a_classifier(tmp_path):
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    folder = model_folder(tmp_path / "classifier", HiViTForImageClassification, **labels)
    head = HiViTForImageClassification.from_pretrained(folder).classifier.weight
    same = initialize(folder, ["a", "b"])
    assert same.notes == [] and torch.equal(same.model.classifier.weight, head)
    for names in (["a", "b", "c"], ["b", "a"]):
        other = initialize(folder, names)
        assert other.notes == [
            f"The classifier of {folder} has 2 labels that are not the {len(names)} of this dataset: "
            "its head is re-initialized."
        ]
        assert other.model.classifier.weight.shape == (len(names), 64)
        assert not torch.equal(other.model.classifier.weight[:2], head) and not other.model.classifier.bias.any()
        assert list(other.model.config.label2id) == names


def test_what_is_only_evaluated_must_be_trained_on_the_labels(tmp_path):
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    classifier = model_folder(tmp_path / "classifier", HiViTForImageClassification, **labels)
    assert initialize(classifier, ["a", "b"], do_train=False).notes == []
    for name, names in ((classifier, ["b", "a"]), (model_folder(tmp_path / "pretrained"), ["a", "b"])):
        with pytest.raises(ValueError, match="--do_train false evaluates a classifier that was trained on these lab"):
            initialize(name, names, do_train=False)
    with pytest.raises(ValueError, match="--do_train false evaluates a classifier"):
        initialize(None, from_scratch=True, architecture="tiny", config_overrides=_small(), do_train=False)


def test_another_image_size_interpolates_what_depends_on_it(tmp_path):
    folder = model_folder(tmp_path / "pretrained", use_relative_position_bias=False)
    small = initialize(folder, ["a"], problem_type="regression", init_relative_position_bias=True).model.eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for layer in small.hivit.stages[2].layers:
            layer.attention.relative_position_bias_table.mul_(100)  # large enough to matter
        small.classifier.weight.mul_(50)
        expected = small(pixel_values).logits
        resize_for(small, 64)
        assert small.config.image_size == 64 and small.hivit.position_embeddings.shape[1] == 64
        assert_close(small(pixel_values).logits, expected)
    small.save_pretrained(tmp_path / "resized")
    again = HiViTForImageClassification.from_pretrained(tmp_path / "resized").eval()
    assert_close(again(pixel_values).logits, expected)
    assert initialize(folder, image_size=64).model.config.image_size == 64
    with pytest.raises(ValueError, match="multiple of patch_size 8"):
        initialize(folder, ["a"], problem_type="regression", image_size=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "base"}, r"recipe is for base, whose hidden_size is 512, but that of .* is 64"),
        (
            {"config_overrides": {"hidden_size": 128}},
            r"do not fit the network: .* more are missing, left over or of another sh",
        ),
        ({"config_overrides": {"depths": [1, 1, 1]}}, r"do not fit the network: hivit.stages.2.layers.1.* left over"),
        ({"config_overrides": {"patch_size": 16}}, r"do not fit the network: hivit.embeddings.projection"),
        ({"config_overrides": {"foo": 1}}, r"--config_overrides sets foo, which no HiViT has"),
    ],
)
def test_weights_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        initialize(model_folder(tmp_path / "pretrained"), ["a"], problem_type="regression", **changes)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder ./missing. Check the path"):
        initialize("./missing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="other is a vit, not a HiViT"):
        initialize(str(tmp_path / "other"))


def _small() -> dict:
    own = {"image_size"}  # which has a flag
    return {name: value for name, value in NETWORK.items() if not name.startswith("decoder") and name not in own}


@pytest.mark.parametrize("random_biases", [False, True])
def test_random_weights(random_biases):
    changes = {"architecture": "tiny", "image_size": 32, "head_init_std": 1e-3, "config_overrides": _small()}
    changes |= {"from_scratch": True, "init_relative_position_bias": random_biases}
    model = initialize(None, **changes).model
    tables = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(BIAS)])
    assert (0.015 < tables.std() < 0.02) if random_biases else not tables.any()
    assert model.classifier.weight.std() < 2e-3
    same, other = (initialize(None, seed=seed, **changes).model for seed in (0, 1))
    assert torch.equal(model.classifier.weight, same.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)


def test_lora_trains_the_attention_and_the_head(tmp_path):
    model = initialize(model_folder(tmp_path / "pretrained"), ["a"]).model
    with pytest.raises(ValueError, match="lora_r 65 is more than the 64 channels: try 8 or 16"):
        add_lora(model, 65, "base")
    adapted = add_lora(model, 4, "base")
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {config.base_model_name_or_path for config in adapted.peft_config.values()} == {"base"}
