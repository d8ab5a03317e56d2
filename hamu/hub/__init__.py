"""The Hugging Face hub: fetched once at a pinned revision, then used from its cache; asked briefly, answered in one line.

`fetch_model` and `fetch_dataset` bring a repository into the cache of `huggingface_hub`, and the rows of a dataset into that
of `datasets`. `why_not_cached` and `check_available` say before a run whether its parts can be had, and `rows_in_cache` reads
the rows of exactly one commit. Neither torch nor transformers is imported here, and a token is never part of a message.
"""

from hamu.hub.cache import MODEL, cached_commit, is_cached, offline, offline_environment, rows_in_cache, why_not_cached
from hamu.hub.fetch import Fetched, check_available, fetch_dataset, fetch_model, why_not_on_hub
from hamu.hub.refusals import DATASET, one_line

__all__ = [
    "DATASET",
    "MODEL",
    "Fetched",
    "cached_commit",
    "check_available",
    "fetch_dataset",
    "fetch_model",
    "is_cached",
    "offline",
    "offline_environment",
    "one_line",
    "rows_in_cache",
    "why_not_cached",
    "why_not_on_hub",
]
