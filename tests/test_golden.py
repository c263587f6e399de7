"""
Outputs of the original codes, recorded with random weights in which every tensor matters: their checkpoints, converted
through the command line, give the same numbers.

Each folder of tests/golden holds a checkpoint in the original layout, inputs, outputs and gradients; meta.json names
the network and the commit of the original repository.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import prove
from checkpoint import read_checkpoint
from hivit_hf import HiViTBackbone
from hivit_hf.modeling_hivit import units_to_map


OURS = Path(__file__).parent / "golden"
FOLDERS = sorted(OURS.iterdir())
ALL_RECORDED = Path(__file__).parents[2] / "shared" / "golden"  # more of them, where they lie beside the project
if ALL_RECORDED.is_dir():
    FOLDERS += [
        path.parent for path in sorted(ALL_RECORDED.glob("*/checkpoint.pth")) if path.parent.name != "fast_itpn"
    ]

IO_TOLERANCE = 1e-5  # the recorded float32 is up to 3e-6 from float64


@pytest.fixture
def converted(tmp_path):
    """A function that converts a recorded set and returns the folder."""

    def convert(folder):
        assert prove.convert_set(folder, tmp_path / "converted") == 0
        return tmp_path / "converted"

    return convert


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.parent.name}-{folder.name}")
def test_converted_models_equal_the_original(folder, implementation, converted):
    found = prove.differences(folder, converted(folder), implementation)
    assert len(found) >= 3
    assert max(found.values()) < IO_TOLERANCE, {name: value for name, value in found.items() if value >= IO_TOLERANCE}
    recorded = {name for name in load_file(folder / "io.safetensors") if ".grad." in name}
    assert {f"out.{name}" for name in found if ".grad." in name} == recorded


def swap_queries_and_keys(tensors):
    name = "hivit.stages.2.layers.0.attention.qkv.weight"
    query, key, value = tensors[name].chunk(3)
    tensors[name] = torch.cat([key, query, value])


def transpose_a_table(tensors):
    name = "hivit.stages.2.layers.1.attention.relative_position_bias_table"
    side = round(len(tensors[name]) ** 0.5)
    tensors[name] = tensors[name].unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)


def merge_row_by_row(tensors):
    for leaf in ("norm.weight", "norm.bias", "reduction.weight"):
        name = f"hivit.stages.0.merge.{leaf}"
        first, second, third, fourth = tensors[name].chunk(4, dim=-1)
        tensors[name] = torch.cat([first, third, second, fourth], dim=-1)


def swap_two_layers(tensors):
    for leaf in ("weight", "bias"):
        names = [f"hivit.stages.2.layers.{layer}.norm1.{leaf}" for layer in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


@pytest.mark.parametrize("mistake", [swap_queries_and_keys, transpose_a_table, merge_row_by_row, swap_two_layers])
def test_a_broken_map_is_noticed(mistake, converted):
    folder = converted(OURS / "classifier")
    tensors = load_file(folder / "model.safetensors")
    mistake(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert max(prove.differences(OURS / "classifier", folder).values()) > 100 * IO_TOLERANCE


@pytest.mark.parametrize("name", ["masked_autoencoder", "masked_autoencoder_last_stage", "classifier"])
def test_a_wrong_epsilon_is_noticed(name, converted):
    folder = converted(OURS / name)
    config = (folder / "config.json").read_text()
    assert '"layer_norm_eps": 1e-06' in config
    (folder / "config.json").write_text(config.replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 1e-05'))
    assert max(prove.differences(OURS / name, folder).values()) > IO_TOLERANCE


@pytest.mark.skipif(not ALL_RECORDED.is_dir(), reason="the whole set of recorded outputs is not here")
def test_fast_itpn_is_refused(tmp_path, capsys):
    assert prove.convert_set(ALL_RECORDED / "fast_itpn", tmp_path / "out") == 2
    assert "Fast-iTPN, a different network" in capsys.readouterr().err


@pytest.mark.skipif(not ALL_RECORDED.is_dir(), reason="the whole set of recorded outputs is not here")
def test_the_dense_pyramid_of_the_original_in_our_terms(converted):
    """Its 'H' is taken in the middle of stage 1 and its 'M' after the first merge; ours are the stages' outputs."""
    recorded = load_file(ALL_RECORDED / "finetune_rect" / "io.safetensors")
    fused = load_file(ALL_RECORDED / "finetune" / "io.safetensors")
    folder = converted(ALL_RECORDED / "finetune")
    backbone = HiViTBackbone.from_pretrained(folder, out_features=["stage1", "stage2", "stage3"]).eval()
    images = recorded["in.img_64x64"]
    output = backbone(images, output_hidden_states=True)
    middle = output.hidden_states[backbone.config.depths[0]]
    merged = backbone.hivit.stages[0](backbone.hivit.embeddings(images))[1]
    for name, tokens in {"feat_0": middle, "feat_1": merged}.items():
        found = units_to_map(tokens, (4, 4))
        assert_close(found, recorded[f"out.native64_rpe.{name}"], atol=IO_TOLERANCE, rtol=0)
    assert (output.feature_maps[0] - recorded["out.native64_rpe.feat_0"]).abs().max() > 0.1
    assert (output.feature_maps[1] - recorded["out.native64_rpe.feat_1"]).abs().max() > 0.1
    for stage, feature_map in enumerate(backbone(fused["in.images"]).feature_maps):
        expected = units_to_map(fused[f"out.hifeat_{stage}"], (4, 4))
        assert_close(feature_map, expected, atol=IO_TOLERANCE, rtol=0)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.parent.name}-{folder.name}")
def test_the_way_back(folder, converted, tmp_path):
    """Every tensor that was mapped comes back as it was; index buffers are computed again and equal."""
    source = read_checkpoint(next(iter(sorted(folder.glob("checkpoint.*"))))).tensors
    path = converted(folder)
    assert prove.convert.main([str(path), str(tmp_path / "back"), "--to_original"]) == 0
    back = read_checkpoint(tmp_path / "back" / "checkpoint.pth").tensors
    dropped = json.loads((path / "conversion_report.json").read_text())["dropped"]
    lost = {key for reason, keys in dropped.items() if "recomputed" not in reason for key in keys}
    assert set(back) | lost == set(source)
    for name, tensor in source.items():
        if name not in lost:
            assert_close(back[name], tensor, atol=0, rtol=0)
