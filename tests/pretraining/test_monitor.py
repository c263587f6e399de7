"""The monitor of pre-training: reconstructions of validation images."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hivit_hf.pretraining.monitor import reconstruction_grid
from hivit_hf.training.figures import figure_to_png


def test_reconstruction_grid_grays_the_masked_patches():
    images, mask = torch.zeros(1, 3, 8, 8), torch.tensor([[True, False, False, False]])
    figure = reconstruction_grid(images, mask, images, patch_size=4)
    row = 2 + 8 + 2  # below the original and two margins
    masked = figure.axes[0].images[0].get_array()[row : row + 8, 2:10]
    assert (abs(masked[:4, :4] - 0.55) < 1e-6).all()
    assert (masked[4:, :] == 0).all()
    assert (masked[:, 4:] == 0).all()


def test_reconstruction_grid_is_a_png_file_and_refuses_what_does_not_fit():
    images, mask = torch.rand(3, 3, 16, 16), torch.rand(3, 16) > 0.5
    figure = reconstruction_grid(images, mask, images, patch_size=4)
    assert figure_to_png(figure, dots_per_inch=50).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="bool_masked_pos"):
        reconstruction_grid(images, torch.zeros(3, 9, dtype=torch.bool), images, patch_size=4)
    with pytest.raises(ValueError, match="both have the shape"):
        reconstruction_grid(images, mask, images[:1], patch_size=4)


def test_the_knn_accuracy_of_a_single_image_is_refused(make_run, data, tmp_path):
    """Half of the images have known labels: there would be none."""
    few = pq.read_table(data / "0.parquet").slice(0, 3)
    (tmp_path / "few").mkdir()
    pq.write_table(few.append_column("label", pa.array([0, 1, 0])), tmp_path / "few" / "0.parquet")
    labeled = {"eval_dataset_name": str(tmp_path / "few"), "label_column_name": "label"}
    with pytest.raises(ValueError, match="takes two labeled images or more, got 1: raise --max_eval_samples"):
        make_run(max_eval_samples=1, **labeled)
    assert len(make_run(max_eval_samples=2, **labeled).validation.labels) == 2
