"""
The converter, through its command line: every layout, the proof, the way back, hostile and damaged files. What the
converted models compute is held against the original's recorded outputs in test_golden.py.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

import convert
import engine
from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.modeling_hivit import resize_table, sin_cos_position_embeddings
from support.original_layouts import (
    FULL_SIZE,
    classifier,
    decoder,
    encoder,
    fill,
    index_buffer,
    itpn_pyramid,
    norm,
    prefixed,
)


KEY_LISTS = Path(__file__).parents[3] / "shared" / "golden" / "keys"

SMALL_ENCODER = encoder(64, 2, 2, 2, heads=4, side=4, index=["model"])
SMALL = {
    "classifier": SMALL_ENCODER | classifier(64, 5),
    "supervised": encoder(64, 2, 2, 2, heads=4, side=4, index=["block"]) | classifier(64, 5),
    "mae": encoder(64, 2, 2, 2, side=4) | decoder(64, 448, 32, 2, side=4),
    "mae_last_stage": SMALL_ENCODER | decoder(64, 64, 32, 2, side=4),
    "mmpretrain": prefixed("backbone.", encoder(64, 2, 2, 2, 4, 4, "pos_embed", ["model", "block"]))
    | {"head.fc.weight": (5, 64), "head.fc.bias": (5,)},
    "dense": prefixed("backbone.", SMALL_ENCODER | norm("fpn1", 16) | norm("fpn4.1", 64)) | norm("neck.convs.0", 8),
    "odd": encoder(64, 3, 3, 2, heads=4, side=4, index=["model"]) | classifier(64, 5),
}
HEADS = {"mae": ["--num_heads", "4", "--decoder_num_heads", "4"], "mae_last_stage": ["--decoder_num_heads", "4"]}
CONTAINER = {"mmpretrain": "state_dict", "dense": "state_dict"}


TABLE, TABLE_2 = (f"blocks.{block}.attn.relative_position_bias_table" for block in (6, 7))


def save(path, tensors, container="model", **entries):
    torch.save({container: OrderedDict(tensors), **entries}, path)
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """A function that runs the command: exit code, output and errors. `run.refused` expects and returns an error."""

    def run_command(*arguments):
        code = convert.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def refused(*arguments):
        code, _, err = run_command(*arguments)
        assert code == 2
        assert err.startswith("error: ")
        assert "Traceback" not in err
        return err

    run_command.refused = refused
    return run_command


@pytest.fixture
def small(tmp_path):
    """A function that writes the checkpoint of a small network, and returns its path, tensors and needed options."""

    def write(name, change=lambda tensors: None, **entries):
        tensors = fill(SMALL[name])
        change(tensors)
        path = save(tmp_path / f"{name}.pth", tensors, CONTAINER.get(name, "model"), **entries)
        return path, tensors, HEADS.get(name, [])

    return write


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_written_down_layouts_are_the_real_ones(name):
    shapes, entries, parameters = FULL_SIZE[name]
    assert len(shapes) == entries
    count = sum(torch.Size(shape).numel() for key, shape in shapes.items() if not key.endswith("_index"))
    assert count == parameters
    key_list = KEY_LISTS / f"keys_{name}.txt"
    if key_list.is_file():
        lines = [line.split("\t") for line in key_list.read_text().splitlines() if not line.startswith("#")]
        assert {line[0]: tuple(json.loads(line[1])) for line in lines if line[0]} == shapes


ARCHITECTURE_OF = {
    "mae_hivit_base_dec512d6b": ("self-supervised", HiViTForMaskedImageModeling, "base-mae"),
    "hivit_base_finetune": ("self-supervised", HiViTForImageClassification, "base"),
    "supervised_tiny": ("supervised", HiViTForImageClassification, "tiny"),
    "supervised_small": ("supervised", HiViTForImageClassification, "small"),
    "supervised_base": ("supervised", HiViTForImageClassification, "base"),
    "mmpretrain_small": ("mmpretrain", HiViTForImageClassification, "small"),
    "itpn_base_finetune": ("self-supervised", HiViTForImageClassification, None),
    "itpn_large_finetune": ("self-supervised", HiViTForImageClassification, "large"),
    "itpn_base_pretrain": ("itpn-pretraining", HiViTModel, None),
}


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_full_size(name, run, tmp_path):
    layout, model_class, architecture = ARCHITECTURE_OF[name]
    shapes, _, parameters = FULL_SIZE[name]
    dtype = torch.bfloat16 if "large" in name else torch.float32
    if layout == "mmpretrain":
        shapes = prefixed("backbone.", shapes) | {"head.fc.weight": (1000, 384), "head.fc.bias": (1000,)}
    path = save(tmp_path / "original.pth", fill(shapes, dtype), "state_dict" if layout == "mmpretrain" else "model")
    code, _, err = run(path, tmp_path / "converted")
    assert code == 0, err
    report = json.loads((tmp_path / "converted" / "conversion_report.json").read_text())
    assert report["source"]["layout"] == layout
    assert report["model"]["class"] == model_class.__name__
    assert report["proof"]["equal"] == report["proof"]["compared"] == report["tensors"]["mapped"]
    assert report["tensors"]["read"] == len(shapes)
    config = HiViTConfig.from_pretrained(tmp_path / "converted")
    if architecture:
        expected = HiViTConfig.from_architecture(architecture)
        for field in ("depths", "early_blocks_per_depth", "num_attention_heads", "use_relative_position_bias"):
            assert getattr(config, field) == getattr(expected, field)
        if layout != "mmpretrain":
            assert report["model"]["parameters"] == parameters
    elif model_class is HiViTModel:
        assert report["dropped"].keys() == {
            "feature pyramid of iTPN",
            "decoder of iTPN, which reads its feature pyramid",
        }
        assert sum(map(len, report["dropped"].values())) == len(itpn_pyramid(512))
        assert config.num_attention_heads == 8 and config.depths == [3, 3, 24]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()


@pytest.mark.parametrize("name", SMALL)
def test_every_layout_converts_loads_and_goes_back(name, run, small, tmp_path):
    path, tensors, heads = small(name)
    code, _, err = run(path, tmp_path / "converted", *heads)
    assert code == 0, err
    auto = AutoModelForPreTraining if name.startswith("mae") else AutoModelForImageClassification
    model = (AutoModel if name == "dense" else auto).from_pretrained(tmp_path / "converted")
    assert AutoImageProcessor.from_pretrained(tmp_path / "converted").crop_size["height"] == 64
    assert model(torch.randn(1, 3, 64, 64))[0].isfinite().all()
    report = json.loads((tmp_path / "converted" / "conversion_report.json").read_text())
    assert report["tensors"]["read"] == len(tensors) == report["tensors"]["mapped"] + report["tensors"]["dropped"]

    assert run(tmp_path / "converted", tmp_path / "original", "--to_original")[0] == 0
    back = torch.load(tmp_path / "original" / "checkpoint.pth", weights_only=True)[CONTAINER.get(name, "model")]
    dropped = {key for reason, keys in report["dropped"].items() if "recomputed" not in reason for key in keys}
    if name == "mae_last_stage":
        assert_close(back.pop("norm.weight"), torch.ones(64))
        assert_close(back.pop("norm.bias"), torch.zeros(64))
    assert set(back) == set(tensors) - dropped
    for key, tensor in back.items():
        assert_close(tensor, tensors[key], atol=0, rtol=0)


def test_encoder_only_and_the_moving_average(run, small, tmp_path):
    average = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in fill(SMALL["mae"]).items()}
    path, tensors, heads = small("mae", model_ema=average)
    assert run(path, tmp_path / "encoder", "--encoder_only", *heads[:2])[0] == 0
    model = HiViTModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    assert_close(model.position_embeddings.data, tensors["absolute_pos_embed"], atol=0, rtol=0)
    assert not any(name.startswith("decoder") for name in load_file(tmp_path / "encoder" / "model.safetensors"))
    assert run(path, tmp_path / "average", "--model_ema", *heads)[0] == 0
    model = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "average")
    assert_close(model.hivit.position_embeddings.data, average["absolute_pos_embed"], atol=0, rtol=0)
    err = run.refused(small("classifier")[0], tmp_path / "none", "--model_ema")
    assert "no state dict under model_ema or state_dict_ema; it holds: model" in err


def test_heads_are_asked_for_by_name_and_may_not_contradict(run, small, tmp_path):
    path, _, _ = small("mae")
    err = run.refused(path, tmp_path / "out")
    assert "tell the heads: --num_heads" in err
    err = run.refused(path, tmp_path / "out", "--num_heads", 4)
    assert "tell the heads: --decoder_num_heads" in err
    err = run.refused(small("classifier")[0], tmp_path / "out", "--num_heads", 8)
    assert "--num_heads 8 contradicts the relative tables, which have 4: leave it out" in err
    err = run.refused(path, tmp_path / "out", "--num_heads", 5, "--decoder_num_heads", 4)
    assert "num_attention_heads must divide hidden_size 64, got 5" in err


def test_another_image_size_interpolates_once_and_says_so(run, small, tmp_path):
    path, tensors, _ = small("classifier")
    code, out, _ = run(path, tmp_path / "out", "--image_size", 96)
    assert code == 0 and "resized: `hivit.position_embeddings`: 4x4 -> 6x6 units, bicubic" in out
    at_64, at_96 = (tmp_path / "at_64", tmp_path / "out")
    assert run(path, at_64)[0] == 0
    pixel_values = torch.randn(2, 3, 96, 96)
    native = HiViTForImageClassification.from_pretrained(at_96)
    interpolating = HiViTForImageClassification.from_pretrained(at_64)
    assert native.config.image_size == 96
    expected = resize_table(tensors["absolute_pos_embed"][0], (4, 4), (6, 6))
    assert_close(native.hivit.position_embeddings[0], expected, atol=0, rtol=0)
    assert_close(native(pixel_values).logits, interpolating(pixel_values).logits)
    err = run.refused(path, tmp_path / "odd", "--image_size", 90)
    assert "multiple of patch_size 16" in err


def test_tables_of_another_grid_than_the_position_embedding(run, tmp_path):
    """A segmentation backbone: tables for 640 px, the position embedding still for 224."""
    shapes = prefixed("backbone.", encoder(64, 2, 2, 2, heads=4, side=6, index=["model"]))
    shapes["backbone.absolute_pos_embed"] = (1, 16, 64)
    path = save(tmp_path / "segmentation.pth", fill(shapes), "state_dict")
    code, out, err = run(path, tmp_path / "out")
    assert code == 0, err
    assert "4x4 -> 6x6 units" in out and "offsets" not in out
    assert HiViTBackbone.from_pretrained(tmp_path / "out").config.image_size == 96


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept_or_converted(dtype, run, small, tmp_path):
    half = getattr(torch, dtype)
    path, tensors, _ = small("classifier")
    halves = {key: tensor.to(half) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    save(path, halves)
    assert run(path, tmp_path / "kept")[0] == 0
    model = HiViTForImageClassification.from_pretrained(tmp_path / "kept")
    assert {parameter.dtype for parameter in model.parameters()} == {half}
    assert run(path, tmp_path / "float32", "--dtype", "float32")[0] == 0
    model = HiViTForImageClassification.from_pretrained(tmp_path / "float32")
    assert_close(model.classifier.weight.data, halves["head.weight"].float(), atol=0, rtol=0)
    halves["head.weight"] = halves["head.weight"].float()
    err = run.refused(save(path, halves), tmp_path / "mixed")
    assert "of several types" in err and "--dtype" in err


def test_class_names(run, small, tmp_path):
    path, _, _ = small("classifier")
    names = ["ant", "bee", "cat", "dog", "elk"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "names.json").write_text(json.dumps({str(n): name for n, name in enumerate(names)}))
    for file in ("names.txt", "names.json"):
        assert run(path, tmp_path / "out", "--id2label", tmp_path / file, "--overwrite")[0] == 0
        config = HiViTConfig.from_pretrained(tmp_path / "out")
        assert config.id2label == dict(enumerate(names)) and config.label2id["cat"] == 2
    err = run.refused(path, tmp_path / "more", "--id2label", "imagenet-1k")
    assert "names 1000 classes, but the classifier has 5" in err
    err = run.refused(path, tmp_path / "more", "--id2label", tmp_path / "nowhere.txt")
    assert "No such file" in err
    path, _, heads = small("mae")
    err = run.refused(path, tmp_path / "mae", "--id2label", "imagenet-1k", *heads)
    assert "this makes a HiViTForMaskedImageModeling" in err
    assert convert.read_labels("imagenet-1k", 1000)[207] == "golden retriever"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("n.json", "5", "must hold names"),
        ("n.json", '"abcde"', "must hold names"),
        ("n.json", '["a", null, "c", "d", "e"]', "must hold names"),
        ("n.json", '{"1": "a"}', "names no classes 0, 1, ... (KeyError)"),
        ("n.json", "[" * 10**5, "names no classes 0, 1, ... (RecursionError)"),
        ("n.txt", "a\n\n\nb\nc\nd\ne", "must hold names"),
        ("n.txt", "a\nb\nc\nd\na", "names several classes 'a'"),
        ("n.txt", b"\xff\xfe\x00", "names no classes 0, 1, ... (UnicodeDecodeError)"),
    ],
)
def test_labels_that_are_no_names(name, content, sentence, run, small, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in run.refused(small("classifier")[0], tmp_path / "out", "--id2label", tmp_path / name)


def test_numbers_and_layouts_that_have_no_meaning(run, small, tmp_path, capsys):
    path, _, _ = small("classifier")
    for option in ("--num_heads", "--image_size"):
        with pytest.raises(SystemExit) as stopped:
            run(path, tmp_path / "out", option, 0)
        assert stopped.value.code == 2 and "must be at least 1, got 0" in capsys.readouterr().err
    assert "there is no decoder to convert" in run.refused(path, tmp_path / "out", "--decoder_num_heads", 4)
    assert "are those of --source self-supervised" in run.refused(path, tmp_path / "out", "--source", "dense")
    assert "image_size must be at most 32768" in run.refused(path, tmp_path / "out", "--image_size", 16 * 10**5)


def test_safetensors_and_data_parallel_prefixes(run, small, tmp_path):
    _, tensors, _ = small("classifier")
    for prefix, name in [("module.", "a.safetensors"), ("_orig_mod.module.", "b.bin"), ("module._orig_mod.", "c.bin")]:
        save_file({f"{prefix}{key}": tensor for key, tensor in tensors.items()}, tmp_path / name)
        code, _, err = run(tmp_path / name, tmp_path / "out", "--overwrite")
        assert code == 0, err


# -- every tensor is accounted for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda t: t.update({"extra.weight": torch.zeros(3)}), r"unknown +extra.weight +\[3\]"),
        (lambda t: t.pop("blocks.6.attn.proj.bias"), r"missing +blocks.6.attn.proj.bias +nothing +\[64\]"),
        (lambda t: t.pop("fc_norm.weight"), r"missing +fc_norm.weight +nothing +\[64\]"),
        (lambda t: t.update({"head.bias": torch.zeros(6)}), r"shape +head.bias +\[6\] +\[5\]"),
        (
            lambda t: t.update({"blocks.0.norm2.bias": torch.zeros(16).long()}),
            r"type +blocks.0.norm2.bias +torch.int64",
        ),
        (
            lambda t: t["blocks.7.mlp.fc1.bias"].fill_(float("nan")),
            r"not finite +blocks.7.mlp.fc1.bias +NaN or infinity",
        ),
        (lambda t: t["head.weight"][0].fill_(float("inf")), r"not finite +head.weight"),
        (lambda t: t["relative_position_index"].add_(1), r"index +relative_position_index"),
        (lambda t: t.update({"blocks.00.norm2.weight": torch.ones(16)}), r"unknown +blocks.00.norm2.weight"),
        (lambda t: t.update({"blocks.\u0660.norm2.weight": torch.ones(16)}), r"unknown +blocks.\\u0660.norm2.weight"),
        (lambda t: t.update({"head.\x1b[31m" + "x" * 10**5: torch.ones(1)}), r"unknown +head.\\x1b\[31mx+\.\.\. "),
        (lambda t: t.update({"blocks.9999.norm2.weight": torch.ones(16)}), r"blocks.8 is missing"),
        (lambda t: t.update({f"blocks.{10**9}.norm2.weight": torch.ones(16)}), r"unknown +blocks.1000000000.norm2"),
        (lambda t: t.update({TABLE: torch.zeros(25, 4)}), r"relative tables have several shapes"),
        (
            lambda t: t.update({TABLE: torch.zeros(36, 4), TABLE_2: torch.zeros(36, 4)}),
            r"6x6 offsets, which must",
        ),
        (lambda t: t.update({"absolute_pos_embed": torch.zeros(1, 25, 64)}), r"is for 5x5 units, the relative tables"),
        (lambda t: t.update({"head.weight": torch.zeros(0, 64)}), r"head.weight must have 2 dimensions, none empty"),
        (
            lambda t: t.update({"head.weight": torch.ones(1, 64).expand(10**9, 64)}),
            r"larger than its storage",
        ),
        (lambda t: t.update({"epoch": 3}), r"model: its 'epoch' is a int, which is no tensor"),
        (lambda t: t.pop("absolute_pos_embed"), None),
        (lambda t: t.pop("patch_embed.proj.bias"), r"missing +patch_embed.proj.bias"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith("blocks.1.")],
            r"blocks.1 is missing: blocks are numbered from 0 without gaps",
        ),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_unknown_missing_and_misshapen_tensors_stop_it(change, row, run, small, tmp_path):
    path, _, _ = small("classifier", change)
    code, _, err = run(path, tmp_path / "out")
    if row is None:  # without a position embedding it is another HiViT, and a valid one
        assert code == 0 and not HiViTConfig.from_pretrained(tmp_path / "out").use_absolute_position_embeddings
        return
    assert code == 2 and not (tmp_path / "out").exists()
    assert re.search(row, err), err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"], "a plain ViT"),
        (["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"], "a Swin Transformer"),
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"], "a ResNet"),
        (["pos_embed", "blocks.0.mlp.ffn_ln.weight", "blocks.9.attn.q_proj.weight"], "Fast-iTPN, a different"),
        (["hivit.embeddings.norm.weight", "classifier.weight"], "a HiViT of this package: it needs no conversion"),
        (["encoder.weight", "encoder.bias"], "no HiViT that is known here. Its 2 keys begin with encoder.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_networks_are_recognized(keys, sentence, run, tmp_path):
    path = save(tmp_path / "other.pth", {key: torch.zeros(4, 4) for key in keys})
    err = run.refused(path, tmp_path / "out")
    assert sentence in err


def test_a_trained_position_embedding_of_the_decoder_is_not_thrown_away(run, small, tmp_path):
    path, _, heads = small("mae")
    assert (
        "decoder.position_embeddings`: 4x4 -> 6x6 units, bicubic"
        in run(path, tmp_path / "a", "--image_size", 96, *heads)[1]
    )
    fixed = sin_cos_position_embeddings((4, 4), 32).float()
    path, _, _ = small("mae", lambda t: t.update({"decoder_pos_embed": fixed}))
    out = run(path, tmp_path / "b", "--image_size", 96, *heads)[1]
    assert "dropped: `decoder_pos_embed`: fixed sines and cosines, recomputed for the other grid" in out
    model = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "b")
    assert_close(model.decoder.position_embeddings.data, sin_cos_position_embeddings((6, 6), 32).float())
    for shape in ((1, 9, 32), (1, 17, 32)):
        path, _, _ = small("mae", lambda t, shape=shape: t.update({"decoder_pos_embed": torch.ones(shape)}))
        assert re.search(r"shape +decoder_pos_embed", run.refused(path, tmp_path / "c", "--image_size", 96, *heads))


def test_numbers_that_do_not_fit_the_type(run, small, tmp_path):
    path, _, _ = small("classifier", lambda t: t["head.bias"].fill_(1e6))
    assert "classifier.bias has numbers too large for torch.float16" in run.refused(
        path, tmp_path / "o", "--dtype", "float16"
    )
    code, out, _ = run(path, tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0 and "cast: float32 to bfloat16; largest change 5.8e+02" in out
    doubles = {key: t.double() if t.is_floating_point() else t for key, t in fill(SMALL["classifier"]).items()}
    assert "of type float64: choose another with --dtype" in run.refused(save(path, doubles), tmp_path / "double")


def test_the_report_holds_what_was_measured(run, small, tmp_path):
    path, tensors, _ = small("classifier", args=Namespace(model="x"))
    _, out, _ = run(path, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["source"]["size_bytes"] == path.stat().st_size
    assert report["proof"]["qkv_bias_k_thirds_equal"] == 2
    assert report["proof"]["numbers_compared"] == sum(t.numel() for t in tensors.values()) - 256
    assert "Never imported: `argparse.Namespace`" in out
    assert report["source"]["entries_left_out"] == ["args"]
    with pytest.raises(engine.ConversionError, match=r"differ in the numbers of \['a'\]"):
        engine.compare({"a": torch.zeros(3)}, {"a": torch.tensor([0.0, 1e-9, 0.0])})


def test_folders_that_do_not_go_back(run, small, tmp_path):
    path, _, _ = small("classifier")
    out = tmp_path / "out"

    def changed(change_tensors=lambda t: None, **config):
        shutil.rmtree(out, ignore_errors=True)
        assert run(path, out)[0] == 0
        tensors = load_file(out / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**content, **config}))
        return run.refused(out, tmp_path / "back", "--to_original")

    bias, extra = "hivit.stages.2.layers.0.attention.qkv.bias", "hivit.stages.2.layers.7.norm1.weight"
    assert re.search(rf"missing +{bias}", changed(lambda t: t.pop(bias)))
    assert re.search(
        rf"unknown +{extra} +\[64\] +the model has no", changed(lambda t: t.update({extra: torch.ones(64)}))
    )
    integers = {"classifier.bias": torch.ones(5, dtype=torch.int64)}
    assert re.search(r"type +classifier.bias +torch.int64", changed(lambda t: t.update(integers)))
    assert re.search(
        r"shape +classifier.bias +\[3\] +\[5\]", changed(lambda t: t.update({"classifier.bias": torch.ones(3)}))
    )
    assert re.search(r"not finite +classifier.bias", changed(lambda t: t["classifier.bias"].fill_(float("nan"))))
    assert "do not belong together" in changed(depths=[1, 1, 1])
    assert "do not belong together" in changed(image_size=[96, 64])
    assert "implies hidden_act=gelu, but the model has relu" in changed(hidden_act="relu")
    assert "implies layer_norm_eps=1e-06, but the model has 1e-05" in changed(layer_norm_eps=1e-5)
    assert "holds a vit, not a hivit" in changed(model_type="vit")
    assert "holds no HiViT that can be read" in changed(architectures=[["a"]])
    assert run(path, tmp_path / "sound")[0] == 0
    (tmp_path / "sound" / "conversion_report.json").write_text("{")
    assert run(tmp_path / "sound", tmp_path / "back", "--to_original")[0] == 0
    assert "has no place for these" in run.refused(
        tmp_path / "sound", tmp_path / "other", "--to_original", "--source", "itpn-pretraining"
    )


# -- a checkpoint is data ---------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Settings(dict):
    """Stands for a yacs CfgNode: a class that is not there when the file is read."""


def test_reading_runs_nothing_and_says_so(run, small, tmp_path):
    path, _, _ = small("classifier", args=Namespace(model="hivit_base"), extra=Hostile(tmp_path / "ran"))
    code, out, err = run(path, tmp_path / "out")
    assert code == 0, err
    assert not (tmp_path / "ran").exists()
    assert f"the file asks to call `{os.system.__module__}.system` when it is read. It was not called" in out
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert "argparse.Namespace" in report["source"]["classes_left_out"]
    assert report["source"]["calls_not_made"] == [f"{os.system.__module__}.system"]
    with pytest.raises(pickle.UnpicklingError):  # the library's own safe reader refuses the whole file
        torch.load(path, weights_only=True)


def test_a_hostile_call_in_place_of_a_tensor(run, small, tmp_path):
    path, _, _ = small("classifier", lambda t: t.update({"head.bias": Hostile(tmp_path / "ran")}))
    err = run.refused(path, tmp_path / "out")
    assert "no state dict" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("function", [eval, shutil.rmtree, torch.hub.load], ids=lambda f: f.__name__)
def test_every_call_that_is_not_made_is_reported(function, run, small, tmp_path):
    class Calls:
        def __reduce__(self):
            return function, ("1",)

    path, _, _ = small("classifier", extra=Calls())
    assert run(path, tmp_path / "out")[0] == 0
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["source"]["calls_not_made"] == [f"{function.__module__}.{function.__name__}"]


def repacked(path, change, **options):
    """The same archive with records changed by a function of name and content, all with sound checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, record in records.items():
            archive.writestr(name, change(name, record))


