"""ResNet-20 for small images, in the form of Hugging Face's `resnet`.

The published HAMU checkpoints are such folders: model type `resnet`, basic layers, a 3x3 stride-1 stem without pooling.
Only the stem differs from the library's class, so keys and `config.json` are the library's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


class ResNet20(ResNetForImageClassification):
    """ResNet-20 (He et al., 2015): 3 stages of 3 basic layers, 16, 32 and 64 channels, 1x1-convolution shortcuts.

    65 parameter tensors and 272,474 parameters at 3 channels and 10 classes. Takes images (n, channels, h, w) of any
    size from 8x8 on and returns an output with `.logits` (n, classes). `from_pretrained` and `save_pretrained` work as
    for any transformers model.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, padding=1, bias=False
        )
        stem.pooler = nn.Identity()  # type: ignore[assignment]
        self.post_init()  # initialises the new convolution; the other modules are marked as done


def resnet20_config(*, n_classes: int, n_channels: int = 3) -> ResNetConfig:
    """Return the configuration of a ResNet-20 for `n_classes` classes and images of `n_channels` channels."""
    settings: dict[str, Any] = {
        "num_channels": n_channels,
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [3, 3, 3],
        "layer_type": "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "num_labels": n_classes,
    }
    return ResNetConfig(**settings)
