"""
python benchmarks/loader.py [--rounds 7]

Images per CPU second, one process: our stream, torchvision's ImageFolder with DataLoader, and a plain stream of
`datasets`, all with the same crop, flip and normalization, on small JPEG files and on 12-megapixel ones. In turn,
medians. Also how far our crops are from those of PIL. Writes benchmarks/results/loader_cpu.json.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from hivit_hf.data.streaming import SampleStream, Source, make_loader, open_source
from hivit_hf.data.transforms import RandomCrop, normalize
from hivit_hf.image_processing import IMAGENET_MEAN, IMAGENET_STD
from measure import interleave, write


SETS = {"500x375": (500, 375, 512, 0), "4000x3000": (4000, 3000, 40, 4)}  # width, height, images, noise
BICUBIC = v2.InterpolationMode.BICUBIC


def make_images(folder: Path, width: int, height: int, number: int, noise: int) -> float:
    """Crops of the two photographs of scikit-learn as JPEG files and as Parquet. Returns their mean size in MB."""
    generator, rows = np.random.default_rng(0), []
    (folder / "images" / "photos").mkdir(parents=True)
    (folder / "parquet").mkdir()
    for index in range(number):
        photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[index % 2]))
        left, top = generator.integers(0, photo.width - 560), generator.integers(0, photo.height - 420)
        photo = photo.crop((left, top, left + 560, top + 420)).resize((width, height), Image.BICUBIC)
        pixels = np.asarray(photo, dtype=np.int16)
        pixels = pixels + generator.integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        rows.append({"bytes": file.getvalue(), "path": f"{index}.jpg"})
        (folder / "images" / "photos" / f"{index}.jpg").write_bytes(file.getvalue())
    table = pa.table({"image": rows})
    features = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(table.cast(features), folder / "parquet" / "0.parquet", row_group_size=10)
    return sum(len(row["bytes"]) for row in rows) / number / 1e6


def on_pil():
    """The usual way: torchvision's transforms on PIL images."""
    crop = v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=BICUBIC, antialias=True)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *end])


def ours(folder: Path):
    stream = SampleStream([open_source(Source(str(folder / "parquet")))], RandomCrop(224), 196, seed=0, window=16)
    loader = iter(make_loader(stream, 4, 0, False))

    def batches():
        while True:
            yield normalize(next(loader)["pixel_values"], IMAGENET_MEAN, IMAGENET_STD)

    return batches()


def image_folder(folder: Path):
    dataset = ImageFolder(folder / "images", transform=on_pil())
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    return (batch for _ in itertools.count() for batch, _ in loader)


def plain_stream(folder: Path):
    stream = load_dataset("parquet", data_files=str(folder / "parquet" / "*"), split="train", streaming=True)
    transform = on_pil()
    stream = stream.shuffle(seed=0, buffer_size=16).map(lambda row: {"image": transform(row["image"].convert("RGB"))})
    return (
        batch["image"] for _ in itertools.count() for batch in DataLoader(stream.with_format("torch"), batch_size=4)
    )


def reader(batches, number: int):
    """A contender that reads a number of batches and returns the CPU seconds."""

    def run() -> float:
        start = time.process_time()
        for _ in range(number):
            assert next(batches).shape == (4, 3, 224, 224)
        return time.process_time() - start

    next(batches)
    return run


def difference_from_pil(folder: Path) -> float:
    """Mean absolute difference, in levels of 255, of our crops from PIL's of the same boxes."""
    found, crop = [], RandomCrop(224, flip_probability=0.0)
    for seed, path in enumerate(sorted((folder / "images" / "photos").iterdir())):
        image = Image.open(path)
        box, _, _ = crop.draw(image, seed)
        expected = v2.functional.resized_crop(
            image.convert("RGB"), **box, size=[224, 224], interpolation=BICUBIC, antialias=True
        )
        difference = crop(path.read_bytes(), seed).float() - v2.functional.pil_to_tensor(expected).float()
        found.append(difference.abs().mean().item())
    return statistics.mean(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="Number of measured rounds.")
    rounds = parser.parse_args().rounds
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {"rounds": rounds, "sets": {}}
    for name, (width, height, number, noise) in SETS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            megabytes = make_images(folder, width, height, number, noise)
            batches = 16 if width < 1000 else 4
            makers = {"ours": ours, "ImageFolder": image_folder, "plain datasets stream": plain_stream}
            contenders = {who: reader(make(folder), batches) for who, make in makers.items()}
            seconds = interleave(contenders, rounds, name)
            results["sets"][name] = {
                "megabytes": megabytes,
                "images_per_cpu_second": {who: 4 * batches / statistics.median(s) for who, s in seconds.items()},
                "ours_is_faster_by": {
                    who: statistics.median(theirs / mine for theirs, mine in zip(s, seconds["ours"]))
                    for who, s in seconds.items()
                },
                "difference_from_pil_levels": difference_from_pil(folder),
            }
        print(json.dumps(results["sets"][name], indent=1))
    print("written:", write("loader_cpu", results, "cpu"))


if __name__ == "__main__":
    main()
