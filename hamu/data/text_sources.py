"""Which rows of text are kept, forgotten and tested on: names of datasets, subsets and splits, before any row is read.

    sources = resolve_sources(config.data)  # {"retain": ..., "forget": ..., "test": ...}

Datasets in the layout of TOFU (`forget10`, `retain90`, `holdout10`) or of WaterDrum-TOFU (`forget_10` with the splits `retain`,
`forget`, `semantic_duplicate`, ...) have defaults for all of them; of any other, the rows to forget are to be named.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hamu.data.authors import FORGOTTEN, SPLITS
from hamu.data.tables import is_hub_name, subsets_of
from hamu.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from hamu.training.config import DataConfig

AUTHORS = "authors"
HUB_NAMES = {"tofu": "locuslab/TOFU", "waterdrum_tofu": "Glow-AI/WaterDrum-TOFU"}
"""Short names of datasets on the hub; a folder of such a name is `./tofu`."""
NO_PROMPT = "none"
"""A prompt field of this name: there are no prompts, the whole text is the response."""
PERTURBED_PARTS = ("forget", "retain", "real_authors", "world_facts")
_NOT_GIVEN = "train"  # the default of dataset_split
_AUTHORS_SPLITS = {"retain": "retain", "forget": "forget", "test": "holdout", "duplicate": "semantic_duplicate"}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where the rows of a part come from; nothing is opened yet."""

    part: str
    """"retain", "forget", "test" or "duplicate"."""
    name: str
    """"authors", a path, or `owner/name` on the hub."""
    subset: str | None
    split: str
    prompt_field: str | None = None
    """None: a usual name; "": there are no prompts."""
    response_field: str | None = None
    revision: str | None = None
    """Of a hub dataset; None is main."""

    @property
    def is_hub(self) -> bool:
        """Whether the rows come from the hub, or its cache."""
        return self.name != AUTHORS and is_hub_name(self.name)

    @property
    def flag(self) -> str:
        """Start of the settings that name it: "dataset", "forget_dataset", ..."""
        return "dataset" if self.part == "retain" else f"{self.part}_dataset"

    def describe(self) -> str:
        """Return its names on one line: "authors, subset forget_10, split retain"."""
        subset, revision = f", subset {self.subset}" if self.subset else "", f" at {self.revision}" if self.revision else ""
        return f"{self.name}{revision}{subset}, split {self.split}"

    def is_same(self, other: TextSource) -> bool:
        """Whether both name the same rows."""
        one, two = ((_identity(source.name), source.subset, source.split) for source in (self, other))
        return one == two


def resolve_sources(data: DataConfig) -> dict[str, TextSource]:
    """Return the sources that the settings name: "retain" and "forget", and "test" and "duplicate" where there are any.

    What is not given follows from what is, in the layout of the dataset:

    - TOFU: `forget10` is forgotten; retain and test are the `retain90` and `holdout10` that go with it, and the other way
      round. A `dataset_subset` that is a forget subset is what to forget.
    - WaterDrum-TOFU and `authors`: subset `forget_10`, splits `retain` and `forget`; duplicates `semantic_duplicate`; test rows
      are `holdout` of authors, and of WaterDrum-TOFU those that are named.
    - any other: `dataset_*` are the retain rows; `forget_dataset_*` and `duplicate_dataset_*` must be named, test rows may be.

    `full` is retain and forget together, as add_forget_to_train asks for, and is refused without it.

    Raises:
        ConfigError: the rows to forget (or the duplicates asked for) are not named, are those to retain, or are among them.
    """
    is_mixed = data.forget_dataset_name is not None and not _is_one(data.forget_dataset_name, data.dataset_name)
    layout = "own" if is_mixed else _layout(data.dataset_name)
    if layout == "own" and data.forget_pct is not None:
        raise ConfigError(
            f"forget_pct {data.forget_pct} is for TOFU, WaterDrum-TOFU and authors; of {data.dataset_name!r} name the rows to "
            "forget with --forget_dataset_name, --forget_dataset_subset or --forget_dataset_split"
        )
    sources = {"tofu": _tofu, "splits": _in_splits, "own": _own}[layout](data)
    if data.add_duplicate_to_retain:
        sources["duplicate"] = _duplicates(data, layout, sources["forget"])
    for source in sources.values():
        if source.name == AUTHORS:
            _check_authors(source)
    if sources["retain"].is_same(sources["forget"]):
        raise ConfigError(
            f"the rows to retain and to forget are the same ({sources['retain'].describe()}); name another dataset, subset or "
            "split with --forget_dataset_name, --forget_dataset_subset or --forget_dataset_split"
        )
    return sources


