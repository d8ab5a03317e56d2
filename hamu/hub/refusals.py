"""Why the hub did not give something, in one line without a token: what was asked, the reason, the mend."""

from __future__ import annotations

import re
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants, errors

from hamu.errors import CheckpointError, DataError, HamuError

DATASET = "dataset"

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{4,}|(?<=Bearer )\S+")


def one_line(error: BaseException) -> str:
    """Return an error's text on one line of at most 160 characters, without any token."""
    text = " ".join(_without_tokens(str(error)).split())
    return text if len(text) <= 160 else text[:157] + "..."


def error_type(kind: str) -> type[HamuError]:
    """What is raised where a repository of this kind cannot be had."""
    return DataError if kind == DATASET else CheckpointError


def is_of_hub(error: BaseException) -> bool:
    """Whether the hub's answer, or its silence, led to an error."""
    return any(isinstance(cause, errors.HfHubHTTPError) or is_no_network(cause) for cause in causes(error))


def refusal(error: BaseException, name: str, kind: str, revision: str | None) -> str:
    """Say why the hub did not give a repository, and the mend, in one line."""
    site = "https://huggingface.co/" + (f"datasets/{name}" if kind == DATASET else name)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    for cause in causes(error):
        if isinstance(cause, errors.HFValidationError):
            return f"{kind} name {name!r} is not one of the hub ({one_line(cause)}); give owner/name"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                f"{kind} {name!r} cannot be had: HF_HUB_OFFLINE is set; run --fetch once without it on a machine with a "
                f"network, e.g. the login node; the cache is {constants.HF_HOME}"
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _refusal_of_hub(cause, f"{kind} {name!r}", site=site, log_in=log_in, revision=revision)
        if is_no_network(cause):
            return (
                f"{kind} {name!r} cannot be had: no network ({type(cause).__name__}: {one_line(cause)}); run --fetch "
                f"once on a machine with a network, e.g. the login node (what is there is kept); the cache is {constants.HF_HOME}"
            )
    return (
        f"cannot fetch {kind} {name!r} ({type(error).__name__}: {one_line(error)}); fetch again; the cache is {constants.HF_HOME}"
    )


def _refusal_of_hub(error: errors.HfHubHTTPError, what: str, *, site: str, log_in: str, revision: str | None) -> str:
    """What the hub answered, in our words."""
    status, has_token = error.response.status_code, huggingface_hub.get_token() is not None
    said = _without_tokens(" ".join((error.server_message or error.response.headers.get("X-Error-Message") or "").split()))[:160]
    hub_says = f" (the hub says: {said.rstrip('.')})" if said else ""
    if status == 401 and has_token:
        return f"{what}: the hub does not accept the token that was given{hub_says}; {log_in} to a valid one; then fetch again"
    if isinstance(error, errors.GatedRepoError):
        if not has_token:
            return f"{what} is gated, and there is no token: accept the licence at {site} and {log_in}; then fetch again"
        return (
            f"{what} is gated, and the account of the token may not read it{hub_says}: accept the licence at {site} with "
            "that account, and let the token read gated repositories; then fetch again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; give a commit, tag or branch of those at {site}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):  # without a token 401 stands for both
        mend = "or ask its owner for access" if has_token else f"or if it is private {log_in}"
        return f"{what} is not on the hub, or is private; check the name, {mend}"
    if status == 403:
        return f"{what}: the hub refuses to give it{hub_says}; let the token read it, then fetch again"
    return f"{what}: the hub answers with status {status}{hub_says}; fetch again later"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, the outermost first.

    A file that a repository does not have is no cause: the libraries ask for optional ones, and go on.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if not isinstance(at, errors.EntryNotFoundError):
            yield at
        at = at.__cause__ or at.__context__


def is_no_network(error: BaseException) -> bool:
    """By name, since `datasets` and `huggingface_hub` each bring a client with errors of its own."""
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        base.__name__ in ("TransportError", "RevisionResolutionError") for base in type(error).__mro__
    )


def _without_tokens(text: str) -> str:
    token = huggingface_hub.get_token()
    return _TOKEN.sub("<token>", text.replace(token, "<token>") if token else text)
