"""
python benchmarks/detection_scenes.py --pretrained demo_output/pretrained

Trains Mask R-CNN on scenes of digits, by examples/finetune_detection.py and its recipe for scenes: on the backbone of
the digits demonstration, and alike on one with random weights. Also evaluates the first with its backbone exchanged for
the second. Writes benchmarks/results/detection_scenes_cpu.json, and examples/detection.png with what the first finds.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.training.dense import pyramid_start
from hivit_hf.training.detection import DetectionRun
from hivit_hf.training.detection_recipe import DetectionRecipe
from hivit_hf.training.detector import HiViTRCNN
from hivit_hf.training.recipe import read_recipe
from measure import write


EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = EXAMPLES / "recipes" / "detection_scenes.yaml"
METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")


def untrained(config: HiViTConfig, folder: Path) -> Path:
    """A folder with the same network, but random weights."""
    torch.manual_seed(0)
    HiViTForMaskedImageModeling(config).save_pretrained(folder)
    return folder


def files(scenes: Path) -> dict[str, str]:
    """The fields of a recipe that say where scenes are."""
    found = {}
    for field, split in (("train", "train"), ("eval", "test")):
        found[f"{field}_annotations"] = str(scenes / "annotations" / f"instances_{split}.json")
        found[f"{field}_images"] = str(scenes / split)
    return found


def train(start: Path, scenes: Path, output: Path) -> dict[str, float]:
    """Average precision after the training, and the processor's seconds."""
    flags = [word for name, value in files(scenes).items() for word in (f"--{name}", value)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, EXAMPLES / "finetune_detection.py", "--recipe", RECIPE]
    subprocess.run([*command, "--model_name_or_path", start, "--output_dir", output, *flags], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = json.loads((output / "eval_results.json").read_text())
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {name: results[f"eval_{name}"] for name in METRICS} | {"processor_s": spent}


def exchange(trained: Path, backbone: Path, scenes: Path, output: Path) -> dict[str, float]:
    """Average precision of a trained detector whose network has the weights of another folder."""
    recipe = read_recipe(RECIPE, DetectionRecipe) | files(scenes)
    run = DetectionRun(DetectionRecipe(**recipe, model_name_or_path=str(backbone), output_dir=str(output)))
    run.model.load_state_dict(HiViTRCNN.from_pretrained(trained).state_dict())
    run.model.pyramid.hivit.load_state_dict(pyramid_start(str(backbone)).backbone.hivit.state_dict())
    results = run.evaluate()
    return {name: results[name] for name in METRICS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, required=True, help="folder of the demonstration's pre-training")
    parser.add_argument("--train", type=int, default=256, help="scenes to learn from (256)")
    parser.add_argument("--test", type=int, default=64, help="scenes to evaluate with (64)")
    arguments = parser.parse_args()
    if not (arguments.pretrained / "config.json").exists():
        parser.error(f"there is no model in {arguments.pretrained}: run examples/demo_digits.py first")
    results = {"scenes": {"train": arguments.train, "test": arguments.test}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        command = [sys.executable, EXAMPLES / "make_scenes.py", "--output", folder / "scenes"]
        subprocess.run([*command, "--train", str(arguments.train), "--test", str(arguments.test)], check=True)
        scenes = folder / "scenes" / "coco"
        random = untrained(HiViTConfig.from_pretrained(arguments.pretrained), folder / "random")
        for name, start in (("pretrained", arguments.pretrained), ("untrained", random)):
            results[name] = train(start, scenes, folder / f"run_{name}")
        results["exchanged"] = exchange(folder / "run_pretrained", random, scenes, folder / "run_exchanged")
        shutil.copy(folder / "run_pretrained" / "detections.png", EXAMPLES / "detection.png")
    print(write("detection_scenes_cpu", results, "cpu").read_text())


if __name__ == "__main__":
    main()
