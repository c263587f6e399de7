# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Streaming datasets with exact resumption: a stream can stop after any sample and resumes with the next one.

What a rank reads depends on (seed, epoch, rank, worker, and their numbers) alone, and the crop and mask of a sample on
(seed, epoch, the sample's bytes) alone. A stream never ends: each source begins its next epoch by itself, so ranks with
data of unequal size neither wait for each other nor leave anything out.

Data are often sorted by class, so a reader mixes many shards: of up to 48 row groups at once, each in random order, or
of up to 8 tars, each in its own order; then it shuffles windows of what it has mixed.
"""

import atexit
import math
import multiprocessing
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, pairwise, zip_longest
from pathlib import Path

import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from datasets import Dataset, DatasetDict, Image, IterableDataset, load_dataset, load_from_disk
from datasets.table import table_cast
from huggingface_hub import HfApi
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging

from ..configuration_hivit import MAX_LABELS
from ..image_processing import first_line
from .datasets import check_column, choose_split, find_dataset, image_column, opening
from .decoding import UnreadableImageError, image_of
from .seeding import seed_of


logger = logging.get_logger(__name__)
FOLDER_SHARDS = 1024  # of a folder of images or a saved dataset, which has no shards of its own
MAX_EMPTY_EPOCHS = 50
READ_SHARDS = 32  # that validation images come from
MIXED_ROW_GROUPS = 48  # that a reader has open at once
MIXED_STREAMS = 8  # the same for tars, which a resumption has to read from their beginnings
HELD_BYTES = 256 * 2**20  # of open row groups; no further one is opened beyond it
ROWS_AT_ONCE, READ_BYTES = 64, 2**20  # of a row group
MAX_PARTS = 3  # that a large row group is read in, to hold only one of them: each costs a pass over the row group


@dataclass(frozen=True)
class Source:
    """
    Where images come from.

    Args:
        name: a dataset of the Hub, or a folder: a saved dataset, Parquet files, tars (WebDataset), or images.
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
    A source as a `datasets` stream, its image column, and what changes where the data do: the commit of a Hub dataset,
    or a hash of the names of local files.

    Args:
        has_tables: whether a shard is a table that can be held as a whole (row groups, saved datasets, folders of
            images), not a stream (tars).
        row_groups: file and row group of each shard, for local Parquet files.
        table: all samples, for saved datasets and folders of images, which need not be held: they stay on the disk.
    """

    source: Source
    dataset: IterableDataset
    column: str
    revision: str | None = None
    has_tables: bool = False
    row_groups: Sequence[tuple[str, int]] | None = None
    table: Dataset | None = None

    @property
    def num_mixed(self) -> int:
        """Number of shards that a reader has open at once."""
        return MIXED_ROW_GROUPS if self.has_tables else MIXED_STREAMS


def open_source(source: Source) -> OpenSource:
    """
    Opens a source, whatever it is, without reading images.

    Raises:
        ValueError: if there is no such folder, it holds no images, or a column does not exist or cannot be told.
    """
    root = _root(source)
    kind, files = find_dataset(root)
    if kind == "hub":
        revision = _commit_of(source)
        with opening(source.name):
            dataset = load_dataset(source.name, source.config, split=source.split, revision=revision, streaming=True)
        table = None
    else:
        dataset, table, revision = _stream_files(kind, files, Path(root), source.split)
    column = image_column(dataset, source.column, source.name)
    if isinstance(dataset.features[column], Image):
        dataset = dataset.cast_column(column, Image(decode=False))
    if source.label_column is not None:
        check_column(dataset, source.label_column, source.name, "label_column_name")
    keep = [name for name in dataset.features if name in (column, source.label_column, "__key__", "__url__")]
    has_tables = table is not None or dataset.info.builder_name == "parquet"
    if table is not None:
        table = table.select_columns(keep)
        is_feature = isinstance(table.features[column], Image)
        table = table.cast_column(column, Image(decode=False)) if is_feature else table
    dataset, groups = dataset.select_columns(keep).reshard(), None
    if kind == "parquet":
        groups = [(file, group) for file in files for group in range(pq.read_metadata(file).num_row_groups)]
    return OpenSource(source, dataset, column, revision, has_tables, groups, table)


def _commit_of(source: Source) -> str | None:
    """The commit that a revision means now, so that all processes and resumptions read the same."""
    try:
        return HfApi().dataset_info(source.name, revision=source.revision).sha
    except Exception as error:  # load_dataset has its own ways, and says better what is wrong
        logger.warning(f"{source.name}: its commit cannot be found out ({type(error).__name__}), so it is not pinned.")
        return source.revision


def _root(source: Source) -> str:
    """The source's name, or the sub-folder of its split if there is one."""
    if (Path(source.name) / source.split).is_dir():
        return str(Path(source.name) / source.split)
    if Path(source.name).is_dir() and source.split not in (Source.split, "validation"):  # the recipes' defaults
        raise ValueError(f"{source.name} has no sub-folder {source.split!r}. Leave the split out to read all of it.")
    return source.name


def _stream_files(kind: str, files: list[str], root: Path, split: str) -> tuple[IterableDataset, Dataset | None, str]:
    """Local files as a stream, the table behind it if there is one, and their fingerprint."""
    if kind == "other":
        raise ValueError(f"{root} holds neither Parquet files nor tars nor images. Check the path.")
    if kind == "saved":
        table = load_from_disk(str(root))
        table = choose_split(table, split, "train_split_name") if isinstance(table, DatasetDict) else table
        files = [item["filename"] for item in table.cache_files]
        return _sharded(table), table, _fingerprint(root, files, sizes=True)
    if kind != "imagefolder":
        with opening(str(root)):
            stream = load_dataset(kind, data_files={"train": files}, split="train", streaming=True)
        return stream, None, _fingerprint(root, files, sizes=True)
    names = _fingerprint(root, files, sizes=False)
    random.Random(0).shuffle(files)  # they are sorted by class, and a shard would hold one only
    table = Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in files]})
    return _sharded(table), table, names


