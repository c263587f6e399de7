"""
python examples/linear_probe.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/probe

How good are the features of a pre-trained HiViT, without training it? They are computed once and kept; then linear
classifiers (L-BFGS or LARS) and nearest neighbors are judged with them, for each stage and for all stages together.
--random_weights gives the yardstick: what the network does without having learned anything.
"""

import argparse
import json
import sys
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from hivit_hf.classification.metrics import top_k_accuracy
from hivit_hf.data.datasets import ImageDataset, check_images, image_column, open_splits
from hivit_hf.data.datasets import train_and_eval as choose
from hivit_hf.data.labels import SINGLE, check_same_labels, find_labels
from hivit_hf.probing.features import FEATURES, cached_features, load_encoder
from hivit_hf.probing.linear import probe_lars, probe_lbfgs
from hivit_hf.probing.neighbors import nearest_neighbors
from hivit_hf.training.recipe_old import check_numbers, one_sentence, settings


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Read the HiViT from this folder or Hub name.")
    parser.add_argument("--random_weights", action="store_true", help="Take its network, but with random weights.")
    parser.add_argument(
        "--dataset_name", required=True, help="Read a dataset of the Hub, or a folder, as in fine-tuning."
    )
    parser.add_argument("--dataset_config", help="Take this configuration of the Hub dataset.")
    parser.add_argument("--train_split", default="train", help="Learn from this split.")
    parser.add_argument("--eval_split", help="Evaluate with this split; 'validation' or 'test' if not given.")
    parser.add_argument("--eval_fraction", type=float, help="Hold out this share of the training split instead.")
    parser.add_argument("--image_column", help="Find the images in this column, if it cannot be told.")
    parser.add_argument("--label_column", help="Find the labels in this column, if it cannot be told.")
    parser.add_argument("--image_size", type=int, help="Take images of this side in px; the model's if not given.")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=FEATURES, help="Judge these features.")
    methods = ("lbfgs", "lars", "knn")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="Judge them by these methods.")
    parser.add_argument("--neighbors", type=int, default=20, help="Ask so many nearest neighbors.")
    parser.add_argument("--strength", type=float, default=1.0, help="Regularise the L-BFGS probe this strongly.")
    parser.add_argument(
        "--lars_epochs", type=int, default=90, help="Train the LARS probe for so many epochs, a ninth of them warm-up."
    )
    parser.add_argument("--lars_learning_rate", type=float, default=6.4, help="Reach this rate in the LARS probe.")
    parser.add_argument("--batch_size", type=int, default=64, help="Take so many images per forward pass.")
    parser.add_argument("--num_workers", type=int, default=4, help="Read and decode in so many processes.")
    parser.add_argument("--check_images", type=int, default=1000, help="Decode so many images first, to find bad ones.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Write results.json and the kept features to this folder."
    )
    arguments = parser.parse_args(argv)
    positive = ["neighbors", "strength", "lars_epochs", "lars_learning_rate", "batch_size"]
    check_numbers(parser, arguments, positive, nonnegative=["num_workers", "check_images"])
    return arguments


def probe(arguments: argparse.Namespace) -> dict:
    """Top-1 of each method with each kind of features."""
    splits = open_splits(arguments.dataset_name, arguments.dataset_config)
    train, other = choose(splits, arguments.train_split, arguments.eval_split, arguments.eval_fraction, seed=0)
    column = image_column(train, arguments.image_column)
    labels = find_labels(train, SINGLE, [arguments.label_column] if arguments.label_column else ())
    known, wanted = labels.targets(train, "train"), labels.targets(other, "eval")
    check_same_labels(train, other, labels, (known, wanted))
    for split, name in ((train, "train"), (other, "eval")):
        check_images(ImageDataset(split, column, transform=None, name=name), arguments.check_images)
    encoder = load_encoder(arguments.model_name_or_path, arguments.image_size, arguments.random_weights)
    kept = (arguments.output_dir / "features", arguments.batch_size, arguments.num_workers)
    (seen, before), (unseen, _) = (
        cached_features(encoder, split, column, *kept, name) for split, name in ((train, "train"), (other, "eval"))
    )
    print(f"{len(train)} images to learn from, {len(other)} held out; features {'kept' if before else 'computed'}")
    results = {}
    for name in tqdm(arguments.features, desc="probing", unit="kind", delay=2):
        scores = {
            "lbfgs": lambda a, b: probe_lbfgs(a, known, b, arguments.strength),
            "lars": lambda a, b: probe_lars(
                a, known, b, arguments.lars_learning_rate, arguments.lars_epochs, arguments.lars_epochs // 9
            ),
        }
        results[name] = {}
        for method in arguments.methods:
            if method == "knn":
                predicted = nearest_neighbors(seen[name], known, unseen[name], arguments.neighbors)
                results[name][method] = (predicted == wanted).float().mean().item()
            else:
                scored = scores[method](seen[name], unseen[name])
                results[name][method] = top_k_accuracy(scored, wanted.numpy(), 1)
    return results


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    datasets.disable_progress_bars()
    try:
        results = probe(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    print(f"{'features':<10}" + "".join(f"{method:>8}" for method in arguments.methods))
    for name, row in results.items():
        print(f"{name:<10}" + "".join(f"{row[method]:>8.3f}" for method in arguments.methods))
    (arguments.output_dir / "results.json").write_text(
        json.dumps({"settings": settings(arguments), "accuracy": results}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
