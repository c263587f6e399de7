"""COCO files and what is refused of them, large-scale jitter."""

import json

import pytest
import torch
from PIL import Image as PILImage
from pycocotools import mask as run_lengths
from torch.testing import assert_close
from torchvision import tv_tensors

from hivit_hf.detection.data import CocoImages, large_scale_jitter, read_coco
from support.detection import annotations_of


@pytest.fixture
def changed(scenes, tmp_path):
    """A function that writes the training annotations once more, after a change, and reads them."""

    def write(change, **keywords):
        content = json.loads(annotations_of(scenes, "train").read_text())
        change(content)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content))
        return read_coco(path, scenes / "train", **keywords)

    return write


def test_annotations_become_boxes_labels_and_masks(scenes):
    coco = read_coco(annotations_of(scenes, "train"), scenes / "train")
    assert coco.names == [str(digit) for digit in range(10)] and not coco.left_out
    images = CocoImages(coco, coco.images, with_masks=True)
    assert len(images) == 8
    for row, image in enumerate(coco.images):
        item = images[row]
        assert item["image_id"] == image["id"] and item["image"].shape == (3, 64, 80)
        assert item["image"].dtype == torch.uint8 and len(item["boxes"]) == len(coco.objects(image["id"]))
        for box, mask, label, annotation in zip(
            item["boxes"], item["masks"], item["labels"], coco.objects(image["id"])
        ):
            left, top, right, bottom = box.int().tolist()
            assert [left, top, right - left, bottom - top] == annotation["bbox"]
            assert coco.category_ids[label - 1] == annotation["category_id"]
            assert mask[top:bottom, left:right].sum() == mask.sum() == annotation["area"]


