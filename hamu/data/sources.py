"""Where images come from: the embedded digits, a local folder, or a dataset of the Hugging Face hub.

    data = load_image_data(config.data)  # digits, uoft-cs/cifar10, shared/data/cifar10, ...

The rows end up as uint8 arrays in memory, so that a batch is an index selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hamu.data.hashing import sha256_arrays
from hamu.data.images import decode_cached, decode_labels
from hamu.data.tables import OpenTable, open_table
from hamu.errors import DataError

if TYPE_CHECKING:
    from hamu.training.config import DataConfig

DIGITS = "digits"
HUB_ALIASES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_N_DIGITS_TRAIN = 1437
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Images and labels of a dataset: numpy and plain Python only, so that it can be shared between processes.

    Arrays that come back from a shared store are read-only: never write into one.
    """

    name: str
    train_images: np.ndarray
    """(n, channels, height, width), uint8."""
    train_labels: np.ndarray
    """(n,), int64 in [0, n_classes)."""
    test_images: np.ndarray
    """(m, channels, height, width), uint8."""
    test_labels: np.ndarray
    """(m,), int64."""
    n_classes: int
    class_names: tuple[str, ...] = ()
    """By class number; empty where the dataset states none."""
    scale: float = 1.0 / 255.0
    """What a pixel is multiplied by to lie in [0, 1]."""
    mean: tuple[float, ...]
    """Per channel, of the scaled training pixels."""
    std: tuple[float, ...]
    """Per channel, of the scaled training pixels; never 0."""
    sha256: str
    """64 hex digits over the four arrays."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from: source, split and column names, numbers of rows."""

    @property
    def n_bytes(self) -> int:
        """Of its four arrays."""
        return sum(array.nbytes for array in (self.train_images, self.train_labels, self.test_images, self.test_labels))

    @property
    def n_channels(self) -> int:
        """Number of channels, 1 or 3."""
        return int(self.train_images.shape[1])

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.train_images.shape[2]), int(self.train_images.shape[3])


def make_image_data(
    *,
    name: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    n_classes: int,
    class_names: tuple[str, ...] = (),
    scale: float = 1.0 / 255.0,
    provenance: dict[str, Any] | None = None,
) -> ImageData:
    """Build an `ImageData` from its arrays: adds the statistics of the training pixels (4 digits) and the hash."""
    mean, std = _pixel_statistics(train_images, scale)
    return ImageData(
        name=name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        n_classes=n_classes,
        class_names=class_names,
        scale=scale,
        mean=mean,
        std=std,
        sha256=sha256_arrays(train_images, train_labels, test_images, test_labels),
        provenance={**(provenance or {}), "n_train": len(train_labels), "n_test": len(test_labels)},
    )


def load_image_data(data: DataConfig, *, img_size: int | None = None) -> ImageData:
    """Load the dataset that the settings name: `digits`, a local folder, or a dataset on the hub or in its cache.

    `digits`, `cifar10` and `cifar100` mean the embedded set and the hub's; a folder of such a name is `./cifar10`.

    Args:
        data: dataset_name, dataset_subset, dataset_split, dataset_prompt_field (images), dataset_response_field
            (labels), the same with `test_` (default: as for training, split "test"), dataset_cache_dir.
        img_size: pixels a side that images of several sizes are resized to here; images of one size stay as they are.

    Raises:
        DataError: there is no such dataset, split or column, or the rows are not images with class labels.
    """
    if data.dataset_name == DIGITS:
        return _load_digits()
    train, image_column, label_column = _open_train(data)
    test, test_image_column, test_label_column = _open_test(data)
    rows = train.read([image_column, label_column])
    names = train.class_names(label_column)
    labels, class_names = decode_labels(rows[label_column], name=train.name, class_names=names)
    images = decode_cached(rows[image_column], name=train.name, common_side=img_size, cache_dir=data.dataset_cache_dir)
    rows = test.read([test_image_column, test_label_column])
    test_labels, _ = decode_labels(rows[test_label_column], name=test.name, class_names=class_names)
    test_images = decode_cached(
        rows[test_image_column], name=test.name, size=(images.shape[2], images.shape[3]), n_channels=images.shape[1],
        cache_dir=data.dataset_cache_dir,
    )  # fmt: skip
    n_classes = len(class_names) if class_names else int(labels.max()) + 1
    if test_labels.max() >= n_classes:
        raise DataError(f"{test.name} has the label {test_labels.max()}, but training has {n_classes} classes")
    return make_image_data(
        name=data.dataset_name,
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        n_classes=n_classes,
        class_names=class_names or (),
        provenance={
            "train": {**train.source, "columns": [image_column, label_column]},
            "test": {**test.source, "columns": [test_image_column, test_label_column]},
        },
    )


