"""Folders that the tests of probing share."""

from pathlib import Path

import pytest

from support.digit_folders import save_digits, save_random_encoder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The digits as saved datasets: all, a few, and with several labels per image."""
    return save_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def random_encoder(tmp_path_factory) -> Path:
    return save_random_encoder(tmp_path_factory.mktemp("random_encoder"))
