"""Reading and writing model folders: a local folder or the cache before the hub, quietly, and each file replaced at once."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hamu.errors import CheckpointError
from hamu.hub import offline, one_line, why_not_on_hub
from hamu.models.record import RECORD_NAME, json_text

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What the libraries raise on a model that is missing, broken or of another kind."""
_NO_ACCESS = re.compile(r"gated|restricted|\b401\b|\b403\b|unauthorized|forbidden", re.IGNORECASE)


def is_hub_name(name: str) -> bool:
    """Return whether a name that is no folder can be `owner/model` of the hub."""
    return "/" in name and not name.startswith((".", "/", "~"))


def offline_first(load: Callable[..., Any], name: str, *, wanted: str, **settings: Any) -> Any:
    """Call a `from_pretrained` on a local folder or the local cache, and on the hub only when that has nothing.

    Args:
        load: the function; called as `load(name, **settings)`, at first with `local_files_only=True`.
        name: a local folder, or `owner/model`.
        wanted: what is loaded, for the message ("an image classifier").

    Raises:
        CheckpointError: neither has it, or the hub does not let this user have it.
    """
    is_local = os.path.isdir(name)
    with quiet():
        try:
            with offline():
                return load(name, local_files_only=True, **settings)
        except LOAD_ERRORS as error:
            reason = one_line(error)
        if not is_local:
            missing = why_not_on_hub(name, "model", settings.get("revision"))
            if missing is None:
                try:
                    return load(name, **settings)
                except LOAD_ERRORS as error:
                    reason = one_line(error)
            else:
                reason = missing
    if not is_local and _NO_ACCESS.search(reason):
        raise CheckpointError(
            f"the hub does not give {name!r} to this user ({reason}); check the name, accept its licence at "
            f"https://huggingface.co/{name} and log in with `hf auth login`"
        )
    where = "in the folder" if is_local else "in the local cache or on the hub"
    raise CheckpointError(f"cannot load {wanted} {name!r} {where} ({reason}); check the name, or fetch the model first")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its warning about a replaced head, which is what was asked for."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def replaced_files(path: str | Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a scratch folder whose files are moved into `path` at the end, `record` as `record.json` last.

    Files in a folder of the scratch folder go into the folder of that name in `path`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        written = sorted(file for file in scratch.rglob("*") if file.is_file())
        (scratch / RECORD_NAME).write_text(json_text(record, indent=2) + "\n")
        for file in (*written, scratch / RECORD_NAME):
            target = folder / file.relative_to(scratch)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