def _sharded(table: Dataset) -> IterableDataset:
    return table.to_iterable_dataset(num_shards=min(FOLDER_SHARDS, len(table)))


def _fingerprint(root: Path, files: list[str], sizes: bool) -> str:
    """A hash of the names of files, and of their sizes."""
    lines = [str(Path(file).relative_to(root)) + (f" {Path(file).stat().st_size}" if sizes else "") for file in files]
    return f"files {xxhash.xxh3_64_hexdigest(chr(10).join(lines).encode())}"


class ShardReader:
    """
    The samples of one shard in their order.

    Args:
        place: where to begin, from `place()`; the start if not given.
    """

    weight, num_bytes = 1, 0  # how often it is drawn when shards are mixed; the most memory that it takes

    def __init__(self, opened: OpenSource, shard: int, place: dict | None = None):
        self.opened, self.shard = opened, shard
        self.num_read = place["num_read"] if place else 0
        with self._in_words():
            self._open(place["within"] if place else None)
        self.samples = self._examples()

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        with self._in_words():
            example = next(self.samples)
        self.num_read += 1
        return example

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except StopIteration:
            raise
        except Exception as error:  # the readers of files beside the images raise many things
            raise ValueError(
                f"{self.opened.source.name}: shard {self.shard} of {self.opened.dataset.num_shards}, counted from 0, "
                f"cannot be read after sample {self.num_read} ({first_line(error)[:200].rstrip('.')}). Repair or "
                "remove the file."
            ) from error

    def _open(self, within: dict | None):
        self.current = self.opened.dataset.shard(self.opened.dataset.num_shards, self.shard)
        if within is not None:
            self.current.load_state_dict(within)

    def _examples(self) -> Iterator[dict]:
        for batch in self.current.iter(batch_size=1):  # unlike iter(dataset), never splits among workers by itself
            yield {name: values[0] for name, values in batch.items()}

    def place(self) -> dict:
        """Number of samples that were read, and the state in `datasets`."""
        return {"num_read": self.num_read, "within": self.current.state_dict()}