def test_records_that_are_not_what_they_claim(run, small, tmp_path):
    path, _, _ = small("classifier")
    repacked(path, lambda name, record: record, compression=zipfile.ZIP_DEFLATED)
    assert "was compressed. Unpack it" in run.refused(path, tmp_path / "out")
    path, _, _ = small("classifier")
    repacked(path, lambda name, record: record[:-4] if name.endswith("data/3") else record)
    assert "bytes for" in run.refused(path, tmp_path / "out")
    path, _, _ = small("classifier")
    repacked(path, lambda name, record: record + b"1234" if name.endswith("data/3") else record)
    assert "bytes for" in run.refused(path, tmp_path / "out")
    path, _, _ = small("classifier")
    repacked(path, lambda name, record: b"big" if name.endswith("byteorder") else record)
    assert "big-endian" in run.refused(path, tmp_path / "out")
    path, tensors, _ = small("classifier")
    repacked(path, lambda name, record: record)  # as another packer would write it
    assert run(path, tmp_path / "out")[0] == 0
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"], tensors["head.weight"])


def nested_key():
    """A key that takes longer to be hashed than there is time: t = (t, t), sixty times."""
    return (
        b"\x80\x02}("
        + b"(t"
        + b"q\x00h\x00\x86" * 1
        + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(1, 60))
        + b"K\x01u."
    )


