"""Images from the embedded set and from local folders in both forms, and the errors of folders that do not fit."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hamu.data import images
from hamu.data.sources import load_image_data, read_train_labels
from hamu.errors import DataError
from hamu.training.config import DataConfig

GOLDEN = np.load(Path(__file__).resolve().parents[1] / "data" / "golden_data.npz")
FEATURES = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})


def make_pixels(n_rows: int, seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_rows, side, side, 3), dtype=np.uint8)


def make_table(pixels: Any, labels: Any, **columns: str) -> pa.Table:
    """Rows in the form of CIFAR-10: PNG bytes in `img`, class numbers in `label`, and the names in the metadata."""
    rows = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = [columns.get("img", "img"), columns.get("label", "label")]
    table = pa.table([pa.array(rows, type=kind), pa.array(labels)], names=names)
    return table.replace_schema_metadata(FEATURES.arrow_schema.metadata)


def write_folder(folder: Path, seed: int = 0, **columns: str) -> Path:
    """A folder like the published CIFAR-10: plain_text/train-00000-of-00002.parquet and so on."""
    files = folder / "plain_text"
    files.mkdir(parents=True)
    for shard in range(2):
        table = make_table(make_pixels(6, seed + shard), np.arange(6) % 3, **columns)
        pq.write_table(table, files / f"train-0000{shard}-of-00002.parquet")
    test = make_table(make_pixels(4, seed + 9), np.array([0, 1, 2, 0]), **columns)
    pq.write_table(test, files / "test-00000-of-00001.parquet")
    return folder


def load(folder: Path | str, **settings: Any) -> Any:
    return load_image_data(DataConfig(dataset_name=str(folder), **settings))


def test_digits_are_the_golden_training_rows() -> None:
    data = load("digits")
    assert data.train_labels.tolist() == GOLDEN["split/digits1437/labels"].tolist()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() * data.scale == 1.0
    assert data.n_classes == 10
    assert np.array_equal(read_train_labels(DataConfig()), data.train_labels)


def test_digits_are_all_1797_rows_once() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    ours = np.concatenate((data.train_images, data.test_images)).reshape(1797, 64)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))


def test_parquet_folder_gives_the_pixels_that_were_written(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "cifar10"))
    expected = np.concatenate((make_pixels(6, 0), make_pixels(6, 1))).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train_images, expected)
    assert data.train_labels.tolist() == [0, 1, 2] * 4
    assert data.test_labels.tolist() == [0, 1, 2, 0]
    assert data.class_names == ("ant", "bee", "cat")
    scaled = expected / 255.0
    assert data.mean == pytest.approx(scaled.mean(axis=(0, 2, 3)), abs=5e-5)  # rounded to 4 digits
    assert data.std == pytest.approx(scaled.std(axis=(0, 2, 3)), abs=5e-5)
    assert data.provenance["train"]["columns"] == ["img", "label"]


def test_saved_form_loads_as_the_parquet_form_does(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "parquet")
    rows = {
        "train": [*make_pixels(6, 0), *make_pixels(6, 1)],
        "test": list(make_pixels(4, 9)),
    }
    labels = {"train": [0, 1, 2] * 4, "test": [0, 1, 2, 0]}
    saved = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"img": rows[split], "label": labels[split]}, features=FEATURES) for split in rows}
    )
    saved.save_to_disk(tmp_path / "saved")
    one, other = load(folder), load(tmp_path / "saved")
    assert one.sha256 == other.sha256
    assert one.class_names == other.class_names


def test_two_folders_of_one_name_are_not_confused(tmp_path: Path) -> None:
    readme = "---\nconfigs:\n- config_name: default\n  data_files: plain_text/*\n---\n"  # what makes `datasets` confuse them
    folders = [write_folder(tmp_path / parent / "cifar10", seed=seed) for parent, seed in (("a", 0), ("b", 50))]
    for folder in folders:
        (folder / "README.md").write_text(readme)
    first, second = (load(folder) for folder in folders)
    assert first.sha256 != second.sha256
    assert np.array_equal(second.train_images[:6], make_pixels(6, 50).transpose(0, 3, 1, 2))


def test_images_survive_pickling_and_are_plain_arrays(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "rows"))
    again = pickle.loads(pickle.dumps(data))
    assert again.sha256 == data.sha256
    assert np.array_equal(again.train_images, data.train_images)


def test_columns_can_be_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "rows", img="picture", label="kind")
    settings = {"dataset_prompt_field": "picture", "dataset_response_field": "kind"}
    assert load(folder, **settings).sha256 == load(write_folder(tmp_path / "usual")).sha256


def test_missing_column_names_the_columns_that_exist(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "rows", img="picture")
    with pytest.raises(DataError, match=r"no column 'img' or 'image'; it has picture, label: .*dataset_prompt_field"):
        load(folder)
    with pytest.raises(DataError, match=r"no column 'kind'; it has picture, label: .*dataset_response_field") as error:
        read_train_labels(DataConfig(dataset_name=str(folder), dataset_prompt_field="picture", dataset_response_field="kind"))
    assert "\n" not in str(error.value)


def test_missing_folder_split_subset_and_hub_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "rows")
    with pytest.raises(DataError, match="not an existing folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no split 'validation'; it has: test, train"):
        load(folder, dataset_split="validation")
    with pytest.raises(DataError, match="no subset 'full'; its folders are: plain_text"):
        load(folder, dataset_subset="full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet files"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"cannot load dataset 'uoft-cs/cifar10'.*or give a local folder"):
        load("cifar10", dataset_cache_dir=str(tmp_path / "cache"))  # the tests have no network


def test_split_in_two_subsets_must_be_chosen(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "rows")
    (folder / "plain_text").rename(folder / "one")
    write_folder(tmp_path / "more", seed=50)
    (tmp_path / "more" / "plain_text").rename(folder / "two")
    with pytest.raises(DataError, match=r"in 2 folders \(one, two\); name one with --dataset_subset"):
        load(folder)
    assert load(folder, dataset_subset="one").sha256 != load(folder, dataset_subset="two").sha256


def test_wrong_column_types_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "rows")
    with pytest.raises(DataError, match="holds int64 where images should be"):
        load(folder, dataset_prompt_field="label")
    with pytest.raises(DataError, match="where labels should be"):
        load(folder, dataset_response_field="img")


def column(pixels: Any) -> pa.ChunkedArray:
    return make_table(pixels, np.zeros(len(pixels), np.int64))["img"]


def test_images_of_several_sizes_need_a_size() -> None:
    mixed = column([*make_pixels(2, 0, side=8), *make_pixels(2, 0, side=6)])
    with pytest.raises(DataError, match=r"images of 2 sizes \(6x6, 8x8, \.\.\.\); give one with --img_size"):
        images.decode_images(mixed, name="rows")
    assert images.decode_images(mixed, name="rows", common_side=8).shape == (4, 3, 8, 8)
    assert images.decode_images(column(make_pixels(2, 0)), name="rows", common_side=4).shape == (2, 3, 8, 8)


def test_grey_images_have_one_channel_and_mixed_ones_three() -> None:
    grey = make_pixels(3, 1)[..., 0]
    assert np.array_equal(images.decode_images(column(grey), name="rows")[:, 0], grey)
    mixed = images.decode_images(column([*grey, *make_pixels(1, 2)]), name="rows")
    assert mixed.shape == (4, 3, 8, 8)
    assert np.array_equal(mixed[0, 2], grey[0])


def test_broken_image_is_named_by_row() -> None:
    rows = pa.chunked_array([pa.array([column(make_pixels(1, 0))[0].as_py()["bytes"], b"not an image"])])
    with pytest.raises(DataError, match="broken image in row 1"):
        images.decode_images(rows, name="rows")


def test_labels_by_name_are_numbered_in_order() -> None:
    labels, names = images.decode_labels(pa.chunked_array([["bee", "ant", "bee"]]), name="rows", class_names=None)
    assert labels.tolist() == [1, 0, 1]
    assert names == ("ant", "bee")
    with pytest.raises(DataError, match="label 'cow'"):
        images.decode_labels(pa.chunked_array([["cow"]]), name="rows", class_names=names)


@pytest.mark.parametrize(("labels", "message"), [([0, None], "without a label"), ([-1, 0], "label -1"), ([0.5], "double")])
def test_labels_that_name_no_class_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        images.decode_labels(pa.chunked_array([pa.array(labels)]), name="rows", class_names=None)


def test_pixel_cache_follows_content_and_survives_a_cut_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_CACHE_FROM_ROWS", 1)
    for seed in (0, 1, 0):
        pixels = make_pixels(3, seed)
        decoded = images.decode_cached(column(pixels), name="rows", cache_dir=str(tmp_path))
        assert np.array_equal(decoded, pixels.transpose(0, 3, 1, 2))
    files = sorted((tmp_path / "pixels").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    decoded = images.decode_cached(column(make_pixels(3, 1)), name="rows", cache_dir=str(tmp_path))
    assert np.array_equal(decoded, make_pixels(3, 1).transpose(0, 3, 1, 2))
