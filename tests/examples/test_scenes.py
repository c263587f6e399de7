"""Scenes of digits on photographs: exact boxes, masks and segmentation maps, as datasets and as COCO files."""

import json

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image as PILImage

import make_scenes
from hivit_hf import HiViTConfig
from scene_tasks import TASKS, untrained
from scenes.data import DIGIT_PX, Scene, map_names, run_lengths, scenes


THRESHOLDS = {  # least after training, and most with the backbone replaced; background alone has 0.18
    "segmentation": {"mean_iou": (0.5, 0.25)},
    "detection": {"box_ap": (0.4, 0.1), "box_ap50": (0.7, 0.2), "mask_ap": (0.35, 0.1)},
}


def mask_of(segmentation: dict) -> np.ndarray:
    """The mask of uncompressed run lengths."""
    values = np.arange(len(segmentation["counts"])) % 2 == 1
    return np.repeat(values, segmentation["counts"]).reshape(segmentation["size"][::-1]).T


def test_a_scene_depends_on_seed_split_and_number():
    first, again = (list(scenes("train", number, 64, 80)) for number in (3, 5))
    for one, other in zip(first, again):
        assert one.name == other.name and np.array_equal(one.image, other.image)
        assert np.array_equal(one.masks, other.masks) and np.array_equal(one.digits, other.digits)
    for others in (scenes("train", 1, 64, 80, seed=1), scenes("test", 1, 64, 80)):
        assert not np.array_equal(next(others).image, first[0].image)
    assert [scene.name for scene in first] == ["train_00000", "train_00001", "train_00002"]
    assert first[0].image.shape == (64, 80, 3) and not np.array_equal(first[0].image, first[1].image)


def test_masks_lie_on_bright_ink_and_boxes_hold_them_tightly():
    for scene in scenes("test", 20, 90, 100):
        assert scene.masks.any(axis=(1, 2)).all() and scene.masks.sum(axis=0).max() == 1
        assert len(scene.masks) == len(scene.digits) == len(scene.boxes) >= 1
        # half ink of 220 or more over a dimmed photograph
        assert scene.image.min(axis=2)[scene.masks.any(axis=0)].min() >= 110
        for mask, (left, top, width, height), digit in zip(scene.masks, scene.boxes, scene.digits):
            inside = mask[top : top + height, left : left + width]
            assert inside.sum() == mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert max(width, height) <= DIGIT_PX[1]
            assert set(scene.segmentation_map[mask].tolist()) == {map_names().index(str(digit))}
        assert not scene.segmentation_map[~scene.masks.any(axis=0)].any()


def test_a_known_scene():
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:5] = True
    scene = Scene("by_hand", np.zeros((4, 6, 3), dtype=np.uint8), mask[None], np.array([7]))
    assert scene.boxes.tolist() == [[2, 1, 3, 2]]
    assert scene.segmentation_map.tolist() == [[0] * 6, [0, 0, 8, 8, 8, 0], [0, 0, 8, 8, 8, 0], [0] * 6]
    assert run_lengths(mask) == {"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}
    assert run_lengths(~mask) == {"size": [4, 6], "counts": [0, 9, 2, 2, 2, 2, 2, 5]}


def test_some_digits_only():
    for scene in scenes("train", 5, 64, 64, kinds=(7, 1)):
        assert set(scene.digits.tolist()) <= {1, 7} and scene.classes.tolist() == [
            [1, 7].index(d) for d in scene.digits
        ]
        assert set(np.unique(scene.segmentation_map[scene.masks.any(axis=0)]).tolist()) == set(
            (scene.classes + 1).tolist()
        )
    assert map_names((1, 7)) == ["background", "1", "7"]


def test_the_command_line_writes_both_formats(tmp_path, capsys):
    sizes = ["--train", "3", "--test", "2", "--height", "60", "--width", "72", "--seed", "4"]
    assert make_scenes.main(["--output", str(tmp_path), *sizes]) == 0
    assert "3 + 2 scenes" in capsys.readouterr().out
    dataset = load_from_disk(tmp_path / "dataset")
    for split, count in (("train", 3), ("test", 2)):
        expected = list(scenes(split, count, 60, 72, seed=4))
        coco = json.loads((tmp_path / "coco" / "annotations" / f"instances_{split}.json").read_text())
        assert len(coco["images"]) == len(dataset[split]) == count
        assert [category["name"] for category in coco["categories"]] == map_names()[1:]
        for scene, row, entry in zip(expected, dataset[split], coco["images"]):
            image = np.asarray(PILImage.open(tmp_path / "coco" / split / entry["file_name"]))
            assert np.array_equal(image, scene.image) and np.array_equal(np.asarray(row["image"]), scene.image)
            assert np.array_equal(np.asarray(row["annotation"]), scene.segmentation_map)
            assert row["image_id"] == scene.name and row["objects"]["category"] == scene.digits.tolist()
            assert row["objects"]["bbox"] == scene.boxes.tolist()
            assert (entry["height"], entry["width"]) == (60, 72)
            here = [item for item in coco["annotations"] if item["image_id"] == entry["id"]]
            assert [item["category_id"] - 1 for item in here] == scene.digits.tolist()
            assert [item["bbox"] for item in here] == scene.boxes.tolist()
            for item, mask in zip(here, scene.masks):
                assert np.array_equal(mask_of(item["segmentation"]), mask) and item["area"] == mask.sum()
        assert len({item["id"] for item in coco["annotations"]}) == len(coco["annotations"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train", "0"], "at least 1 scene, got 0"),
        (["--seed", "-1"], "seed of scenes must be 0 or more, got -1"),
        (["--width", "20"], "width of scenes must be 36 to 320 px, got 20"),
        (["--digits", "3", "12"], "of the digits 0 to 9, got 3 12"),
        (["--height", "2000"], "height of scenes must be 36 to 427 px, got 2000"),
    ],
)
def test_impossible_scenes_are_refused(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        make_scenes.main(["--output", str(tmp_path / "scenes"), *flags])
    assert exit_info.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()


def test_scenes_do_not_mix_with_other_files(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        make_scenes.main(["--output", str(tmp_path)])
    assert "is not empty: choose another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_split_that_does_not_exist():
    with pytest.raises(ValueError, match="no split 'val' of scenes: choose from train, test"):
        scenes("val", 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_scenes_are_segmented_and_detected_with_pretrained_weights(task, digits_pretrained, tmp_path):
    """With random weights in place of the backbone's, the same heads find next to nothing."""
    task.make_scenes(tmp_path / "scenes")
    found = task.train(digits_pretrained, tmp_path / "scenes", tmp_path / "run")
    random = untrained(HiViTConfig.from_pretrained(digits_pretrained), tmp_path / "random")
    lost = task.evaluate_with(random, tmp_path / "run", tmp_path / "scenes", tmp_path / "exchanged")
    for name, (wanted, most) in THRESHOLDS[task.name].items():
        assert found[name] > wanted and lost[name] < most, (name, found, lost)
