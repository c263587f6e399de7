"""The script from end to end: training, resumption, evaluation alone, upload; and the code of its page."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image as PILImage
from transformers import AutoModelForObjectDetection, pipeline

import finetune_detection
from hivit_hf.detection.initialization import backbone_of, build_detector, out_features_of
from hivit_hf.detection.modeling import HiViTRCNN, detr_processor
from hivit_hf.training.command_line import read_recipe
from hivit_hf.training.initialization import initialize_backbone
from support.damage import NEVER_READ, damages, plants
from support.detection import (
    DETR,
    NETWORK,
    RCNN,
    SMOKE,
    annotations_of,
    command,
    data_flags,
    flags_of,
    trainer_for,
)
from support.refusals import refusal


PAGE = (Path(finetune_detection.__file__).parent / "detection.md").read_text()


@pytest.mark.slow
def test_training_writes_model_metrics_and_overlays_and_resumes_as_if_never_stopped(scenes, tmp_path, capsys):
    assert command(scenes, tmp_path / "whole") == 0
    assert command(scenes, tmp_path / "parts", "--stop_after_steps", "2") == 0
    assert command(scenes, tmp_path / "parts") == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    resume = ["--resume_from_checkpoint", "latest"]
    assert command(scenes, tmp_path / "parts", *resume, "--layer_decay", "0.8") == 2
    assert "layer_decay" in capsys.readouterr().err
    assert command(scenes, tmp_path / "parts", *resume) == 0
    whole, parts = (HiViTRCNN.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for (name, one), other in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(one, other), name
    results = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert {"eval_box_ap", "eval_box_ap50", "eval_mask_ap", "eval_mask_ap75"} <= set(results)
    assert all(math.isfinite(value) for value in results.values())
    with PILImage.open(tmp_path / "whole" / "detections.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 20
    assert "use_cache" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    rates = [record["learning_rate"] / 0.9**3 for record in history if "loss" in record]  # of all before the main stage
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.slow
def test_deformable_detr_trains_and_its_pipeline_detects(tmp_path, scenes):
    small = {"detector": "deformable_detr", "detector_overrides": DETR, "num_overlays": 1, "ema_decay": 0.5}
    first = backbone_of(trainer_for(scenes, tmp_path / "first", **small).model).hivit.embeddings.projection.weight
    assert command(scenes, tmp_path / "run", *flags_of(small), "--stop_after_steps", "1") == 0
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_box_ap"] <= 1 and "eval_mask_ap" not in metrics
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    trained = backbone_of(model).hivit.embeddings.projection.weight
    assert trained.shape == first.shape and not torch.equal(trained, first)
    assert model.config.num_queries == 10
    assert model.config.backbone_config.out_features == ["stage2", "stage3", "stage4"]
    detect = pipeline("object-detection", str(tmp_path / "run"), threshold=0.0)
    found = detect(str(next((scenes / "test").glob("*.png"))))
    assert len(found) > 0 and {one["label"] for one in found} <= set("0123456789")
    assert command(scenes, tmp_path / "run", *flags_of(small), "--resume_from_checkpoint", "latest") == 0


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn", "deformable_detr"])
def test_a_detector_is_evaluated_alone_and_trained_again(scenes, tmp_path, capsys, detector):
    small = {"detector": detector}
    if detector == "deformable_detr":
        small |= {"detector_overrides": DETR, "crop_size": 64}
    assert command(scenes, tmp_path / "run", *flags_of(small), "--stop_after_steps", "2") == 0
    expected = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    begin = flags_of({"config": SMOKE, "model_name_or_path": tmp_path / "run", "from_scratch": False} | small)
    only = [*data_flags(scenes)[4:], *begin, "--do_train", "false", "--output_dir"]
    assert finetune_detection.main([*only, str(tmp_path / "alone")]) == 0, capsys.readouterr().err[-400:]
    found = json.loads((tmp_path / "alone" / "eval_results.json").read_text())
    assert {name: found[name] for name in found if "ap" in name} == {n: expected[n] for n in expected if "ap" in n}
    assert (tmp_path / "alone" / "detections.png").exists()
    capsys.readouterr()
    no = [*only, str(tmp_path / "no")]
    deeper = json.dumps(read_recipe(SMOKE)["config_overrides"] | {"depths": [1, 1, 7]})
    wider = json.dumps({"d_model": 64} if detector == "deformable_detr" else {"fpn_channels": 64})
    wrong = {
        "holds all_results.json of another run": [*only, str(tmp_path / "alone")],
        "run holds all_results.json of another run: give another --output_dir": [*only, str(tmp_path / "run")],
        "whose hidden_size is 512": [*no, "--architecture", "base", "--config_overrides", "{}"],
        "has depths [1, 1, 2], not [1, 1, 7]: leave it out of --config_overrides": [*no, "--config_overrides", deeper],
        ", not [0.1, 0.1, 0.1]: leave it out of the flags": [*no, "--image_mean", "0.1", "0.1", "0.1"],
        "leave it out of --detector_overrides": [*no, "--detector_overrides", wider],
        f"is a {detector}, not a faster_rcnn": [*no, "--detector", "faster_rcnn"],
    }
    for sentence, arguments in wrong.items():
        assert finetune_detection.main(arguments) == 2, sentence
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    again = [*data_flags(scenes), *begin, "--output_dir", str(tmp_path / "again"), "--stop_after_steps", "1"]
    assert finetune_detection.main([*again, "--learning_rate", "1e-12", "--warmup_steps", "0"]) == 0


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


def test_empty_images_and_bad_annotations_are_left_out_and_said(scenes, tmp_path, capsys):
    content = json.loads(annotations_of(scenes, "train").read_text())
    empty = content["images"][0]["id"]
    bad = content["annotations"][-1] | {"id": 999, "bbox": [1, 1, 0, 0]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty] + [bad]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    trainer = trainer_for(scenes, tmp_path / "run", train_annotations=path, bad_annotations="leave_out")
    images = trainer.train_dataset.images
    assert len(images) == 7 and empty not in [image["id"] for image in images]
    said = capsys.readouterr().out
    assert re.search(rf"1 of 8 training images .* the first is {empty} ", said)
    assert re.search(r"1 annotations of .* were left out. The first: Annotation 999 ", said)


@pytest.mark.slow
def test_pushing(scenes, tmp_path, monkeypatch):
    uploads = []
    repository = type("Repository", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **keywords: repository)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **keywords: uploads.append(keywords))
    flags = {"stop_after_steps": 1, "num_overlays": 1, "push_to_hub": True, "hub_model_id": "me/mine"}
    assert command(scenes, tmp_path / "run", *flags_of(flags)) == 0
    assert uploads[-1]["repo_id"] == "me/mine" and (tmp_path / "run" / "detections.png").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "object-detection" in card and str(tmp_path) not in card


@pytest.mark.slow
def test_one_run_with_average_checkpointing_bf16_and_betas(scenes, tmp_path, capsys):
    flags = {"ema_decay": 0.5, "gradient_checkpointing": True, "adam_beta1": 0.5, "adam_beta2": 0.6, "bf16": True}
    flags |= {"check_images": 0, "stop_after_steps": 2, "num_overlays": 0, "dataloader_num_workers": 1}
    assert command(scenes, tmp_path / "run", *flags_of(flags)) == 0
    assert not (tmp_path / "run" / "detections.png").exists()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "average.safetensors").exists()
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert tuple(optimizer["param_groups"][0]["betas"]) == (0.5, 0.6)
    capsys.readouterr()
    assert command(scenes, tmp_path / "none", "--show_layer_table") == 0 and not (tmp_path / "none").exists()
    assert "stages.0.layers.0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pages_code_runs_on_any_folder(tmp_path, scenes):
    """Each piece in a process of its own, which knows nothing but what it imports."""
    folder, start = tmp_path / "runs" / "detector", initialize_backbone(None, "tiny", {**NETWORK})
    (tmp_path / "scenes" / "coco").mkdir(parents=True)
    (tmp_path / "scenes" / "coco" / "test").symlink_to(scenes / "test")
    rcnn, detr = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    build_detector("mask_rcnn", start, ["a"], RCNN).save_pretrained(folder)
    run = {"cwd": tmp_path, "check": True, "timeout": 300}
    subprocess.run(
        [sys.executable, "-c", rcnn + '\nassert {"boxes", "labels", "scores", "masks"} == set(found)'], **run
    )
    shutil.rmtree(folder)
    start = initialize_backbone(None, "tiny", {**NETWORK}, out_features_of("deformable_detr"))
    build_detector("deformable_detr", start, ["a"], DETR).save_pretrained(folder)
    detr_processor(8, 64, 96, start.image_mean, start.image_std).save_pretrained(folder)
    subprocess.run([sys.executable, "-c", detr], **run)


@pytest.mark.slow
def test_no_file_of_a_checkpoint_runs_code_and_damage_is_a_sentence(scenes, tmp_path, capsys):
    assert command(scenes, tmp_path / "run", *["--stop_after_steps", "2", "--num_overlays", "0"]) == 0
    checkpoint, trace, names = tmp_path / "run" / "checkpoint-2", tmp_path / "trace", set()
    flags = ["--num_overlays", "0", "--stop_after_steps", "2", "--resume_from_checkpoint"]

    def resume(*_) -> int:
        return command(scenes, tmp_path / "run", *flags, str(checkpoint))

    for name in plants(checkpoint, trace):
        if name in NEVER_READ:
            assert resume() == 0
        else:
            assert name in refusal(resume, capsys)
        assert not trace.exists(), name
        names.add(name)
    assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    for name in damages(checkpoint):
        assert name in refusal(resume, capsys)
