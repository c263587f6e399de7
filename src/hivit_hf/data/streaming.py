# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Images as streams that can be stopped after any sample and go on with the next one.

What a process reads depends on (seed, epoch, rank, worker, and their numbers) alone, and what it makes of a sample on
(seed, epoch, the sample's bytes) alone. A stream never ends: each source begins its next epoch by itself, so processes
with unequal shares neither wait for each other nor leave anything out.
"""

import atexit
import math
import multiprocessing
import random
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import fsspec.asyn
import torch
import xxhash
from datasets import Dataset, Image, IterableDataset, load_dataset
from huggingface_hub import HfApi
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging

from .decoding import IMAGE_SUFFIXES, UnreadableImageError, image_of
from .seeding import seed_of


logger = logging.get_logger(__name__)
FOLDER_SHARDS = 1024  # a folder of images is cut into as many, or into single images
MAX_EMPTY_EPOCHS = 50
READ_SHARDS = 32  # of how many the images to look at come


@dataclass(frozen=True)
class Source:
    """
    Where images come from.

    Args:
        name: a dataset of the Hub, or a local folder: of Parquet files, of tars (WebDataset), or of images.
        config: configuration of a Hub dataset.
        split: split of a Hub dataset, or a sub-folder of a folder that has one of that name.
        revision: commit of a Hub dataset; the newest if not given.
        column: the column with the images; the only one of its kind if not given.
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
    """
    A source as a `datasets` stream, the column with the images, and what would be another one if the data were: the
    commit of a Hub dataset, or a hash of the names of local files.
    """

    source: Source
    dataset: IterableDataset
    column: str
    revision: str | None = None


def open_source(source: Source) -> OpenSource:
    """
    Finds out what a source is, and opens it without reading images.

    Raises:
        ValueError: if the folder holds no images, or the column does not exist or cannot be told.
    """
    folder, revision = Path(source.name), None
    if folder.is_dir():
        dataset, revision = _open_folder(folder, source.split)
    elif folder.exists() or source.name.startswith((".", "/")):
        raise ValueError(f"{source.name} must be a folder of Parquet files, tars or images, or a dataset of the Hub.")
    else:
        revision = _commit_of(source)
        dataset = load_dataset(source.name, source.config, split=source.split, revision=revision, streaming=True)
    features = dataset.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = source.column or (images[0] if len(images) == 1 else "image" if "image" in features else None)
    if column is None or column not in features:
        found = ", ".join(features) or "none"
        what = f"no column {source.column!r}" if source.column else "no single column of images"
        raise ValueError(f"{source.name} has {what}; its columns are {found}. Name one with --image_column.")
    if column in images:
        dataset = dataset.cast_column(column, Image(decode=False))
    if source.label_column is not None and source.label_column not in features:
        raise ValueError(f"{source.name} has no column {source.label_column!r}; its columns are {', '.join(features)}.")
    keep = [name for name in features if name in (column, source.label_column, "__key__", "__url__")]
    return OpenSource(source, dataset.select_columns(keep).reshard(), column, revision)


def _commit_of(source: Source) -> str | None:
    """The commit that a revision means now, so that all processes and resumptions read the same."""
    try:
        return HfApi().dataset_info(source.name, revision=source.revision).sha
    except Exception as error:  # load_dataset has its own ways, and says better what is wrong
        logger.warning(f"{source.name}: its commit cannot be found out ({type(error).__name__}), so it is not pinned.")
        return source.revision


def _open_folder(folder: Path, split: str) -> tuple[IterableDataset, str]:
    """A folder, or that sub-folder of it, as a stream; and what tells its files from others."""
    if (folder / split).is_dir():
        folder = folder / split
    elif split not in (Source.split, "validation"):  # what the recipes say if nothing is given
        raise ValueError(f"{folder} has no sub-folder {split!r}. Leave the split out to read all of it.")
    for kind, pattern in (("parquet", "**/*.parquet"), ("webdataset", "**/*.tar")):
        files = sorted(str(path) for path in folder.glob(pattern))
        if files:
            sizes = [f"{Path(file).relative_to(folder)} {Path(file).stat().st_size}" for file in files]
            return load_dataset(kind, data_files={"train": files}, split="train", streaming=True), _fingerprint(sizes)
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds neither Parquet files nor tars nor images. Check the path.")
    names = _fingerprint([str(Path(file).relative_to(folder)) for file in files])
    random.Random(0).shuffle(files)  # they are sorted by class, and a shard would hold one only
    table = Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in files]})
    return table.to_iterable_dataset(num_shards=min(FOLDER_SHARDS, len(files))), names