def read_train_labels(data: DataConfig) -> np.ndarray:
    """Return the training labels (n,) without decoding an image: enough to check columns, splits and the forget set.

    Raises:
        DataError: as `load_image_data`, but for the images themselves.
    """
    if data.dataset_name == DIGITS:
        return _load_digits().train_labels
    train, _, label_column = _open_train(data)
    _open_test(data)
    names = train.class_names(label_column)
    return decode_labels(train.read([label_column])[label_column], name=train.name, class_names=names)[0]


def _open_train(data: DataConfig) -> tuple[OpenTable, str, str]:
    name = HUB_ALIASES.get(data.dataset_name, data.dataset_name)
    table = open_table(
        name, data.dataset_split, subset=data.dataset_subset, cache_dir=data.dataset_cache_dir, revision=data.dataset_revision
    )
    return (
        table,
        table.column(data.dataset_prompt_field, _IMAGE_COLUMNS, "dataset_prompt_field"),
        table.column(data.dataset_response_field, _LABEL_COLUMNS, "dataset_response_field"),
    )


def _open_test(data: DataConfig) -> tuple[OpenTable, str, str]:
    name = data.test_dataset_name or data.dataset_name
    subset = data.test_dataset_subset or (None if data.test_dataset_name else data.dataset_subset)
    split = data.test_dataset_split or "test"
    revision = None if data.test_dataset_name else data.dataset_revision
    table = open_table(HUB_ALIASES.get(name, name), split, subset=subset, cache_dir=data.dataset_cache_dir, revision=revision)
    image_field = data.test_dataset_prompt_field or data.dataset_prompt_field
    label_field = data.test_dataset_response_field or data.dataset_response_field
    return (
        table,
        table.column(image_field, _IMAGE_COLUMNS, "test_dataset_prompt_field"),
        table.column(label_field, _LABEL_COLUMNS, "test_dataset_response_field"),
    )


def _load_digits() -> ImageData:
    """The 1,797 digits of 8x8 pixels inside scikit-learn: 1,437 to train on, 360 to test, in a fixed random order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images.astype(np.uint8)[order, None]
    labels = digits.target.astype(np.int64)[order]
    return make_image_data(
        name=DIGITS,
        train_images=images[:_N_DIGITS_TRAIN],
        train_labels=labels[:_N_DIGITS_TRAIN],
        test_images=images[_N_DIGITS_TRAIN:],
        test_labels=labels[_N_DIGITS_TRAIN:],
        n_classes=10,
        class_names=tuple("0123456789"),
        scale=1.0 / 16.0,
        provenance={"source": "sklearn.datasets.load_digits", "order": "numpy default_rng(0)"},
    )


def _pixel_statistics(images: np.ndarray, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's scaled pixels, from exact counts of the 256 values."""
    n_channels = images.shape[1]
    counts = np.zeros((n_channels, 256), dtype=np.int64)
    for start in range(0, len(images), _CHUNK_ROWS):
        for channel in range(n_channels):
            counts[channel] += np.bincount(images[start : start + _CHUNK_ROWS, channel].ravel(), minlength=256)
    values = np.arange(256) * scale
    shares = counts / counts.sum(axis=1, keepdims=True)
    means = shares @ values
    deviations = np.sqrt((shares * (values - means[:, None]) ** 2).sum(axis=1))
    # Images of one value have no spread to divide by; they are shifted only.
    return (
        tuple(round(float(mean), 4) for mean in means),
        tuple(round(float(deviation), 4) or 1.0 for deviation in deviations),
    )