class TableReader(ShardReader):
    """The samples of a shard that is held as a table, in an order that depends on `seed` alone."""

    def __init__(self, opened: OpenSource, shard: int, place: dict | None, seed: int):
        self.seed = seed
        super().__init__(opened, shard, place)

    def _open(self, _within: None):
        super()._open(None)
        tables = list(self.current.with_format("arrow").iter(batch_size=1000))
        self.order = _shuffled(range(sum(map(len, tables))), self.seed)
        self.table = pa.concat_tables(tables) if tables else None
        self.weight = max(1, len(self.order))
        self.num_bytes = self.table.nbytes if tables else 0

    def _examples(self) -> Iterator[dict]:
        for row in self.order[self.num_read :]:
            yield self._row(row)

    def _row(self, row: int) -> dict:
        return self.table.slice(row, 1).to_pylist()[0]

    def place(self) -> dict:
        """Number of samples that were read."""
        return {"num_read": self.num_read, "within": None}


class RowReader(TableReader):
    """As `TableReader`, of a source whose table is on the disk: each row is read when it is wanted."""

    def _open(self, _within: None):
        rows, shards = len(self.opened.table), self.opened.dataset.num_shards
        first, last = (rows * shard // shards for shard in (self.shard, self.shard + 1))
        self.order = _shuffled(range(first, last), self.seed)
        self.weight = max(1, len(self.order))

    def _row(self, row: int) -> dict:
        return self.opened.table[row]


class RowGroupReader(TableReader):
    """
    As `TableReader`, a row group of a local Parquet file. At most a part of it is held, of about `share` bytes; it is
    read again for the next part, but not more than `MAX_PARTS` times.
    """

    def __init__(self, opened: OpenSource, shard: int, place: dict | None, seed: int, share: float):
        self.share = share
        super().__init__(opened, shard, place, seed)

    def _open(self, _within: None):
        self.file, self.group = self.opened.row_groups[self.shard]
        self.schema = self.opened.dataset.features.arrow_schema
        group = pq.read_metadata(self.file).row_group(self.group)
        columns = (group.column(index) for index in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in self.schema.names)
        self.order = _shuffled(range(group.num_rows), self.seed)
        self.weight = max(1, group.num_rows)
        self.part = math.ceil(self.weight / max(1, min(MAX_PARTS, math.ceil(size / self.share))))
        self.num_bytes = size * self.part / self.weight

    def _examples(self) -> Iterator[dict]:
        while self.num_read < len(self.order):
            end = (self.num_read // self.part + 1) * self.part
            rows = self._read(self.order[self.num_read : end])
            while rows:
                yield rows.pop()  # and free its memory

    def _read(self, numbers: list[int]) -> list[dict]:
        """Rows of the group, the last one first."""
        found, wanted, first = {}, np.sort(numbers), 0
        with pq.ParquetFile(self.file, pre_buffer=False, buffer_size=READ_BYTES) as file:
            names = self.schema.names
            for batch in file.iter_batches(ROWS_AT_ONCE, [self.group], names, use_threads=False):
                rows = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(batch))]
                table = pa.Table.from_batches([batch])
                if not table.schema.equals(self.schema):
                    table = table_cast(table, self.schema)
                table = table if len(rows) == len(batch) else table.take(rows - first)
                found.update(zip(rows.tolist(), table.to_pylist()))
                first += len(batch)
        return [found.pop(number) for number in reversed(numbers)]


def _shuffled(rows: range, seed: int) -> list[int]:
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order


