"""Fetching from the hub, the cache alone afterwards, and what is said when something cannot be had: on a stand-in."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from hamu.cli.fetch import fetch_all
from hamu.errors import CheckpointError, DataError
from hamu.hub import (
    cached_commit,
    check_available,
    fetch_dataset,
    fetch_model,
    is_cached,
    offline_environment,
    one_line,
    why_not_cached,
    why_not_on_hub,
)
from tests.hub_server import StandIn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NAME = "owner/small-model"
MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights " * 500,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "README.md": b"# a card",
}
TOKEN = "hf_notARealTokenButOfItsForm"
CARD = b"""---
configs:
- config_name: full
  default: true
  data_files: data/full.parquet
- config_name: forget10
  data_files: data/forget10.parquet
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that this process takes for the hub, with an empty cache and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with StandIn() as server:
        point_to(server.url, tmp_path, monkeypatch)
        yield server


def point_to(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what the client read from the environment at its import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


def unused_url() -> str:
    """An address where nobody answers, at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def parquet(**columns: list[str]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table(columns), written)
    return written.getvalue()


def rows_of(mark: str) -> dict[str, bytes]:
    """Files of a dataset of two subsets whose rows carry a mark."""
    files = {f"data/{subset}.parquet": parquet(question=[f"{subset} {mark}"]) for subset in ("full", "forget10")}
    return {"README.md": CARD, **files}


def in_process(code: str, home: Path, url: str, **environment: str) -> str:
    """Run code where the libraries read their settings from the environment; returns all that it printed."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**kept, **settings}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# Models


def test_a_fetched_model_is_its_safetensors_and_texts_at_the_commit_of_main(hub: StandIn) -> None:
    pickles = {"pytorch_model.bin": b"x", "training_args.bin": b"x", "run.py": b"x", "onnx/model.onnx": b"x", "a.pt": b"x"}
    commit = hub.add(NAME, "model", MODEL_FILES | pickles)
    fetched = fetch_model(NAME)
    files = sorted(path.name for path in Path(fetched.folder).iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (fetched.commit, fetched.revision, fetched.n_files) == (commit, None, 4)
    assert fetched.n_bytes == sum(len(MODEL_FILES[file]) for file in files)


def test_a_pinned_revision_is_fetched_and_main_is_not(hub: StandIn) -> None:
    old = hub.add(NAME, "model", MODEL_FILES, tag="v1")
    hub.add(NAME, "model", MODEL_FILES | {"config.json": b"{}"})
    assert fetch_model(NAME, old).commit == old
    assert is_cached(NAME, old, "model") and not is_cached(NAME, None, "model")
    assert fetch_model(NAME, "v1").commit == old
    assert cached_commit(NAME, "v1", "model") == old


def test_of_a_model_in_shards_all_are_fetched_and_the_second_form_of_the_weights_is_not(hub: StandIn) -> None:
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "consolidated.safetensors": b"twice"}
    commit = hub.add(NAME, "model", files | dict.fromkeys(shards, b"half"))
    folder = Path(fetch_model(NAME).folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    (folder / shards[1]).unlink()
    assert why_not_cached(NAME, None, "model") == f"the cache lacks {shards[1]} of model {NAME!r} at {commit[:12]}"


def test_a_model_of_pickles_alone_is_refused_before_anything_is_downloaded(hub: StandIn) -> None:
    hub.add(NAME, "model", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(CheckpointError, match=r"pickles alone \(pytorch_model.bin\); only .safetensors are loaded"):
        fetch_model(NAME)
    assert not any("/resolve/" in asked for asked in hub.asked)


def test_an_interrupted_fetch_goes_on_where_it_stopped(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what is written at a time; 10 MB by default
    content = bytes(range(256)) * 4096
    hub.add(NAME, "model", MODEL_FILES | {"model.safetensors": content})
    hub.cut_after = 600_000
    folder = Path(fetch_model(NAME).folder)
    assert (folder / "model.safetensors").read_bytes() == content
    assert [asked.partition("bytes=")[2] for asked in hub.asked if "bytes=" in asked] == ["600000-"]


def test_a_model_whose_fetch_was_interrupted_is_not_cached(hub: StandIn) -> None:
    commit = hub.add(NAME, "model", MODEL_FILES)
    folder = Path(fetch_model(NAME).folder)
    for file in ("tokenizer.json", "config.json", "model.safetensors"):
        (folder / file).unlink()
        assert why_not_cached(NAME, commit, "model") is not None
        fetch_model(NAME)
        assert why_not_cached(NAME, commit, "model") is None


def test_a_commit_in_the_cache_needs_no_network_and_main_does(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, "model", MODEL_FILES)
    first = fetch_model(NAME, commit)
    point_to(unused_url(), tmp_path, monkeypatch)
    assert fetch_model(NAME, commit) == first
    with pytest.raises(CheckpointError, match="no network"):
        fetch_model(NAME)


def test_an_adapter_brings_its_base_model(hub: StandIn) -> None:
    base = hub.add(NAME, "model", MODEL_FILES)
    hub.add(NAME, "model", MODEL_FILES)
    stated = json.dumps({"base_model_name_or_path": NAME, "revision": base}).encode()
    hub.add("owner/adapter", "model", {"adapter_config.json": stated, "adapter_model.safetensors": b"lora"})
    said: list[str] = []
    assert fetch_all([("owner/adapter", None)], [], say=said.append) == 0
    assert f"model {NAME}: commit {base}" in said[-1]
    assert is_cached("owner/adapter", None, "model")


# What is said


def refusals(name: str, kind: str) -> str:
    """What a fetch is refused with; what is said before a run ends with the same."""
    with pytest.raises(CheckpointError if kind == "model" else DataError) as fetching:
        fetch_model(name) if kind == "model" else fetch_dataset(name)
    with pytest.raises(type(fetching.value)) as checking:
        check_available(name, None, kind)
    assert str(checking.value) == f"the cache has no {kind} {name!r} at revision 'main', and {fetching.value}"
    assert "\n" not in str(fetching.value)
    return str(fetching.value)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_gated_repository_without_a_token_names_its_page_and_the_login(hub: StandIn, kind: str) -> None:
    hub.add(NAME, kind, MODEL_FILES, is_gated=True)
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{NAME}"
    assert refusals(NAME, kind) == (
        f"{kind} {NAME!r} is gated, and there is no token: accept the licence at {page} and log in with `hf auth login`, or set "
        "HF_TOKEN; then fetch again"
    )


def test_a_gated_model_whose_licence_is_not_accepted_says_so(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, "model", MODEL_FILES, is_gated=True)
    hub.accounts.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refusals(NAME, "model")
    assert "is gated, and the account of the token may not read it" in said and f"https://huggingface.co/{NAME}" in said
    hub.readers.add(TOKEN)
    assert fetch_model(NAME).n_files == 4


def test_a_token_that_the_hub_does_not_know_is_not_called_a_missing_licence(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, "model", MODEL_FILES, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "does not accept the token that was given" in refusals(NAME, "model")


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_repository_that_does_not_exist_is_named(
    hub: StandIn, kind: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        hub.accounts.add(token)
        monkeypatch.setenv("HF_TOKEN", token)
    assert f"{kind} 'owner/none' is not on the hub, or is private; check the name" in refusals("owner/none", kind)


def test_a_revision_that_does_not_exist_is_named(hub: StandIn) -> None:
    hub.add(NAME, "model", MODEL_FILES)
    for revision in ("v9", "0" * 40):
        with pytest.raises(CheckpointError, match=f"has no revision '{revision}'; give a commit, tag or branch"):
            fetch_model(NAME, revision)


def test_a_name_that_no_repository_can_have_is_refused(hub: StandIn) -> None:
    with pytest.raises(CheckpointError, match="give owner/name"):
        fetch_model("owner/has space")
    assert hub.asked == []


def test_without_a_network_the_mend_is_to_fetch_where_there_is_one(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(unused_url(), tmp_path, monkeypatch)
    said = refusals(NAME, "model")
    assert "no network (ConnectError" in said and "run --fetch once on a machine with a network" in said
    assert said.endswith(f"the cache is {tmp_path}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; run --fetch once without it" in refusals(NAME, "dataset")


def test_a_token_is_in_no_message(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "a-token-of-no-known-form"
    monkeypatch.setenv("HF_TOKEN", odd)
    line = one_line(ValueError(f"Authorization: Bearer {TOKEN}; {odd} and {TOKEN}\n and {TOKEN[:20]}"))
    assert odd not in line and TOKEN[:10] not in line and "Authorization: Bearer <token>" in line
    said = refusals(NAME, "model") + refusals(NAME, "dataset") + str(why_not_on_hub(NAME, "model"))
    assert odd not in said


def test_what_can_be_had_from_the_hub_may_start_and_what_is_cached_asks_nobody(hub: StandIn) -> None:
    hub.add(NAME, "model", MODEL_FILES)
    check_available(NAME, None, "model")
    fetch_model(NAME)
    hub.asked.clear()
    check_available(NAME, None, "model")
    assert hub.asked == []


# The command line's part


def test_each_repository_is_told_in_a_line_with_the_setting_that_pins_it(hub: StandIn) -> None:
    commit = hub.add(NAME, "model", MODEL_FILES)
    said: list[str] = []
    assert fetch_all([(NAME, None), (NAME, None)], [], say=said.append) == 0
    folder = Path(constants.HF_HUB_CACHE) / "models--owner--small-model/snapshots" / commit
    assert said == [f"model {NAME}: commit {commit}, 4.0 kB in 4 files, {folder}; pin it with model_revision={commit}"]
    said.clear()
    fetch_all([(NAME, commit)], [], say=said.append)
    assert said == [f"model {NAME}: commit {commit}, 4.0 kB in 4 files, {folder}"]


def test_what_is_embedded_or_a_path_is_not_fetched(hub: StandIn, tmp_path: Path) -> None:
    said: list[str] = []
    models = [(name, None) for name in ("resnet20", "tiny-llama", "torchvision/resnet18", str(tmp_path))]
    datasets = [(name, None, "train", None) for name in ("digits", "authors", "digits", str(tmp_path))]
    assert fetch_all(models, datasets, say=said.append) == 0
    assert [line.rpartition(": ")[2] for line in said] == [
        *["embedded, nothing to fetch"] * 3, "a path, nothing to fetch", *["embedded, nothing to fetch"] * 2,
        "a path, nothing to fetch",
    ]  # fmt: skip
    assert hub.asked == []


def test_what_can_be_had_is_fetched_though_another_cannot(hub: StandIn) -> None:
    hub.add(NAME, "model", MODEL_FILES)
    said: list[str] = []
    with pytest.raises(CheckpointError, match="owner/second"):
        fetch_all([("owner/first", None), (NAME, None), ("owner/second", None)], [], say=said.append)
    assert said[0].startswith(f"model {NAME}: commit") and said[1].startswith("not fetched: model 'owner/first'")


# Processes of their own: the libraries read the environment at import


def test_workers_get_what_keeps_the_libraries_in_their_caches(tmp_path: Path) -> None:
    code = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    assert in_process(code, tmp_path, unused_url(), **offline_environment()).strip() == "True"


def test_importing_the_hub_brings_no_heavy_library(tmp_path: Path) -> None:
    code = "import sys, hamu.hub, hamu.cli.fetch; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert in_process(code, tmp_path, unused_url()).strip() == "set()"


@pytest.mark.slow
def test_a_fetched_dataset_loads_without_a_network_at_the_commit_asked_for(tmp_path: Path) -> None:
    name = "owner/My-Set"
    with StandIn() as hub:
        old, new = hub.add(name, "dataset", rows_of("old")), hub.add(name, "dataset", rows_of("new"))
        fetching = f"""
from hamu.cli.fetch import fetch_all
from hamu.errors import DataError
fetch_all([], [("{name}", "forget10", "train", "{old}"), ("{name}", None, "train", "{old}")], say=print)
fetch_all([], [("{name}", "forget10", "train", None)], say=print)
for subset, split in (("forget11", "train"), ("forget10", "test")):
    try:
        fetch_all([], [("{name}", subset, split, None)], say=print)
    except DataError as error:
        print("refused:", error)
"""
        hub.accounts.add(TOKEN)
        said = in_process(fetching, tmp_path, hub.url, HF_TOKEN=TOKEN)
    assert f"dataset {name}: commit {old}" in said and f"pin it with dataset_revision={new}" in said
    assert f"refused: cannot read dataset '{name}', subset 'forget11', split 'train' at {new}" in said
    assert "split 'test'" in said and TOKEN not in said
    # The rows cached last are the new ones: what `datasets` itself would serve for either commit.
    reading = f"""
import json
import datasets
from hamu.hub import rows_in_cache, why_not_cached
wanted = [("{old}", "forget10"), ("{new}", "forget10"), (None, "forget10"), ("{old}", None)]
rows = [rows_in_cache("{name}", subset, "train", revision=revision)["question"][0] for revision, subset in wanted]
missing = [why_not_cached("{name}", None, "dataset", subset=a, split=b) for a, b in (("forget11", None), ("forget10", "test"))]
loaded = datasets.load_dataset("{name}", "forget10", split="train", revision="{new}")["question"][0]
print(json.dumps([rows, missing, loaded, rows_in_cache("{name}", "full", "train")]))
"""
    printed = in_process(reading, tmp_path, unused_url(), **offline_environment())
    rows, missing, loaded, absent = json.loads(next(line for line in printed.splitlines() if line.startswith("[[")))
    assert rows == ["forget10 old", "forget10 new", "forget10 new", "full old"]
    assert missing == [
        f"the cache has no rows of dataset '{name}' at {new[:12]}, subset 'forget11'",
        f"dataset '{name}' at {new[:12]} has no split 'test'; it has: train",
    ]
    assert loaded == "forget10 new" and absent is None


@pytest.mark.slow
def test_a_fetched_language_model_loads_without_a_network_at_the_commit_asked_for(tmp_path: Path) -> None:
    saving = f"""
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
config = LlamaConfig(vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(config).save_pretrained({str(tmp_path / "model")!r})
words = Tokenizer(WordLevel({{"a": 0, "b": 1, "?": 2}}, unk_token="?"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained({str(tmp_path / "model")!r})
"""
    in_process(saving, tmp_path / "home", unused_url(), **offline_environment())
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with StandIn() as hub:
        old = hub.add(NAME, "model", files)
        hub.add(NAME, "model", files | {"config.json": b"{}"})
        fetching = f"from hamu.hub import fetch_model; fetch_model('{NAME}', '{old}'); fetch_model('{NAME}')"
        in_process(fetching, tmp_path / "home", hub.url)
    loading = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{NAME}", revision="{old}")
tokenizer = AutoTokenizer.from_pretrained("{NAME}", revision="{old}")
print("loaded", model.config.hidden_size, len(tokenizer))
"""
    assert "loaded 4 3" in in_process(loading, tmp_path / "home", unused_url(), **offline_environment())