def test_polygons_compressed_runs_and_crowds_are_read(changed):
    def change(content):
        first, second, third = content["annotations"][:3]
        left, top, width, height = first["bbox"]
        right, bottom = left + width, top + height
        first["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        size = second["segmentation"]["size"]
        encoded = run_lengths.frPyObjects(second["segmentation"], *size)
        second["segmentation"] = {"size": size, "counts": encoded["counts"].decode()}
        third["iscrowd"] = 1

    plain, read = changed(lambda content: None), changed(change)
    image = read.images[0]
    assert [annotation["image_id"] for annotation in read.objects(image["id"])][:2] == [image["id"]] * 2
    before, after = (CocoImages(coco, coco.images[:1], True)[0] for coco in (plain, read))
    left, top, right, bottom = after["boxes"][0].int().tolist()
    assert after["masks"][0].sum() == (right - left) * (bottom - top)
    assert torch.equal(after["masks"][1], before["masks"][1])
    crowds = [a for annotations in read.coco.imgToAnns.values() for a in annotations if a["iscrowd"]]
    assert len(crowds) == 1
    number = sum(len(CocoImages(coco, coco.images, True)[row]["labels"]) for coco in (plain, read) for row in range(8))
    assert number == 2 * sum(map(len, plain.coco.imgToAnns.values())) - 1


def set_in(index: int, **values):
    """A change of one annotation."""

    def change(content):
        content["annotations"][index].update(values)

    return change


WRONG = {
    "no area": (set_in(1, bbox=[3, 4, 0, 5]), "has a box of no area: [3, 4, 0, 5]"),
    "negative": (set_in(1, bbox=[3, 4, 5, -5]), "has a box of no area"),
    "outside": (set_in(1, bbox=[90, 4, 5, 5]), "has a box outside its image of 80x64 px"),
    "not finite": (set_in(1, bbox=[float("nan"), 4, 5, 5]), "has a bbox that is not finite"),
    "three numbers": (set_in(1, bbox=[3, 4, 5]), "must have a bbox of four numbers"),
    "texts": (set_in(1, bbox=["3", "4", "5", "6"]), "must have a bbox of four numbers"),
    "huge": (set_in(1, bbox=[3, 4, 5, 10**400]), "must have a bbox of four numbers"),
    "category": (set_in(1, category_id=11), "has category 11, which is not among the 10"),
    "image": (set_in(1, image_id=77), "is of an image that the file does not have"),
    "no mask": (set_in(1, segmentation=[]), "has no mask"),
    "other size": (set_in(1, segmentation={"size": [80, 64], "counts": [80 * 64]}), "has a mask of [80, 64]"),
    "runs": (set_in(1, segmentation={"size": [64, 80], "counts": [5, 6]}), "runs add up to 11 px, but its image has"),
    "empty": (set_in(1, segmentation={"size": [64, 80], "counts": [64 * 80]}), "has an empty mask"),
    "elsewhere": (set_in(1, segmentation={"size": [64, 80], "counts": [0, 9, 64 * 80 - 9]}), "does not match its box"),
    "two points": (set_in(1, segmentation=[[1, 2, 3, 4]]), "a polygon of fewer than three points"),
    "odd": (set_in(1, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers, which are no pairs"),
    "flat": (set_in(1, segmentation=[1, 2, 3, 4, 5, 6]), "neither a list of polygons nor run lengths"),
    "not a point": (set_in(1, segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "a polygon that leaves its image"),
    "far away": (set_in(1, segmentation=[[1, 2, 1e8, 4, 5, 6]]), "a polygon that leaves its image"),
    "words": (set_in(1, segmentation=[["1", "2", "a", "4", "5", "6"]]), "a polygon that is not of numbers"),
    "broken runs": (set_in(1, segmentation={"size": [64, 80], "counts": [64 * 80, "a"]}), "runs that are no numbers"),
    "no runs": (set_in(1, segmentation={"size": [64, 80], "counts": None}), "a mask whose counts are None"),
    "list of categories": (set_in(1, category_id=[1]), "has category [1], which is not among the 10"),
    "text for crowd": (set_in(1, iscrowd="0"), "has iscrowd '0', which must be 0 or 1"),
    "text for area": (set_in(1, area="x"), "has an area of 'x'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_annotations_that_cannot_be_right_are_refused_by_id_or_left_out(changed, name):
    change, words = WRONG[name]
    with pytest.raises(ValueError, match="Annotation 2 of image") as raised:
        changed(change)
    assert "\n" not in str(raised.value)
    sentence, right = str(raised.value), changed(lambda content: None)
    first = next(annotation for annotations in right.coco.imgToAnns.values() for annotation in annotations)
    assert words in sentence and "--bad_annotations" in sentence
    if name != "image":
        assert f"image {first['image_id']} (" in sentence
    read = changed(change, leave_out_bad=True)
    assert len(read.left_out) == 1 and words in read.left_out[0]
    assert sum(map(len, read.coco.imgToAnns.values())) == sum(map(len, right.coco.imgToAnns.values())) - 1


@pytest.mark.parametrize("sides", [(1.6, 1.6), (0.9, 6.0), (3.4, 0.8)])
def test_thin_objects_match_their_boxes(changed, sides):
    """Whose masks are whole pixels, and so overlap with their boxes by less than a half."""
    left, top = 10.3, 20.4
    right, bottom = left + sides[0], top + sides[1]
    polygon = [left, top, right, top, right, bottom, left, bottom]
    read = changed(set_in(1, segmentation=[polygon], bbox=[left, top, *sides]))
    assert not read.left_out


def test_masks_are_of_no_interest_to_boxes(changed):
    change, _ = WRONG["no mask"]
    read = changed(change, with_masks=False)
    assert not read.left_out and "masks" not in CocoImages(read, read.images, False)[0]


FILES = {
    "categories": (lambda c: c.pop("categories"), "has no list of 'categories'"),
    "no images": (lambda c: c.update(images=[], annotations=[]), "has no images"),
    "lacking": (lambda c: c["images"][0].pop("height"), "'height' is missing in one of 'images'"),
    "twice": (lambda c: c["images"][1].update(id=c["images"][0]["id"]), "two images with the id"),
    "not there": (lambda c: c["images"][2].update(file_name="gone.png"), "gone.png"),
    "nothing": (lambda c: c.update(annotations=[]), "No image of"),
    "height": (lambda c: c["images"][0].update(height="60"), "'height' is '60', not a number from 0 on"),
    "ids": (lambda c: c["images"][0].update(id="a"), "'id' is 'a', not a number from 0 on"),
    "file name": (lambda c: c["images"][0].update(file_name=7), "'file_name' is 7, not a text"),
    "one name": (lambda c: c["categories"][1].update(name="0"), "two categories with the name '0'"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_coco_are_refused(changed, name):
    change, words = FILES[name]
    with pytest.raises(ValueError, match=r"changed\.json") as raised:
        changed(change)
    assert words in str(raised.value)


def test_files_that_cannot_be_read_are_refused(scenes, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for path, folder, words in (
        (tmp_path / "none.json", scenes / "train", "cannot be read"),
        (tmp_path / "broken.json", scenes / "train", "cannot be read"),
        (annotations_of(scenes, "train"), tmp_path / "none", "There is no folder"),
    ):
        with pytest.raises(ValueError, match=words):
            read_coco(path, folder)


def test_images_of_another_size_and_damaged_ones_are_named(scenes, tmp_path):
    coco = read_coco(annotations_of(scenes, "train"), scenes / "train")
    for image in coco.images:
        (tmp_path / image["file_name"]).write_bytes((scenes / "train" / image["file_name"]).read_bytes())
    PILImage.new("RGB", (33, 22)).save(tmp_path / coco.images[0]["file_name"])
    (tmp_path / coco.images[1]["file_name"]).write_bytes(b"no image")
    other = read_coco(annotations_of(scenes, "train"), tmp_path)
    images = CocoImages(other, other.images, True)
    with pytest.raises(ValueError, match=rf"Image {coco.images[0]['id']} of train .* has 33x22 px, but its .* 80x64"):
        images.check(0)
    with pytest.raises(ValueError, match=rf"Image {coco.images[1]['id']} of train .* cannot be read"):
        images.check(1)


# -- jitter ---------------------------------------------------------------------------------------------------------


def test_jitter_makes_squares_whose_boxes_hold_their_masks(scenes):
    coco = read_coco(annotations_of(scenes, "train"), scenes / "train")
    jitter = large_scale_jitter(48, (0.3, 2.0), 0.5, [0.5] * 3)
    images = CocoImages(coco, coco.images, True, jitter)
    shares = set()
    for epoch in range(3):
        images.epoch = epoch
        for row in range(8):
            item, again = images[row], images[row]
            assert item["image"].shape == (3, 48, 48) and item["masks"].shape[1:] == (48, 48)
            assert torch.equal(item["image"], again["image"]) and torch.equal(item["boxes"], again["boxes"])
            assert len(item["boxes"]) == len(item["labels"]) == len(item["masks"])
            for box, mask in zip(item["boxes"], item["masks"]):
                left, top, right, bottom = box.int().tolist()
                assert mask[top:bottom, left:right].sum() == mask.sum() > 0
                assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
            shares.add(round(item["image"].float().std().item(), 3))
    assert len(shares) > 16  # every epoch has its own


def test_jitter_scales_flips_and_fills(scenes):
    ramp = torch.arange(40, dtype=torch.uint8).expand(3, 40, 40).contiguous()
    box = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 10, 10, 20]]), format="XYXY", canvas_size=(40, 40))

    def item(scales, flip):
        inputs = {"image": tv_tensors.Image(ramp), "boxes": box, "labels": torch.tensor([1])}
        return large_scale_jitter(40, scales, flip, [1.0] * 3)(inputs)

    assert torch.equal(item((1.0, 1.0), 0.0)["image"], ramp)
    flipped = item((1.0, 1.0), 1.0)
    assert torch.equal(flipped["image"], ramp.flip(2)) and flipped["boxes"].tolist() == [[30, 10, 40, 20]]
    small = item((0.5, 0.5), 0.0)
    sides = small["boxes"][0, 2:] - small["boxes"][0, :2]
    assert_close(sides, torch.tensor([5.0, 5.0]))
    assert (small["image"] == 255).float().mean() > 0.7


def test_masks_are_scaled_about_the_middles_of_pixels():
    """Halved, five columns are two, the second and the fourth, as in the image that goes with them."""
    masks = torch.zeros(1, 40, 40, dtype=torch.uint8)
    masks[0, :, 4:9] = 1
    box = tv_tensors.BoundingBoxes(torch.tensor([[4.0, 0, 9, 40]]), format="XYXY", canvas_size=(40, 40))
    item = {"image": tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8)), "boxes": box}
    item |= {"labels": torch.tensor([1]), "masks": tv_tensors.Mask(masks)}
    found = large_scale_jitter(20, (1.0, 1.0), 0.0, [0.5] * 3)(item)
    expected = torch.nn.functional.interpolate(masks[None].float(), size=(20, 20), mode="nearest-exact")[0]
    assert torch.equal(found["masks"], expected.byte())
    plain = torch.nn.functional.interpolate(masks[None].float(), size=(20, 20), mode="nearest")[0]
    assert not torch.equal(expected, plain)
