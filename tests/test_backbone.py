"""The backbone with the stages that segmenters and detectors read: values, loading, and the models that take it."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoBackbone,
    AutoConfig,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.training.initialization import PYRAMID, pyramid_config


LEVELS = ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])  # an even and an odd grid
def test_levels_are_the_normalized_stages_and_the_last_is_max_pooled(tiny_config, redraw, size):
    config = tiny_config(out_features=LEVELS[:3])
    pyramid = redraw(HiViTBackbone(pyramid_config(config))).eval()
    backbone = HiViTBackbone(config).eval()
    backbone.hivit.load_state_dict(pyramid.hivit.state_dict())
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        stages, levels = backbone(pixel_values).feature_maps, pyramid(pixel_values).feature_maps
    assert pyramid.channels == [8, 16, 32, 32] == [level.shape[1] for level in levels]
    assert [level.shape[2] for level in levels] == [size[0] // 4, size[0] // 8, size[0] // 16, -(-size[0] // 32)]
    last = stages[2]
    rows, columns = levels[3].shape[2:]
    pooled = torch.stack(
        [
            torch.stack([last[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].amax(dim=(2, 3)) for x in range(columns)], -1)
            for y in range(rows)
        ],
        dim=-2,
    )
    for name, stage, level in zip(LEVELS, [*stages, pooled], levels):
        norm = pyramid.norms[name]
        mean, variance = stage.mean(1, keepdim=True), stage.var(1, keepdim=True, unbiased=False)
        expected = (stage - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        assert_close(level, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(70, 90), (1, 33), (64, 50)], ids=str)
@pytest.mark.parametrize("windows", [{}, {"window_size": 3, "global_attention_layers": [1]}], ids=["global", "windows"])
def test_any_size_equals_padding_by_hand(tiny_config, redraw, size, windows):
    backbone = redraw(HiViTBackbone(pyramid_config(tiny_config(), out_features=["stem", *LEVELS], **windows))).eval()
    (height, width), pixel_values = size, torch.randn(2, 3, *size)
    padded = torch.zeros(2, 3, -(-height // 16) * 16, -(-width // 16) * 16)
    padded[:, :, :height, :width] = pixel_values
    with torch.no_grad():
        maps, expected = backbone(pixel_values).feature_maps, backbone(padded).feature_maps
    for stride, found, whole in zip([4, 4, 8, 16, 32], maps, expected):
        rows, columns = -(-height // stride), -(-width // stride)
        assert found.shape[2:] == (rows, columns)
        assert torch.equal(found, whole[:, :, :rows, :columns])


def test_any_size_trains(tiny_config):
    backbone = HiViTBackbone(pyramid_config(tiny_config()))
    sum(level.square().mean() for level in backbone(torch.randn(1, 3, 70, 90)).feature_maps).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", [HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone])
def test_any_checkpoint_loads_and_only_the_norms_are_new(tiny_config, redraw, kind, tmp_path):
    redraw(kind(tiny_config())).save_pretrained(tmp_path / "start")
    config = pyramid_config(AutoConfig.from_pretrained(tmp_path / "start"), drop_path_rate=0.1)
    pyramid, loading = HiViTBackbone.from_pretrained(tmp_path / "start", config=config, output_loading_info=True)
    assert set(loading["missing_keys"]) == {f"norms.{name}.{part}" for name in LEVELS for part in ("weight", "bias")}
    assert not loading["unexpected_keys"] and pyramid.config.drop_path_rate == 0.1
    assert pyramid.config.image_size == 64 and pyramid.config.problem_type is None
    pyramid.save_pretrained(tmp_path / "pyramid")
    again = HiViTBackbone.from_pretrained(tmp_path / "pyramid")
    assert AutoConfig.from_pretrained(tmp_path / "pyramid").out_features == LEVELS
    for (name, one), (_, other) in zip(pyramid.named_parameters(), again.named_parameters()):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("stages", [{}, PYRAMID], ids=["last", "pyramid"])
def test_what_no_level_needs_is_freed(stages, tiny_config):
    """Images of detectors are large: the outputs of layers inside a stage are not kept until the end."""
    model = HiViTBackbone(tiny_config(depths=[2, 2, 3], **stages)).eval()  # 4, 4 and 3 layers
    layers = [layer for stage in model.hivit.stages for layer in stage.layers]
    outputs, alive = [], []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    layers[-1].register_forward_pre_hook(lambda *_: alive.extend(output() is not None for output in outputs))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    assert alive == [False, False, False, True] * 2 + [False, True]
    assert output.hidden_states is None
    with torch.no_grad():
        assert (
            len(model(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states) == 12
        )  # and what the first layer gets


def test_keywords_of_from_pretrained(tiny_config, tmp_path):
    """In any order: which stages exist is settled before some of them are chosen."""
    HiViTForMaskedImageModeling(tiny_config()).save_pretrained(tmp_path)
    backbone = HiViTBackbone.from_pretrained(tmp_path, out_features=LEVELS, apply_layernorm=True, add_pooled_stage=True)
    assert backbone.channels == [8, 16, 32, 32] and list(backbone.norms) == LEVELS
    plain = HiViTBackbone.from_pretrained(tmp_path, out_features=LEVELS[:3])
    assert plain.stage_names == ["stem", *LEVELS[:3]] and plain.norms is None
    with pytest.raises(
        ValueError, match=r"adds 'stage4', but out_features \['stage3'\] leave it out: name it there, or"
    ):
        HiViTBackbone.from_pretrained(tmp_path, add_pooled_stage=True)
    backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"out_features got \['stage4'\], which do not exist"):
        HiViTBackbone.from_pretrained(tmp_path / "backbone", add_pooled_stage=False)
    narrow = {"add_pooled_stage": False, "out_features": ["stage2"]}
    assert list(HiViTBackbone.from_pretrained(tmp_path / "backbone", **narrow).norms) == ["stage2"]
    encoder = HiViTModel.from_pretrained(tmp_path / "backbone")
    assert torch.equal(encoder.position_embeddings, backbone.hivit.position_embeddings)


def test_stages_that_are_not_chosen_are_the_last():
    assert HiViTConfig().out_features == ["stage3"] and HiViTConfig(add_pooled_stage=True).out_features == ["stage4"]


def test_some_levels_only(tiny_config):
    config = pyramid_config(tiny_config(), out_features=["stage2", "stage4"])
    pyramid = AutoBackbone.from_config(config)
    assert isinstance(pyramid, HiViTBackbone) and pyramid.channels == [16, 32]
    maps = pyramid(torch.randn(1, 3, 64, 32)).feature_maps
    assert [tuple(level.shape[1:]) for level in maps] == [(16, 8, 4), (32, 2, 1)]
    maps[0].sum().backward()
    maps = pyramid(torch.randn(1, 3, 64, 32)).feature_maps
    sum(level.square().mean() for level in maps).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())  # none unused
    with pytest.raises(ValueError, match="needs all units"):
        pyramid(torch.randn(1, 3, 64, 64), bool_masked_pos=torch.zeros(1, 16, dtype=torch.bool))


@pytest.mark.parametrize("first", ["import hivit_hf", "from hivit_hf import HiViTBackbone", "import transformers"])
def test_auto_backbone_knows_it_whatever_is_imported_first(first):
    code = f"""{first}
