"""The page that shows what the digits demonstration measured, in one file without any other."""

import base64
import html
import io
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.classification.figures import confusion_matrix_figure
from hivit_hf.pretraining.monitor import reconstruction_grid
from hivit_hf.training.figures import figure_to_png, learning_curves

from .data import CLASS_NAMES, digits_processor


LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "matplotlib", "numpy")
NAMES = {"pretrained": "pre-trained", "scratch": "from scratch", "all_labels": "all labels", "few_labels": "100 labels"}
STYLE = """
:root { --ink: #1f2933; --soft: #5b6875; --line: #e1e6eb; --blue: #1d4ed8; --good: #047857; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink); }
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 104ch; }
.soft { color: var(--soft); font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px; margin-top: 22px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 22px; }
.pair > section { min-width: 0; }
section img.figure { display: block; width: 100%; height: auto; margin-top: 8px; }
.headlines { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 24px; }
.headline { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.headline { border-top: 4px solid var(--good); }
.headline b { display: block; font-size: 25px; line-height: 1.25; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: 14px; } th:first-child, td:first-child { text-align: left; }
td.mean { font-weight: 700; }
.digits { display: grid; grid-template-columns: repeat(5, 1fr); gap: 14px; margin-top: 12px; }
.digit { display: flex; gap: 12px; align-items: center; padding: 12px; }
.digit { border: 1px solid var(--line); border-radius: 8px; }
.digit.wrong { border-color: var(--bad); }
.digit img { width: 64px; height: 64px; image-rendering: pixelated; border-radius: 4px; }
.digit div { font-size: 13px; line-height: 1.45; flex: 1; } .digit b { font-size: 15px; }
code { background: #eef1f4; border-radius: 4px; padding: 1px 5px; font-size: 14px; }
pre { background: #f1f4f7; border-radius: 8px; padding: 14px 16px; margin: 12px 0 0; }
pre { overflow-x: auto; font-size: 14px; line-height: 1.5; }
"""
USAGE = """import hivit_hf
from transformers import pipeline

classify = pipeline("image-classification", model="{folder}/model")
classify("{folder}/samples/digit_0.png")"""


