# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Pictures as streams that can be stopped after any sample and go on with the next one.

What a process reads depends on (seed, epoch, rank, worker) alone, and what it makes of a sample on (seed, epoch, the
sample's bytes) alone. A stream never ends: each source begins its next epoch by itself, so processes with unequal
shares neither wait for each other nor leave anything out.
"""

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from datasets import Dataset, Image, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging

from .augment import UnreadablePictureError, seed_of


logger = logging.get_logger(__name__)

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FOLDER_SHARDS = 1024  # a folder of pictures is cut into as many, or into single pictures


@dataclass(frozen=True)
class Source:
    """
    Where pictures come from.

    Args:
        name: a dataset of the Hub, or a local folder: of Parquet files, of tars (WebDataset), or of pictures.
        config: configuration of a Hub dataset.
        split: split of a Hub dataset.
        revision: commit of a Hub dataset; the newest if not given.
        column: the column with the pictures; the only one of its kind if not given.
        weight: how often it is read, relative to the other sources.
        label_column: a column with labels, which is kept if it is given.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    weight: float = 1.0
    label_column: str | None = None


@dataclass(frozen=True)
class OpenSource:
    """A source as a `datasets` stream, and the column of it that holds the pictures."""

    source: Source
    dataset: IterableDataset
    column: str


def open_source(source: Source) -> OpenSource:
    """
    Finds out what a source is, and opens it without reading pictures.

    Raises:
        ValueError: if the folder holds no pictures, or the column does not exist or cannot be told.
    """
    folder = Path(source.name)
    if folder.is_dir():
        dataset = _open_folder(folder)
    elif folder.exists() or source.name.startswith((".", "/")):
        raise ValueError(f"{source.name} must be a folder of Parquet files, tars or pictures, or a dataset of the Hub.")
    else:
        dataset = load_dataset(source.name, source.config, split=source.split, revision=source.revision, streaming=True)
    features = dataset.features or {}
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = source.column or (pictures[0] if len(pictures) == 1 else "image" if "image" in features else None)
    if column is None or column not in features:
        found = ", ".join(features) or "none"
        what = f"no column {source.column!r}" if source.column else "no single column of pictures"
        raise ValueError(f"{source.name} has {what}; its columns are {found}. Name one with --image_column.")
    if column in pictures:
        dataset = dataset.cast_column(column, Image(decode=False))
    if source.label_column is not None and source.label_column not in features:
        raise ValueError(f"{source.name} has no column {source.label_column!r}; its columns are {', '.join(features)}.")
    keep = [name for name in features if name in (column, source.label_column, "__key__", "__url__")]
    return OpenSource(source, dataset.select_columns(keep).reshard(), column)


def _open_folder(folder: Path) -> IterableDataset:
    for kind, pattern in (("parquet", "**/*.parquet"), ("webdataset", "**/*.tar")):
        files = sorted(str(path) for path in folder.glob(pattern))
        if files:
            return load_dataset(kind, data_files={"train": files}, split="train", streaming=True)
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds neither Parquet files nor tars nor pictures. Check the path.")
    table = Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in files]})
    return table.to_iterable_dataset(num_shards=min(FOLDER_SHARDS, len(files)))


def picture_of(example: dict, column: str) -> tuple[bytes, str]:
    """The bytes of a picture, and a name that people find it by."""
    value = example[column]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UnreadablePictureError(f"{path}: {error.strerror}") from error
    if "__key__" in example:
        return data or b"", f"{Path(example.get('__url__', '')).name}/{example['__key__']}"
    return data or b"", str(path or "")


class EndlessSource:
    """
    One source, epoch after epoch: shards in another order each time, samples shuffled within windows.

    Its state is where the current window began, and how many of its samples have been given out: on resumption the
    window is read again and shuffled alike. So nothing depends on a buffer that would have to be saved.
    """

    def __init__(self, opened: OpenSource, seed: int, rank: int, world_size: int, window: int):
        self.opened, self.seed, self.rank, self.world_size, self.window = opened, seed, rank, world_size, window
        self.state = {"epoch": 0, "window": 0, "given": 0, "dataset": None}

    def epoch_stream(self, epoch: int) -> IterableDataset:
        """This process's part of an epoch, shard after shard."""
        dataset = self.opened.dataset.shuffle(
            seed=seed_of(self.seed, self.opened.source.name, epoch) % 2**32, buffer_size=1, max_buffer_input_shards=1
        )
        if self.world_size == 1:
            return dataset
        return split_dataset_by_node(dataset, self.rank, self.world_size, strategy="shards")

    def __iter__(self) -> Iterator[tuple[dict, int]]:
        """Examples and their epoch, without end. Raises ValueError if an epoch of this process is empty."""
        worker = get_worker_info()
        while True:
            epoch, anything = self.state["epoch"], self.state["window"] > 0
            dataset = self.epoch_stream(epoch)
            if self.state["dataset"] is not None:
                dataset.load_state_dict(self.state["dataset"])
            iterator = iter(dataset)
            while examples := [example for _, example in zip(range(self.window), iterator)]:
                anything = True
                key = (self.seed, epoch, self.rank, worker.id if worker else 0, self.state["window"])
                random.Random(seed_of(*key)).shuffle(examples)
                for example in examples[self.state["given"] :]:
                    self.state["given"] += 1
                    yield example, epoch
                self.state.update(window=self.state["window"] + 1, given=0, dataset=dataset.state_dict())
            if not anything:
                raise ValueError(
                    f"{self.opened.source.name} gives no sample to rank {self.rank}. It has too few shards."
                )
            self.state = {"epoch": epoch + 1, "window": 0, "given": 0, "dataset": None}