def _fingerprint(lines: list[str]) -> str:
    return f"files {xxhash.xxh3_64_hexdigest(chr(10).join(lines).encode())}"


class ShardReader:
    """The samples of some shards one after the other, from a place on, and the place after the sample last given."""

    def __init__(self, opened: OpenSource, shards: Sequence[int], place: dict):
        self.name, self.dataset, self.shards = opened.source.name, opened.dataset, shards
        self.position, self.num_read, self.current = place["position"], place["num_read"], None
        self.within = place["within"]

    def __iter__(self) -> Iterator[dict]:
        for position in range(self.position, len(self.shards)):
            self.position = position
            self.current = self.dataset.shard(self.dataset.num_shards, self.shards[self.position])
            if self.within is not None:
                self.current.load_state_dict(self.within)
            for example in self._examples():
                self.num_read += 1
                yield example
            self.within, self.num_read = None, 0

    def _examples(self) -> Iterator[dict]:
        try:
            for batch in self.current.iter(batch_size=1):  # unlike iter(dataset), never splits among workers by itself
                yield {name: values[0] for name, values in batch.items()}
        except (OSError, ValueError, tarfile.TarError) as error:
            shard = self.shards[self.position]
            raise ValueError(
                f"{self.name}: shard {shard} of {self.dataset.num_shards}, counted from 0, cannot be read after sample "
                f"{self.num_read} ({error}). Repair or remove the file."
            ) from error

    def place(self) -> dict:
        """Which of the shards, how many of its samples have been read, and the state that `datasets` has for it."""
        return {"position": self.position, "num_read": self.num_read, "within": self.current.state_dict()}


START_OF_EPOCH = {"window": 0, "given": 0, "position": 0, "num_read": 0, "within": None}


class EndlessSource:
    """
    One source, epoch after epoch: shards in another order each time, samples shuffled within windows.

    A reader is a worker of a process, and reads every so-manieth shard. Its state is where the current window began,
    and how many of the window's samples have been given out: on resumption the window is read again and shuffled alike.
    So nothing depends on a buffer that would have to be saved. `done` holds, for an epoch, shards that need no reading
    any more, because other readers have done so before their number changed.
    """

    def __init__(self, opened: OpenSource, seed: int, window: int):
        self.opened, self.seed, self.window = opened, seed, window
        self.state = {"epoch": 0, "done": {}, **START_OF_EPOCH}

    def shards_of(self, reader: int, num_readers: int, epoch: int, done: dict[int, list[int]]) -> list[int]:
        """What a reader reads of an epoch, in order."""
        order = list(range(self.opened.dataset.num_shards))
        random.Random(seed_of(self.seed, self.opened.source.name, epoch)).shuffle(order)
        finished = set(done.get(epoch, ()))
        return [shard for shard in order if shard not in finished][reader::num_readers]

    def read(self, reader: int, num_readers: int) -> Iterator[tuple[dict, int]]:
        """Examples and their epoch, without end. Raises ValueError if there are none in epoch after epoch."""
        empty_epochs = 0
        while True:
            epoch, state = self.state["epoch"], self.state
            shards = self.shards_of(reader, num_readers, epoch, state["done"])
            samples = ShardReader(self.opened, shards, state)
            iterator = iter(samples)
            while examples := list(islice(iterator, self.window)):
                empty_epochs = -1
                random.Random(seed_of(self.seed, epoch, reader, num_readers, state["window"])).shuffle(examples)
                for example in examples[state["given"] :]:
                    state["given"] += 1
                    yield example, epoch
                state.update(window=state["window"] + 1, given=0, **samples.place())
            empty_epochs += 1  # a reader may get empty shards only now and then
            if empty_epochs == MAX_EMPTY_EPOCHS:
                raise ValueError(f"{self.opened.source.name} gives no sample to reader {reader} of {num_readers}.")
            later = {number: shards for number, shards in state["done"].items() if number > epoch}
            state.update(START_OF_EPOCH, epoch=epoch + 1, done=later)

    def done_by(self, states: Sequence[dict]) -> tuple[int, dict[int, list[int]], int]:
        """
        What all readers together have read, by shards.

        Args:
            states: of all readers, in order.

        Returns:
            The first epoch that has something left; for each epoch from there on the shards that are done; and how many
            samples of the others were read already.
        """
        first = min(state["epoch"] for state in states)
        before = {epoch: shards for state in states for epoch, shards in state["done"].items()}  # all began with them
        done = {
            epoch: set(before.get(epoch, ())) for epoch in range(first, max(state["epoch"] for state in states) + 1)
        }
        for reader, state in enumerate(states):
            for epoch in range(first, state["epoch"] + 1):
                shards = self.shards_of(reader, len(states), epoch, before)
                done[epoch].update(shards if epoch < state["epoch"] else shards[: state["position"]])
        repeated = sum(state["num_read"] + state["given"] for state in states)
        return first, {epoch: sorted(shards) for epoch, shards in done.items()}, repeated