def test_pickles_that_would_take_for_ever(run, small, tmp_path):
    path, _, _ = small("classifier")
    repacked(path, lambda name, record: nested_key() if name.endswith("/data.pkl") else record)
    assert "as a key" in run.refused(path, tmp_path / "out")
    repacked(path, lambda name, record: bytes(65 * 2**20) if name.endswith("/data.pkl") else record)
    assert "data.pkl has more than" in run.refused(path, tmp_path / "out")


def test_the_functions_of_torch_cannot_be_changed(run, small, tmp_path):
    path, _, _ = small("classifier")
    before = torch._utils._rebuild_tensor_v2.__defaults__
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    repacked(path, lambda name, record: attack if name.endswith("/data.pkl") else record)
    assert "holds no state dict" in run.refused(path, tmp_path / "out")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_classes_that_are_not_installed(run, small, tmp_path):
    settings = Settings(TRAIN=Settings(EPOCHS=300))
    path, _, _ = small("supervised", config=settings)
    data = path.read_bytes()
    assert b"Settings" in data
    program = f"import sys, convert; sys.exit(convert.main([{str(path)!r}, {str(tmp_path / 'out')!r}]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(convert.__file__).parent), *sys.path])}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["source"]["classes_left_out"] == [f"{Settings.__module__}.Settings"]


