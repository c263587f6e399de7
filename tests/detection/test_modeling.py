"""Mask R-CNN, Faster R-CNN and Deformable DETR on HiViT."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, RTDetrConfig, RTDetrForObjectDetection
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrObjectDetectionOutput

from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.detection.initialization import build_detector
from hivit_hf.detection.modeling import DetrBatches, HiViTRCNN, RCNNBatches, detr_processor
from hivit_hf.training.initialization import initialize_backbone
from support.detection import NETWORK, RCNN, pretrained


@pytest.fixture
def batch():
    torch.manual_seed(1)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    masks = torch.zeros(2, 50, 70, dtype=torch.uint8)
    masks[0, 5:25, 6:30], masks[1, 20:45, 30:66] = 1, 1
    targets = [
        {"boxes": torch.tensor([[6.0, 5, 30, 25], [30, 20, 66, 45]]), "labels": torch.tensor([1, 3]), "masks": masks},
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.long),
            "masks": torch.zeros(0, 64, 40, dtype=torch.uint8),
        },
    ]
    return images, targets


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn"])
def test_rcnn_trains_detects_and_loads_from_its_folder(tmp_path, batch, detector):
    changes = {"window_size": 3, "global_attention_layers": [1]}
    start = initialize_backbone(pretrained(tmp_path / "start"), overrides=changes)
    model = build_detector(detector, start, ["a", "b", "c"], RCNN)
    source = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "start").hivit.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.pyramid.hivit.state_dict().items())
    assert model.config.backbone_config.window_size == 3 and model.pyramid.channels == [8, 16, 32, 32]
    images, targets = batch
    output = model.train()(images, targets)
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert set(output.losses) == names | ({"loss_mask"} if detector == "mask_rcnn" else set())
    assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="needs targets"):
        model(images)
    model.config.score_threshold = model.rcnn.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = model.eval()(images).detections
        model.save_pretrained(tmp_path / "saved")
        assert AutoConfig.from_pretrained(tmp_path / "saved").id2label == {0: "a", 1: "b", 2: "c"}
        loaded = HiViTRCNN.from_pretrained(tmp_path / "saved").eval()
        for before, after in zip(found, loaded(images).detections):
            assert len(before["boxes"]) and all(torch.equal(before[name], after[name]) for name in before)
    assert ("masks" in found[0]) == (detector == "mask_rcnn")
    assert found[0]["boxes"][:, 2].max() <= 70 and found[1]["boxes"][:, 3].max() <= 64
    if detector == "mask_rcnn":
        masks = RCNNBatches().detections(model(images), [])[0]["masks"]
        assert masks.dtype == torch.bool and masks.shape[1:] == (50, 70)


def test_anchors_and_levels_are_the_published_ones_at_the_published_size():
    """32 to 512 px on strides 4 to 64; boxes of 224 px come from stage 3, half as large ones from stage 2."""
    network = NETWORK | {"patch_size": 16, "image_size": 224}
    rcnn = build_detector("mask_rcnn", initialize_backbone(None, "tiny", network), ["a"], RCNN).rcnn
    assert [*rcnn.rpn.anchor_generator.sizes] == [(32,), (64,), (128,), (256,), (512,)]
    for pool in (rcnn.roi_heads.box_roi_pool, rcnn.roi_heads.mask_roi_pool):
        assert pool.canonical_scale == 224 and pool.canonical_level == 4
    features = {
        str(level): torch.full((1, 1, 224 // s, 224 // s), float(level)) for level, s in enumerate((4, 8, 16, 32))
    }
    boxes = torch.tensor([[0.0, 0, side, side] for side in (60, 130, 223, 224)])
    pooled = rcnn.roi_heads.box_roi_pool(features, [boxes], [(224, 224)]).mean(dim=(1, 2, 3))
    assert pooled.tolist() == [0, 1, 1, 2]
    start = initialize_backbone(None, "tiny", {**NETWORK})
    small = build_detector("mask_rcnn", start, ["a"], RCNN | {"canonical_size": 20})
    features = {str(level): torch.full((1, 1, 96 // s, 96 // s), float(level)) for level, s in enumerate((2, 4, 8, 16))}
    boxes = torch.tensor([[0.0, 0, side, side] for side in (9, 19, 21, 41)])
    pooled = small.rcnn.roi_heads.box_roi_pool(features, [boxes], [(96, 96)]).mean(dim=(1, 2, 3))
    assert pooled.tolist() == [0, 1, 2, 3]


def test_new_heads_are_initialized_as_torchvision_does(tmp_path):
    start = initialize_backbone(None, "tiny", {**NETWORK})
    model = build_detector("mask_rcnn", start, ["a"], RCNN | {"fpn_channels": 64})
    rpn, heads = model.rcnn.rpn.head, model.rcnn.roi_heads
    assert 0.008 < rpn.cls_logits.weight.std() < 0.012 and 0.009 < rpn.conv[0][0].weight.std() < 0.011
    fan_in = heads.box_head.fc6.weight.shape[1]
    assert_close(heads.box_head.fc6.weight.std().item(), (3 * fan_in) ** -0.5, rtol=0.1, atol=0)
    fpn = model.rcnn.backbone.fpn.inner_blocks[3][0].weight
    assert_close(fpn.std().item(), fpn.shape[1] ** -0.5, rtol=0.1, atol=0)
    model.save_pretrained(tmp_path)
    more = HiViTRCNN.from_pretrained(tmp_path, id2label={i: str(i) for i in range(5)}, ignore_mismatched_sizes=True)
    assert more.rcnn.roi_heads.box_predictor.cls_score.weight.shape[0] == 6
    assert 0.05 < more.rcnn.roi_heads.box_predictor.cls_score.weight.std() < 0.3


def test_boxes_and_labels_of_deformable_detr_are_those_of_images():
    """One query sure of class 2 in the middle of an image of 60x80 px: label 3, in its pixels; targets go back."""
    batches = DetrBatches(detr_processor(8, 64, 96, [0.5] * 3, [0.5] * 3), 64)
    logits = torch.full((1, 1, 4), -9.0).index_fill(2, torch.tensor([2]), 9.0)
    output = DeformableDetrObjectDetectionOutput(logits=logits, pred_boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.2]]]))
    best = batches.detections(output, [(60, 80)])[0]
    assert best["labels"][0] == 3 and best["scores"][0] > 0.99
    assert_close(best["boxes"][0], torch.tensor([20.0, 24, 60, 36]))
    item = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "boxes": best["boxes"][:1], "image_id": 5}
    inputs = batches([item | {"labels": torch.tensor([3])}], training=True)
    assert inputs["labels"][0]["class_labels"].tolist() == [2] and inputs["pixel_mask"].all()
    assert_close(inputs["labels"][0]["boxes"][0], torch.tensor([40 / 64, 30 / 64, 40 / 64, 12 / 64]))
    assert batches([item], training=False)["pixel_values"].shape == (1, 3, 96, 96)


def test_rt_detr_takes_the_backbone_by_its_configuration(tmp_path):
    start = initialize_backbone(None, "tiny", {**NETWORK}, ["stage2", "stage3", "stage4"])
    sizes = {"encoder_hidden_dim": 32, "d_model": 32, "num_queries": 5, "decoder_layers": 2, "encoder_ffn_dim": 32}
    sizes |= {"decoder_ffn_dim": 32, "decoder_attention_heads": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_in_channels": [32] * 3, "encoder_in_channels": start.model.channels}
    config = RTDetrConfig(backbone_config=start.model.config, num_labels=3, num_denoising=0, **sizes)
    model = RTDetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(start.model.state_dict())
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2]])}] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.model.backbone.model.hivit.embeddings.projection.weight.clone()
    model(pixel_values=torch.rand(2, 3, 64, 64), labels=labels).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.backbone.model.hivit.embeddings.projection.weight, before)
