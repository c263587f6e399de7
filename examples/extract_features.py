"""
python examples/extract_features.py --model_name_or_path MODEL --dataset_name DATASET --output_file embeddings.parquet

Embeddings of images as a Parquet file with a row per image: a list of numbers per kind of features, and all columns of
the dataset but the images themselves.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from datasets import Dataset, Features, List, Value, concatenate_datasets

from hivit_hf.data.datasets import choose_split, image_column, open_splits
from hivit_hf.probing.arguments import EncodedImages
from hivit_hf.probing.features import FEATURES, extract, load_encoder
from hivit_hf.training.command_line import argument, parse_arguments, required_argument, run_script, some_of
from hivit_hf.training.output_folders import refuse_existing_file


@dataclass(kw_only=True)
class ExtractionArguments(EncodedImages):
    """Features of images."""

    split_name: str = argument("train", "Split of the dataset.")
    features: Annotated[list[str], some_of(*FEATURES)] = argument(["stage3"], f"Features: {', '.join(FEATURES)}.")
    output_file: str = required_argument("Parquet file to write.")


def write_embeddings(args: ExtractionArguments):
    """Computes the features of a split and writes them, with the other columns, to a Parquet file."""
    output = Path(args.output_file)
    refuse_existing_file(output, "--output_file")

    # data
    images = choose_split(open_splits(**args.location()), args.split_name, "split_name")
    others = images.remove_columns(image_column(images, args.image_column_name, args.split_name))
    for name in sorted(set(args.features) & set(others.column_names)):
        raise ValueError(f"The dataset has a column {name!r} already: rename it, or leave out --features {name}.")
    column = args.checked_column(images, args.split_name)

    # model
    encoder = load_encoder(args.model_name_or_path, args.image_size)
    loading = (args.per_device_eval_batch_size, args.dataloader_num_workers, args.split_name)
    found = extract(encoder, images, column, *loading)

    # save
    embeddings = Dataset.from_dict(
        {name: found[name].numpy() for name in args.features},
        features=Features({name: List(Value("float32")) for name in args.features}),
    )
    table = concatenate_datasets([others, embeddings], axis=1) if others.column_names else embeddings
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        table.to_parquet(partial)
        refuse_existing_file(output, "--output_file")  # it may have appeared meanwhile
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    widths = ", ".join(f"{name} ({found[name].shape[1]})" for name in args.features)
    print(f"{len(table)} rows with {widths}: {args.output_file}")


def main(argv: list[str] | None = None) -> int:
    return run_script(write_embeddings, *parse_arguments([ExtractionArguments], __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