def perturbed_sources(data: DataConfig) -> dict[str, TextSource]:
    """Return the sources of the questions with wrong answers, by `PERTURBED_PARTS`; those of `authors` are made in code.

    Raises:
        DataError: only TOFU and `authors` have them.
    """
    sources = resolve_sources(data)
    forget = sources["forget"]
    name = forget.name
    if name == AUTHORS and sources["retain"].name == AUTHORS:
        return {part: dataclasses.replace(forget, part=part, split=part) for part in PERTURBED_PARTS}
    if name == AUTHORS or _layout(name) != "tofu" or not _is_one(name, sources["retain"].name):
        raise DataError(
            f"dataset {data.dataset_name!r} has no perturbed answers, which eval_tofu needs; leave eval_tofu out, or give tofu, "
            "authors, or a folder like TOFU's with forget10_perturbed.json, retain_perturbed.json, real_authors_perturbed.json "
            "and world_facts_perturbed.json"
        )
    subsets = {"forget": f"{forget.subset}_perturbed"} | {part: f"{part}_perturbed" for part in PERTURBED_PARTS[1:]}
    return {
        part: TextSource(part=part, name=name, subset=subset, split="train", revision=forget.revision)
        for part, subset in subsets.items()
    }


def text_task_name(data: DataConfig) -> str:
    """Return the folder name of a task: "authors", "tofu", "waterdrum_tofu", or the name of the dataset, folder or file."""
    if not is_hub_name(_full_name(data.dataset_name)):
        return _short_name(data.dataset_name)
    for short, full in HUB_NAMES.items():
        if _last_part(data.dataset_name) == _last_part(full):
            return short
    return _short_name(data.dataset_name)


def forget_group(data: DataConfig) -> str:
    """Return the folder name of what is forgotten: "forget10", "forget_10", or the names that were given.

    Retain rows that are not those of the forget subset are named too: "forget05_retain90".
    """
    sources = resolve_sources(data)
    retain, forget = sources["retain"], sources["forget"]
    is_one = _is_one(retain.name, forget.name)
    layout = _layout(retain.name) if is_one else "own"
    if layout == "tofu":
        usual = f"retain{100 - share:02d}" if (share := _share(forget.subset)) else None
        names = [forget.subset, None if retain.subset == usual else retain.subset]
    elif layout == "splits":
        names = [forget.subset, None if forget.split == "forget" else forget.split]
        if (retain.subset, retain.split) != (forget.subset, "retain"):
            names += [retain.split, None if retain.subset == forget.subset else retain.subset]
    else:
        names = [None if is_one else _short_name(forget.name), forget.subset, None if forget.split == "train" else forget.split]
    return _path_safe("_".join(name for name in names if name)) or "forget"


def duplicate_suffix(data: DataConfig) -> str:
    """Return what the duplicates among the retain rows add to a folder name: "", "_semanticdup", "_exactdup", "_duplicate"."""
    if not data.add_duplicate_to_retain:
        return ""
    source = resolve_sources(data)["duplicate"]
    for split, suffix in (("semantic_duplicate", "_semanticdup"), ("exact_duplicate", "_exactdup")):
        if split in (source.split, source.subset):
            return suffix
    return "_duplicate"


def _tofu(data: DataConfig) -> dict[str, TextSource]:
    retain, forget = data.dataset_subset, _forget_subset(data, "forget{:02d}")
    if forget is None and retain is not None and re.fullmatch(r"forget\d\d", retain):
        retain, forget = None, retain
    if retain == "full":
        _check_full(data, "retain90, or leave --dataset_subset out")
        retain = None
    if forget is None:
        share = 10 if retain is None else _share(retain)
        if share is None:
            raise ConfigError(
                f"dataset_subset {retain!r} does not say which rows to forget; name them with --forget_dataset_subset, such as "
                "forget10"
            )
        forget = f"forget{share:02d}"
    share = _share(forget)
    if retain is None:
        if share is None or share == 100:
            raise ConfigError(
                f"forget_dataset_subset {forget!r} does not say which rows to retain; name them with --dataset_subset, such as "
                "retain90"
            )
        retain = f"retain{100 - share:02d}"
    left = 0 if re.fullmatch(r"forget\d\d", retain) else _share(retain)  # percent at the tail that retain leaves out
    if share is not None and left is not None and share > left and retain != forget:
        raise ConfigError(
            f"dataset_subset {retain!r} holds rows of forget_dataset_subset {forget!r}; leave one of the two out: it follows "
            "from the other"
        )
    sources = {
        "retain": _source(data, "retain", data.dataset_name, retain, data.dataset_split),
        "forget": _source(data, "forget", data.dataset_name, forget, data.forget_dataset_split or "train"),
    }
    if _names_of(data, "test"):
        sources["test"] = _test(data, subset=f"holdout{share:02d}" if share else None, split="train")
    elif share and _has_file(_full_name(data.dataset_name), f"holdout{share:02d}"):
        sources["test"] = _source(data, "test", data.dataset_name, f"holdout{share:02d}", "train")
    return sources


