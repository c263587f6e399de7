"""Scenes for the tests of segmentation."""

import pytest

from scenes.data import scenes_dataset


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory) -> str:
    """Sizes that are no multiples of the patch size."""
    folder = tmp_path_factory.mktemp("scenes") / "dataset"
    scenes_dataset({"train": 10, "test": 2}, height_px=60, width_px=75).save_to_disk(folder)
    return str(folder)
