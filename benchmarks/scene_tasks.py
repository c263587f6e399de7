"""
python benchmarks/scene_tasks.py --pretrained demo_output/pretrained

Trains UPerNet and Mask R-CNN on scenes of digits, by the example scripts and their recipes for scenes: on the backbone
of the digits demonstration, and on one with random weights. Also evaluates the first with random weights in place of
its backbone's. Writes benchmarks/results/scene_tasks_cpu.json, and examples/segmentation.png and
examples/detection.png with predictions of the first.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.training.initialization import initialize_backbone, resize_for
from measure import write


EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Task:
    """
    What a network is trained for.

    Args:
        name: `segmentation` or `detection`, as in the names of the script, the recipe, and the image.
        scenes: flags of examples/make_scenes.py.
        metrics: those of an evaluation that are recorded.
        overlays: the image that the script writes.
        backbone: what the names of the backbone's weights begin with.
    """

    name: str
    scenes: tuple[str, ...]
    metrics: tuple[str, ...]
    overlays: str
    backbone: str

    def data(self, folder: Path) -> list[str]:
        """The flags that say where scenes are."""
        if self.name == "segmentation":
            return ["--dataset_name", str(folder / "dataset")]
        found = []
        for name, split in (("train", "train"), ("eval", "test")):
            found += [f"--{name}_annotations", str(folder / "coco" / "annotations" / f"instances_{split}.json")]
            found += [f"--{name}_image_dir", str(folder / "coco" / split)]
        return found

    def make_scenes(self, folder: Path):
        subprocess.run([sys.executable, EXAMPLES / "make_scenes.py", "--output", folder, *self.scenes], check=True)

    def run(self, model: Path, scenes: Path, output: Path, *flags: str) -> dict[str, float]:
        """The script. Returns the metrics of its evaluation."""
        command = [sys.executable, EXAMPLES / f"finetune_{self.name}.py", *self.data(scenes), *flags]
        command += ["--config", EXAMPLES / "recipes" / f"{self.name}_scenes.yaml"]
        subprocess.run([*command, "--model_name_or_path", model, "--output_dir", output], check=True)
        results = json.loads((output / "eval_results.json").read_text())
        return {name: results[f"eval_{name}"] for name in self.metrics}

    def train(self, model: Path, scenes: Path, output: Path) -> dict[str, float]:
        """Metrics after training, and seconds of the processor."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = self.run(model, scenes, output)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return metrics | {"processor_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}

    def evaluate_with(self, backbone: Path, trained: Path, scenes: Path, output: Path) -> dict[str, float]:
        """Metrics of a trained model whose backbone has the weights of another folder."""
        model = output.with_name(f"{output.name}_model")
        shutil.copytree(trained, model, ignore=shutil.ignore_patterns("checkpoint-*"))
        weights = load_file(model / "model.safetensors")
        config = json.loads((model / "config.json").read_text())["backbone_config"]
        other = initialize_backbone(str(backbone)).model
        resize_for(other, config["image_size"])
        weights |= {f"{self.backbone}.hivit.{name}": tensor for name, tensor in other.hivit.state_dict().items()}
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        return self.run(model, scenes, output, "--do_train", "false")


TASKS = [
    Task(
        "segmentation",
        ("--train", "400", "--height", "64", "--width", "64", "--digits", "0", "1", "4", "7"),
        ("mean_iou", "pixel_accuracy"),
        "overlays.png",
        "backbone",
    ),
    Task(
        "detection",
        (),
        ("box_ap", "box_ap50", "mask_ap", "mask_ap50"),
        "detections.png",
        "rcnn.backbone.pyramid",
    ),
]


def untrained(config: HiViTConfig, folder: Path) -> Path:
    """A folder with the same network, but random weights."""
    torch.manual_seed(0)
    HiViTForMaskedImageModeling(config).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, required=True, help="Folder of the demonstration's pre-training.")
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
            for name, model in (("pretrained", pretrained), ("untrained", random)):
                found[name] = task.train(model, scenes, runs / name)
            found["exchanged"] = task.evaluate_with(random, runs / "pretrained", scenes, runs / "exchanged")
            shutil.copy(runs / "pretrained" / task.overlays, EXAMPLES / f"{task.name}.png")
            results[task.name] = found
    print(write("scene_tasks_cpu", results, "cpu").read_text())


if __name__ == "__main__":
    main()
