"""
python conversion/convert.py CHECKPOINT OUT_DIR

Converts a checkpoint of the original HiViT code, of mmpretrain or of iTPN (pixel) to a folder for `from_pretrained`,
loads that folder, compares every number with the checkpoint, and writes a report. --to_original converts back.
Reading a checkpoint never runs code from it. Exits with code 2 and a sentence on errors, and leaves nothing then.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import transformers

from checkpoint import ConversionError, read_checkpoint, shown
from engine import DTYPES, KEY_MAPS, WRITTEN_FILES, convert, plan_conversion
from hivit_hf.training.folders import FolderError, refuse_output
from report import summary
from to_original import to_original


def read_labels(which: str, num_labels: int) -> dict[int, str]:
    """
    Class names by class id.

    Args:
        which: `imagenet-1k`, or a file: JSON (a list, or an object from number to name) or text, a name per line.

    Raises:
        ConversionError: if they cannot be read, are no distinct names, or are not as many as the classifier has.
    """
    if which == "imagenet-1k":
        try:
            from torchvision.models import ResNet50_Weights
        except ImportError as error:
            raise ConversionError("--id2label imagenet-1k takes the names from torchvision: install it.") from error
        labels = disambiguate(ResNet50_Weights.DEFAULT.meta["categories"])
    else:
        try:
            text = Path(which).read_text(encoding="utf-8-sig")
            labels = json.loads(text) if which.lower().endswith(".json") else text.rstrip("\n").split("\n")
            if isinstance(labels, dict):
                labels = [labels[str(number)] for number in range(len(labels))]
        except OSError as error:
            raise ConversionError(f"--id2label {which}: {error.strerror}.") from error
        except (ValueError, KeyError, RecursionError) as error:
            raise ConversionError(f"--id2label {which} names no classes 0, 1, ... ({type(error).__name__}).") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ConversionError(f"--id2label {which} must hold names: a list, an object from number to name, or lines.")
    labels = [label.strip() for label in labels]
    if len(labels) != num_labels:
        raise ConversionError(f"--id2label names {len(labels)} classes, but the classifier has {num_labels}.")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConversionError(f"--id2label {which} names several classes {shown(twice[0])!r}: each needs its own name.")
    return dict(enumerate(labels))


def disambiguate(labels: list[str]) -> list[str]:
    """ImageNet has two cranes and two maillots: the second of a name gets a number."""
    seen: Counter = Counter()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return unique


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="File of torch.save or safetensors; a folder with --to_original.")
    parser.add_argument("out_dir", type=Path, help="Output folder, which must not exist without --overwrite.")
    layouts = ["auto", *KEY_MAPS]
    parser.add_argument("--source", default="auto", choices=layouts, help="Layout of the keys; detected by default.")
    parser.add_argument("--encoder_only", action="store_true", help="Convert the encoder alone, to a HiViTModel.")
    parser.add_argument("--num_heads", type=positive, metavar="H", help="Attention heads, if no tensor tells them.")
    parser.add_argument("--decoder_num_heads", type=positive, metavar="H", help="Attention heads of the decoder.")
    parser.add_argument("--model_ema", action="store_true", help="Convert the moving average of the weights.")
    parser.add_argument(
        "--image_size", type=positive, metavar="S", help="Image size in px to interpolate positions to."
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Dtype of the written weights; that of the checkpoint if not given."
    )
    parser.add_argument(
        "--id2label", metavar="imagenet-1k|FILE", help="Class names: a JSON file, or a text file with a name per line."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier conversion in the output folder.")
    parser.add_argument("--to_original", action="store_true", help="Convert a folder back to checkpoint.pth.")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict:
    keep = [arguments.checkpoint]
    if arguments.id2label is not None and arguments.id2label != "imagenet-1k":
        keep.append(Path(arguments.id2label))
    refuse_output(arguments.out_dir, arguments.overwrite, keep, WRITTEN_FILES)
    if arguments.to_original:
        for name in ("encoder_only", "num_heads", "decoder_num_heads", "model_ema", "image_size", "dtype", "id2label"):
            if getattr(arguments, name) not in (None, False):
                raise ConversionError(f"--{name} has no meaning with --to_original. Leave it out.")
        return to_original(arguments.checkpoint, arguments.out_dir, arguments.source, arguments.overwrite)
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.model_ema)
    plan = plan_conversion(
        checkpoint,
        arguments.source,
        arguments.encoder_only,
        arguments.num_heads,
        arguments.decoder_num_heads,
        arguments.image_size,
        DTYPES.get(arguments.dtype),
    )
    labels = None
    if arguments.id2label is not None:
        if plan.model_class.__name__ != "HiViTForImageClassification":
            raise ConversionError(
                f"--id2label names classes, but this makes a {plan.model_class.__name__}. Leave it out."
            )
        labels = read_labels(arguments.id2label, plan.config.num_labels)
    return convert(checkpoint, plan, arguments.out_dir, labels, arguments.overwrite, keep)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        report = run(arguments)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C; nothing was left.", file=sys.stderr)
        return 130
    except (ConversionError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or arguments.checkpoint}: {error.strerror}.", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # shapes that no machine can hold
        print(f"error: {arguments.checkpoint} cannot be converted: {shown(str(error), 200)}.", file=sys.stderr)
        return 2
    print(summary(report))
    print(f"written: {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
