"""
python examples/linear_probe.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/probe

Linear probes (L-BFGS, LARS) and nearest neighbors on the frozen features of a HiViT, for each stage and for all stages
concatenated. The features are computed once and cached. --random_weights gives the baseline of an untrained network.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tqdm.auto import tqdm

from hivit_hf.classification.metrics import top_k_accuracy
from hivit_hf.data.datasets import open_splits, train_and_eval
from hivit_hf.data.labels import SINGLE, check_same_labels, find_labels
from hivit_hf.probing.arguments import EncodedImages
from hivit_hf.probing.features import FEATURES, cached_features, load_encoder
from hivit_hf.probing.linear import probe_lars, probe_lbfgs
from hivit_hf.training.arguments import DatasetSplits
from hivit_hf.training.command_line import (
    argument,
    parse_arguments,
    positive,
    required_argument,
    run_script,
    some_of,
)
from hivit_hf.training.neighbors import nearest_neighbor_accuracy


METHODS = ("lbfgs", "lars", "knn")


@dataclass(kw_only=True)
class ProbeArguments(EncodedImages, DatasetSplits):
    """Linear probes and nearest neighbors."""

    random_weights: bool = argument(False, "Random weights instead of the trained ones, as a baseline.")
    label_column_name: str | None = argument(None, "Column of the labels ('label' or the like).")
    features: Annotated[list[str], some_of(*FEATURES)] = argument(list(FEATURES), f"Features: {', '.join(FEATURES)}.")
    methods: Annotated[list[str], some_of(*METHODS)] = argument(list(METHODS), f"Classifiers: {', '.join(METHODS)}.")
    neighbors: Annotated[int, positive] = argument(20, "Number of nearest neighbors.")
    strength: Annotated[float, positive] = argument(1.0, "L2 regularization of the L-BFGS probe.")
    lars_epochs: Annotated[int, positive] = argument(90, "Epochs of the LARS probe, a ninth of them warmup.")
    lars_learning_rate: Annotated[float, positive] = argument(6.4, "Peak learning rate of the LARS probe.")
    output_dir: str = required_argument("Folder for results.json and the cached features.")

    def __post_init__(self):
        super().__post_init__()
        results = Path(self.output_dir) / "results.json"
        if results.exists() and not is_of_probe(results):
            raise ValueError(f"{results} is not of a linear probe, and not overwritten: give another --output_dir.")


def is_of_probe(results: Path) -> bool:
    """Whether an earlier probe, whose cached features may be used again, has written a file of results."""
    try:
        return set(json.loads(results.read_bytes())["settings"]) >= {"methods", "lars_epochs"}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def probe(args: ProbeArguments):
    """Prints and saves the top-1 accuracy of each method on each kind of features."""
    # data
    splits = (args.train_split_name, args.eval_split_name, args.train_val_split)
    train, evaluation = train_and_eval(open_splits(**args.location()), *splits, seed=0)
    encoding = find_labels(train, SINGLE, [args.label_column_name] if args.label_column_name else ())
    labels, targets = encoding.targets(train, "train"), encoding.targets(evaluation, "eval")
    check_same_labels(train, evaluation, encoding, (labels, targets))
    column = args.checked_column(train, "train")
    args.checked_column(evaluation, "eval")

    # model
    encoder = load_encoder(args.model_name_or_path, args.image_size, args.random_weights)
    loading = (Path(args.output_dir) / "features", args.per_device_eval_batch_size, args.dataloader_num_workers)
    known, cached = cached_features(encoder, train, column, *loading, "train")
    unknown, _ = cached_features(encoder, evaluation, column, *loading, "eval")
    print(
        f"{len(train)} training and {len(evaluation)} evaluation images; features {'cached' if cached else 'computed'}"
    )

    # evaluate
    lars = (args.lars_learning_rate, args.lars_epochs, args.lars_epochs // 9)
    accuracy_of = {
        "lbfgs": lambda a, b: top_k_accuracy(probe_lbfgs(a, labels, b, args.strength), targets.numpy(), 1),
        "lars": lambda a, b: top_k_accuracy(probe_lars(a, labels, b, *lars), targets.numpy(), 1),
        "knn": lambda a, b: nearest_neighbor_accuracy(a, labels, b, targets, args.neighbors),
    }
    results = {
        name: {method: accuracy_of[method](known[name], unknown[name]) for method in args.methods}
        for name in tqdm(args.features, desc="probing", unit="features", delay=2)
    }

    # save
    print(f"{'features':<10}" + "".join(f"{method:>8}" for method in args.methods))
    for name, row in results.items():
        print(f"{name:<10}" + "".join(f"{row[method]:>8.3f}" for method in args.methods))
    record = {"settings": asdict(args), "accuracy": results}
    (Path(args.output_dir) / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    return run_script(probe, *parse_arguments([ProbeArguments], __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
