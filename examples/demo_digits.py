"""
python examples/demo_digits.py [--output demo_output] [--seeds 3] [--fast]

Pre-trains a small HiViT on handwritten digits without labels, fine-tunes it beside one from scratch, and predicts with
it in a fresh process. Then open demo_output/index.html. Minutes on two CPU cores; no network.
"""

import argparse
import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from accelerate import Accelerator

from digits import experiment, page
from digits.data import DigitPixels, digits_dataset, digits_processor, save_samples
from hivit_hf import HiViTForMaskedImageModeling


def main():
    settings, arguments = parse_arguments()
    quieten()
    # A network this small gains a third from a second thread, but stalls when another program uses one of the cores
    torch.set_num_threads(1)
    output, seconds = arguments.output, {}
    output.mkdir(parents=True, exist_ok=True)

    dataset, processor = digits_dataset(), digits_processor()
    train, test = (DigitPixels.from_dataset(dataset[name], processor) for name in ("train", "test"))
    dataset["test"].save_to_disk(output / "holdout")
    print(f"{len(train)} images to train with, {len(test)} held out")

    print("1/4 Masked pre-training, without labels")
    with timed("pretraining", seconds):
        pretraining = experiment.pretrain_digits(train, settings, output / "pretrained")
        processor.save_pretrained(output / "pretrained")

    print("2/4 Fine-tuning, pre-trained and from scratch")
    runs = {}
    with experiment.worker_processes() as pool:
        for labels in experiment.LABELS:
            with timed(f"finetuning_{labels}", seconds):
                models, runs[labels] = experiment.compare_starts(
                    pool, train, test, labels, arguments.seeds, settings, output / "pretrained"
                )
            if labels == "all_labels":
                final_model = models["pretrained"]

    print("3/4 Evaluation of the pre-trained classifier of seed 0, from the images themselves")
    with timed("evaluation", seconds):
        final_model.save_pretrained(output / "model")
        processor.save_pretrained(output / "model")
        save_samples(dataset["test"], output / "samples")
        probabilities = experiment.predict_probabilities(final_model, test)
        evaluation = experiment.evaluate_model(final_model, processor, dataset["test"], probabilities)

    print("4/4 Predictions of the saved classifier in a fresh process")
    with timed("fresh_process", seconds):
        fresh = experiment.predict_in_fresh_process(output / "model", output / "holdout")

    results = {
        "fast": arguments.fast,
        "seeds": list(range(arguments.seeds)),
        "settings": asdict(settings),
        "network": experiment.digits_config().to_diff_dict(),
        "parameters": {"classifier": final_model.num_parameters()},
        "images": {"train": len(train), "holdout": len(test)},
        "pretraining": pretraining,
        "finetuning": runs,
        "accuracy": experiment.summarize(runs),
        "evaluation": evaluation,
        "fresh_process": experiment.compare_predictions(probabilities, fresh),
        "predictions": experiment.example_predictions(fresh, test.labels),
        "seconds": seconds,
    } | surroundings()
    autoencoder = HiViTForMaskedImageModeling.from_pretrained(output / "pretrained")
    finish(results, output, dataset["test"], autoencoder, test.pixel_values)


def finish(results: dict, output: Path, images: datasets.Dataset, autoencoder: HiViTForMaskedImageModeling, pixels):
    """Stops the clock, judges the targets, and writes the page and the numbers."""
    started = psutil.Process().create_time()  # importing the libraries takes seconds too
    results["seconds"]["total"] = time.time() - started
    results["targets"] = experiment.judge(results)
    page.write_page(output / "index.html", results, images, autoencoder, pixels)
    (output / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    page.print_summary(results, output)


def surroundings() -> dict:
    """Versions, and what the training ran on."""
    versions = {name: version(name) for name in page.LIBRARIES} | {"python": platform.python_version()}
    device = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "type": Accelerator().device.type}
    return {"versions": versions, "device": device}


def quieten():
    """Leaves the terminal to the demonstration's own progress bars."""
    for library in (transformers.logging, datasets.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def timed(phase: str, seconds: dict[str, float]):
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def parse_arguments() -> tuple[experiment.DemoSettings, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="Write this folder (demo_output).")
    parser.add_argument("--seeds", type=int, default=3, help="Make so many runs of each kind (3).")
    parser.add_argument("--fast", action="store_true", help="Take a handful of steps, to see that everything runs.")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    settings = experiment.DemoSettings()
    return (settings.fast() if arguments.fast else settings), arguments


if __name__ == "__main__":
    main()
