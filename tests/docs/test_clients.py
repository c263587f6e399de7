"""The page on other people's programs: its code runs, and each row of its tables is tried with a small network."""

import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from support.networks import TINY


PAGE = (Path(__file__).parents[2] / "docs/clients.md").read_text()
OPTIONAL = {"torchao": "torchao", "bitsandbytes": "BitsAndBytes"}  # and the word that a block that needs it has
CHANNELS = TINY["hidden_size"]

# small networks: keywords of the configurations, by what the names of the classes begin with
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 8}
RT_DETR = {**DETR, "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32]}
MASKS = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32}
MASKS |= {"dim_feedforward": 32, "num_attention_heads": 2, "num_queries": 8}
TEXT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "vocab_size": 99}
NECK = {"neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 16}
SMALL = {
    "Mask2Former": {**MASKS, "feature_size": 32, "mask_feature_size": 32},
    "MaskFormer": {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": {"model_type": "detr", **DETR}},
    "OneFormer": {**MASKS, "conv_dim": 32, "mask_dim": 32, "text_encoder_width": 32, "task_seq_len": 5},
    "UperNet": {"hidden_size": 16, "auxiliary_channels": 8},
    "Detr": DETR,
    "ConditionalDetr": DETR,
    "DabDetr": {**{name: value for name, value in DETR.items() if name != "d_model"}, "hidden_size": 32},
    "TableTransformer": DETR,
    "DeformableDetr": DETR,
    "RTDetr": RT_DETR,
    "RTDetrV2": RT_DETR,
    "DFine": RT_DETR,
    "GroundingDino": {**DETR, "text_config": TEXT},
    "MMGroundingDino": {**DETR, "text_config": TEXT},
    "VitMatte": {"convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [8, 8, 8, 8]},
    "DPT": {**NECK, "is_hybrid": False},
    "DepthAnything": {**NECK, "reassemble_hidden_size": CHANNELS, "patch_size": 16},
    "PromptDepthAnything": {**NECK, "reassemble_hidden_size": CHANNELS, "patch_size": 16},
    "ZoeDepth": NECK,
    "VitPose": {},
}
# what is asked for besides images
OTHER_INPUTS = {
    "OneFormer": lambda: {"task_inputs": torch.randint(0, 9, (2, 5))},
    "GroundingDino": lambda: {"input_ids": torch.tensor([[1, 5, 6, 7, 2]] * 2)},
    "MMGroundingDino": lambda: {"input_ids": torch.tensor([[1, 5, 6, 7, 2]] * 2)},
    "PromptDepthAnything": lambda: {"prompt_depth": torch.rand(2, 1, 8, 8)},
}


def rows(table: str) -> list[tuple[str, ...]]:
    """The rows of a table of the page: class, stages, what to say."""
    text = re.search(rf"<!-- {table}: begin -->\n(.*?)<!-- {table}: end -->", PAGE, re.DOTALL)[1]
    cells = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in text.splitlines()[2:]]
    return [(name, stages.split(), *rest) for name, stages, *rest in cells]


def make(name: str, stages: list[str], said: str = ""):
    """A small model of transformers on a HiViT that has these stages, as the page says it; and its inputs."""
    kind = re.match(r"(\w+?)For[A-Z]", name)[1]
    keywords = dict(SMALL[kind])
    for key, value in re.findall(r"(\w+)=(\[.*?\]|\w+)", said):
        keywords[key] = eval(value, {"C": CHANNELS})
    changes = {"add_pooled_stage": "stage4" in stages, "apply_layernorm": True, "out_features": stages}
    changes |= {"num_channels": keywords.pop("num_channels", 3)}
    model_class = getattr(transformers, name)
    config = model_class.config_class(backbone_config=HiViTConfig(**TINY | changes), **keywords)
    size = (64, 96) if "multiples of 32 px" in said else (72, 100)
    inputs = {"pixel_values": torch.randn(2, changes["num_channels"], *size)}
    return model_class(config), inputs | OTHER_INPUTS.get(kind, dict)()


def outputs_of(model, inputs) -> dict[str, torch.Tensor]:
    """The tensors of an output that depend on the weights, without infinite numbers."""
    found = {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)}
    return {name: value[value.isfinite()] for name, value in found.items() if value.requires_grad}


@pytest.mark.parametrize("row", rows("tried"), ids=lambda row: row[0])
def test_a_model_of_transformers_takes_the_backbone(row, tmp_path):
    model, inputs = make(*row)
    (backbone,) = (module for module in model.modules() if isinstance(module, HiViTBackbone))
    assert backbone.out_features == row[1]
    pretrained = HiViTForMaskedImageModeling(HiViTConfig(**TINY, num_channels=backbone.config.num_channels))
    pretrained.save_pretrained(tmp_path / "pretrained")
    backbone.load_state_dict(
        HiViTBackbone.from_pretrained(tmp_path / "pretrained", config=backbone.config).state_dict()
    )
    torch.manual_seed(1)
    found = outputs_of(model.eval(), inputs)
    assert found and all(len(values) for values in found.values())
    sum(values.float().square().mean() for values in found.values()).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    torch.manual_seed(1)
    for name, values in outputs_of(again, inputs).items():
        assert_close(values, found[name], msg=name)


@pytest.mark.parametrize("row", rows("refused"), ids=lambda row: row[0])
def test_a_model_that_reads_tokens_of_a_plain_vit_fails(row):
    model, inputs = make(*row)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        model.eval()(**inputs)


@pytest.fixture
def folder(tiny_network, tmp_path, monkeypatch):
    """Where the page's code runs: a folder with the classifier that it loads."""
    model = tiny_network(HiViTForImageClassification)
    model.save_pretrained(tmp_path / "demo_output/model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo_output/model"


@pytest.fixture
def ran(folder):
    """The names that the code of the page leaves behind; what needs a package that is not installed is left out."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        needs = [package for package, word in OPTIONAL.items() if word in block]
        if all(map(find_spec, needs)):
            exec(compile(block, "docs/clients.md", "exec"), names)
    return names


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)).logits


def test_peft_and_timm(ran):
    trained = {name for name, parameter in ran["adapted"].named_parameters() if parameter.requires_grad}
    assert len([name for name in trained if "qkv.lora_" in name]) == 4
    assert len([name for name in trained if "attention.lora_" in name]) == 4
    config, scales = ran["model"].config, {group["lr_scale"] for group in ran["optimizer"].param_groups}
    assert scales == {0.75**layer for layer in range(config.num_hidden_layers + 2)}
    names = {id(parameter): name for name, parameter in ran["model"].named_parameters()}
    undecayed = [group["params"] for group in ran["optimizer"].param_groups if not group["weight_decay"]]
    plain = {names[id(parameter)] for parameters in undecayed for parameter in parameters}
    assert "hivit.position_embeddings" in plain and "classifier.bias" in plain and "classifier.weight" not in plain


def test_a_segmenter_has_the_pretrained_backbone(ran):
    weights = ran["model"].state_dict()
    for name, tensor in ran["segmenter"].model.pixel_level_module.encoder.hivit.state_dict().items():
        assert torch.equal(tensor, weights[f"hivit.{name}"]), name


def test_torchao(ran):
    pytest.importorskip("torchao")
    expected, layer = logits(ran["model"]), ran["quantized"].hivit.stages[2].layers[0]
    assert "Int8" in type(layer.attention.qkv.weight).__name__
    assert_close(logits(ran["quantized"]), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_bitsandbytes(ran):
    pytest.importorskip("bitsandbytes")
    expected, layer = logits(ran["model"]), ran["in_8_bit"].hivit.stages[2].layers[0]
    assert layer.attention.qkv.weight.dtype == torch.int8
    assert_close(logits(ran["in_8_bit"]), expected, atol=0.1 * expected.abs().max().item(), rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])
def test_a_detector_of_torchvision_trains_and_detects(name, ran):
    config, extra = ran["backbone_config"], LastLevelMaxPool()
    if name in ("RetinaNet", "FCOS"):
        config, extra = ran["three_stages"], LastLevelP6P7(64, 64)
    pyramid = ran["Pyramid"](HiViTBackbone(config), extra, channels=64)
    model = getattr(detection, name)(pyramid, num_classes=3, min_size=64, max_size=96)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    target |= {"masks": torch.ones(1, 70, 90, dtype=torch.uint8), "keypoints": torch.tensor([[[5.0, 5.0, 1.0]] * 17])}
    sum(model.train()([torch.rand(3, 70, 90)] * 2, [target] * 2).values()).backward()
    assert pyramid.backbone.hivit.embeddings.projection.weight.grad.any()
    assert {"boxes", "labels", "scores"} <= set(model.eval()([torch.rand(3, 70, 90)])[0])


def test_run_mae_trains_a_vitmae(folder):
    """As the script loads it."""
    config = transformers.ViTMAEConfig.from_pretrained(folder)
    model = transformers.ViTMAEForPreTraining.from_pretrained(folder, config=config)
    assert type(model.vit).__module__.startswith("transformers.")


def test_the_masks_of_run_mim():
    """The numbers that the page says: the script masks squares of `mask_patch_size`, rounded up."""
    config = HiViTConfig.from_architecture("base-mae")
    blocks, units = (config.image_size // 32) ** 2, (config.image_size // 16) ** 2
    assert (math.ceil(blocks * 0.6) * 4, units) == (120, 196)
    assert math.ceil(units * 0.75) == 147 == units - config.num_visible_units(units)


def test_a_script_that_knows_nothing_of_hivit(folder, tmp_path):
    """With the line of the page, and without it."""
    (line,) = re.findall(r"^  python -c \"(.*?)\"", PAGE, re.MULTILINE)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers import AutoModelForImageClassification\n"
        "if __name__ == '__main__':\n"
        "    print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])).__name__)\n"
    )
    commands = [["-c", line, str(script), str(folder)], [str(script), str(folder)]]
    done = [subprocess.run([sys.executable, *c], capture_output=True, text=True, input="n\n") for c in commands]
    assert done[0].returncode == 0 and done[0].stdout == "HiViTForImageClassification\n", done[0].stderr
    assert done[1].returncode != 0