class MixedShards:
    """
    The samples of an epoch of a reader, from many shards at once. Which of the open shards the next sample is from is
    drawn in proportion to their size.

    Args:
        opened: the source.
        shards: to be read, in the order in which they are opened.
        begun: of those that were read in part already, the place in them.
        seeds: shard -> seed of the order of its samples.
        place: where to begin, from `place()`.
    """

    def __init__(
        self,
        opened: OpenSource,
        shards: Sequence[int],
        begun: dict[int, dict],
        seeds: Callable[[int], int],
        place: dict,
    ):
        self.opened, self.shards, self.begun, self.seeds = opened, shards, begun, seeds
        self.open = {position: self._reader(position, within) for position, within in place["open"]}
        self.next = place["next"]

    def take(self, number: int, chance: random.Random) -> list[dict]:
        """The next samples, shuffled; fewer at the end."""
        examples = []
        self._open_more()
        while len(examples) < number and self.open:
            positions, weights = self.chances
            position = chance.choices(positions, cum_weights=weights)[0]
            try:
                examples.append(next(self.open[position]))
            except StopIteration:
                del self.open[position]
                self._open_more()
        chance.shuffle(examples)
        return examples

    def _open_more(self):
        while self.next < len(self.shards) and len(self.open) < self.opened.num_mixed:
            if self.open and sum(reader.num_bytes for reader in self.open.values()) >= HELD_BYTES:
                break
            self.open[self.next] = self._reader(self.next, self.begun.get(self.shards[self.next]))
            self.next += 1
        self.chances = list(self.open), list(accumulate(reader.weight for reader in self.open.values()))

    def _reader(self, position: int, place: dict | None) -> ShardReader:
        shard = self.shards[position]
        if self.opened.row_groups is not None:
            share = HELD_BYTES / min(self.opened.num_mixed, len(self.shards))
            return RowGroupReader(self.opened, shard, place, self.seeds(shard), share)
        if self.opened.table is not None:
            return RowReader(self.opened, shard, place, self.seeds(shard))
        if self.opened.has_tables:
            return TableReader(self.opened, shard, place, self.seeds(shard))
        return ShardReader(self.opened, shard, place)

    def place(self) -> dict:
        """The position of the shard that is opened next, and of those that are open, with the place in them."""
        return {"next": self.next, "open": [(position, reader.place()) for position, reader in self.open.items()]}


