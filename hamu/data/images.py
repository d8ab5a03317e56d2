"""Columns of encoded images and of labels, decoded into arrays that sit in memory."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from hamu.errors import DataError
from hamu.hub import one_line

_GREY_MODES = ("1", "L")
_CACHE_FROM_ROWS = 20_000  # decoding takes about 0.1 ms a row: below this, the cache is not worth its disk


def decode_images(
    column: pa.ChunkedArray,
    *,
    name: str,
    size: tuple[int, int] | None = None,
    n_channels: int | None = None,
    common_side: int | None = None,
) -> np.ndarray:
    """Decode a column of PNG, JPEG, ... images.

    Args:
        column: (n,), structs with `bytes` (as `datasets.Image`), or binary.
        name: of the dataset, for messages.
        size: (height, width) in pixels to resize to (bilinear); None: the images' own, which must then be one.
        n_channels: 1 (grey) or 3 (RGB); None: 1 where all images are grey, else 3.
        common_side: pixels a side to resize to where `size` is None and the images come in several sizes.

    Returns:
        (n, channels, height, width), uint8.

    Raises:
        DataError: the column holds no images, one is broken, or they come in several sizes no size is given.
    """
    kind = column.type
    if not (_is_binary(kind) or (pa.types.is_struct(kind) and "bytes" in [part.name for part in kind])):
        raise DataError(f"{name} holds {kind} where images should be; name their column with --dataset_prompt_field")
    if len(column) == 0:
        raise DataError(f"{name} has no rows; it needs at least one")
    if size is None or n_channels is None:
        sizes, modes = set(), set()
        for image in _open_images(column, name):  # reads headers only
            sizes.add((image.height, image.width))
            modes.add(image.mode)
        if size is None and len(sizes) > 1 and common_side is not None:
            size = (common_side, common_side)
        if size is None and len(sizes) > 1:
            few = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise DataError(f"{name} has images of {len(sizes)} sizes ({few}, ...); give one with --img_size")
        size = size or sizes.pop()
        n_channels = n_channels or (1 if modes <= set(_GREY_MODES) else 3)
    pixels = np.empty((len(column), n_channels, *size), dtype=np.uint8)
    for row, image in enumerate(_open_images(column, name)):
        try:
            image = image.convert("L" if n_channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name} has a broken image in row {row} ({one_line(error)}); mend or drop the row") from error
        if (image.height, image.width) != size:
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        array = np.asarray(image)
        pixels[row] = array if n_channels == 1 else array.transpose(2, 0, 1)
    return pixels


def decode_cached(
    column: pa.ChunkedArray,
    *,
    name: str,
    size: tuple[int, int] | None = None,
    n_channels: int | None = None,
    common_side: int | None = None,
    cache_dir: str | None = None,
) -> np.ndarray:
    """As `decode_images`; a large column's pixels are kept in `cache_dir`, under a hash of the encoded images."""

    def decode() -> np.ndarray:
        return decode_images(column, name=name, size=size, n_channels=n_channels, common_side=common_side)

    if cache_dir is None or len(column) < _CACHE_FROM_ROWS:
        return decode()
    file = Path(cache_dir) / "pixels" / f"{_hash_of(column, f'{size} {n_channels} {common_side}')}.npy"
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):  # missing, or cut short: made anew
        pixels = decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        np.save(stream, pixels)
    os.replace(scratch, file)
    return pixels


def decode_labels(
    column: pa.ChunkedArray, *, name: str, class_names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Decode a column of class numbers, or of class names.

    Args:
        column: (n,), integers >= 0, or strings.
        name: of the dataset, for messages.
        class_names: known names in class order; strings without them are numbered in sorted order.

    Returns:
        Labels (n,) int64, and the class names (None for integers without names).

    Raises:
        DataError: a label is missing, negative, of an unknown class, or of another type.
    """
    if column.null_count:
        raise DataError(f"{name} has {column.null_count} rows without a label; drop them")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        class_names = class_names or tuple(sorted(pc.unique(column).to_pylist()))
        numbers = pc.index_in(column, value_set=pa.array(class_names, type=column.type))
        if numbers.null_count:
            strange = pc.filter(column, pc.is_null(numbers))[0].as_py()
            raise DataError(f"{name} has the label {strange!r}, which is none of the {len(class_names)} training classes")
        return numbers.to_numpy().astype(np.int64), class_names
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{name} holds {column.type} where labels should be; name them with --dataset_response_field")
    labels = column.to_numpy().astype(np.int64)
    if labels.size and labels.min() < 0:
        raise DataError(f"{name} has the label {labels.min()}; classes are numbered from 0: drop rows without a class")
    if class_names is not None and labels.size and labels.max() >= len(class_names):
        raise DataError(f"{name} has the label {labels.max()}, but only {len(class_names)} classes")
    return labels, class_names


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open_images(column: pa.ChunkedArray, name: str) -> Iterator[Image.Image]:
    row = 0
    for chunk in column.chunks:
        for value in chunk if _is_binary(chunk.type) else chunk.field("bytes"):
            if not value.is_valid:
                raise DataError(f"{name} has no image bytes in row {row}; save the dataset with the images embedded")
            try:
                image = Image.open(io.BytesIO(value.as_buffer()))
            except (UnidentifiedImageError, OSError) as error:
                kind = type(error).__name__
                raise DataError(f"{name} has a broken image in row {row} ({kind}); mend or drop the row") from error
            yield image
            row += 1


def _hash_of(column: pa.ChunkedArray, settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for chunk in column.chunks:
        for value in chunk if _is_binary(chunk.type) else chunk.field("bytes"):
            encoded = value.as_buffer() if value.is_valid else b""
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()[:32]