class SampleStream(TorchIterableDataset):
    """
    Samples of several sources, mixed by weight: dictionaries with `pixel_values` (uint8), `noise` (N,) that the mask is
    drawn from, `sample_id`, and `skipped`: bad images that came before it.

    Args:
        sources: what is read.
        transform: makes a crop of (bytes, seed).
        num_units: units of a crop, which is how many numbers `noise` has.
        seed: of everything random.
        rank, world_size: which process of how many this is.
        window: samples that are shuffled among each other, held in memory as bytes.
        max_bad_fraction: images that cannot be read are skipped and logged, up to this share of them; a reader
            gives up when it has met more than chance explains.
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
        self.sources = [EndlessSource(opened, seed, window) for opened in sources]
        self.weights = [opened.source.weight for opened in sources]
        self.transform, self.num_units, self.seed = transform, num_units, seed
        self.rank, self.world_size = rank, world_size
        self.max_bad_fraction = max_bad_fraction
        self.draws = self.num_bad = 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, num_readers = self.rank * num_workers + worker_id, self.world_size * num_workers
        iterators = [source.read(reader, num_readers) for source in self.sources]
        skipped = 0
        while True:
            choice = random.Random(seed_of(self.seed, "mixture", reader, num_readers, self.draws))
            index = choice.choices(range(len(iterators)), self.weights)[0]
            example, epoch = next(iterators[index])
            self.draws += 1
            sample = self._prepare(example, self.sources[index].opened, epoch)
            if sample is None:
                skipped += 1
                continue
            yield {**sample, "skipped": skipped}
            skipped = 0

    def _prepare(self, example: dict, opened: OpenSource, epoch: int) -> dict | None:
        name = "?"
        try:
            data, name = image_of(example, opened.column)
            content = xxhash.xxh3_64_hexdigest(data)
            seed = seed_of(self.seed, epoch, content)
            pixels = self.transform(data, seed)
        except UnreadableImageError as error:
            self._count_bad(f"{opened.source.name}: {name}: {error}")
            return None
        mask_seed = seed_of(self.seed, epoch, content, "mask")  # not the crop's: they would go together
        noise = torch.rand(self.num_units, generator=torch.Generator().manual_seed(mask_seed))
        return {"pixel_values": pixels, "noise": noise, "sample_id": f"{name}#{content}"}

    def _count_bad(self, message: str):
        self.num_bad += 1
        logger.warning(f"skipped {message}")
        expected = self.max_bad_fraction * self.draws
        if self.draws >= 100 and self.num_bad > expected + 4 * math.sqrt(expected):  # 4 deviations of chance
            raise ValueError(
                f"{self.num_bad} of {self.draws} images cannot be read, more than max_bad_fraction "
                f"{self.max_bad_fraction}. The last: {message}. Repair the data, or raise --max_bad_fraction."
            )

    def state_dict(self) -> dict:
        states = [dict(source.state) for source in self.sources]
        return {"sources": states, "draws": self.draws, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict):
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.state = dict(source_state)
        self.draws, self.num_bad = state["draws"], state["num_bad"]

    def begin_after(self, states: Sequence[dict]) -> int:
        """
        Goes on where readers of another number stopped: no shard that they finished is read again in its epoch.

        Args:
            states: of all those readers, by rank and worker.

        Returns:
            Samples that will be read a second time, as their shards were not finished.
        """
        repeated = 0
        for index, source in enumerate(self.sources):
            epoch, done, again = source.done_by([state["sources"][index] for state in states])
            source.state = {"epoch": epoch, "done": done, **START_OF_EPOCH}
            repeated += again
        return repeated


def stream_states(loader_state) -> Iterator[dict]:
    """The states of the streams in what a StatefulDataLoader saved, by worker."""
    if isinstance(loader_state, dict):
        if {"sources", "draws"} <= set(loader_state):
            yield loader_state
        else:
            for value in loader_state.values():
                yield from stream_states(value)


def read_some(opened: OpenSource, transform: Callable[[bytes, int], torch.Tensor], number: int):
    """
    Readable images from all over a source, always the same, and their labels: (number or fewer, channels, H, W)
    uint8, and (number,) or None.

    Raises:
        ValueError: if more than nine of ten images cannot be read, or a label is no class.
    """
    num_shards, label_column = opened.dataset.num_shards, opened.source.label_column
    spread = [num_shards * i // READ_SHARDS for i in range(READ_SHARDS)]
    spread = list(dict.fromkeys(spread))  # fewer, if there are fewer shards
    images, labels, tried = [], [], 0
    for shard in [*spread, *(shard for shard in range(num_shards) if shard not in spread)]:
        wanted = number if shard not in spread else min(number, len(images) + math.ceil(number / len(spread)))
        for example in ShardReader(opened, [shard], START_OF_EPOCH):
            if len(images) == wanted or tried >= 10 * number > 10 * len(images):
                break
            tried += 1
            try:
                images.append(transform(image_of(example, opened.column)[0], 0))
                labels.append(example.get(label_column))
            except UnreadableImageError as error:
                logger.warning(f"skipped {opened.source.name}: {error}")
        if len(images) == number:
            break
    if len(images) * 10 <= tried:
        raise ValueError(f"Of {opened.source.name}, {len(images)} of {tried} images can be read: is it the column?")
    wrong = [label for label in labels if label_column and not (type(label) is int and label >= 0)]
    if wrong:
        raise ValueError(f"{label_column} of {opened.source.name} must hold class numbers from 0 on, got {wrong[0]!r}.")
    return torch.stack(images), None if label_column is None else torch.tensor(labels)


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
        shards = source.shards_of(stream.rank, stream.world_size, 0, {})
        first = ShardReader(source.opened, shards, START_OF_EPOCH)
        for example in islice(first, num_samples):
            with suppress(UnreadableImageError):
                mine.add(xxhash.xxh3_64_hexdigest(image_of(example, source.opened.column)[0]))
        counts = Counter(gather(sorted(mine)))
        shared = sum(count > 1 for count in counts.values())
        if shared > len(counts) // 2:  # the same image may lie in a dataset twice
            raise RuntimeError(
                f"{source.opened.source.name}: {shared} of the first {len(counts)} samples are read by more than one "
                "process. The data are not split between them."
            )


def _begin_worker(_worker_id: int):
    """Launchers signal the whole group of processes: a worker that died of it would take the last save with it."""
    fsspec.asyn.reset_lock()  # a lock of the parent, which nobody here would open
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_workers():
    """At exit, where Python would send the signal that they ignore, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(stream: SampleStream, batch_size: int, num_workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Batches without end. Not to be prepared by Accelerate, which would split the stream a second time."""
    atexit.register(_end_workers)
    return StatefulDataLoader(
        stream,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # iterating draws a number, which must not come from the training's own
    )