class SampleStream(TorchIterableDataset):
    """
    Samples of several sources, mixed by weight: dictionaries with `pixel_values` (uint8), `noise` (N,) that the mask is
    drawn from, and `sample_id`.

    Args:
        sources: what is read.
        transform: makes a crop of (bytes, seed).
        num_units: units of a crop, which is how many numbers `noise` has.
        seed: of everything random.
        rank, world_size: which process of how many this is.
        window: samples that are shuffled among each other, held in memory as bytes.
        max_bad_fraction: pictures that cannot be read are skipped and logged, up to this share of them.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        transform: Callable[[bytes, int], torch.Tensor],
        num_units: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window: int = 256,
        max_bad_fraction: float = 0.01,
    ):
        self.sources = [EndlessSource(opened, seed, rank, world_size, window) for opened in sources]
        self.weights = [opened.source.weight for opened in sources]
        self.transform, self.num_units, self.seed, self.rank = transform, num_units, seed, rank
        self.max_bad_fraction = max_bad_fraction
        self.draws = self.num_bad = 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        iterators = [iter(source) for source in self.sources]
        while True:
            choice = random.Random(seed_of(self.seed, "mixture", self.rank, worker_id, self.draws))
            index = choice.choices(range(len(iterators)), self.weights)[0]
            example, epoch = next(iterators[index])
            self.draws += 1
            sample = self._prepare(example, self.sources[index].opened, epoch)
            if sample is not None:
                yield sample

    def _prepare(self, example: dict, opened: OpenSource, epoch: int) -> dict | None:
        name = "?"
        try:
            data, name = picture_of(example, opened.column)
            content = xxhash.xxh3_64_hexdigest(data)
            seed = seed_of(self.seed, epoch, content)
            pixels = self.transform(data, seed)
        except UnreadablePictureError as error:
            self._count_bad(f"{opened.source.name}: {name}: {error}")
            return None
        mask_seed = seed_of(self.seed, epoch, content, "mask")  # not the crop's: they would go together
        noise = torch.rand(self.num_units, generator=torch.Generator().manual_seed(mask_seed))
        return {"pixel_values": pixels, "noise": noise, "sample_id": f"{name}#{content}"}

    def _count_bad(self, message: str):
        self.num_bad += 1
        logger.warning(f"skipped {message}")
        if self.draws >= 100 and self.num_bad > self.max_bad_fraction * self.draws:
            raise ValueError(
                f"{self.num_bad} of {self.draws} pictures cannot be read, more than max_bad_fraction "
                f"{self.max_bad_fraction}. The last: {message}. Repair the data, or raise --max_bad_fraction."
            )

    def state_dict(self) -> dict:
        states = [dict(source.state) for source in self.sources]
        return {"sources": states, "draws": self.draws, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict):
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.state = dict(source_state)
        self.draws, self.num_bad = state["draws"], state["num_bad"]


def read_first(opened: OpenSource, transform: Callable[[bytes, int], torch.Tensor], number: int):
    """
    The first readable pictures of a source, and their labels: (number or fewer, channels, H, W) uint8, and (number,) or
    None.

    Raises:
        ValueError: if there are none.
    """
    pictures, labels = [], []
    for example in opened.dataset:
        if len(pictures) == number:
            break
        try:
            pictures.append(transform(picture_of(example, opened.column)[0], 0))
        except UnreadablePictureError as error:
            logger.warning(f"skipped {opened.source.name}: {error}")
            continue
        labels.append(example.get(opened.source.label_column))
    if not pictures:
        raise ValueError(f"{opened.source.name} holds no picture that can be read.")
    return torch.stack(pictures), None if opened.source.label_column is None else torch.tensor(labels)


def check_shards(sources: Sequence[OpenSource], world_size: int, num_workers: int):
    """ValueError if a source has fewer shards than there are readers, each of which needs one of its own."""
    readers = world_size * max(num_workers, 1)
    for opened in sources:
        shards = opened.dataset.num_shards
        if shards < readers:
            fewest = f"--num_workers {shards // world_size}" if shards >= world_size else f"{shards} processes or fewer"
            raise ValueError(
                f"{opened.source.name} has {shards} shards, but {world_size} processes with {max(num_workers, 1)} "
                f"workers each need {readers}: use {fewest}, or write the data as more files or row groups."
            )


def check_disjoint(stream: SampleStream, gather: Callable[[list], list], num_samples: int = 8):
    """
    Holds the first samples of all processes against each other: RuntimeError if two read the same.

    Args:
        gather: gives every process the lists of all of them, one after the other.
    """
    for source in stream.sources:
        mine = set()
        for _, example in zip(range(num_samples), source.epoch_stream(0)):
            with suppress(UnreadablePictureError):
                mine.add(xxhash.xxh3_64_hexdigest(picture_of(example, source.opened.column)[0]))
        counts = Counter(gather(sorted(mine)))
        shared = sum(count > 1 for count in counts.values())
        if shared > len(counts) // 2:  # the same picture may lie in a dataset twice
            raise RuntimeError(
                f"{source.opened.source.name}: {shared} of the first {len(counts)} samples are read by more than one "
                "process. The data are not split between them."
            )


def _leave_signals_to_the_trainer(_worker_id: int):
    """Launchers signal the whole group of processes: a worker that died of it would take the last save with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(stream: SampleStream, batch_size: int, num_workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Batches without end. Not to be prepared by Accelerate, which would split the stream a second time."""
    return StatefulDataLoader(
        stream,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # iterating draws a number, which must not come from the training's own
    )