def _in_splits(data: DataConfig) -> dict[str, TextSource]:
    """The layout of WaterDrum-TOFU: a subset says how much is forgotten, its splits which rows are."""
    forget = _forget_subset(data, "forget_{:02d}") or data.dataset_subset or "forget_10"
    retain, split = data.dataset_subset or forget, data.dataset_split
    if split == "full":
        _check_full(data, "--dataset_split retain, or leave it out")
    if split in (_NOT_GIVEN, "full"):
        split = "retain"
    forget_split = data.forget_dataset_split or "forget"
    shares = _share(retain), _share(forget)
    if (split, forget_split) == ("retain", "forget") and shares[0] and shares[1] and shares[1] > shares[0]:
        raise ConfigError(
            f"the retain rows of subset {retain!r} hold rows of forget_dataset_subset {forget!r}; give one subset for both"
        )
    sources = {
        "retain": _source(data, "retain", data.dataset_name, retain, split),
        "forget": _source(data, "forget", data.dataset_name, forget, forget_split),
    }
    if _names_of(data, "test") or data.dataset_name == AUTHORS:
        is_authors = (data.test_dataset_name or data.dataset_name) == AUTHORS
        sources["test"] = _test(data, subset=forget, split="holdout" if is_authors else "test")
    return sources


def _own(data: DataConfig) -> dict[str, TextSource]:
    if not _names_of(data, "forget"):
        raise ConfigError(
            f"which rows of dataset {data.dataset_name!r} are to be forgotten is not said; name them with --forget_dataset_name, "
            "--forget_dataset_subset or --forget_dataset_split"
        )
    sources = {
        "retain": _source(data, "retain", data.dataset_name, data.dataset_subset, data.dataset_split),
        "forget": _named(data, "forget", subset=data.dataset_subset, split=data.dataset_split),
    }
    if _names_of(data, "test"):
        sources["test"] = _test(data, subset=data.dataset_subset, split="test")
    return sources


def _duplicates(data: DataConfig, layout: str, forget: TextSource) -> TextSource:
    if layout == "splits":
        return _named(data, "duplicate", subset=forget.subset, split="semantic_duplicate")
    if not _names_of(data, "duplicate"):
        raise ConfigError(
            f"add_duplicate_to_retain: which rows of dataset {data.dataset_name!r} are duplicates is not said; name them with "
            "--duplicate_dataset_name, --duplicate_dataset_subset or --duplicate_dataset_split"
        )
    return _named(data, "duplicate", subset=data.dataset_subset, split=data.dataset_split)


def _test(data: DataConfig, *, subset: str | None, split: str) -> TextSource:
    """The test rows that are named; a file has the split "train" alone."""
    name = _full_name(data.test_dataset_name or data.dataset_name)
    is_other = not _is_one(name, data.dataset_name)
    subset = data.test_dataset_subset or (None if is_other else subset)
    usual = "train" if _is_file(name, subset) else "test" if is_other else split
    return _source(data, "test", name, subset, data.test_dataset_split or usual)


def _named(data: DataConfig, part: str, *, subset: str | None, split: str) -> TextSource:
    """A part as its own settings name it; of the retain rows' dataset, what they leave open is `subset` and `split`."""
    name, own_subset, own_split = (getattr(data, f"{part}_dataset_{field}") for field in ("name", "subset", "split"))
    if name is None or _is_one(name, data.dataset_name):
        return _source(data, part, data.dataset_name, own_subset or subset, own_split or split)
    return _source(data, part, name, own_subset, own_split or "train")


