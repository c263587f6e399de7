"""Opening and decoding: which formats are read, and which values."""

import numpy as np
import pytest
from PIL import Image

from hivit_hf.data.decoding import UnreadableImageError, decode, open_image
from hivit_hf.data.transforms import RandomCrop
from support.nonsense import encoded, exotic_files, floats_with, no_process, noise


@pytest.mark.parametrize("name", exotic_files())
def test_other_formats_are_refused_and_start_no_program(name, monkeypatch):
    started = no_process(monkeypatch)
    with pytest.raises(UnreadableImageError, match=r"^no image: it is no JPEG, PNG, GIF, WebP, BMP or TIFF file"):
        RandomCrop(16)(exotic_files()[name], 0)
    assert not started


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_formats_that_are_read(name):
    assert decode(open_image(encoded(noise(30, 20), name), 10**6), 3).shape == (3, 20, 30)


def test_a_tiff_with_a_nan_is_refused_wherever_it_stands():
    for file in floats_with(np.nan):
        with pytest.raises(UnreadableImageError, match=r"^some of its values are no numbers \(NaN\)"):
            decode(open_image(file, 10**6), 3)
    assert decode(open_image(encoded(Image.new("F", (9, 9), 0.5), "TIFF"), 10**6), 3).unique().tolist() == [128]
