"""Detection: COCO files and what is wrong with them, jitter, average precision, detectors, training by command line."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image as PILImage
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForObjectDetection, EarlyStoppingCallback, pipeline
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrObjectDetectionOutput

import finetune_detection
from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.detection.arguments import DetectionRecipe
from hivit_hf.detection.modeling import (
    DetrBatches,
    HiViTRCNN,
    RCNNBatches,
    build_detector,
    detr_processor,
    out_features_of,
)
from hivit_hf.detection.run import DetectionRun
from hivit_hf.training.initialization import pyramid_start, read_config
from hivit_hf.training.optim import stepped_learning_rate
from hivit_hf.training.recipe_old import read_recipe
from support.detection import DETR, NETWORK, RCNN, annotations_of, pretrained


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("detection_*.yaml"))
SMOKE = EXAMPLES / "recipes" / "detection_smoke_cpu.yaml"
HEAD_OF_64 = '{"fpn_channels": 64}'


def flags(folder: Path) -> list[str]:
    parts = []
    for flag, split in (("train", "train"), ("eval", "test")):
        parts += [f"--{flag}_annotations", annotations_of(folder, split), f"--{flag}_images", folder / split]
    return [str(part) for part in parts]


# -- detectors ------------------------------------------------------------------------------------------------------


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
def test_rcnn_learns_detects_and_comes_back_from_its_folder(tmp_path, batch, detector):
    changes = {"window_size": 3, "global_attention_layers": [1]}
    start = pyramid_start(pretrained(tmp_path / "start"), changes=changes)
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
    rcnn = build_detector("mask_rcnn", pyramid_start(None, "tiny", network), ["a"], RCNN).rcnn
    assert [*rcnn.rpn.anchor_generator.sizes] == [(32,), (64,), (128,), (256,), (512,)]
    for pool in (rcnn.roi_heads.box_roi_pool, rcnn.roi_heads.mask_roi_pool):
        assert pool.canonical_scale == 224 and pool.canonical_level == 4
    features = {
        str(level): torch.full((1, 1, 224 // s, 224 // s), float(level)) for level, s in enumerate((4, 8, 16, 32))
    }
    boxes = torch.tensor([[0.0, 0, side, side] for side in (60, 130, 223, 224)])
    pooled = rcnn.roi_heads.box_roi_pool(features, [boxes], [(224, 224)]).mean(dim=(1, 2, 3))
    assert pooled.tolist() == [0, 1, 1, 2]
    small = build_detector("mask_rcnn", pyramid_start(None, "tiny", {**NETWORK}), ["a"], RCNN | {"canonical_size": 20})
    features = {str(level): torch.full((1, 1, 96 // s, 96 // s), float(level)) for level, s in enumerate((2, 4, 8, 16))}
    boxes = torch.tensor([[0.0, 0, side, side] for side in (9, 19, 21, 41)])
    pooled = small.rcnn.roi_heads.box_roi_pool(features, [boxes], [(96, 96)]).mean(dim=(1, 2, 3))
    assert pooled.tolist() == [0, 1, 2, 3]


def test_new_heads_are_drawn_as_torchvision_does(tmp_path):
    start = pyramid_start(None, "tiny", {**NETWORK})
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


@pytest.mark.slow
def test_deformable_detr_learns_and_its_pipeline_detects(tmp_path, scenes):
    recipe = smoke(scenes, tmp_path / "run", detector="deformable_detr", head=DETR, max_steps=1, num_images=1)
    run = DetectionRun(recipe)
    first = run.model.model.backbone.model.hivit.embeddings.projection.weight.clone()
    metrics = run.train()
    assert 0 <= metrics["box_ap"] <= 1 and "mask_ap" not in metrics
    assert not torch.equal(run.model.model.backbone.model.hivit.embeddings.projection.weight, first)
    assert run.model.config.backbone_config.out_features == ["stage2", "stage3", "stage4"]
    detect = pipeline("object-detection", str(tmp_path / "run"), threshold=0.0)
    image = next((scenes / "test").glob("*.png"))
    found = detect(str(image))
    assert len(found) > 0 and {one["label"] for one in found} <= set("0123456789")
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "run").config.num_queries == 10


def test_boxes_and_labels_of_deformable_detr_are_those_of_images():
    """One query sure of class 2 in the middle of a image of 60x80 px: label 3, in its pixels; targets go back."""
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
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    start = pyramid_start(None, "tiny", {**NETWORK}, ["stage2", "stage3", "stage4"])
    sizes = {"encoder_hidden_dim": 32, "d_model": 32, "num_queries": 5, "decoder_layers": 2, "encoder_ffn_dim": 32}
    sizes |= {"decoder_ffn_dim": 32, "decoder_attention_heads": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_in_channels": [32] * 3, "encoder_in_channels": start.backbone.channels}
    config = RTDetrConfig(backbone_config=start.backbone.config, num_labels=3, num_denoising=0, **sizes)
    model = RTDetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(start.backbone.state_dict())
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2]])}] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.model.backbone.model.hivit.embeddings.projection.weight.clone()
    model(pixel_values=torch.rand(2, 3, 64, 64), labels=labels).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.backbone.model.hivit.embeddings.projection.weight, before)


def test_starts_that_do_not_fit_are_refused(tmp_path):
    folder = pretrained(tmp_path / "start")
    for keywords, words in (
        ({"name": str(tmp_path / "none")}, "There is no folder"),
        ({"name": folder, "architecture": "base"}, "The recipe is for base"),
        ({"name": folder, "changes": {"hidden_size": 64}}, "do not fit the network"),
        ({"name": folder, "changes": {"window_sise": 3}}, "window_sise"),
    ):
        with pytest.raises(ValueError, match=words):
            pyramid_start(**keywords)
    start = pyramid_start(folder)
    with pytest.raises(ValueError, match="fpn_chanels"):
        build_detector("mask_rcnn", start, ["a"], {"fpn_chanels": 3})
    with pytest.raises(ValueError, match="fpn_channels must be positive"):
        build_detector("mask_rcnn", start, ["a"], {"fpn_channels": 0})
    with pytest.raises(ValueError, match="decoder_layers"):
        build_detector(
            "deformable_detr",
            pyramid_start(folder, out_features=out_features_of("deformable_detr")),
            ["a"],
            DETR | {"decoder_layers": 1},
        )


# -- schedule and recipes -------------------------------------------------------------------------------------------


def test_the_learning_rate_falls_in_steps():
    rates = [stepped_learning_rate(step, 4, [10, 15], 0.1, 2.0) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[9] == 2.0
    assert_close(rates[10:], [0.2] * 5 + [0.02] * 5)
    assert stepped_learning_rate(0, 0, [], 0.1, 2.0) == 2.0


def smoke(folder: Path, output: Path, **changes) -> DetectionRecipe:
    values = read_recipe(SMOKE, DetectionRecipe)
    paths = dict(zip((flag.removeprefix("--") for flag in flags(folder)[::2]), flags(folder)[1::2]))
    recipe = DetectionRecipe(**{**values, **paths, "output_dir": str(output), **changes})
    recipe.check()
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete(path, scenes, tmp_path):
    values = read_recipe(path, DetectionRecipe)
    assert all(values[name] for name in ("title", "source", "cost", "expected_result"))
    start = {} if values.get("from_scratch") else {"model_name_or_path": "anything"}
    paths = {"train_annotations": "a.json", "eval_annotations": "b.json", "output_dir": str(tmp_path)}
    DetectionRecipe(**values, **paths, **start).check()


def test_the_published_recipe_is_the_papers(tmp_path):
    """Checked on the real network: windows, drop path, one id before the main stage, 0.9 from layer to layer."""
    values = read_recipe(EXAMPLES / "recipes" / "detection_base_coco_3x.yaml", DetectionRecipe)
    recipe = DetectionRecipe(**values)
    expected = {"learning_rate": 1e-4, "weight_decay": 0.05, "layer_decay": 0.9, "epochs": 36, "drop_path_rate": 0.2}
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.decay_epochs == [27, 33] and recipe.effective_batch_size == 16 and recipe.count_early_layers is False
    config = HiViTConfig.from_architecture("base-mae", **recipe.model_changes())
    assert config.window_size == 14 and config.global_attention_layers == [4, 9, 14, 19]
    assert not config.use_relative_position_bias


@pytest.mark.slow
def test_steps_of_the_schedule_come_from_epochs(scenes, tmp_path):
    """3 epochs of 2 steps; the rate falls after 2 of them: warm-up 1/2, 1, then 1, 1, then 0.1, 0.1."""
    run = DetectionRun(smoke(scenes, tmp_path / "run", detector="faster_rcnn", num_images=0))
    lines = run.layer_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert "rcnn.backbone.pyramid.norms" not in lines[1] and "0.7290" in lines[1] and "stages.0" in lines[1]
    run.train()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [record["learning_rate"] for record in history if "loss" in record]
    head = [rate / 0.9**3 for rate in rates]  # the first group is all before the main stage
    assert_close(head, [0.5e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4]) if len(rates) == 6 else pytest.fail(str(rates))


# -- the page ---------------------------------------------------------------------------------------------------------


PAGE = (EXAMPLES / "detection.md").read_text()


@pytest.mark.slow
def test_the_pages_code_runs_on_any_folder(tmp_path, scenes):
    """Each piece in a process of its own, which knows nothing but what it imports."""
    folder, start = tmp_path / "runs" / "detector", pyramid_start(None, "tiny", {**NETWORK})
    (tmp_path / "scenes" / "coco").mkdir(parents=True)
    (tmp_path / "scenes" / "coco" / "test").symlink_to(scenes / "test")
    rcnn, detr = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    build_detector("mask_rcnn", start, ["a"], RCNN).save_pretrained(folder)
    run = {"cwd": tmp_path, "check": True, "timeout": 300}
    subprocess.run(
        [sys.executable, "-c", rcnn + '\nassert {"boxes", "labels", "scores", "masks"} == set(found)'], **run
    )
    shutil.rmtree(folder)
    start = pyramid_start(None, "tiny", {**NETWORK}, out_features_of("deformable_detr"))
    build_detector("deformable_detr", start, ["a"], DETR).save_pretrained(folder)
    detr_processor(8, 64, 96, start.mean, start.std).save_pretrained(folder)
    subprocess.run([sys.executable, "-c", detr], **run)


# -- the command line -----------------------------------------------------------------------------------------------


def command(folder: Path, output: Path, *arguments) -> int:
    return finetune_detection.main(["--recipe", str(SMOKE), *flags(folder), "--output_dir", str(output), *arguments])


@pytest.mark.slow
def test_training_writes_model_metrics_and_image_and_goes_on_as_if_never_stopped(scenes, tmp_path, capsys):
    assert command(scenes, tmp_path / "whole") == 0
    assert "processes: 1" in capsys.readouterr().out
    assert command(scenes, tmp_path / "parts", "--max_steps", "2") == 0
    assert command(scenes, tmp_path / "parts") == 2
    assert "--resume latest" in capsys.readouterr().err
    assert command(scenes, tmp_path / "parts", "--resume", "latest", "--layer_decay", "0.8") == 2
    assert "layer_decay" in capsys.readouterr().err
    assert command(scenes, tmp_path / "parts", "--resume", "latest") == 0
    whole, parts = (HiViTRCNN.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for (name, one), other in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(one, other), name
    results = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert {"eval_box_ap", "eval_box_ap50", "eval_mask_ap", "eval_mask_ap75"} <= set(results)
    assert all(math.isfinite(value) for value in results.values())
    with PILImage.open(tmp_path / "whole" / "detections.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 20
    assert "use_cache" not in json.loads((tmp_path / "whole" / "config.json").read_text())


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(scenes, tmp_path):
    results = []
    for number in (1, 2):
        output = tmp_path / str(number)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if number == 2 else []
        arguments = ["--batch_size", str(4 // number), "--max_steps", "1", "--eval_batch_size", "1", *flags(scenes)]
        program = [str(EXAMPLES / "finetune_detection.py"), "--recipe", str(SMOKE), "--output_dir", str(output)]
        done = subprocess.run(
            [sys.executable, *launcher, *program, "--learning_rate", "1e-9", "--warmup_steps", "0", *arguments],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"processes: {number}" in done.stdout
        results.append(json.loads((output / "eval_results.json").read_text()))
    for name in ("eval_box_ap", "eval_box_ap50", "eval_mask_ap"):
        assert_close(results[0][name], results[1][name], rtol=0, atol=1e-4)


REFUSED = {
    "tiny images": (["--jitter_scale", "0.0001", "0.001"], "leaves less than 8 px of a image"),
    "rising": (["--decay_factor", "5"], "decay_factor must be at most 1"),
    "frozen drops": (["--freeze_backbone", "--drop_path_rate", "0.5"], "leaves nothing to --drop_path_rate"),
    "a thousand images": (["--num_images", "1000"], "num_images must be at most 60"),
    "nothing to learn": (["--train_annotations", ""], "nothing to train with"),
    "detector": (["--detector", "yolo"], "detector must be one of mask_rcnn"),
    "bad_annotations": (["--bad_annotations", "guess"], "bad_annotations must be one of"),
    "decay_epochs": (["--decay_epochs", "9"], "decay_epochs must be ascending and within"),
    "jitter": (["--jitter_scale", "2", "1"], "jitter_scale must be two positive"),
    "sizes": (["--eval_min_size", "200"], "must not exceed eval_max_size"),
    "head": (["--head", "[]"], "--head must be a JSON object"),
    "head's own": (["--head", '{"min_size": 3}'], "--head sets min_size"),
    "model's own": (["--model", '{"drop_path_rate": 0.1}'], "--model sets drop_path_rate"),
    "start": (["--model_name_or_path", "x"], "Give either --model_name_or_path, or --from_scratch"),
    "threshold": (["--image_threshold", "1.5"], "image_threshold must be in"),
    "crop": (["--crop_size", "0"], "crop_size must be a positive"),
    "accumulation": (["--effective_batch_size", "6"], "effective_batch_size 6 is no multiple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_fit_are_refused_before_anything_is_read(scenes, tmp_path, capsys, name):
    arguments, words = REFUSED[name]
    with pytest.raises(SystemExit) as raised:
        command(scenes, tmp_path / "run", *arguments)
    assert raised.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_bad_files_end_the_command_with_a_sentence(scenes, tmp_path, capsys):
    content = json.loads(annotations_of(scenes, "train").read_text())
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    assert command(scenes, tmp_path / "run", "--train_annotations", str(path)) == 2
    error = capsys.readouterr().err
    assert "Annotation 1 of image" in error and "no area" in error and "Traceback" not in error
    other = json.loads(annotations_of(scenes, "test").read_text())
    other["categories"][3]["name"] = "drei"
    path.write_text(json.dumps(other))
    assert command(scenes, tmp_path / "run", "--eval_annotations", str(path)) == 2
    assert "Category 4 is 'drei'" in capsys.readouterr().err


@pytest.mark.parametrize("detector", ["mask_rcnn", "deformable_detr"])
@pytest.mark.slow
def test_a_detector_is_judged_and_goes_on(scenes, tmp_path, capsys, detector):
    small = ["--detector", detector, "--max_steps", "2"]
    if detector == "deformable_detr":
        small += ["--head", json.dumps(DETR), "--crop_size", "64"]
    assert command(scenes, tmp_path / "run", *small) == 0
    expected = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    judge = [*flags(scenes)[4:], "--model_name_or_path", str(tmp_path / "run"), "--from_scratch", "false"]
    judge += ["--recipe", str(SMOKE), *small[:-2]]
    only = [*judge, "--evaluate_only", "--output_dir"]
    assert finetune_detection.main([*only, str(tmp_path / "judged")]) == 0, capsys.readouterr().err[-400:]
    found = json.loads((tmp_path / "judged" / "eval_results.json").read_text())
    assert {name: found[name] for name in found if "ap" in name} == {n: expected[n] for n in expected if "ap" in n}
    assert (tmp_path / "judged" / "detections.png").exists()
    capsys.readouterr()
    no = [*only, str(tmp_path / "no")]
    deeper = json.dumps(json.loads(smoke(scenes, tmp_path).model) | {"depths": [1, 1, 7]})
    wrong = {
        "holds all_results.json of another run": [*only, str(tmp_path / "judged")],
        "run holds all_results.json of another run: give another --output_dir": [*only, str(tmp_path / "run")],
        "whose hidden_size is 512": [*no, "--architecture", "base", "--model", "{}"],
        "not depths in --model [1, 1, 7]: leave that out": [*no, "--model", deeper],
        "leave it out of --head": [*no, "--head", '{"d_model": 64}' if "d_model" in str(small) else HEAD_OF_64],
        f"is a {detector}, not a faster_rcnn": [*no, "--detector", "faster_rcnn"],
    }
    for sentence, arguments in wrong.items():
        assert finetune_detection.main(arguments) == 2, sentence
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    again = [*flags(scenes), *judge[4:], "--output_dir", str(tmp_path / "again"), "--max_steps", "1"]
    assert finetune_detection.main([*again, "--learning_rate", "1e-12", "--warmup_steps", "0"]) == 0


@pytest.mark.parametrize("kind", ["hivit_rcnn", "unheard_of"])  # transformers knows the first once it is imported
def test_models_of_other_kinds_are_named_where_a_hivit_is_wanted(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"is a {kind}, not a HiViT: choose another start"):
        read_config(str(tmp_path))


def test_only_detectors_are_judged(scenes, tmp_path, capsys):
    HiViTForMaskedImageModeling(HiViTConfig(**NETWORK)).save_pretrained(tmp_path / "start")
    start = ["--model_name_or_path", str(tmp_path / "start"), "--from_scratch", "false", "--evaluate_only"]
    assert command(scenes, tmp_path / "run", *start) == 2
    assert "start is no detector: train one first" in capsys.readouterr().err and not (tmp_path / "run").exists()


REFUSED_BY_MODEL = {
    "words for numbers": (["--head", '{"fpn_channels": "many"}'], "--head does not fit"),
    "names of classes": (["--head", '{"id2label": {"0": "a"}}'], "--head sets id2label, which"),
    "queries": (["--detector", "deformable_detr", "--head", '{"num_queries": 0}'], "needs num_queries of at least 1"),
    "heads": (["--detector", "deformable_detr", "--head", '{"d_model": 33}'], "must be a multiple of twice the"),
    "levels": (["--detector", "deformable_detr", "--head", '{"num_feature_levels": 1}'], "num_feature_levels of at"),
    "stages": (
        ["--detector", "deformable_detr", "--head", '{"two_stage": true, "with_box_refine": false}'],
        "--head does not fit",
    ),
    "stages of the pyramid": (["--model", '{"out_features": ["stage3"]}'], "--model sets out_features"),
    "no warm-up": (["--warmup_steps", "1000"], "warmup_steps 1000 are not fewer than the 6 steps"),
}


@pytest.mark.parametrize("name", REFUSED_BY_MODEL)
def test_flags_that_the_model_cannot_have_are_refused_in_a_sentence(scenes, tmp_path, capsys, name):
    arguments, words = REFUSED_BY_MODEL[name]
    if "deformable_detr" in arguments:
        arguments = [*arguments, "--crop_size", "64"]
    if name == "stages of the pyramid":
        arguments = ["--model", json.dumps({**NETWORK, "out_features": ["stage3"]})]
    assert command(scenes, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and not list((tmp_path / "run").glob("*"))


def test_empty_images_and_bad_annotations_are_left_out_and_said(scenes, tmp_path):
    content = json.loads(annotations_of(scenes, "train").read_text())
    empty, bad = (
        content["images"][0]["id"],
        copy.deepcopy(content["annotations"][-1]) | {"id": 999, "bbox": [1, 1, 0, 0]},
    )
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty] + [bad]
    path, said = tmp_path / "some.json", []
    path.write_text(json.dumps(content))
    recipe = smoke(scenes, tmp_path / "run", train_annotations=str(path), bad_annotations="leave_out")
    run = DetectionRun(recipe, said.append)
    assert len(run.train_images) == 7 and empty not in [image["id"] for image in run.train_images.images]
    assert any("1 of 8 images" in sentence and str(empty) in sentence for sentence in said)
    assert any(
        "1 annotations of" in sentence and "were left out" in sentence and "999" in sentence for sentence in said
    )


FLAGS = {
    "freeze_backbone": (True, lambda run: not run.model.pyramid.hivit.position_embeddings.requires_grad),
    "drop_path_rate": (0.3, lambda run: run.model.config.backbone_config.drop_path_rate == 0.3),
    "eval_min_size": (64, lambda run: run.model.rcnn.transform.min_size == (64,)),
    "eval_max_size": (96, lambda run: run.model.rcnn.transform.max_size == 96),
    "crop_size": (48, lambda run: run.train_images[0]["image"].shape == (3, 48, 48)),
    "image_mean": ([0.1, 0.2, 0.3], lambda run: run.model.rcnn.transform.image_mean == [0.1, 0.2, 0.3]),
    "image_std": ([0.1, 0.2, 0.3], lambda run: run.model.rcnn.transform.image_std == [0.1, 0.2, 0.3]),
    "max_train_samples": (5, lambda run: len(run.train_images) == 5),
    "max_eval_samples": (3, lambda run: len(run.eval_images) == 3),
    "detector": ("faster_rcnn", lambda run: not run.model.config.predicts_masks),
    "head": ({"max_detections": 7}, lambda run: run.model.rcnn.roi_heads.detections_per_img == 7),
    "model": (
        {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 8, "image_size": 64},
        lambda run: run.config.hidden_size == 32,
    ),
    "seed": (5, lambda run: run.train_images.seed == 5),
    "batch_size": (2, lambda run: run._training_arguments().per_device_train_batch_size == 2),
    "eval_batch_size": (2, lambda run: run._training_arguments().per_device_eval_batch_size == 2),
    "clip_norm": (0.5, lambda run: run._training_arguments().max_grad_norm == 0.5),
    "mixed_precision": ("bf16", lambda run: run._training_arguments().bf16),
    "num_workers": (1, lambda run: run._training_arguments().dataloader_num_workers == 1),
    "evaluate_every_steps": (3, lambda run: run._training_arguments().eval_steps == 3),
    "keep_last": (5, lambda run: run._training_arguments().save_total_limit == 5),
    "log_every_steps": (7, lambda run: run._training_arguments().logging_steps == 7),
    "tracker": ("tensorboard", lambda run: run._training_arguments().report_to == ["tensorboard"]),
    "early_stopping_patience": (3, lambda run: stopper(run) is not None and stopper(run).early_stopping_patience == 3),
}


def stopper(run: DetectionRun) -> EarlyStoppingCallback | None:
    callbacks = run._trainer(run._training_arguments()).callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)), None)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_reach_what_they_are_about(scenes, tmp_path, name):
    value, holds = FLAGS[name]
    assert not holds(DetectionRun(smoke(scenes, tmp_path / "run")))
    assert holds(DetectionRun(smoke(scenes, tmp_path / "run", **{name: value})))


def test_flips_scales_and_rates_reach_what_they_are_about(scenes, tmp_path):
    still = {"jitter_scale": [1.0, 1.0], "crop_size": 80}
    run = DetectionRun(smoke(scenes, tmp_path / "run", flip_probability=0.0, **still))
    flipped = DetectionRun(smoke(scenes, tmp_path / "run", flip_probability=1.0, **still))
    half = DetectionRun(smoke(scenes, tmp_path / "run", flip_probability=0.0, jitter_scale=[0.5, 0.5], crop_size=80))
    one, other, small = (made.train_images[0] for made in (run, flipped, half))
    assert torch.equal(one["masks"].sum(2), other["masks"].sum(2)) and not torch.equal(one["image"], other["image"])
    assert small["masks"].sum() < 0.4 * one["masks"].sum()
    groups = DetectionRun(smoke(scenes, tmp_path / "run", weight_decay=0.3, learning_rate=0.5))
    assert "5.000e-01    0.3" in groups.layer_table()


def test_every_flag_is_tested():
    elsewhere = {"title", "source", "cost", "expected_result", "from_scratch", "architecture", "model_name_or_path"}
    elsewhere |= {"train_annotations", "train_images", "eval_annotations", "eval_images", "bad_annotations", "epochs"}
    elsewhere |= {"jitter_scale", "flip_probability", "warmup_steps", "decay_epochs", "decay_factor", "max_steps"}
    elsewhere |= {"effective_batch_size", "learning_rate", "weight_decay", "layer_decay", "output_dir", "resume"}
    elsewhere |= {"num_images", "image_threshold", "check_images", "adam_betas", "ema_decay"}
    elsewhere |= {
        "evaluate_only",
        "gradient_checkpointing",
        "show_layer_table",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    }
    assert {item.name for item in fields(DetectionRecipe)} == elsewhere | set(FLAGS)


@pytest.mark.slow
def test_pushing(scenes, tmp_path, monkeypatch):
    uploads = []
    repository = type("Repository", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **keywords: repository)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **keywords: uploads.append(keywords))
    recipe = smoke(scenes, tmp_path / "run", max_steps=1, num_images=1, push_to_hub=True, hub_model_id="me/mine")
    DetectionRun(recipe).train()
    assert uploads[-1]["repo_id"] == "me/mine" and (tmp_path / "run" / "detections.png").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "object-detection" in card and str(tmp_path) not in card


@pytest.mark.slow
def test_one_run_with_average_checkpointing_bf16_and_betas(scenes, tmp_path, capsys):
    arguments = ["--ema_decay", "0.5", "--gradient_checkpointing", "--adam_betas", "0.5", "0.6", "--check_images", "0"]
    arguments += ["--mixed_precision", "bf16", "--max_steps", "2", "--num_images", "0", "--num_workers", "1"]
    assert command(scenes, tmp_path / "run", *arguments) == 0
    assert not (tmp_path / "run" / "detections.png").exists()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "average.safetensors").exists()
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert tuple(optimizer["param_groups"][0]["betas"]) == (0.5, 0.6)
    assert command(scenes, tmp_path / "none", "--show_layer_table") == 0 and not (tmp_path / "none").exists()
    assert "stages.0.layers.0" in capsys.readouterr().out
