"""The vision task: which rows a batch holds, how they are normalised, and that shared data is never written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu.data.sources import ImageData, make_image_data
from hamu.data.splits import ForgetSet, draw_forget_set
from hamu.errors import CheckpointError, ConfigError, DataError
from hamu.tasks.base import SPLITS
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.config import TrainConfig


def make_data(n_channels: int = 3, side: int = 8, n_rows: int = 40) -> ImageData:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (n_rows, n_channels, side, side), dtype=np.uint8),
        "train_labels": np.arange(n_rows) % 4,
        "test_images": rng.integers(0, 256, (12, n_channels, side, side), dtype=np.uint8),
        "test_labels": np.arange(12) % 4,
    }
    for array in arrays.values():
        array.flags.writeable = False  # as arrays of a shared store are
    return make_image_data(name="noise", n_classes=4, **arrays)


def make_task(data: ImageData | None = None, *, rho: float = 0.0, **settings: Any) -> VisionTask:
    data = data or make_data()
    return VisionTask(data, draw_forget_set(data.train_labels, forget_class=1, rho=rho, seed=0), **settings)


def normalised(data: ImageData, images: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in (data.mean, data.std))
    return (images * data.scale - mean) / std


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_batches_hold_the_rows_of_their_split_in_order(rho: float) -> None:
    task = make_task(rho=rho)
    data, chosen = task.data, task.forget_set
    rows = {
        "retain": chosen.retain,
        "forget": chosen.forget,
        "train": np.concatenate((chosen.retain, chosen.forget)),
    }
    for split, numbers in rows.items():
        batch = task.batch(split, torch.arange(task.n_rows(split)))
        assert batch.n_rows == len(numbers)
        assert batch.labels.tolist() == data.train_labels[numbers].tolist()
        # float32, one product and one sum
        assert batch.inputs.numpy() == pytest.approx(normalised(data, data.train_images[numbers]), abs=1e-5)
    batch = task.batch("test", torch.tensor([3, 1]))
    assert batch.inputs.numpy() == pytest.approx(normalised(data, data.test_images[[3, 1]]), abs=1e-5)


def test_split_sizes_and_unknown_split() -> None:
    task = make_task()
    assert {split: task.n_rows(split) for split in SPLITS} == {"retain": 30, "forget": 10, "test": 12, "train": 40}
    with pytest.raises(DataError, match="unknown split 'retian'; did you mean 'retain'"):
        task.batch("retian", torch.arange(2))


def test_batch_without_rows_is_allowed() -> None:
    task = make_task()
    batch = task.batch("forget", torch.empty(0, dtype=torch.int64))
    assert batch.inputs.shape == (0, 3, 8, 8)
    assert batch.n_rows == 0


def test_read_only_data_gives_no_warning_no_copy_and_is_not_written() -> None:
    data = make_data()
    before = data.train_images.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = make_task(data)
    assert task._tables["train"][0].data_ptr() == data.train_images.__array_interface__["data"][0]
    task.batch("retain", torch.arange(30)).inputs.zero_()
    task.batch("retain", torch.arange(30)).labels.zero_()
    assert np.array_equal(data.train_images, before)
    assert data.train_labels.max() == 3


def test_batches_and_models_are_channels_last_when_asked() -> None:
    for channels_last in (True, False):
        task = make_task(channels_last=channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert task.batch("retain", torch.arange(4)).inputs.is_contiguous(memory_format=layout)
        convolutions = [weight for weight in task.new_model(0).parameters() if weight.ndim == 4]
        assert all(weight.is_contiguous(memory_format=layout) for weight in convolutions)


def test_layout_does_not_change_the_numbers() -> None:
    logits = []
    for channels_last in (True, False):
        task = make_task(channels_last=channels_last)
        logits.append(task.logits(task.new_model(1).eval(), task.batch("retain", torch.arange(8))))
    # another order of float32 sums through 20 layers
    assert logits[0].detach().numpy() == pytest.approx(logits[1].detach().numpy(), rel=1e-4, abs=1e-4)


def test_grey_images_are_repeated_for_a_colour_model() -> None:
    data = make_data(n_channels=1, side=32)
    task = make_task(data, model_name="torchvision/shufflenet_v2_x0_5")
    images = task.batch("retain", torch.arange(2)).inputs
    assert images.shape == (2, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = normalised(data, data.train_images[task.forget_set.retain[:2]])
    assert all(images[:, channel].numpy() == pytest.approx(expected[:, 0], abs=1e-5) for channel in range(3))
    assert task.logits(task.new_model(0).eval(), task.batch("test", torch.arange(2))).shape == (2, 4)


def test_img_size_resizes_batches() -> None:
    assert make_task(img_size=16).batch("retain", torch.arange(2)).inputs.shape == (2, 3, 16, 16)


def test_row_scores_are_per_row_and_do_not_depend_on_the_batch() -> None:
    task = make_task()
    model = task.new_model(0).eval()
    whole = task.batch("retain", torch.arange(30))
    scores = task.row_scores(model, whole)
    parts = [task.batch("retain", positions) for positions in torch.arange(30).split(7)]
    split = [task.row_scores(model, part) for part in parts]
    for name in ("loss", "correct", "entropy", "min_k"):
        values = getattr(scores, name)
        assert values.shape == (30,)
        assert values.dtype == torch.float64
        assert not values.requires_grad
        # convolutions of another batch size may sum in another order
        assert torch.cat([getattr(part, name) for part in split]).numpy() == pytest.approx(values.numpy(), abs=1e-5)
    assert torch.equal(scores.min_k, -scores.loss)


def test_saved_model_loads_into_the_task(tmp_path: Path) -> None:
    task = make_task()
    model = task.new_model(4).eval()
    task.save_model(model, tmp_path, {"seed": 4})
    batch = task.batch("test", torch.arange(12))
    assert torch.equal(task.logits(task.load_model(tmp_path).eval(), batch), task.logits(model, batch))


def test_model_of_another_dataset_is_refused(tmp_path: Path) -> None:
    task = make_task()
    task.save_model(task.new_model(0), tmp_path, {})
    with pytest.raises(CheckpointError, match="gives 4 classes, but the task has 6; .*num_labels"):
        make_task(n_classes=6).load_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not take 1-channel images of 8x8 pixels") as error:
        make_task(make_data(n_channels=1)).load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_the_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_labels is 2, but 'noise' has 4 classes"):
        make_task(n_classes=2)
    with pytest.raises(ConfigError, match="k_pct is 0"):
        make_task(k_pct=0.0)
    with pytest.raises(DataError, match="names row 99, but there are 40"):
        VisionTask(make_data(), ForgetSet(forget=np.array([99]), retain=np.arange(40)))
    grey = make_task(make_data(n_channels=1))
    grey.save_model(grey.new_model(0), tmp_path, {})
    with pytest.raises(ConfigError, match="takes 1-channel images, but 'noise' has 3"):
        make_task(model_name=str(tmp_path))


def test_task_for_takes_forget_set_and_model_of_the_configuration() -> None:
    data = make_data()
    config = TrainConfig.from_flat(
        {
            "method": "hamu-q",
            "forget_class": 2,
            "rho": 0.5,
            "seed": 9,
            "split_ratio": 0.2,
            "img_size": 16,
            "num_labels": 5,
        }
    )
    task = task_for(config, data)
    expected = draw_forget_set(data.train_labels, forget_class=2, rho=0.5, seed=9, split_ratio=0.2)
    assert task.forget_set.sha256 == expected.sha256
    assert task.logits(task.new_model(0), task.batch("retain", torch.arange(3))).shape == (3, 5)
    assert task.batch("retain", torch.arange(3)).inputs.shape == (3, 3, 16, 16)


def test_images_are_normalised_as_the_start_model_was_trained(tmp_path: Path) -> None:
    task = make_task()
    task.save_model(task.new_model(0), tmp_path, {})
    said = json.loads((tmp_path / "record.json").read_text())
    assert said["normalisation"] == {"mean": list(task.data.mean), "std": list(task.data.std), "scale": 1 / 255}
    (tmp_path / "record.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}))
    data = task.data
    rows = data.test_images[:4] * data.scale
    expected = (rows - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.1, 0.2, 0.3])[:, None, None]
    for settings in ({"model_name": str(tmp_path)}, {"start": tmp_path}):
        published = make_task(data, **settings)
        assert published.batch("test", torch.arange(4)).inputs.numpy() == pytest.approx(expected, abs=1e-5)  # float32
    # what it says is kept with a model made from it
    published.save_model(published.new_model(0), tmp_path / "made", {})
    assert make_task(data, start=tmp_path / "made").mean == (0.5, 0.4, 0.3)


def test_grey_images_take_a_colour_models_normalisation_channel_by_channel(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 2, 4]}))
    data = make_data(n_channels=1, side=32)
    images = make_task(data, model_name="torchvision/shufflenet_v2_x0_5", start=tmp_path).batch("test", torch.arange(2)).inputs
    for channel, (mean, std) in enumerate(((0.5, 1), (0.4, 2), (0.3, 4))):
        expected = (data.test_images[:2, 0] * data.scale - mean) / std
        assert images[:, channel].numpy() == pytest.approx(expected, abs=1e-5)  # float32


@pytest.mark.parametrize(
    ("said", "mean"),
    [
        ({"do_normalize": False, "image_mean": [0.5]}, (0.0,)),
        ({"size": 8}, None),
        ({"image_mean": 0.5, "image_std": 0.1}, (0.5,)),
    ],
)
def test_what_a_preprocessor_file_says_is_taken(tmp_path: Path, said: dict[str, Any], mean: tuple[float, ...] | None) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    task = make_task(start=tmp_path)
    assert task.mean == (task.data.mean if mean is None else mean)


@pytest.mark.parametrize("said", [{"image_mean": [1, 2], "image_std": [1, 2]}, {"image_mean": "x", "image_std": [0]}, [1]])
def test_a_normalisation_that_cannot_be_is_refused(tmp_path: Path, said: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError) as error:
        make_task(start=tmp_path)
    assert "mend" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_called_resnet20_is_not_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    task.save_model(task.new_model(0), tmp_path / "resnet20", {"normalisation": {"mean": [0.5], "std": [1.0]}})
    monkeypatch.chdir(tmp_path)
    assert make_task().mean == task.mean
