"""Cluster files that must be refused: the message names the file, the key and the mend."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hamu.errors import ConfigError
from launch.cluster import cluster_machine, read_cluster
from launch.cluster_checks import check_asks, check_filled_in
from launch.cluster_settings import looks_secret
from launch.cluster_yaml import ask_ray, load_yaml
from launch.pairing import Pairing
from tests.launch.bad_clusters import BAD_FILES, BAD_SETTINGS, CLUSTERS, edited

SPLIT = Pairing(n_workers=2)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_cluster_file_is_refused_with_file_key_and_mend(tmp_path: Path, case: str) -> None:
    name, edits, key, mend = BAD_FILES[case]
    path = edited(tmp_path, name, *edits)
    if case == "a list":
        path.write_text("- cluster_name: hamu\n")
    if case == "nothing":
        path.write_text("# nothing yet\n")
    with pytest.raises(ConfigError) as caught:
        read_cluster(path)
    said = str(caught.value)
    assert str(path) in said and key in said and mend in said, said
    assert "\n" not in said and "s3cret" not in said and "hf_abc123" not in said


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_with_file_key_and_mend(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, edits, key, mend = BAD_SETTINGS[case]
    # Ray's own functions have judged the unchanged file in test_cluster.py: 0.7 s each, and not what is tried here.
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    path = edited(tmp_path, name, *edits, part=".settings")
    with pytest.raises(ConfigError) as caught:
        read_cluster(path)
    said = str(caught.value)
    assert str(tmp_path / f"{name}.settings.yaml") in said and key in said and mend in said, said
    assert "\n" not in said and "hf_abc123" not in said


def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *edits: tuple[str, str], part: str = ".settings"):
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    return read_cluster(edited(tmp_path, name, *edits, part=part))


@pytest.mark.parametrize(
    ("settings", "file", "pairing", "mend"),
    [
        ([("gpus_per_worker: 1 ", "gpus_per_worker: 0.5 ")], [], SPLIT, "give 1, or 0 for the cores"),
        ([("gpus_per_worker: 1 ", "gpus_per_worker: auto ")], [], SPLIT, "give 1, or 0 for the cores"),
        ([("cpus: 32, gpus: 4", "cpus: 32, gpus: 0")], [], Pairing(), "give 0, or add nodes with GPUs"),
        ([("gpus_per_worker: 1 ", "gpus_per_worker: 8 ")], [], Pairing(), "give at most 4"),
        ([("cpus: 32, gpus: 4", "cpus: 32, gpus: 1")], [], Pairing(n_workers=4), "--set num_workers=2"),
        ([("# cpus_per_worker: 8", "cpus_per_worker: 64")], [], Pairing(), "give at most 32"),
    ],
)
def test_a_sweep_that_no_node_could_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list, file: list, pairing: Pairing, mend: str
) -> None:
    cluster = of(tmp_path, monkeypatch, "onprem", *settings)
    with pytest.raises(ConfigError) as caught:
        check_asks(cluster, pairing)
    said = str(caught.value)
    assert "onprem.settings.yaml" in said and "_per_worker" in said and mend in said, said


def test_a_head_alone_without_a_gpu_is_refused_when_the_sweep_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [("hamu-aws-a100\nmax_workers: 4", "hamu-aws-a100\nmax_workers: 0")]
    cluster = of(tmp_path, monkeypatch, "aws-a100", *edits, part="")
    with pytest.raises(ConfigError, match="the head is the only node, without any; give 0, or add nodes with GPUs"):
        check_asks(cluster, Pairing())


def test_a_flag_that_asks_for_too_much_is_named_beside_the_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = of(tmp_path, monkeypatch, "onprem", ("", ""))
    with pytest.raises(ConfigError, match=r"onprem\.yaml, --gpus-per-worker: 8 GPUs .* give at most 4"):
        check_asks(cluster, Pairing(), 8.0)


def test_what_the_cluster_can_run_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = of(tmp_path, monkeypatch, "onprem", ("", ""))
    for pairing, gpus in ((Pairing(), None), (Pairing(), 0.5), (Pairing(), "auto"), (SPLIT, 1.0), (SPLIT, 0.0), (SPLIT, None)):
        check_asks(cluster, pairing, gpus)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("onprem", "provider.head_ip"),
        ("aws-a100", "docker.image"),
        ("gcp-a100", "provider.project_id"),
        ("kuberay-rayjob", "image"),
    ],
)
def test_examples_that_were_not_replaced_are_refused_before_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    cluster = of(tmp_path, monkeypatch, name, ("", ""))
    with pytest.raises(ConfigError, match=re.escape(f"{name}.yaml") + r", .*" + re.escape(key) + r".*replace it by your own"):
        check_filled_in(cluster)


def test_a_file_with_ones_own_values_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_filled_in(of(tmp_path, monkeypatch, "onprem", ("192.0.2.", "192.168.1."), part=""))
    check_filled_in(of(tmp_path, monkeypatch, "local", ("", "")))


def test_an_example_in_the_settings_is_named_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = of(tmp_path, monkeypatch, "aws-a100", ("registry.example", "images.mine"), part="")
    with pytest.raises(ConfigError, match=r"aws-a100\.settings\.yaml, storage_path: .*example-bucket"):
        check_filled_in(cluster)


def test_ray_has_the_last_word(tmp_path: Path) -> None:
    """What our checks do not know is still refused, by Ray's own functions, with the file named."""
    path = edited(tmp_path, "aws-a100", ("", ""))
    config = load_yaml(path) | {"head_node_type": "no such type"}
    with pytest.raises(ConfigError, match=r"aws-a100\.yaml.*Ray refuses it: .*head_node_type"):
        ask_ray(path, config)


def test_a_ray_whose_functions_have_moved_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cluster_yaml._ASK_RAY", "import json, sys; json.load(sys.stdin); sys.exit(3)")
    with pytest.raises(ConfigError, match=r"prepare_config and validate_config any more.*constraints\.txt"):
        ask_ray(tmp_path / "x.yaml", {})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of a file."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


STRANGE: tuple[Any, ...] = (None, [], {}, -1, True, "x", 1.5, {"a": [1]}, [{"b": None}], "", 10**30, float("nan"), {1: 2})


@pytest.mark.parametrize("name", ["onprem", "onprem.settings", "aws-a100", "kuberay-rayjob"])
def test_whatever_stands_in_a_file_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each value in turn is replaced by a strange one: never a traceback, and always the file's name."""
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    path = edited(tmp_path, name.removesuffix(".settings"), ("", ""))
    config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    refusals = []
    for i, at in enumerate(places(config)):
        changed = copy.deepcopy(config)
        inner = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = STRANGE[i % len(STRANGE)]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed))
        try:
            cluster_machine(read_cluster(path))
        except ConfigError as error:
            refusals.append(str(error))
    assert len(refusals) > 3
    assert [said for said in refusals if str(tmp_path) not in said or "\n" in said] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True), ("HF_TOKEN", True), ("hf_token", True), ("DB_PASSWORD", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True), ("KEY", True), ("TOKENIZERS_PARALLELISM", False), ("HF_HUB_OFFLINE", False),
        ("KEYBOARD", False), ("MONKEY", False),
    ],
)  # fmt: skip
def test_names_of_secrets_are_known(name: str, expected: bool) -> None:
    assert looks_secret(name) is expected