def _source(data: DataConfig, part: str, name: str, subset: str | None, split: str) -> TextSource:
    full = _full_name(name)
    prefix = "" if part == "retain" else f"{part}_"
    prompt, response = (getattr(data, f"{prefix}dataset_{field}_field") for field in ("prompt", "response"))
    usual = data.dataset_prompt_field if prompt is None else prompt
    if full == AUTHORS:
        subset, split = subset or "forget_10", _AUTHORS_SPLITS[part] if split == _NOT_GIVEN else split
    return TextSource(
        part=part,
        name=full,
        subset=subset,
        split=split,
        prompt_field="" if usual == NO_PROMPT else usual,
        response_field=response or data.dataset_response_field,
        revision=data.dataset_revision if full != AUTHORS and is_hub_name(full) and _is_one(name, data.dataset_name) else None,
    )


def _forget_subset(data: DataConfig, form: str) -> str | None:
    """The subset to forget, where it is named or follows from forget_pct."""
    given = data.forget_dataset_subset
    if data.forget_pct is None:
        return given
    meant = form.format(data.forget_pct)
    if given is not None and given != meant:
        raise ConfigError(
            f"forget_dataset_subset {given!r} and forget_pct {data.forget_pct} ({meant!r}) differ; give one of them"
        )
    return meant


def _check_full(data: DataConfig, mend: str) -> None:
    if not data.add_forget_to_train:
        raise ConfigError(
            f"'full' holds the rows to forget; give {mend}, or add --add_forget_to_train to train on the retain and forget rows"
        )


def _check_authors(source: TextSource) -> None:
    if source.subset not in FORGOTTEN:
        raise ConfigError(unknown("subset of authors", source.subset, FORGOTTEN))
    if source.split not in SPLITS:
        raise ConfigError(unknown("split of authors", source.split, SPLITS))


def _names_of(data: DataConfig, part: str) -> bool:
    return any(getattr(data, f"{part}_dataset_{field}") is not None for field in ("name", "subset", "split"))


def _share(subset: str | None) -> int | None:
    """Percent of the rows that a subset forgets, or that a retain subset leaves out; None: its name does not say."""
    match = re.fullmatch(r"(retain|forget|forget_)(\d\d)", subset or "")
    if match is None:
        return 100 if subset == "full" else None
    return 100 - int(match[2]) if match[1] == "retain" else int(match[2])


def _layout(name: str) -> str:
    """ "tofu", "splits" (WaterDrum-TOFU's and that of authors), or "own"."""
    if name == AUTHORS:
        return "splits"
    full = _full_name(name)
    if is_hub_name(full):
        return {"tofu": "tofu", "waterdrum_tofu": "splits"}.get(_last_part(full), "own")
    folder = Path(full).expanduser()
    if not folder.is_dir():
        return "own"
    folders, files = subsets_of(folder)
    if any(re.fullmatch(r"forget\d\d", subset) for subset in (*folders, *files)):
        return "tofu"
    return "splits" if any(re.fullmatch(r"forget_\d\d", subset) for subset in folders) else "own"


def _has_file(name: str, subset: str) -> bool:
    """Whether a dataset of TOFU's layout has a subset: on the hub it has them all."""
    if is_hub_name(name):
        return True
    folder = Path(name).expanduser()
    return folder.is_dir() and any(subset in names for names in subsets_of(folder))


def _is_file(name: str, subset: str | None) -> bool:
    """Whether a name means a single file, itself or as a subset of its folder."""
    path = Path(name).expanduser()
    if subset is None or not path.is_dir():
        return path.is_file()
    return not (path / subset).is_dir() and subset in subsets_of(path)[1]


def _full_name(name: str) -> str:
    return HUB_NAMES.get(name, name)


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower().replace("-", "_")


def _identity(name: str) -> str:
    """What two spellings of one dataset share."""
    full = _full_name(name)
    if full == AUTHORS:
        return full
    return full.lower() if is_hub_name(full) else str(Path(full).expanduser().resolve())


def _is_one(name: str, other: str) -> bool:
    return _identity(name) == _identity(other)


def _short_name(name: str) -> str:
    """The last part of a hub name, or the name of a folder or a file, fit for a path."""
    if name == AUTHORS or is_hub_name(_full_name(name)):
        return _path_safe(name.rsplit("/", 1)[-1]) or "data"
    path = Path(name).expanduser().resolve()
    return _path_safe(path.stem if path.is_file() else path.name) or "data"


def _path_safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._")
