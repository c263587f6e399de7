"""The script of segmentation: whole runs, interrupted and resumed, evaluations, what is refused before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image as PILImage
from torch.testing import assert_close
from transformers import AutoModelForSemanticSegmentation, UperNetForSemanticSegmentation, pipeline

import finetune_segmentation
from hivit_hf.segmentation.initialization import load_segmenter
from scenes.data import map_names, scenes_dataset
from support.damage import NEVER_READ, damages, plants
from support.refusals import refusal
from support.segmentation import SCENES, SMALL, flags_of, make_erratic, model_folder, run


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


@pytest.mark.slow
def test_a_run_by_the_command_line(small_scenes, tmp_path, capsys):
    begin = ["--model_name_or_path", model_folder(tmp_path / "backbone")]
    options = ["--eval_stride", "32", "--eval_scales", "1.0", "0.6", "--eval_flip", "true"]
    assert run(small_scenes, tmp_path / "whole", *begin, *options) == 0
    metrics = metrics_of(tmp_path / "whole")
    assert 0 <= metrics["eval_mean_iou"] <= 1 and "eval_iou_background" in metrics
    history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    learning_rates = [record["learning_rate"] for record in history if "loss" in record]
    # of the first group, all before the main stage: two layers below the last of the main stage, three below the heads
    assert_close(learning_rates, [2e-3 * 0.9**3 * f for f in (0, 0.75, 0.5, 0.25)], rtol=1e-6, atol=0)
    assert sum("eval_mean_iou" in record for record in history) >= 2
    sheet = PILImage.open(tmp_path / "whole" / "overlays.png")
    assert sheet.width > 700 and sheet.height > 2 * 200

    # the same again, interrupted and resumed
    assert run(small_scenes, tmp_path / "part", *begin, *options, "--stop_after_steps", "2") == 0
    assert run(small_scenes, tmp_path / "part", *begin, *options, "--resume_from_checkpoint", "latest") == 0
    assert metrics_of(tmp_path / "part")["eval_mean_iou"] == metrics["eval_mean_iou"]
    weights = [AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name) for name in ("whole", "part")]
    for (name, one), (_, other) in zip(weights[0].named_parameters(), weights[1].named_parameters()):
        assert torch.equal(one, other), name

    # what was written is evaluated the same
    only = ["--do_train", "false", "--model_name_or_path"]
    assert run(small_scenes, tmp_path / "evaluated", *only, str(tmp_path / "whole"), *options) == 0
    assert metrics_of(tmp_path / "evaluated")["eval_mean_iou"] == metrics["eval_mean_iou"]
    # windows, scales and mirror images change what an erratic one predicts
    make_erratic(weights[0], load_from_disk(small_scenes)["test"][0]["image"]).save_pretrained(tmp_path / "erratic")
    ways = [options, [], *(options[:2], options[2:5], options[5:])]
    for number, way in enumerate(ways):
        assert run(small_scenes, tmp_path / f"way_{number}", *only, str(tmp_path / "erratic"), *way) == 0
    scores = [metrics_of(tmp_path / f"way_{number}")["eval_mean_iou"] for number in range(5)]
    assert len(set(scores)) == 5 and min(scores) > 0

    # the pipeline's masks have the size of the image
    segments = pipeline("image-segmentation", str(tmp_path / "whole"))(PILImage.new("RGB", (75, 60)))
    assert isinstance(weights[0], UperNetForSemanticSegmentation)
    assert all(segment["label"] in map_names() and segment["mask"].size == (75, 60) for segment in segments)
    assert sum(np.asarray(segment["mask"]).astype(bool) for segment in segments).min() == 1  # all pixels, once
    capsys.readouterr()
    assert run(small_scenes, tmp_path / "whole", *begin) == 2
    assert "whole holds a run, at checkpoint-4: give --resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.mark.slow
def test_every_other_flag_does_something(small_scenes, tmp_path, capsys):
    begin = ["--model_name_or_path", model_folder(tmp_path / "backbone"), "--stop_after_steps", "2"]
    assert run(small_scenes, tmp_path / "plain", *begin) == 0
    plain = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "plain")
    flags = ["--ema_decay", "0.5", "--auxiliary_weight", "0", "--max_grad_norm", "0.1", "--num_overlays", "0"]
    flags += ["--gradient_checkpointing", "true", "--drop_path_rate", "0.1", "--max_train_samples", "6"]
    flags += ["--max_eval_samples", "2", "--early_stopping_patience", "1", "--weight_decay", "0.2"]
    assert run(small_scenes, tmp_path / "other", *begin, *flags) == 0
    other = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "other")
    assert plain.auxiliary_head is not None and other.auxiliary_head is None
    assert other.backbone.config.drop_path_rate == 0.1 and not (tmp_path / "other" / "overlays.png").exists()
    assert (tmp_path / "plain" / "overlays.png").exists()
    assert (tmp_path / "other" / "checkpoint-2" / "average.safetensors").exists()
    capsys.readouterr()
    assert run(small_scenes, tmp_path / "table", *begin, "--show_layer_table", "true") == 0
    table = capsys.readouterr().out
    assert "backbone.norms.stage4.weight" in table and not (tmp_path / "table").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 5])
def test_two_processes_evaluate_every_image_once(tmp_path, images):
    data = tmp_path / "data"
    scenes_dataset({"test": images}, height_px=40, width_px=50).save_to_disk(data)
    made = load_segmenter(model_folder(tmp_path / "backbone"), map_names(), crop_size=32, **SMALL)
    image = load_from_disk(data)["test"][0]["image"]
    make_erratic(made.model, image).save_pretrained(tmp_path / "segmenter")
    values = {"dataset_name": data, "model_name_or_path": tmp_path / "segmenter", "do_train": False}
    values |= {"config": SCENES, "crop_size": 32, "eval_size": 40, "class_names": map_names()}
    values |= {"head_channels": 8, "auxiliary_weight": 0.4}  # the recipe has others
    values |= {"per_device_train_batch_size": 4, "effective_batch_size": 8, "output_dir": tmp_path / "one"}
    flags = flags_of(values)
    assert finetune_segmentation.main(flags) == 0
    script = tmp_path / "script.py"
    lines = ["import os, pathlib, sys", "from finetune_segmentation import main", "code = main()"]
    lines += [f"(pathlib.Path({str(tmp_path)!r}) / ('rank' + os.environ['RANK'])).write_text(str(code))"]
    script.write_text("\n".join([*lines, "sys.exit(code)"]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    examples = str(Path(finetune_segmentation.__file__).parent)
    done = subprocess.run(
        [*launcher, script, *flags, "--output_dir", tmp_path / "two"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([examples, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["0", "0"]
    assert (tmp_path / "two" / "overlays.png").exists()
    results = [metrics_of(tmp_path / name) for name in ("one", "two")]
    scores = [{name: one[name] for name in one if "iou" in name or "accuracy" in name} for one in results]
    assert scores[0] == scores[1] and scores[0]["eval_mean_iou"] > 0


def test_evaluations_need_trained_heads_and_overwrite_no_results(small_scenes, tmp_path, capsys):
    backbone, only = model_folder(tmp_path / "backbone"), ["--do_train", "false", "--model_name_or_path"]
    cases = [(backbone, "is no segmentation model"), (str(tmp_path / "nowhere"), "There is no folder")]
    for name, sentence in cases:
        assert run(small_scenes, tmp_path / "run", *only, name) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()
    whole = tmp_path / "whole"
    load_segmenter(backbone, map_names(), crop_size=32, **SMALL).model.save_pretrained(whole)
    (whole / "eval_results.json").write_text("{}")
    assert run(small_scenes, whole, *only, str(whole)) == 2
    assert "whole holds eval_results.json of another run: give another --output_dir" in capsys.readouterr().err
    assert (whole / "eval_results.json").read_text() == "{}" and not (whole / "overlays.png").exists()
    # of a dataset without a training split
    load_from_disk(small_scenes)["test"].to_parquet(tmp_path / "data" / "validation.parquet")
    assert run(str(tmp_path / "data"), tmp_path / "evaluated", *only, str(whole)) == 0
    assert {"eval_results.json", "overlays.png"} <= {path.name for path in (tmp_path / "evaluated").iterdir()}
    asked = json.loads((tmp_path / "evaluated" / "arguments.json").read_text())
    assert asked["model_name_or_path"] == str(whole) and asked["eval_scales"] == [1.0]
    assert run(small_scenes, tmp_path / "evaluated", "--model_name_or_path", backbone) == 2
    assert "evaluated holds all_results.json of another run" in capsys.readouterr().err
    (tmp_path / "killed" / "checkpoint-2").mkdir(parents=True)
    assert run(small_scenes, tmp_path / "killed", *only, str(whole)) == 2
    assert "killed holds checkpoint-2 of another run" in capsys.readouterr().err
    assert run(small_scenes, tmp_path / "held_out", *only, str(whole), "--train_val_split", "0.2") == 0
    assert "eval_mean_iou" in metrics_of(tmp_path / "held_out")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--crop_size", "30"], "crop_size must be a multiple of the patch size 8, got 30"),
        (["--label_column_name", "mask"], "train has no column 'mask'; its columns are image_id, image, annotation"),
        (["--class_names", "background", "digit"], "but there are 2 classes, 0 to 1"),
        (["--image_mean", "0.5"], "need 3 numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(flags, sentence, small_scenes, tmp_path, capsys):
    begin = ["--model_name_or_path", model_folder(tmp_path / "backbone")]
    assert run(small_scenes, tmp_path / "run", *begin, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_a_bad_sample_stops_a_run_with_its_id(tmp_path, capsys):
    good = scenes_dataset({"train": 4, "test": 2}, height_px=40, width_px=48)
    rows = good["train"].to_list()
    rows[2]["annotation"] = np.zeros((40, 47), dtype=np.uint8)
    bad = DatasetDict(train=Dataset.from_list(rows, features=good["train"].features), test=good["test"])
    bad.save_to_disk(tmp_path / "data")
    begin = ["--model_name_or_path", model_folder(tmp_path / "backbone")]
    assert run(str(tmp_path / "data"), tmp_path / "run", *begin) == 2
    assert "sample 2 of train (train_00002) is 47x40 px and its image 48x40" in capsys.readouterr().err


@pytest.mark.slow
def test_no_file_of_a_checkpoint_runs_code_and_damage_is_a_sentence(small_scenes, tmp_path, capsys):
    begin = ["--model_name_or_path", model_folder(tmp_path / "backbone")]
    assert run(small_scenes, tmp_path / "run", *begin, *["--stop_after_steps", "2", "--num_overlays", "0"]) == 0
    checkpoint, trace, names = tmp_path / "run" / "checkpoint-2", tmp_path / "trace", set()
    flags = ["--num_overlays", "0", "--stop_after_steps", "2", "--resume_from_checkpoint"]

    def resume(*_) -> int:
        return run(small_scenes, tmp_path / "run", *begin, *flags, str(checkpoint))

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
