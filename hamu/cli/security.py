"""Who may use a Ray, and what must not be seen: tokens, secrets, and the folders that state is restored from.

Whoever reaches the port of a Ray without a token can run any code as the user that started it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
REDACTED = "***"
_REASON = "whoever reaches its port can run code as the user that started it"
_MEND = "run `ray get-auth-token --generate` once, give every node that file (mode 600), and set RAY_AUTH_MODE=token"
_LEAST = 4  # characters of a secret: replacing shorter ones would make nonsense of a log
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(.*)", re.DOTALL)
_TIMEOUT_S = 10.0
_KEPT: dict[str, str] = {}


class Secrets(Mapping[str, str]):
    """Names and values that are never printed: as text it shows the names alone."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Secrets({', '.join(sorted(self._values))})"


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine reach an address: a host, host:port, URL or Unix socket. No name is looked up.

    "local" is a Ray of one's own; "auto" may be anywhere, so it is not: give the address that it stands for.

    >>> [is_loopback(each) for each in ("127.0.0.1:6379", "http://[::1]:8265", "unix:/tmp/ray", "0.0.0.0", "10.0.0.1:6379")]
    [True, True, True, False, False]
    """
    address = address.strip()
    if address == "local" or address.startswith(("unix:", "/")):
        return True
    host = _host(address)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def find_token(environment: Mapping[str, str], home: Path) -> str | None:
    """The token that Ray would use, by its own order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; None: none.

    Raises:
        ConfigError: a token file is empty, cannot be read, is another user's, or others may read it.
    """
    if token := environment.get(TOKEN, "").strip():
        return token
    named = environment.get(TOKEN_PATH, "").strip()
    path = Path(named).expanduser() if named else home / ".ray" / "auth_token"
    if not named and not path.exists():
        return None
    token = _private_text(path, "the token").strip()
    if not token:
        raise ConfigError(f"{path}: the token file is empty; {_MEND}")
    return token


def check_token(address: str, environment: Mapping[str, str], home: Path) -> None:
    """Refuse an address that others can reach without token authentication.

    Raises:
        ConfigError: RAY_AUTH_MODE is not token, there is no token, or others may read it.
    """
    if is_loopback(address):
        return
    mode = environment.get(MODE, "").strip().lower()
    if mode != "token":
        given = f"{MODE}={mode}" if mode else f"{MODE} is not set"
        raise ConfigError(f"{address} is not on the loopback and {given}, but {_REASON}; {_MEND}")
    if find_token(environment, home) is None:
        raise ConfigError(
            f"{address} is not on the loopback and there is no token in {TOKEN}, {TOKEN_PATH} or {home / '.ray' / 'auth_token'}, "
            f"but {_REASON}; {_MEND}"
        )


def check_dashboard(url: str, token: str | None) -> None:
    """Ask a job server for its jobs: without the token it must refuse (unless it is on the loopback), with it must answer.

    Raises:
        ConfigError: it serves anybody, does not take the token, or does not answer.
    """
    jobs = url.rstrip("/") + "/api/jobs/"
    if not is_loopback(url):
        code = _status(jobs, None)
        if code not in (401, 403):
            raise ConfigError(
                f"{url} answers a request without a token with {code} instead of 401, but {_REASON}; start Ray there with "
                "RAY_AUTH_MODE=token"
            )
        if token is None:
            raise ConfigError(f"{url} asks for a token, and there is none here; {_MEND}")
    code = _status(jobs, token)
    if code in (401, 403):
        mend = _MEND if token is None else f"give that cluster's own, in {TOKEN} or {TOKEN_PATH}"
        raise ConfigError(f"{url} refuses {'a request without a token' if token is None else 'the token'} ({code}); {mend}")
    if code != 200:
        raise ConfigError(f"{url} answers {code}: that is no job server of Ray; give the address of its dashboard")


def read_secrets(path: str | Path) -> Secrets:
    """Read KEY=VALUE lines of a file that only this user may read; blank lines and those that begin with # are skipped.

    Raises:
        ConfigError: others may read it, or a line is none of these; no message shows what a line holds.
    """
    path = Path(path).expanduser()
    found: dict[str, str] = {}
    for number, line in enumerate(_private_text(path, "secrets").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{path}, line {number}: a line is KEY=VALUE; mend it (its text is not shown)")
        name, value = match[1], match[2].strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if name in found:
            raise ConfigError(f"{path}, line {number}: {name} stands twice; leave one")
        if len(value) < _LEAST:
            raise ConfigError(
                f"{path}, line {number}: the value of {name} has {len(value)} characters, too few to keep it out of logs; a "
                f"secret has {_LEAST} or more, and a plain setting stands under environment in the settings"
            )
        found[name] = value
    return Secrets(found)


def check_owner(folder: str | Path) -> None:
    """Refuse to restore from a folder that others could have written: Ray's state is pickle, which runs code when it is read.

    Raises:
        ConfigError: it does not exist, belongs to another user, or everybody may write to it.
    """
    folder = Path(folder)
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}; give the folder of a sweep") from None
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}: what is restored can run code, so it is "
            "only taken from folders of one's own; copy it and look at it first"
        )
    if found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{folder} can be written by everybody, and what is restored can run code; run chmod o-w {folder}")


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """The text with every secret value replaced, also where it is written as in a URL or in JSON."""
    forms = {
        form
        for value in secrets.values()
        if len(value) >= _LEAST
        for form in (value, urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value), json.dumps(value)[1:-1])
    }
    for form in sorted(forms, key=len, reverse=True):  # a secret that holds another one goes first
        text = text.replace(form, REDACTED)
    return text


def check_url(url: str) -> None:
    """Refuse a URL with a password or a query in it: it would stand in records, in printed commands and in names of folders.

    Raises:
        ConfigError: as said; the message does not show it.
    """
    where = urllib.parse.urlsplit(url)
    if where.password is not None or where.query:
        what = "a query" if where.password is None else "a password"
        raise ConfigError(
            f"the URL {where.scheme}://...@{where.hostname or ''}{where.path} holds {what}; give it without, and the "
            "credentials as the store's own library reads them (environment, or its own file)"
        )


def keep_secret(secrets: Mapping[str, str]) -> None:
    """Have `without_secrets` hide these values from now on, in this process."""
    _KEPT.update(secrets)


def secret_names() -> tuple[str, ...]:
    """Names of what `keep_secret` was given."""
    return tuple(_KEPT)


def without_secrets(text: str) -> str:
    """The text as it may be written down: with what `keep_secret` was given replaced."""
    return redact(text, _KEPT)


def _private_text(path: Path, what: str) -> str:
    """What a file of mode 600 and this user's holds."""
    try:
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())  # of the file that is read, not of what stands there a moment later
            if found.st_uid != os.geteuid():
                raise ConfigError(f"{path} belongs to user {found.st_uid}, not to this one; keep {what} in a file of your own")
            if found.st_mode & 0o077:
                mode = stat.S_IMODE(found.st_mode)
                raise ConfigError(f"{path} has mode {mode:o}, so others may read {what}; run chmod 600 {path}")
            return file.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is no UTF-8 text; write {what} as text") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a file with {what} in it, mode 600") from None


def _host(address: str) -> str:
    """The host of an address: without scheme, user, port and path."""
    text = address.split("://", 1)[-1].split("/", 1)[0].rsplit("@", 1)[-1]
    if text.startswith("["):
        return text[1:].split("]", 1)[0].lower()
    return (text.rsplit(":", 1)[0] if text.count(":") == 1 else text).lower()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is not carried to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    try:
        with urllib.request.build_opener(_NoRedirect, *proxies).open(request, timeout=_TIMEOUT_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"{url}: no answer ({reason}); start the cluster, and for one behind a tunnel run `ray dashboard FILE` beside"
        ) from None
