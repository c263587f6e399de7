"""
python examples/demo_digits.py [--output_dir demo_output] [--seeds 3] [--fast]

Pre-trains a small HiViT on handwritten digits without labels, fine-tunes it beside one from scratch, and predicts with
it in a fresh process: pretrain_mim.py, finetune_classification.py and evaluate_classification.py on small recipes. Then
open demo_output/index.html. Minutes on two CPU cores; no network.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from accelerate import Accelerator

from digits import experiment, page
from digits.data import digits_dataset, save_samples
from digits.predict import predict
from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling


MARK = ".demonstration"  # in a folder that the demonstration may replace


def main():
    arguments = parse_arguments()
    # A network this small gains a third from a second thread, but stalls when another program uses one of the cores
    torch.set_num_threads(1)
    output, seconds = arguments.output_dir, {}
    enter(output)
    pretraining_flags = experiment.FAST_PRETRAINING if arguments.fast else []
    finetuning_flags = experiment.FAST_FINETUNING if arguments.fast else []

    splits = digits_dataset()
    data = experiment.write_data(splits, output / "data", arguments.seeds)
    save_samples(splits["test"], output / "samples")
    quieten()
    splits["test"].save_to_disk(output / "holdout")
    print(f"{len(splits['train'])} training images, {len(splits['test'])} held out")

    with experiment.worker_processes() as pool:
        begin = partial(
            experiment.begin,
            pool,
            seeds=arguments.seeds,
            data=data,
            pretrained=output / "pretrained",
            output=output / "runs",
            flags=finetuning_flags,
        )
        print("1/4 Masked pre-training, without labels; the fine-tunings from scratch run beside it")
        with timed("pretraining", seconds):
            futures = begin(initialization="scratch")
            pretraining = experiment.pretrain(data / "all_labels", output / "runs" / "pretraining", pretraining_flags)
        replace(output / "pretrained", output / "runs" / "pretraining" / "model")

        print("2/4 Fine-tuning, pre-trained and from scratch")
        with timed("finetuning", seconds):
            runs = experiment.wait_for(futures | begin(initialization="pretrained"))
    replace(output / "model", output / "runs" / experiment.Finetuning("all_labels", "pretrained", 0).name)

    print("3/4 Evaluation of the pre-trained classifier of seed 0")
    quieten()
    with timed("evaluation", seconds):
        evaluation = experiment.evaluate_model(output / "model", data / "all_labels", output / "runs" / "evaluation")
        here = predict(output / "model", output / "holdout")

    print("4/4 Predictions of the saved classifier in a fresh process")
    with timed("fresh_process", seconds):
        fresh = experiment.predict_in_fresh_process(output / "model", output / "holdout")

    classifier = HiViTForImageClassification.from_pretrained(output / "model")
    results = {
        "fast": arguments.fast,
        "seeds": list(range(arguments.seeds)),
        "network": classifier.config.to_diff_dict(),
        "parameters": {"classifier": classifier.num_parameters()},
        "images": {"train": len(splits["train"]), "holdout": len(splits["test"])},
        "pretraining": pretraining,
        "finetuning": runs,
        "accuracy": experiment.summarize(runs),
        "evaluation": evaluation,
        "fresh_process": experiment.compare_predictions(here, fresh),
        "predictions": experiment.example_predictions(fresh, splits["test"]["label"]),
        "seconds": seconds,
    } | surroundings()
    finish(results, output, splits["test"])


def enter(output: Path):
    """Makes the output folder; an earlier demonstration in it is replaced. SystemExit if it holds anything else."""
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        print(f"error: {output} is not of an earlier demonstration: give another --output_dir.", file=sys.stderr)
        raise SystemExit(2)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def finish(results: dict, output: Path, test: datasets.Dataset):
    """Stops the clock, and writes the page and the metrics."""
    started = psutil.Process().create_time()  # importing the libraries takes seconds too
    results["seconds"]["total"] = time.time() - started
    autoencoder = HiViTForMaskedImageModeling.from_pretrained(output / "pretrained")
    page.write_page(output / "index.html", results, test, autoencoder)
    (output / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    page.print_summary(results, output)


def replace(folder: Path, model: Path):
    """Copies what `from_pretrained` reads of a run's model."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(model / name, folder)


def surroundings() -> dict:
    """Versions, and what the training ran on."""
    versions = {name: version(name) for name in page.LIBRARIES} | {"python": platform.python_version()}
    device = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "type": Accelerator().device.type}
    device["instructions"] = torch.backends.cpu.get_cpu_capability()
    return {"versions": versions, "device": device}


def quieten():
    """Leaves the terminal to the demonstration's own progress bars."""
    for library in (transformers.logging, datasets.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def timed(phase: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="Output folder (demo_output).")
    parser.add_argument("--seeds", type=int, default=3, help="Number of fine-tuning runs of each kind (3).")
    parser.add_argument("--fast", action="store_true", help="A handful of steps, to see that everything runs.")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
