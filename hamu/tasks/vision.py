"""Image classification: a dataset in memory, a forget set, and a classifier by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hamu.data.sources import ImageData
from hamu.data.splits import ForgetSet, draw_forget_set
from hamu.errors import CheckpointError, ConfigError
from hamu.hub import one_line
from hamu.models.classifiers import build_classifier, input_shape, load_classifier, logits_of, save_classifier
from hamu.models.normalisation import NORMALISATION, input_statistics
from hamu.tasks.base import RowsInMemory

if TYPE_CHECKING:
    from hamu.training.config import TrainConfig


class VisionTask(RowsInMemory):
    """Images of a dataset, normalised by its training pixels, and a classifier for them."""

    def __init__(
        self,
        data: ImageData,
        forget_set: ForgetSet,
        *,
        model_name: str = "resnet20",
        n_classes: int | None = None,
        img_size: int | None = None,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        k_pct: float = 0.1,
        start: str | Path | None = None,
    ) -> None:
        """Take the data as it is: read-only arrays of a shared store are neither copied (on the CPU) nor written into.

        Args:
            data: images and labels.
            forget_set: rows of the training split.
            model_name: as `build_classifier`.
            n_classes: outputs of the model, at least the data's classes; None: as many.
            img_size: pixels a side that batches are resized to (bilinear); None: as the model states, else the data's.
            device: of batches and models.
            channels_last: memory layout of batches and models; about 1.3x as fast on a CPU.
            k_pct: share of a row's labels that min-k averages, in (0, 1]; of one label a row it is always that one.
            start: folder of the model that will be loaded, where it is not `model_name`: its images are normalised as that
                model says (`input_statistics`). A model that says nothing gets the data's own mean and std.

        Raises:
            ConfigError: fewer outputs than classes, `k_pct` out of range, or colour images for a grey model.
            CheckpointError: the model's normalisation has another number of channels than its images.
        """
        if n_classes is not None and n_classes < data.n_classes:
            raise ConfigError(f"num_labels is {n_classes}, but {data.name!r} has {data.n_classes} classes; give as many")
        if not 0.0 < k_pct <= 1.0:
            raise ConfigError(f"k_pct is {k_pct}; it is a share of the labels: give more than 0, at most 1")
        super().__init__(
            name=data.name,
            n_classes=n_classes or data.n_classes,
            forget_set=forget_set,
            train=(_tensor(data.train_images), _tensor(data.train_labels).long()),
            test=(_tensor(data.test_images), _tensor(data.test_labels).long()),
            device=device,
        )
        self.data, self.model_name, self.k_pct = data, model_name, k_pct
        self.channels_last = channels_last
        self.n_channels, native_side = input_shape(model_name, n_channels=data.n_channels)
        if self.n_channels != data.n_channels and data.n_channels != 1:
            raise ConfigError(
                f"model {model_name!r} takes {self.n_channels}-channel images, but {data.name!r} has "
                f"{data.n_channels}; use 'resnet20'"
            )
        self.default_side = native_side or data.img_size[0]
        """Pixels a side that batches have where no `img_size` is given."""
        side = img_size or native_side
        self.resize_to = (side, side) if side is not None and (side, side) != data.img_size else None
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        # (pixel * scale - mean) / std as one product and one sum
        self.mean, self.std = input_statistics(str(start or model_name)) or (data.mean, data.std)
        if len(self.mean) not in {1, data.n_channels, self.n_channels}:
            raise CheckpointError(
                f"model {str(start or model_name)!r} normalises {len(self.mean)} channels, but takes {self.n_channels}-channel "
                "images; mend its preprocessor_config.json"
            )
        std = np.asarray(self.std)
        self._factor = self._per_channel(data.scale / std)
        self._shift = self._per_channel(-np.asarray(self.mean) / std)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Normalise stored pixels (n, channels, h, w) uint8 into the model's images, float32.

        The result has the model's channels (grey is repeated) and size, in the task's memory layout.
        """
        if len(self.mean) > inputs.shape[1]:  # grey pixels, for a model that normalises each of its channels in its own way
            inputs = inputs.expand(-1, len(self.mean), -1, -1)
        images = inputs.to(torch.float32, memory_format=self._layout)  # a copy, so that it may be written into
        images.mul_(self._factor).add_(self._shift)
        if self.resize_to is not None:
            images = functional.interpolate(images, size=self.resize_to, mode="bilinear", align_corners=False)
        if images.shape[1] != self.n_channels:
            images = images.expand(-1, self.n_channels, -1, -1).contiguous(memory_format=self._layout)
        return images

    def new_model(self, seed: int) -> nn.Module:
        """Return the classifier to train from: new weights drawn from `seed`, or those that its name brings."""
        side = (self.resize_to or self.data.img_size)[0]
        return self._placed(
            build_classifier(self.model_name, n_classes=self.n_classes, n_channels=self.n_channels, img_size=side, seed=seed)
        )

    def load_model(self, path: str | Path) -> nn.Module:
        """Return the classifier saved in a folder.

        Raises:
            CheckpointError: there is none, or it has another number of classes or channels than the task.
        """
        model = load_classifier(path)
        side = self.resize_to or self.data.img_size
        with torch.no_grad():
            try:
                shape = tuple(logits_of(model, torch.zeros(1, self.n_channels, *side)).shape)
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"the model in {str(path)!r} does not take {self.n_channels}-channel images of {side[0]}x{side[1]} "
                    f"pixels ({one_line(error)}); give the model of this dataset, or --img_size"
                ) from error
        if shape != (1, self.n_classes):
            raise CheckpointError(
                f"the model in {str(path)!r} gives {shape[-1]} classes, but the task has {self.n_classes}; "
                "give the model of this dataset, or --num_labels"
            )
        return self._placed(model)

    def save_model(self, model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
        """Write a model folder that its own library reads, with `record` and the normalisation used in its `record.json`."""
        used = {"mean": list(self.mean), "std": list(self.std), "scale": self.data.scale}
        save_classifier(model, path, {**record, NORMALISATION: used})

    def facts(self) -> dict[str, Any]:
        """The data's classes and the pixels a side of its batches."""
        return {"n_classes": self.data.n_classes, "side": self.default_side}

    def _per_channel(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(device=self.device, memory_format=self._layout)  # type: ignore[call-overload]


def task_for(
    config: TrainConfig, data: ImageData, *, device: str | torch.device = "cpu", start: str | Path | None = None
) -> VisionTask:
    """Build the vision task of a configuration: draws its forget set and takes its model name.

    Args:
        config: the settings.
        data: the rows.
        device: of batches and models.
        start: folder of the model that will be loaded, which may state how its images are normalised; None: `model_name`.

    Raises:
        ConfigError, DataError: as `draw_forget_set` and `VisionTask`.
    """
    forget_set = draw_forget_set(
        data.train_labels,
        forget_class=config.data.forget_class,
        rho=config.data.hard_probability,
        seed=config.run.seed,
        split_ratio=config.data.split_ratio,
    )
    return VisionTask(
        data,
        forget_set,
        model_name=config.run.model_name,
        n_classes=config.run.num_labels,
        img_size=config.run.img_size,
        device=device,
        k_pct=config.data.k_pct,
        start=start,
    )


def _tensor(array: np.ndarray) -> Tensor:
    """Wrap an array without a copy; torch warns when it is read-only, but nothing here writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))
