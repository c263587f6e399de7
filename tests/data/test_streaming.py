"""Streaming: exact resumption, samples that depend on the seed alone, decoding, and unreadable images."""

import io
import itertools
import random
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as DatasetImage
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.testing import assert_close

from hivit_hf.data import streaming as stream
from hivit_hf.data.decoding import UnreadableImageError, decode, image_of, open_image
from hivit_hf.data.seeding import seed_of
from hivit_hf.data.streaming import (
    START_OF_EPOCH,
    EndlessSource,
    SampleStream,
    Source,
    check_disjoint,
    check_shards,
    make_loader,
    open_source,
    read_some,
)
from hivit_hf.data.transforms import CenterCrop, RandomCrop, normalize
from kill_test import IMAGES, jpeg, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder for each format, with the same 153 images in it."""
    root = tmp_path_factory.mktemp("images")
    folders = {layout: write_images(root / layout, layout) for layout in ("parquet", "tar")}
    folders["images"] = root / "images" / "class"
    folders["images"].mkdir(parents=True)
    for number in range(IMAGES - 7):
        (folders["images"] / f"{number}.jpg").write_bytes(jpeg(number))
    return folders


def make_stream(folder, rank=0, world_size=1, window=16, seed=7, **arguments):
    sources = [open_source(Source(str(path))) for path in (folder if isinstance(folder, list) else [folder])]
    return SampleStream(sources, RandomCrop(32), 4, seed, rank, world_size, window, **arguments)


def read(loader, number):
    return [(b["sample_id"], b["pixel_values"], b["noise"]) for b in itertools.islice(loader, number)]


def assert_equal(found, expected):
    assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected]
    for (_, pixels, noise), (_, expected_pixels, expected_noise) in zip(found, expected):
        assert_close(pixels, expected_pixels, atol=0, rtol=0)
        assert_close(noise, expected_noise, atol=0, rtol=0)


def contents(ids):
    """What identifies an image in any format: its bytes."""
    return [name.split("#")[1] for name in ids]


FORMATS = pytest.mark.parametrize("layout", ["parquet", "tar", "images"])


@FORMATS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stopped_stream_resumes_with_the_next_sample(layout, num_workers, images):
    def loader():
        return make_loader(make_stream(images[layout], rank=1, world_size=2), 4, num_workers, False)

    expected = read(loader(), 50)  # more than two epochs
    cuts = [(0, 0), (1, 0), (3, 1), (4, 2), (19, 0), (20, 1), (38, 2)] if num_workers == 0 else [(5, 1), (20, 0)]
    for first_cut, second_cut in cuts:
        found, state = [], None
        for number in (first_cut, second_cut, 50 - first_cut - second_cut):
            part = loader()
            if state is not None:
                part.load_state_dict(state)
            iterator = iter(part)
            found += read(iterator, number)
            state = part.state_dict()
            del iterator
        assert_equal(found, expected)


@FORMATS
def test_every_image_once_per_epoch_and_each_process_its_own(layout, images):
    seen = []
    for rank in range(3):
        stream = make_stream(images[layout], rank, 3)
        samples, mine = iter(stream), []
        while stream.state_dict()["sources"][0]["epoch"] == 0:
            mine.append(next(samples)["sample_id"])
        seen += contents(mine[:-1])  # the last belongs to the next epoch
    assert Counter(seen) == Counter(dict.fromkeys(seen, 1))
    assert len(seen) == IMAGES - 7


@FORMATS
def test_epochs_differ_in_order_and_crops(layout, images):
    first, second = {}, {}
    stream = make_stream(images[layout])
    for sample in itertools.islice(stream, 2 * (IMAGES - 7)):
        epoch = first if len(first) < IMAGES - 7 else second
        epoch[sample["sample_id"]] = sample["pixel_values"], sample["noise"]
    assert set(first) == set(second) and list(first) != list(second)
    assert sum(torch.equal(first[name][0], second[name][0]) for name in first) < 5
    assert not any(torch.equal(first[name][1], second[name][1]) for name in first)


def test_crop_and_mask_of_a_sample_depend_on_nothing_else(images):
    """Neither on the format, nor on processes, workers, windows or batches; only on the seed."""

    def first_epoch(folder, number=51, num_workers=0, **arguments):
        loader = make_loader(make_stream(folder, **arguments), 3, num_workers, False)
        crops = {}
        for ids, pixels, noise in read(loader, number):
            crops |= {name: crop for name, *crop in zip(contents(ids), pixels, noise)}
        return crops

    reference = first_epoch(images["parquet"])
    others = [
        first_epoch(images["tar"]),
        first_epoch(images["images"], window=40),
        first_epoch(images["parquet"], 20, rank=1, world_size=2),
        first_epoch(images["tar"], 20, num_workers=2),
    ]
    for other in others:
        assert len(other) >= 60 and set(other) <= set(reference)
        for name, (pixels, noise) in other.items():
            assert_close(pixels, reference[name][0], atol=0, rtol=0)
            assert_close(noise, reference[name][1], atol=0, rtol=0)
    changed = first_epoch(images["parquet"], seed=8)
    assert not any(torch.equal(reference[name][1], changed[name][1]) for name in reference)


def test_masks_do_not_go_with_the_crops(images):
    crops = [RandomCrop(32).draw(open_image(jpeg(0), 10**6), seed_of(7, epoch, "x")) for epoch in range(300)]
    noise = [torch.rand(1, generator=torch.Generator().manual_seed(seed_of(7, e, "x", "mask"))) for e in range(300)]
    sample = next(iter(make_stream(images["tar"])))
    content = sample["sample_id"].split("#")[1]
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed_of(7, 0, content, "mask")))
    assert_close(sample["noise"], expected, atol=0, rtol=0)
    area = torch.tensor([float(box["height"] * box["width"]) for box, _, _ in crops])
    assert abs(torch.corrcoef(torch.stack([area, torch.cat(noise)]))[0, 1]) < 0.15


def test_sources_are_mixed_by_weight(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    rows = [{"bytes": jpeg(1000 + number), "path": f"other{number}.jpg"} for number in range(40)]
    pq.write_table(pa.table({"image": rows}), other / "0.parquet")
    sources = [open_source(Source(str(images["tar"]), weight=3.0)), open_source(Source(str(other), weight=1.0))]

    def names(number, state=None):
        stream = SampleStream(sources, RandomCrop(32), 4, seed=0, window=8)
        if state:
            stream.load_state_dict(state)
        found = [sample["sample_id"] for sample in itertools.islice(stream, number)]
        return found, stream.state_dict()

    found, _ = names(400)
    assert 0.18 < sum(name.startswith("other") for name in found) / 400 < 0.32
    part, state = names(123)
    rest, _ = names(277, state)
    assert part + rest == found


def test_columns_and_folders(images, tmp_path):
    pq.write_table(pa.table({"photo": [{"bytes": jpeg(0), "path": ""}], "label": [1]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"no single column of images; its columns are photo, label. .*--image_column"):
        open_source(Source(str(tmp_path)))
    with pytest.raises(ValueError, match=r"no column 'foto'; its columns are photo, label"):
        open_source(Source(str(tmp_path), column="foto"))
    assert open_source(Source(str(tmp_path), column="photo")).column == "photo"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither Parquet files nor tars nor images"):
        open_source(Source(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"0.parquet is a file: give the folder that it is in"):
        open_source(Source(str(tmp_path / "0.parquet")))
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        open_source(Source(str(tmp_path / "nowhere")))


@FORMATS
@pytest.mark.parametrize("seed", range(5))
def test_readers_of_another_number_finish_the_epoch(seed, layout, images):
    """Twice another number: nothing of an epoch is left out, and as much is read again as is said."""
    draw = random.Random(seed)
    opened, numbers = open_source(Source(str(images[layout]))), draw.sample([1, 2, 3, 4, 5, 8], 3)
    counts, repeated, begin = Counter(), 0, None
    for turn, num_readers in enumerate(numbers):
        sources = [EndlessSource(opened, 7, window=16) for _ in range(num_readers)]
        if begin is not None:
            for source in sources:
                source.state = {**begin, "done": dict(begin["done"])}
        last = turn == len(numbers) - 1
        for reader, source in enumerate(sources):
            samples = source.read(reader, num_readers)
            if last:
                samples = itertools.takewhile(lambda sample: sample[1] <= 2, samples)
            else:
                samples = itertools.islice(samples, draw.randrange(120 // num_readers))
            counts.update((epoch, image_of(example, opened.column)[1]) for example, epoch in samples)
        if not last:
            epoch, done, again = sources[0].done_by([source.state for source in sources])
            begin, repeated = {**sources[0].state, **START_OF_EPOCH, "epoch": epoch, "done": done}, repeated + again
    for epoch in range(3):
        assert len([key for key in counts if key[0] == epoch]) == IMAGES - 7
    excess = sum(count - 1 for count in counts.values())
    assert excess == repeated > 0


# -- sorted data --------------------------------------------------------------------------------------------------


def write_sorted(folder, rows_of_class, **arguments):
    """Ten Parquet files of four classes each, sorted; the path of a row is its class and number."""
    folder.mkdir()
    for file in range(10):
        names = [f"{4 * file + part}_{row}" for part in range(4) for row in range(rows_of_class)]
        rows = [{"bytes": name.encode() * 20, "path": name} for name in names]
        pq.write_table(pa.table({"image": rows}), folder / f"{file}.parquet", **arguments)
    return folder


def paths(folder, number, seed=0, reader=0, num_readers=1, state=None, window=256):
    """The first paths that a reader reads, and its state then."""
    source = EndlessSource(open_source(Source(str(folder))), seed, window)
    source.state = source.state if state is None else state
    samples = itertools.islice(source.read(reader, num_readers), number)
    return [example["image"]["path"] for example, _ in samples], source.state


def classes_per_batch(found, size=256):
    batches = [found[start : start + size] for start in range(0, len(found) - size + 1, size)]
    return [len({path.split("_")[0] for path in batch}) for batch in batches]


@pytest.mark.parametrize("row_group_size", [None, 100, 250, 400])
def test_sorted_classes_are_mixed(row_group_size, tmp_path):
    """With the default window, in all batches of an epoch; two classes were in one when shards were read in turn."""
    folder = write_sorted(tmp_path / "sorted", 250, row_group_size=row_group_size)
    found, _ = paths(folder, 10_000)
    assert len(set(found)) == 10_000
    counts = classes_per_batch(found)
    assert sum(counts) / len(counts) >= 33 and min(counts[:20]) >= 30
    eight = [paths(folder, 512, reader=reader, num_readers=8)[0] for reader in range(8)]
    mixed = [path for start in range(0, 512, 32) for found in eight for path in found[start : start + 32]]
    assert min(classes_per_batch(mixed)) >= 30


def test_the_order_depends_on_the_seed_alone(tmp_path, images):
    folder = write_sorted(tmp_path / "sorted", 30)
    random.seed(1)
    first, _ = paths(folder, 2500)
    random.seed(2)
    again, _ = paths(folder, 2500)
    other, _ = paths(folder, 2500, seed=1)
    assert first == again != other and set(first) == set(other)
    assert paths(folder.rename(tmp_path / "elsewhere"), 2500)[0] == first  # not on where the data are
    assert first[:1200] != first[1200:2400] and set(first[:1200]) == set(first[1200:2400])


def test_a_large_row_group_is_held_in_parts_and_its_order_stays(tmp_path, monkeypatch):
    folder = write_sorted(tmp_path / "sorted", 30)
    monkeypatch.setattr(stream, "HELD_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "MAX_PARTS", 1)
        whole, _ = paths(folder, 2400, window=1)
    assert len({int(path.split("_")[0]) // 4 for path in whole[:120]}) == 1  # one row group after the other
    assert paths(folder, 2400, window=1)[0] == whole
    opened = open_source(Source(str(folder)))
    share = pq.read_metadata(folder / "0.parquet").row_group(0).total_byte_size / 2
    reader, whole = (stream.RowGroupReader(opened, 0, None, 5, part) for part in (share, 10**9))
    held = []
    read_rows = stream.RowGroupReader._read
    monkeypatch.setattr(
        stream.RowGroupReader, "_read", lambda *arguments: held.append(rows := read_rows(*arguments)) or rows
    )
    first = next(reader)
    assert len(held[0]) == 59 and reader.num_bytes < 0.51 * whole.num_bytes
    assert [first, *reader] == list(whole) and len(held) == 3


@pytest.mark.parametrize("held_bytes", [1, 30_000, 2**28])
def test_sorted_data_resume_at_any_sample(held_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "HELD_BYTES", held_bytes)
    folder = write_sorted(tmp_path / "sorted", 20, row_group_size=30)
    expected, _ = paths(folder, 1700, window=64)
    for cut in (1, 63, 64, 65, 300, 799, 800, 801, 1111):
        _, state = paths(folder, cut, window=64)
        rest, _ = paths(folder, 1700 - cut, window=64, state=state)
        assert rest == expected[cut:]


def test_a_checkpoint_of_the_earlier_order_is_refused(images):
    samples = make_stream(images["tar"])
    state = samples.state_dict()
    del state["sources"][0]["open"]
    with pytest.raises(ValueError, match=r"of an earlier version of hivit_hf, which read the samples in another order"):
        samples.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of an earlier version of hivit_hf"):
        samples.begin_after([state])


def test_columns_are_read_as_their_features_say(tmp_path):
    """Bytes or a path alone, under a column that the metadata call an image, and files that differ in their types."""
    features = Features({"image": DatasetImage(), "label": Value("int64")}).arrow_schema.metadata
    for number, kind in enumerate([pa.binary(), pa.large_binary()]):
        table = pa.table({"label": [number], "image": pa.array([jpeg(number)], kind), "more": ["x"]})
        pq.write_table(table.replace_schema_metadata(features if kind == pa.binary() else None), tmp_path / f"{number}")
        (tmp_path / f"{number}").rename(tmp_path / f"{number}.parquet")
    found = [sample["sample_id"].split("#")[1] for sample in itertools.islice(make_stream(tmp_path), 2)]
    assert len(set(found)) == 2


def test_too_few_shards_are_refused(images):
    sources = [open_source(Source(str(images["tar"])))]
    check_shards(sources, 4, 2)
    with pytest.raises(
        ValueError, match=r"8 shards, but 4 processes with 3 workers each need 12: use --dataloader_num_workers 2"
    ):
        check_shards(sources, 4, 3)
    with pytest.raises(ValueError, match=r"8 shards, but 16 processes .* use 8 processes or fewer, or write the data"):
        check_shards(sources, 16, 0)


def test_processes_that_read_the_same_are_noticed(images):
    streams = [make_stream(images["tar"], rank, 2) for rank in range(2)]

    def gather_from(others):
        def gather(mine):
            lists = [mine]
            for other in others:
                check_disjoint(other, lambda theirs: lists.append(theirs) or theirs)
            return [name for names in lists for name in names]

        return gather

    check_disjoint(streams[0], gather_from([streams[1]]))
    with pytest.raises(RuntimeError, match=r"of the first 8 samples are read by more than one process"):
        check_disjoint(streams[0], gather_from([make_stream(images["tar"], 0, 2)]))


# -- images -------------------------------------------------------------------------------------------------------


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def test_images_of_every_kind_become_rgb():
    gray = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    rgb = Image.fromarray(np.stack([gray, gray, 255 - gray], axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    kinds = {
        "rgb": encoded(rgb),
        "gray": encoded(Image.fromarray(gray)),
        "palette": encoded(rgb.quantize(64)),
        "transparent": encoded(rgb.convert("RGBA")),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "sixteen": encoded(Image.fromarray(gray.astype(np.uint16) * 257)),
        "animated": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "turned": encoded(rgb, "JPEG", exif=exif, quality=95),
    }
    for name, data in kinds.items():
        pixels = decode(open_image(data, 10**6), 3)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == ((3, 40, 30) if name == "turned" else (3, 30, 40)), name
        expected = torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1).float()
        if name in ("gray", "sixteen"):
            expected = torch.from_numpy(gray).expand(3, 30, 40).float()
        if name == "turned":
            expected = expected.transpose(1, 2).flip(2)
        assert (pixels.float() - expected).abs().mean() < 6, name
        assert RandomCrop(16)(data, 3).shape == (3, 16, 16)
    assert decode(open_image(kinds["rgb"], 10**6), 1).shape == (1, 30, 40)
    assert decode(open_image(kinds["rgb"], 10**6), 4).shape == (4, 30, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"hello", "no image"),
        (jpeg(0)[: len(jpeg(0)) // 2], "damaged"),
        (encoded(Image.effect_noise((90, 90), 50))[:3000], "damaged"),
        (encoded(Image.effect_noise((90, 90), 50), "WEBP")[:2000], "damaged|no image"),
        (encoded(Image.effect_noise((90, 90), 50), "TIFF")[:4000], "damaged|no image"),
        (encoded(Image.new("L", (4000, 4000))), "decompression bomb: 4000x4000"),
        (encoded(Image.new("1", (20000, 20000))), "decompression bomb"),
    ],
    ids=["empty", "text", "truncated-jpeg", "truncated-png", "truncated-webp", "truncated-tiff", "large", "bomb"],
)
def test_images_that_cannot_be_read(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        RandomCrop(32, max_pixels=10**6)(data, 0)


def test_bad_images_are_skipped_counted_and_too_many_stop_it(tmp_path, caplog):
    data = [jpeg(number) for number in range(200)]
    for number in (3, 50, 120):
        data[number] = b"broken"
    rows = [{"bytes": content, "path": f"{number}.jpg"} for number, content in enumerate(data)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "0.parquet")
    stream = make_stream(tmp_path, max_bad_fraction=0.05)
    found = [sample["sample_id"] for sample in itertools.islice(stream, 197)]
    assert len(set(found)) == 197
    next(iter(stream))
    assert stream.state_dict()["num_bad"] >= 3
    assert "50.jpg: no image" in caplog.text
    with pytest.raises(ValueError, match=r"of \d+ images cannot be read, more than max_bad_fraction 0.001. The last:"):
        list(itertools.islice(make_stream(tmp_path, max_bad_fraction=0.001), 400))


def test_decoding_at_a_smaller_size_changes_little_and_saves_much():
    photo = Image.fromarray(load_sample_image("china.jpg"))
    data = encoded(photo.resize((1920, 1280), Image.BICUBIC), "JPEG", quality=90)
    reduced = 0
    for seed in range(8):
        small = RandomCrop(96)(data, seed).float()
        full = RandomCrop(96, reduce_while_decoding=False)(data, seed).float()
        reduced += not torch.equal(small, full)
        assert (small - full).abs().mean() < 3
    assert reduced >= 6


def test_a_crop_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    RandomCrop(32)(jpeg(0), 1)
    assert_close(torch.rand(3), expected, atol=0, rtol=0)


def test_center_crop_and_normalize():
    pixels = CenterCrop(32, 40)(jpeg(0))
    assert pixels.shape == (3, 32, 32)
    normal = normalize(pixels[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = (pixels[0, 3, 4] / 255 - 0.485) / 0.229
    assert_close(normal[0, 0, 3, 4], expected)


def test_the_commit_of_a_hub_dataset_is_pinned(images, monkeypatch, caplog):
    asked = {}

    class Api:
        def dataset_info(self, name, revision):
            if name == "me/gone":
                raise ConnectionError("no network")
            return SimpleNamespace(sha=f"commit of {revision}")

    def load(name, config, split, revision, streaming):
        asked.update(name=name, config=config, split=split, revision=revision)
        return real_load("parquet", data_files=str(images["parquet"] / "0.parquet"), split="train", streaming=True)

    real_load = stream.load_dataset
    monkeypatch.setattr(stream, "HfApi", Api)
    monkeypatch.setattr(stream, "load_dataset", load)
    opened = open_source(Source("me/photos", "small", "validation", "main"))
    assert opened.revision == "commit of main"
    assert asked == {"name": "me/photos", "config": "small", "split": "validation", "revision": "commit of main"}
    assert open_source(Source("me/gone", revision="v1")).revision == "v1"
    assert "me/gone: its commit cannot be found out" in caplog.text


def test_validation_images_come_from_all_over_a_folder(images, tmp_path):
    """Folders are sorted by class: the first images would all be of one."""
    tones = {"a": 0, "b": 120, "c": 240}
    for name, tone in tones.items():
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (40, 40), (tone,) * 3).save(tmp_path / name / f"{number}.png")
    found, labels = read_some(open_source(Source(str(tmp_path))), CenterCrop(32, 32), 9)
    assert set(found[:, 0, 0, 0].tolist()) == set(tones.values()) and len(found) == 9 and labels is None
    assert len(read_some(open_source(Source(str(tmp_path))), CenterCrop(32, 32), 100)[0]) == 60


def test_a_column_without_images_is_noticed_soon(tmp_path):
    pq.write_table(pa.table({"image": [b"text"] * 5000}), tmp_path / "0.parquet")
    opened = open_source(Source(str(tmp_path), column="image"))
    with pytest.raises(ValueError, match=r"0 of 80 images can be read: is it the column\?"):
        read_some(opened, CenterCrop(32, 32), 8)


def test_a_file_beside_an_image_that_cannot_be_read_is_a_sentence(tmp_path):
    """Of a kind that `datasets` decodes, in the middle: a stream meets it only while it is read."""
    good = io.BytesIO()
    torch.save(1, good)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(20):
            beside = b"damaged" if number == 10 else good.getvalue()
            for suffix, content in (("jpg", jpeg(number)), ("pth", beside)):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    shard = stream.ShardReader(open_source(Source(str(tmp_path))), 0)
    with pytest.raises(ValueError, match=r"cannot be read after sample 10 \(it is damaged, or holds pickled obj"):
        list(shard)
    assert shard.num_read == 10


def test_a_shard_that_cannot_be_read_is_named(images, tmp_path):
    for number in range(2):
        data = (images["tar"] / f"{number}.tar").read_bytes()
        (tmp_path / f"{number}.tar").write_bytes(data[: len(data) // 2] if number else data)
    with pytest.raises(ValueError, match=r"shard 1 of 2, counted from 0, cannot be read after sample \d+ \("):
        read(make_loader(make_stream(tmp_path), 8, 0, False), 10)


def test_empty_shards_are_passed_over(images, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes((images["tar"] / f"{number}.tar").read_bytes())
    tarfile.open(tmp_path / "3.tar", "w").close()
    for rank in range(4):  # each of them has the empty one in an epoch now and then
        loader = make_loader(make_stream(tmp_path, rank, 4), 8, 0, False)
        assert len(read(loader, 40)) == 40
    monkeypatch.setattr(stream.ShardReader, "_examples", lambda reader: iter(()))
    with pytest.raises(ValueError, match=r"gives no sample to reader 0 of 1"):
        read(make_loader(make_stream(tmp_path), 8, 0, False), 1)


def test_an_allowed_fraction_of_bad_images_never_stops_a_reader(tmp_path):
    """Chance gives one reader of many more of them than the others."""
    bad = make_stream([], max_bad_fraction=0.01)
    for seed in range(50):
        chance, bad.num_bad = random.Random(seed), 0
        for bad.draws in range(1, 4001):
            if chance.random() < 0.005:
                bad._count_bad("an image")
    bad.num_bad = 40 + 4 * 7  # of 4000, and more than four standard deviations above what is allowed
    with pytest.raises(ValueError, match=r"69 of 4000 images cannot be read, more than max_bad_fraction 0.01"):
        bad._count_bad("an image")


def test_saved_datasets_are_streamed(images, tmp_path):
    rows = {"image": [{"bytes": None, "path": str(path)} for path in sorted(images["images"].iterdir())[:20]]}
    DatasetDict(train=Dataset.from_dict(rows).cast_column("image", DatasetImage())).save_to_disk(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "saved" / "train"):
        opened = open_source(Source(str(folder)))
        samples = [sample["sample_id"] for sample in itertools.islice(make_stream(folder), 20)]
        assert len(set(contents(samples))) == 20 and opened.revision.startswith("files ")
    with pytest.raises(ValueError, match=r"saved has no sub-folder 'test'"):
        open_source(Source(str(tmp_path / "saved"), split="test"))


def test_sub_folders_are_splits(tmp_path):
    for split, tone in [("train", 0), ("val", 255)]:
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40), (tone,) * 3).save(tmp_path / split / "0.png")
    for split, tone in [("train", 0), ("val", 255)]:
        found, _ = read_some(open_source(Source(str(tmp_path), split=split)), CenterCrop(32, 32), 9)
        assert found.unique().tolist() == [tone]


@pytest.mark.parametrize("label", ["cat", None, -1, 0.5, 10**15])
def test_labels_that_are_no_classes_are_refused(label, tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": jpeg(0)}], "label": [label]}), tmp_path / "0.parquet")
    opened = open_source(Source(str(tmp_path), column="image", label_column="label"))
    with pytest.raises(ValueError, match=rf"label of .* must hold class numbers from 0 on, got {label!r}"):
        read_some(opened, CenterCrop(32, 32), 8)