import hivit_hf, sys
from transformers import AutoBackbone, AutoModel
config = hivit_hf.HiViTConfig(add_pooled_stage=True, hidden_size=32, depths=[1, 1, 1], num_attention_heads=4)
print(type(AutoBackbone.from_config(config)).__name__)
print(type(AutoModel.from_config(hivit_hf.HiViTConfig(hidden_size=32, num_attention_heads=4))).__name__)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["HiViTBackbone", "HiViTModel"], ran.stderr


def test_segmenters_and_detectors_take_any_size(tiny_config):
    small = {"num_labels": 3, "backbone_config": pyramid_config(tiny_config())}
    segmenter = UperNetForSemanticSegmentation(
        UperNetConfig(**small, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32)
    )
    with torch.no_grad():
        assert segmenter.eval()(torch.randn(2, 3, 70, 90)).logits.shape == (2, 3, 70, 90)
    small["backbone_config"] = tiny_config()
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_queries": 4}
    detector = DetrForObjectDetection(DetrConfig(**small, **layers)).eval()
    images = [torch.randint(0, 255, (3, *size), dtype=torch.uint8) for size in ((70, 50), (48, 90))]
    batch = DetrImageProcessor(size={"shortest_edge": 50, "longest_edge": 100})(images, return_tensors="pt")
    height, width = batch.pixel_values.shape[2:]
    assert height % 16 and width % 16
    rows, columns = -(-height // 16), -(-width // 16)
    whole = torch.zeros(2, 3, rows * 16, columns * 16)
    whole[:, :, :height, :width] = batch.pixel_values
    with torch.no_grad():
        found, mask = detector.model.backbone(batch.pixel_values, batch.pixel_mask)[-1]
        expected = detector.model.backbone(whole, torch.ones(2, rows * 16, columns * 16))[-1][0]
        assert detector(**batch).pred_boxes.isfinite().all()
    assert torch.equal(found, expected)
    # what the processor padded is masked: the second image fills the height by half, the first one the width
    for image, found in zip(batch.pixel_mask, mask):
        used = image.any(dim=1).sum() / height, image.any(dim=0).sum() / width
        assert [found.any(dim=1).sum(), found.any(dim=0).sum()] == [
            pytest.approx(fraction * length, abs=1) for fraction, length in zip(used, (rows, columns))
        ]


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (MaskFormerConfig, MaskFormerForInstanceSegmentation),
        (Mask2FormerConfig, Mask2FormerForUniversalSegmentation),
    ],
)
def test_mask_classifiers_load_and_take_a_step(tiny_config, config_class, model_class, tmp_path):
    small = {"num_labels": 3, "backbone_config": pyramid_config(tiny_config())}
    if config_class is MaskFormerConfig:
        decoder = {"model_type": "detr", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2}
        decoder |= {"encoder_layers": 1, "encoder_attention_heads": 2, "num_queries": 5, "decoder_ffn_dim": 32}
        small |= {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": decoder}
    else:
        small |= {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 32}
        small |= {"decoder_layers": 2, "encoder_layers": 1, "num_attention_heads": 2, "num_queries": 5}
        small |= {"dim_feedforward": 32, "train_num_points": 64}
    model = model_class(config_class(**small))
    model.save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path)
    encoder = next(module for module in model.modules() if isinstance(module, HiViTBackbone))
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "mask_labels": [masks], "class_labels": [torch.tensor([0, 2])]}
    before = encoder.hivit.stages[0].layers[0].mlp.fc1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch).loss
    loss.sum().backward()
    optimizer.step()
    assert torch.isfinite(loss).all()
    assert not torch.equal(before, encoder.hivit.stages[0].layers[0].mlp.fc1.weight)