def write_page(path: Path, results: dict, test: Dataset, autoencoder: HiViTForMaskedImageModeling):
    """
    Writes the page.

    Args:
        path: the HTML file.
        results: what `metrics.json` holds.
        test: the hold-out, for the images beside the predictions.
        autoencoder: the pre-trained model, for the reconstructions.
    """
    sections = [
        _introduction(results),
        _headlines(results),
        _reconstructions(autoencoder, test),
        _accuracy_table(results),
        _curves(results),
        '<div class="pair">' + _pretraining(results) + _confusion(results) + "</div>",
        _predictions(results, test, path.parent.name),
        _details(results),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>HiViT on handwritten digits</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def print_summary(results: dict, output: Path):
    """The table of the page in the terminal, a few predictions, and where to look."""
    print("\nHold-out accuracy after fine-tuning (mean of the seeds; each seed)")
    for labels, of_start in results["accuracy"].items():
        for start, accuracy in of_start.items():
            each = "  ".join(f"{100 * value:5.1f}" for value in accuracy["per_seed"])
            print(f"  {NAMES[labels]:10}  {NAMES[start]:12}  {100 * accuracy['mean']:5.1f} %   {each}")
    print("\nPredictions of the saved classifier in a fresh process")
    for example in results["predictions"][:5]:
        best = example["pipeline"][0]
        print(f"  a {example['true']}: predicted {best['label']} with {100 * best['score']:.1f} %")
    print()
    for title, value, note in _headline_figures(results):
        print(f"  {title}: {value} ({note})")
    print(f"\nOpen {output / 'index.html'}")


def _introduction(results: dict) -> str:
    images, seconds = results["images"], results["seconds"]["total"]
    device = results["device"]
    place = f"{device['cores']} CPU cores" if device["type"] == "cpu" else device["type"]
    note = (
        '<p class="soft"><b>This was a fast run</b> of a handful of steps: everything ran, and little was trained.</p>'
        if results["fast"]
        else ""
    )
    return (
        "<h1>HiViT on handwritten digits</h1>"
        f"<p>A small HiViT ({results['parameters']['classifier'] / 1e6:.2f} million parameters) was pre-trained on "
        f"{images['train']:,} handwritten digits without their labels: half of each image was masked, and the network "
        "was trained to fill it in. It was then fine-tuned to classify the digits, once with all labels and once with "
        "10 per class, each time beside the same network trained from scratch with the same steps, learning rate and "
        f"augmentation. All accuracies are on {images['holdout']} digits that no training used. "
        f"The whole run took {_duration(seconds)} on {place}.</p>{note}"
    )


def _headline_figures(results: dict) -> list[tuple[str, str, str]]:
    """Title, value and note of the most important results."""
    accuracy, fresh, device = results["accuracy"], results["fresh_process"], results["device"]
    figures = []
    for labels, of_start in accuracy.items():
        pretrained, scratch = (f"{100 * of_start[start]['mean']:.1f} %" for start in ("pretrained", "scratch"))
        figures.append((f"Pre-trained, {NAMES[labels]}", pretrained, f"from scratch {scratch}"))
    place = f"on {device['cores']} CPU cores" if device["type"] == "cpu" else f"on {device['type']}"
    figures.append(("Whole run", f"{results['seconds']['total'] / 60:.1f} minutes", place))
    same = fresh["images"] if fresh["labels_equal"] and fresh["pipeline_labels_equal"] else "not all"
    return [*figures, ("In a fresh process", f"{same} of {fresh['images']}", "predictions are the same")]


def _headlines(results: dict) -> str:
    cards = [
        f'<div class="headline"><span class="soft">{html.escape(title)}</span><b>{value}</b>'
        f'<span class="soft">{note}</span></div>'
        for title, value, note in _headline_figures(results)
    ]
    return '<div class="headlines">' + "".join(cards) + "</div>"


def _reconstructions(autoencoder: HiViTForMaskedImageModeling, test: Dataset) -> str:
    images = [image.convert("RGB") for image in test[:12]["image"]]
    pixel_values = digits_processor()(images, return_tensors="pt")["pixel_values"]
    noise = torch.rand(len(pixel_values), 16, generator=torch.Generator().manual_seed(0))
    mask = autoencoder.draw_mask(pixel_values, noise)
    reconstructions = autoencoder.reconstruct(pixel_values, mask)
    figure = reconstruction_grid((pixel_values + 1) / 2, mask, (reconstructions + 1) / 2, autoencoder.config.patch_size)
    visible = int((~mask[0]).sum())
    return _section(
        "Masked pre-training: filling in what is masked",
        f"The first {len(pixel_values)} digits of the hold-out. The encoder sees {visible} of {mask.shape[1]} units of "
        "8x8 px; the decoder predicts the gray ones. The visible units are pasted back.",
        _image(figure, "Rows of original, masked and reconstructed digits"),
    )


def _accuracy_table(results: dict) -> str:
    header = "".join(f"<th>seed {seed}</th>" for seed in results["seeds"])
    rows = []
    for labels, of_start in results["accuracy"].items():
        for start, accuracy in of_start.items():
            each = "".join(f"<td>{100 * value:.1f} %</td>" for value in accuracy["per_seed"])
            steps = results["finetuning"][labels][start][0]["history"][-1]["step"]
            rows.append(
                f"<tr><td>{NAMES[labels]}, {NAMES[start]}</td><td>{steps}</td>"
                f'<td class="mean">{100 * accuracy["mean"]:.1f} %</td>{each}</tr>'
            )
    return _section(
        "Accuracy on the hold-out",
        "After the last step; no step, seed or model was chosen by it. The seed decides new weights, the order, the "
        "augmentation and which 100 labels are known; pre-training ran once.",
        f"<table><tr><th>fine-tuning</th><th>steps</th><th>mean</th>{header}</tr>{''.join(rows)}</table>",
    )


def _curves(results: dict) -> str:
    sections = []
    for labels, of_start in results["finetuning"].items():
        curves = {
            NAMES[start]: [
                ([point["step"] for point in run["history"]], [100 * point["accuracy"] for point in run["history"]])
                for run in runs
            ]
            for start, runs in of_start.items()
        }
        figure = learning_curves(curves, "step", "hold-out accuracy in %", y_limits=(0, 101))
        sections.append(
            _section(
                f"Fine-tuning with {NAMES[labels]}",
                "Thick: mean of the seeds. Thin: each seed.",
                _image(figure, f"Accuracy against steps with {NAMES[labels]}, pre-trained and from scratch"),
            )
        )
    return '<div class="pair">' + "".join(sections) + "</div>"


def _pretraining(results: dict) -> str:
    history = results["pretraining"]
    epochs, losses = [record["epoch"] for record in history], [record["loss"] for record in history]
    figure = learning_curves({"pre-training": [(epochs, losses)]}, "epoch", "mean squared error of masked pixels")
    speed = sum(record["images_per_second"] for record in history) / len(history)
    return _section(
        "Pre-training",
        f"{epochs[-1]:.0f} epochs, {speed:,.0f} images per second. Black is -1, white is 1.",
        _image(figure, "Loss of masked pre-training against epochs"),
    )


def _confusion(results: dict) -> str:
    evaluation = results["evaluation"]
    return _section(
        "Confusion matrix",
        f"Pre-trained, all labels, seed 0: {100 * evaluation['accuracy']:.1f} % accuracy. Rows are true classes.",
        _image(confusion_matrix_figure(evaluation["confusion_matrix"], CLASS_NAMES), "Confusion matrix"),
    )


def _predictions(results: dict, test: Dataset, folder: str) -> str:
    cards = []
    for example in results["predictions"]:
        ranking = example["pipeline"]
        image = _data_uri(_png(test[example["index"]]["image"]))
        wrong = ranking[0]["label"] != example["true"]
        truth = f" (is {example['true']})" if wrong else ""
        others = "<br>".join(f"{guess['label']}: {100 * guess['score']:.2f} %" for guess in ranking[1:])
        cards.append(
            f'<div class="digit {"wrong" if wrong else "right"}"><img alt="a {example["true"]}" src="{image}">'
            f"<div><b>{ranking[0]['label']}: {100 * ranking[0]['score']:.1f} %</b>{truth}<br>{others}</div></div>"
        )
    fresh = results["fresh_process"]
    equal = "equal" if fresh["labels_equal"] and fresh["pipeline_labels_equal"] else "do NOT equal"
    return _section(
        "Predictions of the saved classifier, in a fresh process",
        f"The first hold-out digit of each class, then mistakes if there are any (red). All {fresh['images']} "
        f"predictions {equal} those of the training process; the probabilities differ by at most "
        f"{fresh['largest_probability_difference']:.1g}.",
        f'<div class="digits">{"".join(cards)}</div><pre>{html.escape(USAGE.format(folder=folder))}</pre>',
    )


def _details(results: dict) -> str:
    seconds = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td>{value:.1f} s</td></tr>"
        for name, value in results["seconds"].items()
    )
    versions = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in results["versions"].items())
    note = "Every number and setting is in <code>metrics.json</code>."
    return (
        '<div class="pair">'
        + _section(
            "Time",
            "Wall clock; the total counts from the start of the process to this page.",
            f"<table>{seconds}</table>",
        )
        + _section("Versions", note, f"<table>{versions}</table>")
        + "</div>"
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft">{note}</p>{body}</section>'


def _duration(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _image(figure: Figure, description: str) -> str:
    return f'<img class="figure" alt="{html.escape(description)}" src="{_data_uri(figure_to_png(figure))}">'


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
