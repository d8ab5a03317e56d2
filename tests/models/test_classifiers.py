"""Classifiers by name: sizes, seeds, and the way to a folder and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hamu.errors import CheckpointError, ConfigError
from hamu.models.classifiers import build_classifier, input_shape, load_classifier, logits_of, save_classifier
from hamu.models.resnet import ResNet20, resnet20_config

SHUFFLENET = "torchvision/shufflenet_v2_x0_5"


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def save_tiny_vit(folder: Path) -> Path:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    config.num_labels = 5
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_resnet20_has_65_tensors_and_272474_parameters() -> None:
    model = ResNet20(resnet20_config(n_classes=10))
    assert len(list(model.parameters())) == 65
    assert sum(parameter.numel() for parameter in model.parameters()) == 272_474


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_resnet20_takes_images_of_8_and_32_pixels(side: int, n_channels: int) -> None:
    model = build_classifier("resnet20", n_classes=7, n_channels=n_channels, img_size=side)
    logits = logits_of(model, torch.zeros(2, n_channels, side, side))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resnet20_keeps_the_resolution_in_its_stem() -> None:
    model = ResNet20(resnet20_config(n_classes=10))
    assert model.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32, 32)


def test_resnet20_stem_is_initialised_as_the_other_convolutions() -> None:
    stem = ResNet20(resnet20_config(n_classes=10)).resnet.embedder.embedder.convolution.weight
    # He's: sqrt(2 / fan_out) with fan_out 16 * 9; 432 values know their spread to about 3.4 %, so 15 % is above 4 sigma
    assert stem.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.15)


def test_resnet20_round_trips_through_pretrained_folder(tmp_path: Path) -> None:
    model = build_classifier("resnet20", n_classes=10, seed=3)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert same_weights(model, ResNet20.from_pretrained(tmp_path))
    assert same_weights(model, load_classifier(tmp_path))


def test_published_resnet_folder_is_known_by_its_stem(tmp_path: Path) -> None:
    model = build_classifier("resnet20", n_classes=10)
    save_classifier(model, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["ResNetForImageClassification"]  # as folders of the published code say
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_classifier(tmp_path)
    assert isinstance(loaded, ResNet20)
    assert same_weights(model, loaded)


def test_ordinary_resnet_folder_stays_an_ordinary_resnet(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    assert not isinstance(load_classifier(tmp_path), ResNet20)


@pytest.mark.parametrize("name", ["resnet20", SHUFFLENET])
def test_same_seed_gives_same_weights_and_leaves_the_random_state(name: str) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one, again, other = (build_classifier(name, n_classes=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(one, again)
    assert not same_weights(one, other)


@pytest.mark.parametrize("name", ["resnet20", SHUFFLENET])
def test_saved_model_loads_with_the_same_bits_and_its_record(name: str, tmp_path: Path) -> None:
    model = build_classifier(name, n_classes=4, seed=5).to(memory_format=torch.channels_last)
    (tmp_path / "other.txt").write_text("mine")
    for _ in range(2):  # over an older one too
        save_classifier(model, tmp_path, {"seed": 5, "path": tmp_path})
    assert same_weights(model, load_classifier(tmp_path))
    assert same_weights(model, build_classifier(str(tmp_path), n_classes=4))
    assert json.loads((tmp_path / "record.json").read_text()) == {"seed": 5, "path": str(tmp_path)}
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert input_shape(str(tmp_path), n_channels=3) == (3, None)


def test_torchvision_model_gives_a_logit_a_class() -> None:
    model = build_classifier(SHUFFLENET, n_classes=6).eval()
    assert logits_of(model, torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_local_hugging_face_classifier_loads_by_path_and_changes_its_head(tmp_path: Path) -> None:
    folder = str(save_tiny_vit(tmp_path / "vit"))
    assert input_shape(folder, n_channels=1) == (3, 16)
    images = torch.zeros(2, 3, 16, 16)
    kept = build_classifier(folder, n_classes=5)
    assert same_weights(kept, load_classifier(folder))
    assert logits_of(kept, images).shape == (2, 5)
    swapped, again = (build_classifier(folder, n_classes=3, seed=1) for _ in range(2))
    assert logits_of(swapped, images).shape == (2, 3)
    assert same_weights(swapped, again)


def test_unknown_names_give_the_nearest_match() -> None:
    for name, message in (
        ("resnet21", "unknown model 'resnet21'; did you mean 'resnet20'"),
        ("torchvision/resnet19", "unknown model 'torchvision/resnet19'; did you mean 'torchvision/resnet"),
        ("./nowhere", "unknown model './nowhere'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            build_classifier(name, n_classes=10)
        assert "\n" not in str(error.value)


def test_hub_model_that_cannot_be_had_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"cannot load an image classifier 'owner/none'.*fetch") as error:
        build_classifier("owner/none", n_classes=10)  # the tests have no network
    assert "\n" not in str(error.value)


def test_grey_images_do_not_go_into_a_colour_model() -> None:
    with pytest.raises(ConfigError, match="takes 3-channel images, got 1"):
        build_classifier(SHUFFLENET, n_classes=10, n_channels=1)


def test_missing_empty_and_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder at"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor classifier\.json"):
        load_classifier(tmp_path)
    save_classifier(build_classifier("resnet20", n_classes=10), tmp_path / "a", {})
    (tmp_path / "a" / "model.safetensors").write_bytes(b"cut")
    save_classifier(build_classifier(SHUFFLENET, n_classes=10), tmp_path / "b", {})
    save_file({"x": torch.zeros(1)}, tmp_path / "b" / "model.safetensors")
    for folder in ("a", "b"):
        with pytest.raises(CheckpointError) as error:
            load_classifier(tmp_path / folder)
        assert "\n" not in str(error.value)


def test_model_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot save a Linear"):
        save_classifier(nn.Linear(2, 2), tmp_path, {})
