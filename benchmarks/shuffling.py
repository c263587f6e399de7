"""
python benchmarks/shuffling.py [--rounds 7] [--rows 250]

How well streams shuffle sorted data: ten Parquet files of four classes each, sorted, in row groups of several sizes.
For our stream, which mixes shards, and for one that reads a shard after the other: number of classes in a batch of 256
with one reader and with eight, images per CPU second (in turn in one process, medians) and peak memory (each in its own
process). Writes benchmarks/results/shuffling_cpu.json.
"""

import argparse
import dataclasses
import io
import itertools
import json
import multiprocessing
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from hivit_hf.data import streaming
from hivit_hf.data.streaming import EndlessSource, OpenSource, SampleStream, Source, make_loader, open_source
from hivit_hf.data.transforms import RandomCrop
from measure import interleave, write


FILES, CLASSES_PER_FILE, BATCH, WINDOW = 10, 4, 256, 256
ROW_GROUPS = {"one row group per file": None, "row groups of 100": 100}
WAYS = ("mixed", "one after the other")


def photos(number: int) -> list[bytes]:
    """Crops of the two photographs of scikit-learn as JPEG files of 500x375 px."""
    generator, found = np.random.default_rng(0), []
    for index in range(number):
        photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[index % 2]))
        left, top = generator.integers(0, photo.width - 560), generator.integers(0, photo.height - 420)
        file = io.BytesIO()
        photo.crop((left, top, left + 560, top + 420)).resize((500, 375), Image.BICUBIC).save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


def make_files(folder: Path, rows: int, row_group_size: int | None):
    """The sorted files, with `rows` images of each class; the path of an image says its class."""
    folder.mkdir()
    images, chance = photos(64), random.Random(0)
    for file in range(FILES):
        names = [f"{CLASSES_PER_FILE * file + part}_{row}" for part in range(CLASSES_PER_FILE) for row in range(rows)]
        table = pa.table({"image": [{"bytes": chance.choice(images), "path": name} for name in names]})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=row_group_size)


def opened(folder: Path, way: str) -> OpenSource:
    """The data as they are read now, or a shard after the other in its order, as before shards were mixed."""
    source = open_source(Source(str(folder)))
    if way == "mixed":
        return source
    streaming.MIXED_STREAMS = 1  # no other stream is read in this benchmark
    return dataclasses.replace(source, has_tables=False, row_groups=None)


def classes(source: OpenSource, num_readers: int) -> float:
    """Mean number of classes in the batches of an epoch, to which each reader contributes alike."""
    size, found = BATCH // num_readers, []
    streams = [EndlessSource(source, 0, WINDOW).read(reader, num_readers) for reader in range(num_readers)]
    parts = [(row["image"]["path"].split("_")[0] for row, _ in takewhile_first_epoch(stream)) for stream in streams]
    while True:
        batch = [name for part in parts for name in itertools.islice(part, size)]
        if len(batch) < BATCH:
            return statistics.mean(found)
        found.append(len(set(batch)))


def takewhile_first_epoch(samples):
    return itertools.takewhile(lambda sample: sample[1] == 0, samples)


def batches(source: OpenSource):
    return iter(make_loader(SampleStream([source], RandomCrop(224), 196, seed=0), 64, 0, False))


def reader(source: OpenSource, number: int):
    """A contender that reads a number of batches of 64 images, and returns the CPU seconds."""
    loader = batches(source)

    def run() -> float:
        start = time.process_time()
        for _ in range(number):
            next(loader)
        return time.process_time() - start

    return run


def peak_mib(folder: Path, way: str, number: int) -> float:
    """The most resident memory of a process of its own that reads a number of batches of 64 images, MiB."""
    torch.set_num_threads(1)
    loader = batches(opened(folder, way))
    for _ in range(number):
        next(loader)
    status = Path("/proc/self/status").read_text()  # getrusage begins with the parent's
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="Number of measured rounds.")
    parser.add_argument("--rows", type=int, default=250, help="Number of images of each class.")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {**vars(arguments), "batch_size": BATCH, "window": WINDOW, "sets": {}}
    for name, row_group_size in ROW_GROUPS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "sorted"
            make_files(folder, arguments.rows, row_group_size)
            # the measured rounds are an epoch together: row groups are read all at once, now and then
            num_batches = FILES * CLASSES_PER_FILE * arguments.rows // 64 // arguments.rounds
            sources = {way: opened(folder, way) for way in WAYS}
            seconds = interleave({way: reader(sources[way], num_batches) for way in WAYS}, arguments.rounds, name)
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                peaks = {way: pool.apply(peak_mib, (folder, way, arguments.rounds * num_batches)) for way in WAYS}
            mixed, before = (seconds[way] for way in WAYS)
            results["sets"][name] = {
                "classes_of_40_in_a_batch": {
                    way: {f"{readers} readers": classes(sources[way], readers) for readers in (1, 8)} for way in WAYS
                },
                "images_per_cpu_second": {
                    way: 64 * num_batches / statistics.mean(times) for way, times in seconds.items()
                },
                "mixed_is_faster_by": statistics.mean(before) / statistics.mean(mixed),
                "peak_mib": peaks,
            }
        print(json.dumps(results["sets"][name], indent=1))
    print("written:", write("shuffling_cpu", results, "cpu"))


if __name__ == "__main__":
    main()
