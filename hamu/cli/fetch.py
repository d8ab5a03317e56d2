"""`--fetch`: bring the models and datasets of a run or a sweep into the cache, once, on a machine that has a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hamu.data.sources import HUB_ALIASES
from hamu.errors import HamuError
from hamu.hub import DATASET, MODEL, Fetched, fetch_dataset, fetch_model
from hamu.tasks.catalog import MODALITIES, is_built_in, modality_of
from hamu.training.config import TrainConfig
from hamu.training.inputs import is_local_path

_EMBEDDED = {
    MODEL: tuple(name for modality in MODALITIES.values() for name in modality.models),
    DATASET: tuple(name for modality in MODALITIES.values() for name in modality.datasets),
}


def fetch_for(configs: Iterable[TrainConfig], *, say: Callable[[str], None]) -> int:
    """Fetch what the runs of some configurations under one artifact root need of the hub, as `fetch_all`."""
    configs = list(configs)
    models = [(config.run.model_name, config.run.model_revision) for config in configs]
    rows = [row for config in configs for row in modality_of(config).hub_rows(config)]
    return fetch_all(models, dict.fromkeys(rows), say=say, cache_dir=configs[0].dataset_cache_dir)


def fetch_all(
    models: Iterable[tuple[str, str | None]],
    datasets: Iterable[tuple[str, str | None, str | None, str | None]],
    *,
    say: Callable[[str], None],
    cache_dir: str | None = None,
) -> int:
    """Fetch every repository once, and say a line for each: its commit, size and folder, and the setting that pins it.

    What is embedded or a path is not fetched, which is said. An adapter's base model is fetched too. When one cannot be
    had, the others are fetched nevertheless.

    Args:
        models: (name, revision) each; a revision None is main.
        datasets: (name, subset, split, revision) each; a subset None is the dataset's own.
        say: takes one line.
        cache_dir: of `datasets`; None is its own.

    Returns:
        The exit code, 0.

    Raises:
        CheckpointError: a model cannot be had; the last one, where several cannot, and `say` got the others.
        DataError: a dataset cannot be had.
    """
    refused: list[HamuError] = []
    waiting = list(dict.fromkeys(models))
    seen: set[tuple[str, str | None]] = set()
    while waiting:
        name, revision = waiting.pop(0)
        if (name, revision) in seen or _is_here(name, MODEL, say):
            continue
        seen.add((name, revision))
        try:
            fetched = fetch_model(name, revision)
        except HamuError as error:
            refused.append(error)
            continue
        _tell(fetched, say)
        if fetched.base_model is not None:
            say(f"  it is an adapter of {fetched.base_model[0]}, which is fetched too")
            waiting.append(fetched.base_model)
    for (name, revision), parts in _by_repository(datasets, say).items():
        try:
            _tell(fetch_dataset(name, revision, parts=parts, cache_dir=cache_dir), say)
        except HamuError as error:
            refused.append(error)
    for refusal in refused[:-1]:
        say(f"not fetched: {refusal}")
    if refused:
        raise refused[-1]
    return 0


def _by_repository(
    datasets: Iterable[tuple[str, str | None, str | None, str | None]], say: Callable[[str], None]
) -> dict[tuple[str, str | None], list[tuple[str | None, str | None]]]:
    """(name, revision) -> the (subset, split) that are wanted of it."""
    parts: dict[tuple[str, str | None], list[tuple[str | None, str | None]]] = {}
    here: set[str] = set()
    for name, subset, split, revision in datasets:
        if name in here or (name not in HUB_ALIASES and _is_here(name, DATASET, say)):
            here.add(name)
            continue
        parts.setdefault((HUB_ALIASES.get(name, name), revision), []).append((subset, split))
    return parts


def _is_here(name: str, kind: str, say: Callable[[str], None]) -> bool:
    """Whether a name means nothing of the hub; this is said."""
    is_embedded = is_built_in(name, _EMBEDDED[kind])
    if is_embedded or is_local_path(name):
        say(f"{kind} {name}: {'embedded' if is_embedded else 'a path'}, nothing to fetch")
        return True
    return False


def _tell(fetched: Fetched, say: Callable[[str], None]) -> None:
    size = f"{_in_units(fetched.n_bytes)} in {fetched.n_files} file{'' if fetched.n_files == 1 else 's'}"
    is_pinned = fetched.revision == fetched.commit
    pin = "" if is_pinned else f"; pin it with {fetched.kind}_revision={fetched.commit}"
    say(f"{fetched.kind} {fetched.name}: commit {fetched.commit}, {size}, {fetched.folder}{pin}")


def _in_units(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"
