"""
python examples/export_onnx.py MODEL_FOLDER OUT_DIR [--task classification] [--size fixed] [--int8 IMAGES]
    [--overwrite]

Exports a trained model to ONNX, one file per task with its weights: `classification`, `features`, `reconstruction`.
Each is compared with PyTorch in onnxruntime, and refused beyond 1e-4; onnx.json holds the differences. config.json and
preprocessor_config.json are written beside them. The folder is written whole or not at all.

--int8 also writes the classifier with int8 matrices, and reports the accuracy of both on labeled images: a folder for
each class (or a dataset saved with `save_to_disk`), held out from training.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import SafetensorError
from transformers import logging

from hivit_hf.hub.onnx import OPSET, TOLERANCE, check_exportable, export_onnx, int8_cost, labeled_images, tasks_of
from hivit_hf.hub.repository import load_folder
from hivit_hf.image_processing import load_processor
from hivit_hf.training.command_line import is_disk_full
from hivit_hf.training.folders import refuse_output, written_whole


TASKS = ("classification", "features", "reconstruction")
WRITTEN_FILES = [*(f"{task}.onnx" for task in TASKS), "classification_int8.onnx", "onnx.json"]
WRITTEN_FILES += ["config.json", "configuration_hivit.py", "preprocessor_config.json"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Folder of the trained model.")
    parser.add_argument("out_dir", type=Path, help="Output folder.")
    parser.add_argument(
        "--task",
        choices=["all", *TASKS],
        default="all",
        help="Task to export; all that the model supports by default.",
    )
    parser.add_argument(
        "--size",
        choices=["fixed", "dynamic"],
        default="fixed",
        help="Input size: the model's own, or any multiples of its patch size (not for reconstruction).",
    )
    parser.add_argument("--opset", type=int, default=OPSET, help=f"ONNX opset version (default: {OPSET}).")
    parser.add_argument(
        "--int8", type=Path, metavar="IMAGES", help="Labeled images to measure an int8 classifier with; also writes it."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export in the output folder.")
    return parser.parse_args(argv)


def dynamic_size(arguments: argparse.Namespace, task: str) -> bool:
    return arguments.size == "dynamic" and task != "reconstruction"


def run(arguments: argparse.Namespace):
    where = (arguments.out_dir, arguments.overwrite, [arguments.model], WRITTEN_FILES)
    refuse_output(*where)
    model = load_folder(arguments.model)
    tasks = tasks_of(model) if arguments.task == "all" else [arguments.task]
    if arguments.int8 and "classification" not in tasks:
        raise ValueError("--int8 is measured by accuracy: it is for classifiers. Leave it out.")
    for task in tasks:
        check_exportable(model, task, dynamic_size(arguments, task), arguments.opset)
    processor = load_processor(arguments.model, model.config)
    images = labeled_images(arguments.int8, model, processor) if arguments.int8 else None

    with written_whole(*where) as folder:
        write(folder, arguments, model, processor, tasks, images)


def write(folder: Path, arguments: argparse.Namespace, model, processor, tasks: list[str], images):
    """Writes and checks the files, and prints what they are."""

    def say(path: Path, what: str):
        print(f"{arguments.out_dir / path.name}: {path.stat().st_size / 1e6:.1f} MB{what}")

    record = {"opset": arguments.opset, "tolerance": TOLERANCE, "files": {}}
    for task in tasks:
        dynamic = dynamic_size(arguments, task)
        path = folder / f"{task}.onnx"
        difference = export_onnx(model, path, task, dynamic, arguments.opset)
        record["files"][path.name] = {"task": task, "dynamic_size": dynamic, "largest_difference": difference}
        say(path, f", {difference:.1e} from PyTorch at most")
    if images is not None:
        path, quantized = folder / "classification.onnx", folder / "classification_int8.onnx"
        cost = int8_cost(path, quantized, images)
        record["files"][quantized.name] = {"task": "classification", **cost}
        accuracy = f"{cost['accuracy_int8']:.2%}, float32 {cost['accuracy_float32']:.2%}: a drop of {cost['drop']:.2%}"
        say(quantized, f"; accuracy on {cost['images']} images {accuracy}")
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "onnx.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except (ValueError, OSError, SafetensorError) as error:
        full = f"{arguments.out_dir} cannot be written ({error}): free space there, or choose another folder."
        print(f"error: {full if is_disk_full(error) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
