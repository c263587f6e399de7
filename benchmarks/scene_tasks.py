"""
python benchmarks/scene_tasks.py --pretrained demo_output/pretrained

Trains UPerNet and Mask R-CNN on scenes of digits, by the example scripts and their recipes for scenes: on the backbone
of the digits demonstration, and alike on one with random weights. Also evaluates the first with the weights of its
backbone exchanged for random ones. Writes benchmarks/results/scene_tasks_cpu.json, and examples/segmentation.png and
examples/detection.png with what the first ones see.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_model

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.detection.arguments import DetectionRecipe
from hivit_hf.detection.run import IMAGES, DetectionRun
from hivit_hf.segmentation.arguments import SegmentationRecipe
from hivit_hf.segmentation.run import SegmentationRun
from hivit_hf.training.recipe_old import read_recipe
from measure import write


EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Task:
    """
    What is learned from scenes.

    Args:
        name: `segmentation` or `detection`, as in the names of the script, the recipe, and the image.
        scenes: flags of examples/make_scenes.py.
        metrics: what is recorded of an evaluation.
        image: that the script writes.
        recipe, run: the classes behind the script.
    """

    name: str
    scenes: tuple[str, ...]
    metrics: tuple[str, ...]
    image: str
    recipe: type
    run: Callable

    @property
    def recipe_path(self) -> Path:
        return EXAMPLES / "recipes" / f"{self.name}_scenes.yaml"

    def data(self, folder: Path) -> dict[str, str]:
        """The fields of a recipe that say where scenes are."""
        if self.name == "segmentation":
            return {"dataset_name": str(folder / "dataset")}
        found = {}
        for field, split in (("train", "train"), ("eval", "test")):
            found[f"{field}_annotations"] = str(folder / "coco" / "annotations" / f"instances_{split}.json")
            found[f"{field}_images"] = str(folder / "coco" / split)
        return found

    def make_scenes(self, folder: Path):
        subprocess.run([sys.executable, EXAMPLES / "make_scenes.py", "--output", folder, *self.scenes], check=True)

    def train(self, start: Path, scenes: Path, output: Path) -> dict[str, float]:
        """Metrics after the training, and the processor's seconds."""
        flags = [word for name, value in self.data(scenes).items() for word in (f"--{name}", value)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, EXAMPLES / f"finetune_{self.name}.py", "--recipe", self.recipe_path]
        subprocess.run([*command, "--model_name_or_path", start, "--output_dir", output, *flags], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        results = json.loads((output / "eval_results.json").read_text())
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {name: results[f"eval_{name}"] for name in self.metrics} | {"processor_s": spent}

    def exchange(self, trained: Path, backbone: Path, scenes: Path, output: Path) -> dict[str, float]:
        """Metrics of a trained model whose encoder has the weights of another folder."""
        recipe = self.recipe(
            **read_recipe(self.recipe_path, self.recipe),
            **self.data(scenes),
            model_name_or_path=str(backbone),
            output_dir=str(output),
        )
        run = self.run(recipe)
        pyramid = run.model.backbone if self.name == "segmentation" else run.model.pyramid
        random = {name: tensor.clone() for name, tensor in pyramid.hivit.state_dict().items()}
        load_model(run.model, trained / "model.safetensors")
        pyramid.hivit.load_state_dict(random)
        results = run.evaluate()
        return {name: results[name] for name in self.metrics}


TASKS = [
    Task(
        "segmentation",
        ("--train", "400", "--height", "64", "--width", "64", "--digits", "0", "1", "4", "7"),
        ("mean_iou", "pixel_accuracy"),
        "overlays.png",
        SegmentationRecipe,
        partial(SegmentationRun, metric_path=EXAMPLES / "metrics" / "mean_iou"),
    ),
    Task("detection", (), ("box_ap", "box_ap50", "mask_ap", "mask_ap50"), IMAGES, DetectionRecipe, DetectionRun),
]


def untrained(config: HiViTConfig, folder: Path) -> Path:
    """A folder with the same network, but random weights."""
    torch.manual_seed(0)
    HiViTForMaskedImageModeling(config).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, required=True, help="folder of the demonstration's pre-training")
    pretrained = parser.parse_args().pretrained
    if not (pretrained / "config.json").exists():
        parser.error(f"there is no model in {pretrained}: run examples/demo_digits.py first")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        random = untrained(HiViTConfig.from_pretrained(pretrained), folder / "random")
        shutil.copy(pretrained / "preprocessor_config.json", random)
        for task in TASKS:
            scenes, runs = folder / f"{task.name}_scenes", folder / f"{task.name}_runs"
            task.make_scenes(scenes)
            found = {"scenes": list(task.scenes)}
            for name, start in (("pretrained", pretrained), ("untrained", random)):
                found[name] = task.train(start, scenes, runs / name)
            found["exchanged"] = task.exchange(runs / "pretrained", random, scenes, runs / "exchanged")
            shutil.copy(runs / "pretrained" / task.image, EXAMPLES / f"{task.name}.png")
            results[task.name] = found
    print(write("scene_tasks_cpu", results, "cpu").read_text())


if __name__ == "__main__":
    main()