def _spread(shards: Sequence[int], number: int, chance: random.Random) -> list[int]:
    """The shards in such a random order that each `number` of them are from all over: neighbors are often alike."""
    ascending, order = sorted(shards), []
    bounds = [len(ascending) * i // number for i in range(number + 1)]
    groups = [ascending[first:last] for first, last in pairwise(bounds)]
    for group in groups:
        chance.shuffle(group)
    for turn in zip_longest(*groups):
        turn = [shard for shard in turn if shard is not None]
        chance.shuffle(turn)
        order += turn
    return order


START_OF_EPOCH = {"window": 0, "given": 0, "next": 0, "open": ()}


class EndlessSource:
    """
    One source, epoch after epoch: shards in another order each time, many of them mixed, and shuffled within windows.

    A reader is a data loading worker of a rank; the readers take shards in turn. Its state is where the current window
    began, and the number of the window's samples that were given out: on resumption the window is read again and
    shuffled alike, so no buffer has to be saved. `done` holds, by epoch, the shards that other readers read before the
    number of readers changed: None for a finished one, otherwise the place in it. `number` is that of the source among
    those that are mixed.
    """

    def __init__(self, opened: OpenSource, seed: int, window: int, number: int = 0):
        self.opened, self.window = opened, window
        self.seed = seed_of(seed, number)  # not the name: the same data in another folder are read alike
        self.state = {"epoch": 0, "done": {}, **START_OF_EPOCH}

    def shards_of(self, reader: int, num_readers: int, epoch: int, done: dict[int, dict]) -> list[int]:
        """The shards that a reader reads in an epoch, in order: those that are open at once are from all over."""
        order = list(range(self.opened.dataset.num_shards))
        chance = random.Random(seed_of(self.seed, epoch))
        chance.shuffle(order)
        places = done.get(epoch, {})
        mine = [shard for shard in order if places.get(shard, START_OF_EPOCH) is not None][reader::num_readers]
        return _spread(mine, self.opened.num_mixed, chance)

    def read(self, reader: int, num_readers: int) -> Iterator[tuple[dict, int]]:
        """Examples and their epoch, without end. Raises ValueError if there are none in epoch after epoch."""
        empty_epochs = 0
        while True:
            epoch, state = self.state["epoch"], self.state
            samples = self._mixed(reader, num_readers, epoch)
            while examples := samples.take(self.window, self._chance(reader, num_readers, epoch, state["window"])):
                empty_epochs = -1
                for example in examples[state["given"] :]:
                    state["given"] += 1
                    yield example, epoch
                state.update(window=state["window"] + 1, given=0, **samples.place())
            empty_epochs += 1  # a reader may get empty shards only now and then
            if empty_epochs == MAX_EMPTY_EPOCHS:
                raise ValueError(f"{self.opened.source.name} gives no sample to reader {reader} of {num_readers}.")
            later = {number: shards for number, shards in state["done"].items() if number > epoch}
            state.update(START_OF_EPOCH, epoch=epoch + 1, done=later)

    def _mixed(self, reader: int, num_readers: int, epoch: int) -> MixedShards:
        shards = self.shards_of(reader, num_readers, epoch, self.state["done"])
        seeds = partial(seed_of, self.seed, epoch, "shard")
        return MixedShards(self.opened, shards, self.state["done"].get(epoch, {}), seeds, self.state)

    def _chance(self, reader: int, num_readers: int, epoch: int, window: int) -> random.Random:
        return random.Random(seed_of(self.seed, epoch, reader, num_readers, window))

    def done_by(self, states: Sequence[dict]) -> tuple[int, dict[int, dict], int]:
        """
        What all readers together have read.

        Args:
            states: of all readers, in order.

        Returns:
            The first epoch that has something left; for each epoch from there on the shards that were read, with None
            for a finished one, otherwise the place in it; and the number of samples that were read already but are not
            before those places.
        """
        first = min(state["epoch"] for state in states)
        before = {epoch: shards for state in states for epoch, shards in state["done"].items()}  # all began with them
        done = {
            epoch: dict(before.get(epoch, {})) for epoch in range(first, max(state["epoch"] for state in states) + 1)
        }
        for reader, state in enumerate(states):
            for epoch in range(first, state["epoch"] + 1):
                shards = self.shards_of(reader, len(states), epoch, before)
                finished = epoch < state["epoch"]
                done[epoch].update(dict.fromkeys(shards if finished else shards[: state["next"]]))
                if not finished:
                    done[epoch].update({shards[position]: place for position, place in state["open"]})
        return first, done, sum(state["given"] for state in states)


class SampleStream(TorchIterableDataset):
    """
    Samples of several sources, mixed by weight: dictionaries with `pixel_values` (channels, H, W), uint8; `noise` (N,)
    that the mask is drawn from; `sample_id`; and `skipped`, the number of unreadable images before it.

    Args:
        sources: the opened sources.
        transform: from (bytes, seed) to a crop (channels, H, W).
        num_units: N, units of a crop.
        seed: of everything random.
        rank, world_size: of this process, and number of processes.
        window: shuffle buffer size, in samples, which are held in memory as bytes.
        max_bad_fraction: fraction of the images that may be unreadable; they are skipped and logged. A reader raises
            ValueError when it has met more than chance explains.
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
        self.sources = [EndlessSource(opened, seed, window, number) for number, opened in enumerate(sources)]
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
        if self.draws >= 100 and self.num_bad > expected + 4 * math.sqrt(expected):  # 4 standard deviations
            raise ValueError(
                f"{self.num_bad} of {self.draws} images cannot be read, more than max_bad_fraction "
                f"{self.max_bad_fraction}. The last: {message}. Repair the data, or raise --max_bad_fraction."
            )

    def state_dict(self) -> dict:
        states = [dict(source.state) for source in self.sources]
        return {"sources": states, "draws": self.draws, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict):
        """Raises ValueError for a state of another version of this package, which read samples in another order."""
        _check_states([state])
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.state = dict(source_state)
        self.draws, self.num_bad = state["draws"], state["num_bad"]

    def begin_after(self, states: Sequence[dict]) -> int:
        """
        Resumes where another number of readers stopped: what they read is not read again in its epoch, except for the
        windows that they had not finished.

        Args:
            states: of all those readers, by rank and worker.

        Returns:
            Number of samples that will be read a second time, as their windows were not finished.

        Raises:
            ValueError: for states of another version of this package, which read samples in another order.
        """
        _check_states(states)
        repeated = 0
        for index, source in enumerate(self.sources):
            epoch, done, again = source.done_by([state["sources"][index] for state in states])
            source.state = {"epoch": epoch, "done": done, **START_OF_EPOCH}
            repeated += again
        return repeated


def _check_states(states: Sequence[dict]):
    for state in states:
        for source in state["sources"]:
            if not set(START_OF_EPOCH) <= set(source):
                raise ValueError(
                    "The checkpoint is of an earlier version of hivit_hf, which read the samples in another order, so "
                    "it cannot be resumed from exactly: resume with that version, or start a new run from its weights."
                )


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
    Validation images from all over a source, always the same: (number or fewer, channels, H, W), uint8, and their
    labels (number,), or None.

    Raises:
        ValueError: if more than nine of ten images cannot be read, or a label is no class.
    """
    num_shards, label_column = opened.dataset.num_shards, opened.source.label_column
    spread = [num_shards * i // READ_SHARDS for i in range(READ_SHARDS)]
    spread = list(dict.fromkeys(spread))  # fewer, if there are fewer shards
    images, labels, tried = [], [], 0
    for shard in [*spread, *(shard for shard in range(num_shards) if shard not in spread)]:
        wanted = number if shard not in spread else min(number, len(images) + math.ceil(number / len(spread)))
        for example in ShardReader(opened, shard):
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
    wrong = [label for label in labels if label_column and not (type(label) is int and 0 <= label < MAX_LABELS)]
    if wrong:
        raise ValueError(
            f"{label_column} of {opened.source.name} must hold class numbers from 0 on, got {repr(wrong[0])[:40]} "
            f"(the highest is {MAX_LABELS - 1}): choose another --label_column_name."
        )
    return torch.stack(images), None if label_column is None else torch.tensor(labels)


def check_shards(sources: Sequence[OpenSource], world_size: int, num_workers: int):
    """ValueError if a source has fewer shards than readers: each data loading worker of each rank needs one."""
    readers = world_size * max(num_workers, 1)
    for opened in sources:
        shards = opened.dataset.num_shards
        if shards < readers:
            fewest = (
                f"--dataloader_num_workers {shards // world_size}"
                if shards >= world_size
                else f"{shards} processes or fewer"
            )
            raise ValueError(
                f"{opened.source.name} has {shards} shards, but {world_size} processes with {max(num_workers, 1)} "
                f"workers each need {readers}: use {fewest}, or write the data as more files or row groups."
            )


def check_disjoint(stream: SampleStream, gather: Callable[[list], list], num_samples: int = 8):
    """
    Compares the first samples of all ranks: RuntimeError if two ranks read the same.

    Args:
        gather: returns, on every rank, the lists of all ranks, concatenated.
    """
    for source in stream.sources:
        mine = set()
        shards = source.shards_of(stream.rank, stream.world_size, 0, {})
        first = chain.from_iterable(ShardReader(source.opened, shard) for shard in shards)
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
    """Launchers signal the whole process group: a worker that died of it would take the last save with it."""
    fsspec.asyn.reset_lock()  # the parent's lock, which is never released here
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, stack):
    """A worker whose process was stopped by Ctrl-C while it fetched a batch has nothing to report."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, stack)


def _end_workers():
    """Kills the workers at exit: Python would send the signal that they ignore, and wait forever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(stream: SampleStream, batch_size: int, num_workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Endless batches. Not to be prepared by Accelerate, which would split the stream a second time."""
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
