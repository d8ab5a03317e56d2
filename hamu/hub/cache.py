"""What of the hub lies in the caches of `huggingface_hub` and `datasets`; nothing here asks a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from hamu.errors import CheckpointError
from hamu.hub.refusals import DATASET

if TYPE_CHECKING:
    import datasets

MODEL = "model"
COMMIT = re.compile(r"[0-9a-f]{40}")

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MODEL_TEXTS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_ADAPTER = "adapter_config.json"
_LOADED = ("config.json", _ADAPTER, "tokenizer_config.json", "tokenizer.json")
"""What is read whenever it exists: a snapshot without it is one whose fetch was interrupted."""


def is_cached(
    name: str,
    revision: str | None,
    kind: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
) -> bool:
    """Whether a run can have it without a network; see `why_not_cached`."""
    return why_not_cached(name, revision, kind, subset=subset, split=split, cache_dir=cache_dir) is None


def why_not_cached(
    name: str,
    revision: str | None,
    kind: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
) -> str | None:
    """Return None when a run can have it without a network, else what is missing. Asks the cache alone.

    Args:
        name: `owner/name`.
        revision: commit, tag or branch; None is main.
        kind: "model" or "dataset".
        subset: of a dataset; None is its own.
        split: of a dataset; None: any.
        cache_dir: of `huggingface_hub` for a model, of `datasets` for a dataset; None is the library's own.
    """
    commit = cached_commit(name, revision, kind, cache_dir=cache_dir if kind == MODEL else None)
    if commit is None:
        return f"the cache has no {kind} {name!r} at revision {revision or constants.DEFAULT_REVISION!r}"
    if kind == MODEL:
        return _missing_of_model(name, commit, cache_dir)
    prepared = _prepared(name, subset, commit, cache_dir)
    at = f"dataset {name!r} at {commit[:12]}"
    if not prepared:
        return f"the cache has no rows of {at}" + (f", subset {subset!r}" if subset else "")
    if len(prepared) > 1:
        return f"the cache has several subsets of {at} ({', '.join(sorted(_subset(p) for p in prepared))}); name one"
    splits = list(json.loads((prepared[0] / "dataset_info.json").read_text()).get("splits") or {})
    plain = re.fullmatch(r"\w[\w.-]*", split or "")
    if plain and split != "all" and split not in splits:
        return f"{at} has no split {split!r}; it has: {', '.join(splits)}"
    return None


def cached_commit(name: str, revision: str | None, kind: str, *, cache_dir: str | None = None) -> str | None:
    """The commit that a revision stands for in the cache of `huggingface_hub`; None: it was never fetched."""
    asked = revision or constants.DEFAULT_REVISION
    if COMMIT.fullmatch(asked):
        commit = asked
    else:
        try:
            commit = (_storage(name, kind, cache_dir) / "refs" / asked).read_text().strip()
        except OSError:
            return None
    return commit if snapshot(name, kind, commit, cache_dir).is_dir() else None


def rows_in_cache(
    name: str, subset: str | None, split: str, *, revision: str | None = None, cache_dir: str | None = None
) -> datasets.Dataset | None:
    """Rows of a dataset at exactly the revision asked for, from the cache alone; None: they are not there.

    `datasets.load_dataset` without a network serves the rows that were cached last, whatever revision it is given.

    Args:
        name: `owner/name`.
        subset: None is the dataset's own.
        split: name of the split, such as "train"; slices of the library's syntax too.
        revision: commit, tag or branch; None is main as it was when it was fetched last.
        cache_dir: of `datasets`; None is its own.
    """
    if not is_cached(name, revision, DATASET, subset=subset, split=split, cache_dir=cache_dir):
        return None
    from datasets.packaged_modules.cache.cache import Cache

    folder = _prepared(name, subset, str(cached_commit(name, revision, DATASET)), cache_dir)[0]
    version, commit = folder.parts[-2:]
    builder = Cache(
        cache_dir=cache_dir, dataset_name=name.split("/")[-1], config_name=_subset(folder), version=version, hash=commit,
        repo_id=name,
    )  # fmt: skip
    return builder.as_dataset(split=split)


@contextmanager
def offline() -> Iterator[None]:
    """Make the hub's client and `datasets` use their caches only, inside the block."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def offline_environment() -> dict[str, str]:
    """What a worker's environment must hold, before it imports the libraries, so that it uses their caches only.

    A worker then neither waits for a network that compute nodes lack nor asks the hub once for each process, and all of
    them read the same commit. What is missing in the cache is an error at once: fetch it first.
    """
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def files_of_model(name: str, files: list[str]) -> list[str]:
    """Of a repository's files those that a model needs: its weights, its configuration and its tokenizer.

    Raises:
        CheckpointError: there are no weights as safetensors.
    """
    top = [file for file in files if "/" not in file]
    texts = [file for file in top if file.endswith(_MODEL_TEXTS) or file.startswith("tokenizer")]
    texts += [file for file in files if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", file)]
    return sorted({*_weights(name, top), *(file for file in texts if not file.endswith((*_PICKLES, ".py")))})


def _weights(name: str, top: list[str]) -> list[str]:
    """Of the files at the top of a repository the weights that transformers and peft would choose."""
    weights = [file for file in top if file == "model.safetensors"] or [file for file in top if _SHARD.fullmatch(file)]
    weights += [file for file in top if file == "adapter_model.safetensors"]
    weights = weights or [file for file in top if file.endswith(".safetensors")]
    if not weights:
        pickled = sorted(file for file in top if file.endswith(_PICKLES) and file != "training_args.bin")
        has = f"has its weights as pickles alone ({', '.join(pickled[:3])})" if pickled else "has no weights"
        raise CheckpointError(
            f"model {name!r} {has}; only .safetensors are loaded, since a pickle can run code: give another revision, such as "
            "refs/pr/1 where the hub converted it, or another model"
        )
    return weights


def base_of(folder: Path) -> tuple[str, str | None] | None:
    """The hub's model that the adapter in a folder belongs to; None: no adapter, or one of a local folder."""
    if not (folder / _ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    stated = json.loads((folder / _ADAPTER).read_text())
    base = stated.get("base_model_name_or_path") or ""
    return (base, stated.get("revision")) if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _storage(name: str, kind: str, cache_dir: str | None = None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"{kind}s--{name.replace('/', '--')}"


def snapshot(name: str, kind: str, commit: str, cache_dir: str | None = None) -> Path:
    """The folder of a commit's files in the cache of `huggingface_hub`, which may not exist."""
    return _storage(name, kind, cache_dir) / "snapshots" / commit


def _missing_of_model(name: str, commit: str, cache_dir: str | None) -> str | None:
    folder = snapshot(name, MODEL, commit, cache_dir)
    at = f"model {name!r} at {commit[:12]}"
    try:  # the list of the repository's files that the client keeps: there unless an older one filled the cache
        listed = list(json.loads((folder.parents[1] / "trees" / f"{commit}.json").read_text())["files"])
        needed = [*_weights(name, [file for file in listed if "/" not in file]), *(file for file in _LOADED if file in listed)]
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, KeyError):
        needed = []
    absent = [file for file in needed if not (folder / file).is_file()]
    if absent:
        return f"the cache lacks {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''} of {at}"
    if not (folder / "config.json").is_file() and not (folder / _ADAPTER).is_file():
        return f"the cache has no config.json of {at}"
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        return f"the cache lacks {len(absent)} of the {len(shards)} weight files of {at}" if absent else None
    if not any(file.is_file() for file in folder.glob("*.safetensors")):
        return f"the cache has no weights of {at}"
    base = base_of(folder)
    return why_not_cached(*base, MODEL, cache_dir=cache_dir) if base else None


def _prepared(name: str, subset: str | None, commit: str, cache_dir: str | None) -> list[Path]:
    """Folders of the rows of one commit in the cache of `datasets`: <owner___name>/<subset>/<version>/<commit>."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(last)])
    folders = [path.parent for path in root.glob(f"*/*/{commit}/dataset_info.json")]
    if subset is not None:
        return [folder for folder in folders if _subset(folder) == subset]
    if len(folders) > 1 and (own := _own_subset(snapshot(name, DATASET, commit) / "README.md")):
        folders = [folder for folder in folders if _subset(folder) == own]
    return folders


def _own_subset(card: Path) -> str | None:
    """The subset that a dataset's card makes the one of those who name none."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return None
    return MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data).get_default_config_name()


def _subset(folder: Path) -> str:
    return folder.parts[-3]
