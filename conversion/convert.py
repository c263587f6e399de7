"""
python conversion/convert.py CHECKPOINT OUT_DIR

Turns a checkpoint of the original HiViT code, of mmpretrain or of iTPN (pixel) into a folder for `from_pretrained`,
loads that folder, compares every number with the checkpoint, and writes a report. With --to-original, the way back.
Reading a checkpoint never runs code from it. Exits with 2 and a sentence if something is wrong; nothing is left then.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

from checkpoint import ConversionError, read_checkpoint
from engine import KEY_MAPS, convert, plan_conversion, refuse_output, to_original
from report import summary


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_labels(which: str, num_labels: int) -> dict[int, str]:
    """
    Names of the classes.

    Args:
        which: `imagenet-1k`, or a file: JSON (a list, or an object from number to name) or text, a name per line.

    Raises:
        ConversionError: if they cannot be read, or are not as many as the classifier has.
    """
    if which == "imagenet-1k":
        try:
            from torchvision.models import ResNet50_Weights
        except ImportError as error:
            raise ConversionError("--id2label imagenet-1k takes the names from torchvision: install it.") from error
        labels = ResNet50_Weights.DEFAULT.meta["categories"]
    else:
        try:
            text = Path(which).read_text(encoding="utf-8")
            labels = json.loads(text) if which.endswith(".json") else text.splitlines()
            if isinstance(labels, dict):
                labels = [labels[str(number)] for number in range(len(labels))]
        except OSError as error:
            raise ConversionError(f"--id2label {which}: {error.strerror}.") from error
        except (ValueError, KeyError) as error:
            raise ConversionError(f"--id2label {which} names no classes 0, 1, ...: {error!r}.") from error
    if len(labels) != num_labels:
        raise ConversionError(f"--id2label names {len(labels)} classes, but the classifier has {num_labels}.")
    return {number: str(label) for number, label in enumerate(labels)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="File of torch.save or safetensors; a folder with --to-original.")
    parser.add_argument("out_dir", type=Path, help="Folder to write. Must not exist.")
    parser.add_argument(
        "--source", default="auto", choices=["auto", *KEY_MAPS], help="Layout; told by the keys if auto."
    )
    parser.add_argument("--encoder-only", action="store_true", help="Leave decoder or classifier behind: a HiViTModel.")
    parser.add_argument("--num-heads", type=int, metavar="H", help="Attention heads, where no tensor tells them.")
    parser.add_argument("--decoder-num-heads", type=int, metavar="H", help="Attention heads of the decoder.")
    parser.add_argument("--model-ema", action="store_true", help="Take the moving average of the weights.")
    parser.add_argument("--image-size", type=int, metavar="S", help="Interpolate positions to images of S px, once.")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Type of the written numbers. As in the checkpoint if not given."
    )
    parser.add_argument(
        "--id2label", metavar="imagenet-1k|FILE", help="Names of the classes: JSON, or a name per line."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier conversion in OUT_DIR.")
    parser.add_argument("--to-original", action="store_true", help="Write checkpoint.pth in the original layout.")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict:
    refuse_output(arguments.out_dir, arguments.overwrite, keep=arguments.checkpoint)
    if arguments.to_original:
        for name in ("encoder_only", "num_heads", "decoder_num_heads", "model_ema", "image_size", "dtype", "id2label"):
            if getattr(arguments, name):
                raise ConversionError(f"--{name.replace('_', '-')} has no meaning with --to-original. Leave it out.")
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
    if arguments.id2label:
        if plan.model_class.__name__ != "HiViTForImageClassification":
            raise ConversionError(
                f"--id2label names classes, but this makes a {plan.model_class.__name__}. Leave it out."
            )
        labels = read_labels(arguments.id2label, plan.config.num_labels)
    return convert(checkpoint, plan, arguments.out_dir, labels, arguments.overwrite)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        report = run(arguments)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(report))
    print(f"written: {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
