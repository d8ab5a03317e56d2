"""Fetching from the hub: once, where there is a network, at a pinned revision; and asking it briefly before a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from hamu.errors import CheckpointError, DataError, HamuError
from hamu.hub.cache import COMMIT, MODEL, base_of, files_of_model, snapshot, why_not_cached
from hamu.hub.refusals import DATASET, causes, error_type, is_no_network, is_of_hub, one_line, refusal

_TIMEOUT_S = 5.0
_DATASET_TEXTS = ("README.md", "dataset_infos.json", ".huggingface.yaml")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A repository of the hub that lies in the cache."""

    name: str
    kind: str
    """"model" or "dataset"."""
    revision: str | None
    """What was asked for; None is main."""
    commit: str
    """What it stands for: 40 hexadecimal digits, the revision to pin."""
    folder: str
    """The snapshot in the cache."""
    n_bytes: int
    """Of the files in the snapshot, whichever fetch brought them."""
    n_files: int
    base_model: tuple[str, str | None] | None = None
    """Name and revision of the model that an adapter belongs to, as its configuration states them; None: no adapter."""


def fetch_model(name: str, revision: str | None = None, *, cache_dir: str | None = None) -> Fetched:
    """Bring a model into the cache: its safetensors, its configuration and its tokenizer; never pickled weights or code.

    An interrupted fetch goes on where it stopped. A commit that is in the cache whole needs no network.

    Args:
        name: `owner/name`.
        revision: commit, tag or branch; None is main.
        cache_dir: of `huggingface_hub`; None is its own.

    Raises:
        CheckpointError: there is no such model or revision, it is gated, it has pickled weights alone, or no network.
    """
    try:
        api = huggingface_hub.HfApi()
        info = _ask(api, name, MODEL, revision)
        files = files_of_model(name, [entry.rfilename for entry in info.siblings or []])
        folder = api.snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=[re.sub(r"([*?[])", r"[\1]", file) for file in files]
        )
    except HamuError:
        raise
    except Exception as error:  # the client's error types differ between its versions; `refusal` tells them apart
        if _is_pinned_in_cache(error, name, revision, MODEL, [(None, None)], cache_dir):
            return _fetched(name, MODEL, revision, snapshot(name, MODEL, str(revision), cache_dir))
        raise CheckpointError(refusal(error, name, MODEL, revision)) from None
    return _fetched(name, MODEL, revision, Path(folder))


def fetch_dataset(
    name: str,
    revision: str | None = None,
    *,
    parts: Iterable[tuple[str | None, str | None]] = ((None, None),),
    cache_dir: str | None = None,
) -> Fetched:
    """Bring subsets of a dataset into the cache, read into Arrow rows, so that they load without a network.

    Only the files of these subsets are downloaded. A subset's splits are read together.

    Args:
        name: `owner/name`.
        revision: commit, tag or branch; None is main.
        parts: (subset, split) each; None is the dataset's own subset, and all splits.
        cache_dir: of `datasets`; None is its own. The downloaded files are in the cache of `huggingface_hub`.

    Raises:
        DataError: there is no such dataset, revision, subset or split, it is gated, or there is no network.
    """
    wanted = list(dict.fromkeys(parts))
    try:
        api = huggingface_hub.HfApi()
        _ask(api, name, DATASET, revision)
        folder = Path(api.snapshot_download(name, repo_type=DATASET, revision=revision, allow_patterns=list(_DATASET_TEXTS)))
    except Exception as error:  # as above
        if _is_pinned_in_cache(error, name, revision, DATASET, wanted, cache_dir):
            return _fetched(name, DATASET, revision, snapshot(name, DATASET, str(revision)))
        raise DataError(refusal(error, name, DATASET, revision)) from None
    import datasets

    for subset, split in wanted:
        try:
            datasets.load_dataset(name, subset, split=split, revision=folder.name, cache_dir=cache_dir)
        except Exception as error:  # whatever the library raises
            if is_of_hub(error):
                raise DataError(refusal(error, name, DATASET, revision)) from None
            part = "".join(f", {word} {value!r}" for word, value in (("subset", subset), ("split", split)) if value)
            reason = one_line(error.__cause__ or error)
            raise DataError(
                f"cannot read dataset {name!r}{part} at {folder.name} ({reason}); check the subset and the split"
            ) from None
        # Where the hub stops answering midway, the library serves whatever it cached last.
        missing = why_not_cached(name, folder.name, DATASET, subset=subset, split=split, cache_dir=cache_dir)
        if missing is not None:
            raise DataError(f"{missing}, although it was fetched; fetch again")
    return _fetched(name, DATASET, revision, folder)


def check_available(
    name: str,
    revision: str | None,
    kind: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
) -> None:
    """Refuse before the start what a run could not get: it is neither in the cache, nor may it be had from the hub.

    Takes at most some seconds: without a network the cache alone decides.

    Raises:
        CheckpointError: a model; the message says what is missing, why the hub does not give it, and the mend.
        DataError: a dataset.
    """
    missing = why_not_cached(name, revision, kind, subset=subset, split=split, cache_dir=cache_dir)
    if missing is None:
        return
    try:
        _ask(huggingface_hub.HfApi(), name, kind, revision)
    except Exception as error:  # as above
        raise error_type(kind)(f"{missing}, and {refusal(error, name, kind, revision)}") from None


def why_not_on_hub(name: str, kind: str, revision: str | None = None) -> str | None:
    """Return None when the hub has the repository, else the reason in one line (not found, gated, or no network).

    Args:
        name: `owner/name`.
        kind: "model" or "dataset".
        revision: commit, tag or branch; None is main.
    """
    api = huggingface_hub.HfApi()
    ask = api.dataset_info if kind == DATASET else api.model_info
    try:
        ask(name, revision=revision, timeout=_TIMEOUT_S)
    except Exception as error:  # the client's error types differ between its versions; none of them is ours to handle
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _ask(api: huggingface_hub.HfApi, name: str, kind: str, revision: str | None) -> Any:
    """Ask the hub for a repository and whether its files may be read: a gated one shows its list of files to all."""
    info = api.repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S)
    if getattr(info, "gated", None) or getattr(info, "private", None):
        try:
            api.auth_check(name, repo_type=kind)
        except errors.HfHubHTTPError as error:
            if error.response.status_code in (401, 403):  # else a mirror that does not know the question; downloads will tell
                raise
    return info


def _is_pinned_in_cache(
    error: BaseException,
    name: str,
    revision: str | None,
    kind: str,
    parts: list[tuple[str | None, str | None]],
    cache_dir: str | None,
) -> bool:
    """Whether a fetch that found no network was not needed: the commit asked for lies in the cache, whole."""
    if revision is None or not COMMIT.fullmatch(revision) or not any(is_no_network(cause) for cause in causes(error)):
        return False
    return not any(why_not_cached(name, revision, kind, subset=a, split=b, cache_dir=cache_dir) for a, b in parts)


def _fetched(name: str, kind: str, revision: str | None, folder: Path) -> Fetched:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return Fetched(
        name=name, kind=kind, revision=revision, commit=folder.name, folder=str(folder), n_bytes=sum(sizes), n_files=len(sizes),
        base_model=base_of(folder) if kind == MODEL else None,
    )  # fmt: skip
