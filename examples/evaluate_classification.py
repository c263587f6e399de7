"""
python examples/evaluate_classification.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/eval

Evaluates a classifier: top-1 and top-5 accuracy, images per second, confusion matrix, calibration. --robustness
adds accuracy on corrupted images. --soup first averages the classifiers of several folders.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import datasets
import evaluate
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hivit_hf.classification import evaluation
from hivit_hf.classification.figures import calibration_figure, confusion_matrix_figure, robustness_figure
from hivit_hf.classification.metrics import calibration
from hivit_hf.classification.robustness import SEVERITIES, robustness
from hivit_hf.classification.soup import soup
from hivit_hf.data.datasets import choose_split, open_splits
from hivit_hf.probing.arguments import EvaluatedImages
from hivit_hf.training.command_line import argument, parse_arguments, positive, required_argument, run_script, some_of
from hivit_hf.training.figures import figure_to_png
from hivit_hf.training.output_folders import refuse_foreign


METRICS = Path(__file__).parent / "metrics"
WRITTEN_FILES = ("results.json", "confusion_matrix.png", "calibration.png", "robustness.png", "soup/*")


@dataclass(kw_only=True)
class EvaluationArguments(EvaluatedImages):
    """Evaluation of classifiers."""

    model_name_or_path: list[str] = required_argument("Folder or Hub name of the classifier; several for a soup.")
    soup: Literal["uniform", "greedy"] | None = argument(None, "Model soup of all classifiers, or of those that help.")
    soup_split_name: str = argument("validation", "Split that chooses the classifiers of a greedy soup.")
    eval_split_name: str = argument("test", "Split to evaluate on; validation, for images of --validation_dir.")
    label_column_name: str | None = argument(None, "Column of the labels ('label' or the like).")
    class_names: list[str] = argument([], "Names of the classes, in the order of their numbers.")
    max_eval_samples: Annotated[int | None, positive] = argument(None, "Number of images, from the first one on.")
    robustness: bool = argument(False, "Evaluate on corrupted images, with masked and with shuffled patches.")
    severities: Annotated[list[int], some_of(*SEVERITIES)] = argument(list(SEVERITIES), "Severities of corruptions.")
    per_device_eval_batch_size: Annotated[int, positive] = argument(32, "Batch size of the forward passes.")
    output_dir: str = required_argument("Folder for results.json, figures and the soup.")

    def __post_init__(self):
        super().__post_init__()
        if len(self.model_name_or_path) > 1 and not self.soup:
            raise ValueError("Several --model_name_or_path make a soup: add --soup uniform or --soup greedy.")
        refuse_foreign(Path(self.output_dir), WRITTEN_FILES)


def evaluate_classifier(args: EvaluationArguments):
    """Prints and saves metrics and figures."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # data
    splits = open_splits(**args.location())
    images = choose_split(splits, args.eval_split_name, "eval_split_name")
    images = images.select(range(min(len(images), args.max_eval_samples or len(images))))
    column = args.checked_column(images, args.eval_split_name)

    # model
    model, processor, record = load_classifier(args, splits, column)
    labels = (args.label_column_name, args.class_names)
    targets = evaluation.targets_for(model, images, args.eval_split_name, *labels)

    # evaluate
    work = (model, processor, images, column, targets)
    metrics, probabilities = evaluation.evaluate_images(*work, args.per_device_eval_batch_size)
    confidence = calibration(probabilities, targets.numpy())
    confusion = evaluate.load(str(METRICS / "confusion_matrix"), keep_in_memory=True).compute(
        predictions=probabilities.argmax(axis=1), references=targets, num_labels=model.config.num_labels
    )
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    results = {"settings": asdict(args), "images": len(images), **metrics, **confidence, **confusion, **record}
    figures = {
        "confusion_matrix": confusion_matrix_figure(confusion["confusion_matrix"], names),
        "calibration": calibration_figure(confidence["bins"], confidence["expected_calibration_error"]),
    }
    if args.robustness:
        results["robustness"] = robustness(*work, sorted(set(args.severities)), args.per_device_eval_batch_size)
        figures["robustness"] = robustness_figure(results["robustness"])

    # save
    for name, figure in figures.items():
        (output / f"{name}.png").write_bytes(figure_to_png(figure))
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("accuracy", "top5_accuracy", "expected_calibration_error", "samples_per_second"):
        print(f"{name:<28}{results[name]:.4g}")
    for kind, row in results.get("robustness", {}).items():
        print(f"{kind:<28}" + "  ".join(f"{strength}: {value:.3f}" for strength, value in row.items()))


def load_classifier(args: EvaluationArguments, splits: datasets.DatasetDict, column: str) -> tuple:
    """The classifier, its processor and {}; or a soup, which is saved, its processor and its record."""
    if not args.soup:
        return *evaluation.load_for_evaluation(args.model_name_or_path[0]), {}

    def accuracy(model: PreTrainedModel, processor: BaseImageProcessor) -> float:
        images = choose_split(splits, args.soup_split_name, "soup_split_name")
        labels = (args.label_column_name, args.class_names)
        targets = evaluation.targets_for(model, images, args.soup_split_name, *labels)
        work = (model, processor, images, column, targets)
        return evaluation.evaluate_images(*work, args.per_device_eval_batch_size)[0]["accuracy"]

    model, processor, record = soup(args.model_name_or_path, args.soup, accuracy)
    for part in (model, processor):
        part.save_pretrained(Path(args.output_dir) / "soup")
    return model, processor, {"soup": record}


def main(argv: list[str] | None = None) -> int:
    return run_script(evaluate_classifier, *parse_arguments([EvaluationArguments], __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
