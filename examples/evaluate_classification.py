"""
python examples/evaluate_classification.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/judged

Judges a classifier through `evaluate` and a pipeline: top-1, top-5, images per second, confusion matrix, calibration.
--robustness damages the images as well. --soup makes one classifier of several folders first.
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
import evaluate
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hivit_hf.classification import evaluation
from hivit_hf.classification.figures import calibration_figure, confusion_matrix_figure, robustness_figure
from hivit_hf.classification.metrics import calibration
from hivit_hf.classification.robustness import SEVERITIES, robustness
from hivit_hf.classification.soup import soup
from hivit_hf.data.datasets import ImageDataset, check_images, choose_split, image_column, open_splits
from hivit_hf.training.figures import figure_to_png
from hivit_hf.training.recipe_old import check_numbers, one_sentence, settings


METRICS = Path(__file__).parent / "metrics"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", nargs="+", required=True, help="Judge a classifier, or a soup of several."
    )
    parser.add_argument("--soup", choices=["uniform", "greedy"], help="Average all classifiers, or those that help.")
    parser.add_argument("--soup_split", default="validation", help="Choose with this split for a greedy soup.")
    parser.add_argument(
        "--dataset_name", required=True, help="Read a dataset of the Hub, or a folder, as in fine-tuning."
    )
    parser.add_argument("--dataset_config", help="Take this configuration of the Hub dataset.")
    parser.add_argument("--split", default="test", help="Judge with this split.")
    parser.add_argument("--image_column", help="Find the images in this column, if it cannot be told.")
    parser.add_argument("--label_column", help="Find the labels in this column, if it cannot be told.")
    parser.add_argument("--label_names", nargs="+", default=[], help="Name the classes, in the order of their numbers.")
    parser.add_argument("--max_samples", type=int, help="Judge with the first so many images only.")
    parser.add_argument("--check_images", type=int, default=1000, help="Decode so many images first, to find bad ones.")
    parser.add_argument("--robustness", action="store_true", help="Judge with damaged, dropped and shuffled parts too.")
    parser.add_argument(
        "--severities", type=int, nargs="+", default=SEVERITIES, choices=SEVERITIES, help="Damage with these strengths."
    )
    parser.add_argument("--batch_size", type=int, default=32, help="Take so many images per forward pass.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Write results.json, images and the soup to this folder."
    )
    arguments = parser.parse_args(argv)
    if len(arguments.model_name_or_path) > 1 and not arguments.soup:
        parser.error("Several --model_name_or_path make a soup: add --soup uniform or --soup greedy.")
    check_numbers(parser, arguments, positive=["batch_size", "max_samples"], nonnegative=["check_images"])
    if (arguments.output_dir / "results.json").exists():
        parser.error(f"{arguments.output_dir} holds results.json of another evaluation: give another --output_dir.")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    datasets.disable_progress_bars()
    try:
        results = judge(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("accuracy", "top5_accuracy", "expected_calibration_error", "samples_per_second"):
        print(f"{name:<28}{results[name]:.4g}")
    for kind, row in results.get("robustness", {}).items():
        print(f"{kind:<28}" + "  ".join(f"{strength}: {share:.3f}" for strength, share in row.items()))
    return 0


def judge(arguments: argparse.Namespace) -> dict:
    """All numbers; the images are drawn on the way."""
    splits = open_splits(arguments.dataset_name, arguments.dataset_config)
    images = choose_split(splits, arguments.split, "split")
    images = images.select(range(min(len(images), arguments.max_samples or len(images))))
    column = image_column(images, arguments.image_column)
    check_images(ImageDataset(images, column, transform=None, name=arguments.split), arguments.check_images)
    model, processor, made = classifier(arguments, splits, column)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    labels = (arguments.label_column, arguments.label_names)
    targets = evaluation.targets_for(model, images, arguments.split, *labels)
    work = (model, processor, images, column, targets)
    numbers, probabilities = evaluation.evaluate_images(*work, arguments.batch_size)
    confidence = calibration(probabilities, targets.numpy())
    confusion = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True).compute(
        predictions=probabilities.argmax(axis=1), references=targets, num_labels=model.config.num_labels
    )
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    figures = {
        "confusion_matrix": confusion_matrix_figure(confusion["confusion_matrix"], names),
        "calibration": calibration_figure(confidence["bins"], confidence["expected_calibration_error"]),
    }
    results = {"settings": settings(arguments), "images": len(images), **numbers, **confidence, **confusion, **made}
    if arguments.robustness:
        results["robustness"] = robustness(*work, sorted(set(arguments.severities)), arguments.batch_size)
        figures["robustness"] = robustness_figure(results["robustness"])
    for name, figure in figures.items():
        (arguments.output_dir / f"{name}.png").write_bytes(figure_to_png(figure))
    return results


def classifier(arguments: argparse.Namespace, splits: datasets.DatasetDict, column: str) -> tuple:
    """What is judged: the classifier of a folder, or a soup of several, which is saved."""
    if not arguments.soup:
        return *evaluation.load_for_evaluation(arguments.model_name_or_path[0]), {}

    def accuracy(model: PreTrainedModel, processor: BaseImageProcessor) -> float:
        held_out = choose_split(splits, arguments.soup_split, "soup_split")
        labels = (arguments.label_column, arguments.label_names)
        targets = evaluation.targets_for(model, held_out, arguments.soup_split, *labels)
        return evaluation.accuracy_of(model, processor, held_out, column, targets, arguments.batch_size)

    model, processor, made = soup(arguments.model_name_or_path, arguments.soup, accuracy)
    for part in (model, processor):
        part.save_pretrained(arguments.output_dir / "soup")
    return model, processor, {"soup": made}


if __name__ == "__main__":
    sys.exit(main())
