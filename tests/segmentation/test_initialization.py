"""UPerNet's initialization: the weights of any HiViT or of a segmentation model, layer ids, refusals."""

import pytest
import torch

from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.segmentation.initialization import load_segmenter, new_segmenter
from hivit_hf.training.initialization import initialize_backbone
from hivit_hf.training.optim import layer_table, layerwise_parameter_groups
from support.segmentation import NAMES, SMALL, model_folder


def test_the_dense_numbering_reaches_into_the_segmenter():
    start = new_segmenter(initialize_backbone(None, "tiny"), NAMES, **SMALL)
    config = start.model.backbone.config
    groups = layerwise_parameter_groups(start.model, config, 0.05, 1e-3, 0.75, count_early_layers=False)
    layers = {name: group["layer_id"] for group in groups for name in group["names"]}
    prefix = "backbone.hivit"
    assert layers[f"{prefix}.stages.1.merge.reduction.weight"] == layers[f"{prefix}.position_embeddings"] == 0
    assert layers[f"{prefix}.stages.0.layers.1.mlp.fc1.weight"] == 0
    assert [layers[f"{prefix}.stages.2.layers.{i}.attention.qkv.weight"] for i in range(10)] == list(range(1, 11))
    heads = {layer for name, layer in layers.items() if not name.startswith(prefix)}
    assert heads == {11} and "backbone.norms.stage4.weight" in layers
    assert {group["lr"] for group in groups if group["layer_id"] == 11} == {1e-3}
    assert len(layers) == sum(1 for _ in start.model.parameters())
    assert "11  1.0000     1.000e-03" in layer_table(groups)


@pytest.mark.parametrize("kind", [HiViTForMaskedImageModeling, HiViTForImageClassification])
def test_a_segmentation_model_begins_with_the_weights_of_any_hivit(kind, tmp_path):
    folder = model_folder(tmp_path / "backbone", kind)
    start = load_segmenter(folder, NAMES, changes={"drop_path_rate": 0.1}, **SMALL)
    encoder = dict(kind.from_pretrained(folder).named_parameters())
    for name, parameter in start.model.backbone.hivit.named_parameters():
        assert torch.equal(parameter, encoder[f"hivit.{name}"]), name
    assert [start.model.config.id2label[i] for i in range(3)] == NAMES
    output = start.model(pixel_values=torch.randn(2, 3, 48, 64), labels=torch.randint(0, 3, (2, 48, 64)))
    assert output.logits.shape == (2, 3, 48, 64)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in start.model.parameters())
    resized = load_segmenter(folder, NAMES, crop_size=64, **SMALL).model
    assert resized.backbone.config.image_size == 64 and resized.backbone.hivit.position_embeddings.shape[1] == 64
    resized.save_pretrained(tmp_path / "segmenter")
    whole = load_segmenter(str(tmp_path / "segmenter"), NAMES, **SMALL).model
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(resized.named_parameters())[name]), name
    with pytest.raises(ValueError, match="has the 3 classes sky, earth, sea"):
        load_segmenter(str(tmp_path / "segmenter"), ["sky", "earth"])


def test_a_segmentation_model_is_resumed_as_it_is_or_refused(tmp_path):
    encoder, folder = model_folder(tmp_path / "encoder", use_relative_position_bias=False), str(tmp_path / "segmenter")
    model = load_segmenter(encoder, NAMES, **SMALL).model
    model.save_pretrained(folder)
    changed = {"window_size": 2, "drop_path_rate": 0.2}
    whole = load_segmenter(folder, NAMES, changes=changed, **SMALL, auxiliary_weight=0.4)
    assert {name: getattr(whole.model.backbone.config, name) for name in changed} == changed and not whole.notes
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name]), name
    (note,) = load_segmenter(folder, NAMES, changes={"use_relative_position_bias": True}).notes
    assert "relative position tables" in note
    cases = [
        ({"architecture": "base"}, "The recipe is for base, whose hidden_size is 512, but that of .* is 32"),
        ({"changes": {"windowsize": 3}}, "has no keyword 'windowsize'"),
        ({"changes": {"depths": [1, 1, 7]}}, "do not fit the network: backbone.hivit.stages.2.layers.2"),
        ({"changes": {"depths": [1, 1, 1]}}, "do not fit the network: backbone.hivit.stages.2.layers.1"),
        ({"changes": {"hidden_size": 64}}, "do not fit the network"),
        ({"head_channels": 64}, "has head_channels 8, not 64: leave out --head_channels"),
        ({"auxiliary_channels": 64}, "has auxiliary_channels 8, not 64"),
        ({"auxiliary_weight": 0.0}, "has auxiliary_weight 0.4, not 0.0"),
    ]
    for keywords, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            load_segmenter(folder, NAMES, **keywords)
    with pytest.raises(ValueError, match=r"hivit\.stages\.2\.layers\.1.* left over"):
        load_segmenter(encoder, NAMES, changes={"depths": [1, 1, 1]}, **SMALL)
    start = load_segmenter(encoder, NAMES, head_channels=8, auxiliary_weight=0.0)
    start.model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has auxiliary_channels 0, not 64: leave out --auxiliary_channels"):
        load_segmenter(str(tmp_path / "plain"), NAMES, auxiliary_weight=0.0, auxiliary_channels=64)
    with pytest.raises(ValueError, match=r"has auxiliary_weight 0\.0, not 0\.4"):
        load_segmenter(str(tmp_path / "plain"), NAMES, auxiliary_weight=0.4)