# -- damaged files, folders -------------------------------------------------------------------------------------------


def test_files_that_are_no_checkpoints(run, small, tmp_path):
    path, _, _ = small("classifier")
    data = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    cases = {
        "empty.pth": (b"", "is empty"),
        "truncated.pth": (data[: len(data) // 2], "cannot be read"),
        "text.pth": (b"<html>not found</html>", "neither a PyTorch checkpoint (1.6 or newer) nor a safetensors file"),
        "truncated.safetensors": (data[:100], "cannot be read"),
        "zip.pth": (None, "holds no data.pkl"),
        "script.pth": (None, "is a TorchScript program"),
        "number.pth": (3, "holds no state dict, but a int"),
        "entries.pth": ({"epoch": 3}, "holds no state dict under model or state_dict; it holds: epoch"),
    }
    for name, (content, sentence) in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        err = run.refused(tmp_path / name, tmp_path / "out")
        assert sentence in err and "Traceback" not in err, (name, err)
    err = run.refused(tmp_path / "nowhere.pth", tmp_path / "out")
    assert "There is no file" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_random_corruptions(small, tmp_path, capsys):
    """Either the file is refused with a sentence, or the tensors are exactly those of the sound file."""
    path, _, _ = small("classifier", args=Namespace(model="hivit_base", lr=0.1))
    assert convert.main([str(path), str(tmp_path / "sound")]) == 0
    sound = load_file(tmp_path / "sound" / "model.safetensors")
    data, random_numbers, refused = path.read_bytes(), random.Random(0), 0
    for round_number in range(1000):
        damaged = bytearray(data)
        for _ in range(random_numbers.choice([1, 1, 4, 64])):
            damaged[random_numbers.randrange(len(data))] ^= 1 << random_numbers.randrange(8)
        if round_number % 5 == 0:  # where the structure is, at both ends
            where = random_numbers.choice(
                [random_numbers.randrange(8000), len(data) - 1 - random_numbers.randrange(8000)]
            )
            damaged[where] = random_numbers.randrange(256)
        if round_number % 10 == 0:
            damaged = damaged[: random_numbers.randrange(len(data))]
        path.write_bytes(damaged)
        code = convert.main([str(path), str(tmp_path / "out"), "--overwrite"])
        err = capsys.readouterr().err
        if code == 2:
            refused += 1
            assert err.startswith("error: ") and "Traceback" not in err
            continue
        converted = load_file(tmp_path / "out" / "model.safetensors")
        assert set(converted) == set(sound) and all(torch.equal(converted[name], sound[name]) for name in sound)
    assert refused > 500


@pytest.mark.slow
def test_random_pickles_with_sound_checksums(small, tmp_path, capsys):
    """What only someone who means it can make: the reader meets the damage, not the checksums."""
    path, _, _ = small("classifier", args=Namespace(model="hivit_base"), extra=Hostile(tmp_path / "ran"))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("/data.pkl"))
    sound, random_numbers = records[pickled], random.Random(0)
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(random_numbers.choice([1, 2, 8])):
            damaged[random_numbers.randrange(len(damaged))] = random_numbers.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in {**records, pickled: bytes(damaged)}.items():
                archive.writestr(name, record)
        code = convert.main([str(path), str(tmp_path / "out"), "--overwrite"])
        err = capsys.readouterr().err
        assert code in (0, 2) and (code == 0 or err.startswith("error: "))
    assert not (tmp_path / "ran").exists()


def test_a_memo_slot_that_would_take_all_memory(run, small, tmp_path):
    path, _, _ = small("classifier")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            bomb = b"\x80\x02}r\xff\xff\xff\x7f."  # an empty dict, put into slot 2147483647
            archive.writestr(name, bomb if name.endswith("/data.pkl") else record)
    err = run.refused(path, tmp_path / "out")
    assert "holds no state dict" in err


def test_output_folders(run, small, tmp_path):
    path, _, _ = small("classifier")
    assert run(path, tmp_path / "out")[0] == 0
    before = (tmp_path / "out" / "conversion_report.json").read_text()
    err = run.refused(path, tmp_path / "out")
    assert "exists" in err and "--overwrite" in err
    assert (tmp_path / "out" / "conversion_report.json").read_text() == before
    assert run(path, tmp_path / "out", "--overwrite", "--encoder_only")[0] == 0
    assert (tmp_path / "out" / "conversion_report.json").read_text() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    err = run.refused(path, tmp_path / "mine", "--overwrite")
    assert "holds thesis.txt, which this command did not write" in err
    err = run.refused(path, tmp_path, "--overwrite")
    assert "which --overwrite would delete" in err
    err = run.refused(path, path, "--overwrite")
    assert "is a file, not a folder" in err
    err = run.refused(tmp_path / "out", tmp_path / "back", "--to_original", "--dtype", "float16")
    assert "--dtype has no meaning with --to_original" in err
    err = run.refused(path, tmp_path / "back", "--to_original")
    assert "must be a folder with config.json and model.safetensors" in err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["classifier.pth", "mine", "out"]


def test_overwrite_deletes_only_what_the_command_wrote(run, small, tmp_path, monkeypatch):
    path, _, _ = small("classifier")
    out = tmp_path / "out"
    assert run(path, out)[0] == 0
    (out / "checkpoint-9000").mkdir()
    assert "holds checkpoint-9000, which this command did not write" in run.refused(path, out, "--overwrite")
    (out / "checkpoint-9000").rmdir()
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne")
    assert run(path, out, "--overwrite", "--id2label", tmp_path / "names.txt")[0] == 0
    (tmp_path / "link").symlink_to(out)
    assert run(path, tmp_path / "link", "--overwrite")[0] == 0
    assert (tmp_path / "link").is_symlink() and (out / "model.safetensors").is_file()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert "is a link to nowhere" in run.refused(path, tmp_path / "nowhere")
    monkeypatch.chdir(out)
    assert "is where this command runs" in run.refused(path, ".", "--overwrite")
    monkeypatch.chdir(tmp_path)

    real = engine.save_file

    def slow(*arguments, **keywords):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "thesis.txt").write_text("years of work")
        real(*arguments, **keywords)

    monkeypatch.setattr(engine, "save_file", slow)
    assert "exists" in run.refused(path, tmp_path / "late")
    assert (tmp_path / "late" / "thesis.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("step", ["save_file", "write_report"])
def test_no_space_left(step, run, small, tmp_path, monkeypatch):
    path, _, _ = small("classifier")
    assert run(path, tmp_path / "out", "--encoder_only")[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, step, full)
    err = run.refused(path, tmp_path / "out", "--overwrite")
    assert "could not be written, and nothing of it was left" in err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["classifier.pth", "out"]


def test_a_written_file_that_differs_is_noticed(run, small, tmp_path, monkeypatch):
    path, _, _ = small("classifier")
    real = engine.save_file

    def careless(tensors, *arguments, **keywords):
        name = "hivit.stages.2.layers.0.attention.qkv.bias"
        keys = slice(64, 128)  # the third of the keys, which no output shows
        tensors = {**tensors, name: tensors[name].clone()}
        tensors[name][keys] += 1e-7
        real(tensors, *arguments, **keywords)

    monkeypatch.setattr(engine, "save_file", careless)
    err = run.refused(path, tmp_path / "out")
    assert "differ in the numbers of ['hivit.stages.2.layers.0.attention.qkv.bias']" in err
    assert not (tmp_path / "out").exists()


def test_the_index_is_that_of_the_original():
    assert index_buffer(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_what_a_layout_and_a_shape_imply(run, small, tmp_path):
    for name, eps, pooler in [("mmpretrain", 1e-5, False), ("classifier", 1e-6, True)]:
        assert run(small(name)[0], tmp_path / name)[0] == 0
        config = HiViTConfig.from_pretrained(tmp_path / name)
        assert (config.layer_norm_eps, config.pooler_layernorm) == (eps, pooler)
        assert (config.depths, config.early_blocks_per_depth) == ([1, 1, 2], 2)
    assert run(small("odd")[0], tmp_path / "odd")[0] == 0
    config = HiViTConfig.from_pretrained(tmp_path / "odd")
    assert (config.depths, config.early_blocks_per_depth) == ([3, 3, 2], 1)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "odd")
    assert processor.size["shortest_edge"] == 73 and processor.resample == 3
