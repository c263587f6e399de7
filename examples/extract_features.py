"""
python examples/extract_features.py --model_name_or_path MODEL --dataset_name DATASET --output embeddings.parquet

Embeddings of images, as a Parquet file with a row per image: a list of numbers per kind of features, and all
columns of the dataset but the images themselves.
"""

import argparse
import sys
from pathlib import Path

import datasets
from datasets import Dataset, Features, List, Value, concatenate_datasets

from hivit_hf.data.datasets import ImageDataset, check_images, choose_split, image_column, open_splits
from hivit_hf.probing.features import FEATURES, extract, load_encoder
from hivit_hf.training.recipe_old import check_numbers, one_sentence


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Read the HiViT from this folder or Hub name.")
    parser.add_argument(
        "--dataset_name", required=True, help="Read a dataset of the Hub, or a folder, as in fine-tuning."
    )
    parser.add_argument("--dataset_config", help="Take this configuration of the Hub dataset.")
    parser.add_argument("--split", default="train", help="Read this split.")
    parser.add_argument("--image_column", help="Find the images in this column, if it cannot be told.")
    parser.add_argument("--image_size", type=int, help="Take images of this side in px; the model's if not given.")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["stage3"], help="Write these features.")
    parser.add_argument("--batch_size", type=int, default=64, help="Take so many images per forward pass.")
    parser.add_argument("--num_workers", type=int, default=4, help="Read and decode in so many processes.")
    parser.add_argument("--check_images", type=int, default=1000, help="Decode so many images first, to find bad ones.")
    parser.add_argument("--output", type=Path, required=True, help="Write this Parquet file.")
    arguments = parser.parse_args(argv)
    check_numbers(parser, arguments, positive=["batch_size"], nonnegative=["num_workers", "check_images"])
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    datasets.disable_progress_bars()
    try:
        splits = open_splits(arguments.dataset_name, arguments.dataset_config)
        images = choose_split(splits, arguments.split, "split")
        column = image_column(images, arguments.image_column)
        rest = images.remove_columns(column)
        for name in sorted(set(arguments.features) & set(rest.column_names)):
            raise ValueError(f"The dataset has a column {name!r} already: rename it, or leave out --features {name}.")
        if arguments.output.is_dir():
            raise ValueError(f"{arguments.output} is a folder: give the name of a file to --output.")
        check_images(ImageDataset(images, column, transform=None, name=arguments.split), arguments.check_images)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        encoder = load_encoder(arguments.model_name_or_path, arguments.image_size)
        found = extract(encoder, images, column, arguments.batch_size, arguments.num_workers, arguments.split)
        embeddings = Dataset.from_dict(
            {name: found[name].numpy() for name in arguments.features},
            features=Features({name: List(Value("float32")) for name in arguments.features}),
        )
        table = concatenate_datasets([rest, embeddings], axis=1) if rest.column_names else embeddings
        table.to_parquet(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    widths = ", ".join(f"{name} ({found[name].shape[1]})" for name in arguments.features)
    print(f"{len(table)} rows with {widths}: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
