"""Initialization of pre-training: pre-trainings, encoders with a new decoder, image sizes, refusals, resumptions."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.image_processing import evaluation_processor
from hivit_hf.modeling_hivit import resize_table, sin_cos_position_embeddings
from hivit_hf.pretraining.arguments import PretrainingModelArguments
from hivit_hf.pretraining.initialization import initialize_autoencoder
from hivit_hf.training.manifest import read_manifest
from support.pretraining import exact_losses, train_and_save


# that of the smoke recipe
NETWORK = {"image_size": 64, "hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
POSITIONS = "hivit.position_embeddings"


@pytest.fixture
def folder_of(redraw, tmp_path):
    """A function that writes a HiViT in which every tensor matters, and returns its folder and its weights."""

    def write(kind=HiViTForMaskedImageModeling, name="begin", mean=MEAN, **changes):
        changes = {"use_relative_position_bias": False, **NETWORK, **changes}
        model = redraw(kind(HiViTConfig(**changes)))
        model.save_pretrained(tmp_path / name)
        evaluation_processor(64, mean, STD).save_pretrained(tmp_path / name)
        return str(tmp_path / name), model.state_dict()

    return write


def initialize(name: str, **changes):
    """The initialization of a pre-training with these arguments."""
    if "config_overrides" in changes:
        changes["config_overrides"] = json.dumps(changes["config_overrides"])
    return initialize_autoencoder(PretrainingModelArguments(model_name_or_path=name, **changes), seed=0)


def assert_same(found: dict, expected: dict, keys=None):
    for key in keys or expected:
        assert_close(found[key], expected[key], atol=0, rtol=0, msg=key)


def test_a_pretraining_is_continued_with_its_weights_and_normalization(folder_of, make_run, tmp_path, capsys):
    folder, weights = folder_of()
    run = make_run(model_name_or_path=folder)
    assert_same(run.training.bare.state_dict(), weights, run.training.bare.state_dict())
    assert not run.training.bare.decoder.position_embeddings.requires_grad
    assert (run.data_args.image_mean, run.data_args.image_std) == (MEAN, STD)
    assert capsys.readouterr().out == f"The weights are those of {folder}.\n"
    train_and_save(run)
    processor = json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == (MEAN, STD)
    arguments = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000024")["arguments"]
    assert (arguments["model_name_or_path"], arguments["image_mean"]) == (folder, MEAN)
    flags = make_run(model_name_or_path=folder, image_std=[0.5, 0.5, 0.5], output_dir=str(tmp_path / "other"))
    assert (flags.data_args.image_mean, flags.data_args.image_std) == (MEAN, [0.5] * 3)


def test_a_run_from_scratch_has_the_published_arguments(make_run):
    run = make_run()
    assert (run.data_args.image_mean, run.data_args.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    model_args = PretrainingModelArguments()
    assert (model_args.architecture, model_args.image_size) == ("base-mae", 224)


@pytest.mark.parametrize("kind", [HiViTModel, HiViTForImageClassification, HiViTBackbone])
def test_an_encoder_gets_a_new_decoder(kind, folder_of):
    changes = {"add_pooled_stage": True, "apply_layernorm": True, "out_features": ["stage3", "stage4"]}
    changes = changes if kind is HiViTBackbone else {"num_labels": 3}
    folder, weights = folder_of(kind, use_relative_position_bias=True, **changes)
    made = initialize(folder)
    assert made.notes == [
        f"The weights are those of {folder}.",
        f"Not in {folder}, so it is newly initialized: the decoder.",
    ]
    model = made.model
    assert type(model) is HiViTForMaskedImageModeling and model.config.use_relative_position_bias
    assert (model.config.add_pooled_stage, model.config.out_features) == (False, ["stage3"])
    prefix = "hivit." if kind is HiViTModel else ""
    encoder = {prefix + key: tensor for key, tensor in weights.items() if "norms." not in key}
    encoder = {key: tensor for key, tensor in encoder.items() if key.startswith("hivit.") and ".layernorm" not in key}
    assert len(encoder) > 30
    assert_same(model.state_dict(), encoder)
    assert 0.015 < model.decoder.head.weight.std() < 0.025 and not model.decoder.head.bias.any()
    positions = sin_cos_position_embeddings((4, 4), 32).float()
    assert torch.equal(model.decoder.position_embeddings, positions)
    assert_same(initialize(folder).model.state_dict(), model.state_dict())
    loss = model.train()(torch.randn(2, 3, 64, 64)).loss
    loss.backward()
    assert loss.isfinite() and model.hivit.stages[2].layers[1].attention.relative_position_bias_table.grad.any()


@pytest.mark.parametrize("use_relative_position_bias", [False, True])
def test_another_image_size_interpolates_what_depends_on_it(use_relative_position_bias, folder_of, tmp_path):
    folder, weights = folder_of(use_relative_position_bias=use_relative_position_bias)
    small, made = initialize(folder).model.eval(), initialize(folder, image_size=96).model.eval()
    assert made.config.image_size == 96
    expected = resize_table(weights[POSITIONS][0], (4, 4), (6, 6))[None]
    assert_close(made.state_dict()[POSITIONS], expected, atol=0, rtol=0)
    assert made.decoder.grid_size == (6, 6) and not made.decoder.position_embeddings.requires_grad
    inputs = {"pixel_values": torch.randn(2, 3, 96, 96), "noise": torch.rand(2, 36)}
    with torch.no_grad():
        assert_close(made(**inputs).logits, small(**inputs).logits)
    made.save_pretrained(tmp_path / "saved")
    again = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "saved")
    assert_same(again.state_dict(), made.state_dict())


def test_what_an_architecture_does_not_have_is_new_and_said(folder_of):
    folder, _ = folder_of()
    changes = {"mask_ratio": 0.5, "config_overrides": {"use_relative_position_bias": True}}
    made = initialize(folder, **changes)
    assert made.notes[1:] == [
        f"Not in {folder}, so they start at zero: 2 relative position tables.",
        f"{folder} was trained with mask_ratio 0.75 and norm_pix_loss True; now it is mask_ratio 0.5 and "
        "norm_pix_loss True.",
    ]
    assert made.model.config.mask_ratio == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "base"}, r"recipe is for base, whose hidden_size is 512, but that of .* is 64"),
        ({"config_overrides": {"depths": [1, 1, 1]}}, r"do not fit the network: hivit.stages.2.layers.1.* left over"),
        ({"config_overrides": {"hidden_size": 128}}, "do not fit the network: "),
        ({"config_overrides": {"decoder_hidden_size": 64}}, "do not fit the network: decoder."),
        ({"config_overrides": {"decoder_num_hidden_layers": 2}}, "do not fit the network: decoder.layers.1"),
        ({"config_overrides": {"fuse_stages": False}}, "do not fit the network: decoder."),
        ({"config_overrides": {"out_features": ["stage1"]}}, "out_features, but pre-training has no feature maps"),
        ({"image_size": 70}, "multiple of patch_size 16"),
        ({"image_size": 16}, "At least one unit must stay visible"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(changes, message, folder_of):
    with pytest.raises(ValueError, match=message):
        initialize(folder_of()[0], **changes)


def test_a_decoder_with_another_number_of_layers_does_not_fit(folder_of, tmp_path):
    folder, weights = folder_of(decoder_num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"do not fit the network: decoder.layers.1.* left over"):
        initialize(folder, config_overrides={"decoder_num_hidden_layers": 1})
    config = json.loads((tmp_path / "begin" / "config.json").read_text())
    cut = {key: tensor for key, tensor in weights.items() if "decoder.layers.1." not in key}
    HiViTForMaskedImageModeling(HiViTConfig(**NETWORK)).save_pretrained(folder, state_dict=cut)
    (tmp_path / "begin" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit the network: decoder.layers.1.* more are missing"):
        initialize(folder)


def test_folders_that_cannot_be_continued(folder_of, tmp_path, make_run):
    windows, _ = folder_of(HiViTBackbone, "windows", window_size=2)
    with pytest.raises(ValueError, match="has windows of 2 units, which cannot be masked: give --config_overrides"):
        initialize(windows)
    assert initialize(windows, config_overrides={"window_size": None}).model.config.window_size is None
    wide, _ = folder_of(name="wide", image_size=[64, 128])
    with pytest.raises(ValueError, match="wide sees 64x128 px, which is no square: give --image_size"):
        initialize(wide)
    assert initialize(wide, image_size=64).model.config.image_size == 64
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="other is a vit, not a HiViT"):
        initialize(str(tmp_path / "other"))
    gray, _ = folder_of(name="gray", mean=[0.5])
    with pytest.raises(ValueError, match="image_mean and image_std need 3 numbers"):
        make_run(model_name_or_path=gray)
    (tmp_path / "gray" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"The weights of .*gray cannot be read"):
        initialize(gray)


def test_a_resumption_is_exact_and_does_not_read_the_initialization(folder_of, make_run, tmp_path, capsys):
    folder, _ = folder_of()
    begun = {"model_name_or_path": folder}
    train_and_save(make_run(**begun, output_dir=str(tmp_path / "reference")))
    assert make_run(**begun, stop_after_steps=7).train()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"was begun with model_name_or_path=.*, now it is None: a resumption must"):
        make_run(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"was begun with image_mean=\[0.1, 0.2, 0.3\], now it is \[0.5, 0.5, 0.5\]"):
        make_run(**begun, resume_from_checkpoint="latest", image_mean=[0.5] * 3)
    capsys.readouterr()
    resumed = make_run(**begun, resume_from_checkpoint="latest", image_mean=MEAN)
    assert "The weights are" not in capsys.readouterr().out
    assert resumed.data_args.image_mean == MEAN and resumed.data_args.image_std == STD
    train_and_save(resumed)
    assert exact_losses(tmp_path / "run") == exact_losses(tmp_path / "reference")
    models = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("reference", "run")]
    assert models[0] == models[1]
