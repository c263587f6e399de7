"""
python examples/push_to_hub.py MODEL_FOLDER OUT_DIR [--checkpoint hivit-base-mae-1600ep] [--samples IMAGES] [--push]

Makes a complete repository of the Hub from a trained or converted model: weights, code, image processor, card, samples
with predictions, ONNX files, endpoint. Prints what is in it. Uploads only with --push; with --dry_run, nothing stays.
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
    "title": "Head the card with this.",
    "repo_id": "Name it OWNER/NAME on the Hub.",
    "description": "Say what the model is, in a sentence or two.",
    "training": "Say what it was trained with, and how.",
    "license": "Name the license of the weights by an identifier of the Hub.",
}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Read the trained or converted model from this folder.")
    parser.add_argument("out_dir", type=Path, help="Write this folder.")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="Describe it as this published checkpoint.")
    for name, what in CARD_FLAGS.items():
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument(
        "--samples", type=Path, nargs="+", default=[], metavar="IMAGE", help="Show these PNG and JPEG files."
    )
    parser.add_argument("--no_onnx", action="store_true", help="Leave onnx/ out, which takes most of the time.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export in OUT_DIR.")
    parser.add_argument("--push", action="store_true", help="Upload it to the Hub.")
    parser.add_argument("--dry_run", action="store_true", help="Make the folder, print what is in it, and delete it.")
    arguments = parser.parse_args(argv)
    if arguments.dry_run and arguments.push:
        parser.error("--dry_run and --push exclude each other: leave one out")
    return arguments


def describe(arguments: argparse.Namespace, model) -> Checkpoint:
    """What the card says: of the table, or of the flags."""
    given = {name: getattr(arguments, name) for name in CARD_FLAGS if getattr(arguments, name) is not None}
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
        print("a dry run: nothing was kept, nothing was uploaded")
        return
    print(tree(export(model, arguments.out_dir, overwrite=arguments.overwrite, push_to_hub=arguments.push, **options)))
    print(f"written: {arguments.out_dir}" + ("" if arguments.push else "; nothing was uploaded"))


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_warning()
    logging.disable_progress_bar()
    try:
        run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
