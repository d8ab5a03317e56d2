"""The Hugging Face hub, asked once and briefly: a machine without a network says so in a second, not after retries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import constants

_TIMEOUT_S = 5.0


def why_not_on_hub(name: str, kind: str) -> str | None:
    """Return None when the hub has the repository, else the reason in one line (not found, gated, or no network).

    Args:
        name: `owner/name`.
        kind: "model" or "dataset".
    """
    api = huggingface_hub.HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        ask(name, timeout=_TIMEOUT_S)
    except Exception as error:  # the client's error types differ between its versions; none of them is ours to handle
        return f"{type(error).__name__}: {one_line(error)}"
    return None


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


def one_line(error: Exception) -> str:
    """Return an error's text on one line of at most 160 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
