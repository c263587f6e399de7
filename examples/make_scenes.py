"""
python examples/make_scenes.py --output FOLDER [--train 256] [--test 64] [--height 96] [--width 96] [--seed 0]
    [--digits 0 1 2 ...]

Composes scenes of digits on photographs, of data that scikit-learn ships, in seconds and without a network. Writes
FOLDER/dataset (for examples/finetune_segmentation.py) and FOLDER/coco (for examples/finetune_detection.py).
"""

import argparse
import sys
from pathlib import Path

import datasets

from scenes.data import ALL_DIGITS, scenes_dataset, write_coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Output folder.")
    parser.add_argument("--train", type=int, default=256, help="Number of training scenes (256).")
    parser.add_argument("--test", type=int, default=64, help="Number of test scenes (64).")
    parser.add_argument("--height", type=int, default=96, help="Height of the scenes in px (96).")
    parser.add_argument("--width", type=int, default=96, help="Width of the scenes in px (96).")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of the scenes (0).")
    parser.add_argument("--digits", type=int, nargs="+", default=ALL_DIGITS, help="Digits that may occur (all).")
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()
    if arguments.output.is_dir() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty: choose another --output.")
    number = {"train": arguments.train, "test": arguments.test}
    size = {"height_px": arguments.height, "width_px": arguments.width, "seed": arguments.seed}
    size["kinds"] = sorted(set(arguments.digits))
    try:
        scenes_dataset(number, **size).save_to_disk(arguments.output / "dataset")
        write_coco(arguments.output / "coco", number, **size)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{arguments.output} cannot be written ({error.strerror}): choose another --output.")
    print(f"{arguments.train} + {arguments.test} scenes in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
