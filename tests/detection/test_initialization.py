"""What detectors begin with, and what is refused of it."""

import json

import pytest
from transformers import DeformableDetrConfig, ResNetConfig

from hivit_hf.detection.initialization import build_detector, out_features_of
from hivit_hf.training.initialization import initialize_backbone, read_config
from support.detection import DETR, command, pretrained


def test_weights_and_overrides_that_do_not_fit_are_refused(tmp_path):
    folder = pretrained(tmp_path / "start")
    for keywords, words in (
        ({"name": str(tmp_path / "none")}, "There is no folder"),
        ({"name": folder, "architecture": "base"}, "The recipe is for base"),
        ({"name": folder, "overrides": {"hidden_size": 64}}, "do not fit the network"),
        ({"name": folder, "overrides": {"window_sise": 3}}, "window_sise"),
    ):
        with pytest.raises(ValueError, match=words):
            initialize_backbone(**keywords)
    start = initialize_backbone(folder)
    with pytest.raises(ValueError, match="fpn_chanels"):
        build_detector("mask_rcnn", start, ["a"], {"fpn_chanels": 3})
    with pytest.raises(ValueError, match="fpn_channels must be positive"):
        build_detector("mask_rcnn", start, ["a"], {"fpn_channels": 0})
    with pytest.raises(ValueError, match="decoder_layers"):
        build_detector(
            "deformable_detr",
            initialize_backbone(folder, out_features=out_features_of("deformable_detr")),
            ["a"],
            DETR | {"decoder_layers": 1},
        )


@pytest.mark.parametrize("kind", ["hivit_rcnn", "unheard_of"])  # transformers knows the first once it is imported
def test_models_of_other_kinds_are_named_where_a_hivit_is_wanted(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"is a {kind}, not a HiViT: choose another model"):
        read_config(str(tmp_path))


def test_detectors_on_other_networks_are_refused(scenes, tmp_path, capsys):
    DeformableDetrConfig(backbone_config=ResNetConfig()).save_pretrained(tmp_path / "other")
    flags = ["--model_name_or_path", str(tmp_path / "other"), "--from_scratch", "false"]
    assert command(scenes, tmp_path / "run", *flags, "--detector", "deformable_detr", "--detector_overrides", "{}") == 2
    assert "is a deformable_detr without a HiViT inside: choose another model." in capsys.readouterr().err


def test_only_detectors_are_evaluated_without_training(scenes, tmp_path, capsys):
    start = ["--model_name_or_path", pretrained(tmp_path / "start"), "--from_scratch", "false", "--do_train", "false"]
    assert command(scenes, tmp_path / "run", *start) == 2
    assert "start is no detector: train one first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
