"""
python examples/push_to_hub.py MODEL OUT_DIR [--checkpoint hivit-base-mae-1600ep] [--samples IMAGES] [--push_to_hub]

Writes a complete repository for the Hub from a trained or converted model: weights, code, image processor, card,
samples with predictions, ONNX files, endpoint. Lists its files. Uploads only with --push_to_hub.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import logging

from hivit_hf.hub.model_zoo import CHECKPOINTS, Checkpoint
from hivit_hf.hub.repository import export, load_folder, tree, undescribed
from hivit_hf.image_processing import load_processor


CARD_FLAGS = {
    "title": "Title of the card.",
    "hub_model_id": "Repository id on the Hub, OWNER/NAME.",
    "description": "Description of the model, in a sentence or two.",
    "training": "Training data and recipe, in Markdown.",
    "license": "License of the weights, as an identifier of the Hub.",
}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Folder of the trained or converted model.")
    parser.add_argument("out_dir", type=Path, help="Output folder.")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="Published checkpoint that the card describes.")
    for name, what in CARD_FLAGS.items():
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument(
        "--samples", type=Path, nargs="+", default=[], metavar="IMAGE", help="PNG and JPEG files for the card."
    )
    parser.add_argument("--no_onnx", action="store_true", help="No ONNX files, which take most of the time.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export in the output folder.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload to the Hub; new repositories are private.")
    parser.add_argument("--dry_run", action="store_true", help="List the files of the folder without keeping it.")
    arguments = parser.parse_args(argv)
    if arguments.dry_run and arguments.push_to_hub:
        parser.error("--dry_run and --push_to_hub exclude each other: leave one out")
    return arguments


def describe(arguments: argparse.Namespace, model) -> Checkpoint:
    """The description of the card, from the table of checkpoints and the flags."""
    given = {name: getattr(arguments, name) for name in CARD_FLAGS if getattr(arguments, name) is not None}
    if "hub_model_id" in given:
        given["repo_id"] = given.pop("hub_model_id")
    known = CHECKPOINTS.get(arguments.checkpoint) or undescribed(model, arguments.out_dir.resolve().name)
    return replace(known, **given)


def read_report(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: convert again, or delete it.") from error


def run(arguments: argparse.Namespace):
    model = load_folder(arguments.model)
    report = arguments.model / "conversion_report.json"
    options = {
        "about": describe(arguments, model),
        "image_processor": load_processor(arguments.model, model.config),
        "samples": arguments.samples,
        "conversion_report": read_report(report) if report.exists() else None,
        "onnx": not arguments.no_onnx,
        "results_dir": RESULTS,
    }
    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            print(tree(export(model, Path(folder) / arguments.out_dir.resolve().name, **options)))
        print("dry run: nothing was kept, nothing was uploaded")
        return
    options |= {"overwrite": arguments.overwrite, "push_to_hub": arguments.push_to_hub}
    print(tree(export(model, arguments.out_dir, **options)))
    print(f"written: {arguments.out_dir}" + ("" if arguments.push_to_hub else "; nothing was uploaded"))


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
