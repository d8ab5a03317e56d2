"""Tokens, secrets and owners: what is refused, and that nothing secret is shown on the way."""

from __future__ import annotations

import http.server
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hamu.cli.security import Secrets, check_dashboard, check_owner, check_token, find_token, is_loopback, read_secrets, redact
from hamu.errors import ConfigError

SECRET = "s3cret/value+1"
NOBODY = 65534


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("127.0.0.1:6379", True), ("127.9.8.7:6379", True), ("localhost", True), ("localhost:8265", True),
        ("LOCALHOST:8265", True), ("::1", True), ("[::1]:6379", True), ("[::ffff:127.0.0.1]:80", True), ("local", True),
        ("http://127.0.0.1:8265", True), ("http://[::1]:8265/", True), ("https://localhost/x", True),
        ("unix:/tmp/ray.sock", True),
        ("0.0.0.0:6379", False), ("[::]:6379", False), ("10.0.0.5:6379", False), ("192.168.1.10", False), ("head", False),
        ("http://ray.lab.org:8265", False), ("http://localhost.evil.org", False), ("http://localhost@evil.org", False),
        ("http://127.0.0.1.evil.org", False), ("auto", False), ("2001:db8::1", False), ("128.0.0.1", False), ("", False),
    ],
)  # fmt: skip
def test_only_addresses_of_this_machine_are_on_the_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_the_loopback_needs_no_token(tmp_path: Path) -> None:
    check_token("127.0.0.1:6379", {}, tmp_path)


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": ""}, {"RAY_AUTH_TOKEN": SECRET}])
def test_an_address_that_others_reach_needs_token_mode(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"10\.0\.0\.5:6379 is not on the loopback.*can run code.*RAY_AUTH_MODE=token"
    ) as caught:
        check_token("10.0.0.5:6379", environment, tmp_path)
    assert SECRET not in str(caught.value)


def test_token_mode_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no token in RAY_AUTH_TOKEN, .*get-auth-token --generate"):
        check_token("10.0.0.5:6379", {"RAY_AUTH_MODE": "token"}, tmp_path)


def test_a_token_is_found_where_ray_looks_in_its_order(tmp_path: Path) -> None:
    assert find_token({}, tmp_path) is None
    private(tmp_path / ".ray" / "auth_token", "of-the-home\n")
    named = str(private(tmp_path / "token", "of-the-path\n"))
    assert find_token({}, tmp_path) == "of-the-home"
    assert find_token({"RAY_AUTH_TOKEN_PATH": named}, tmp_path) == "of-the-path"
    assert find_token({"RAY_AUTH_TOKEN_PATH": named, "RAY_AUTH_TOKEN": "of-the-variable"}, tmp_path) == "of-the-variable"
    for extra in ({}, {"RAY_AUTH_TOKEN_PATH": named}, {"RAY_AUTH_TOKEN": "of-the-variable"}):
        check_token("10.0.0.5:6379", {"RAY_AUTH_MODE": "token", **extra}, tmp_path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620])
def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / ".ray" / "auth_token", SECRET, mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod 600 {path}") as caught:
        check_token("10.0.0.5:6379", {"RAY_AUTH_MODE": "token"}, tmp_path)
    assert SECRET not in str(caught.value)


def test_a_named_token_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    private(tmp_path / ".ray" / "auth_token", SECRET)  # Ray does not fall back on it either
    with pytest.raises(ConfigError, match="missing: No such file"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")}, tmp_path)
    empty = private(tmp_path / "empty", " \n")
    with pytest.raises(ConfigError, match="empty: the token file is empty"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(empty)}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_and_folders_of_another_user_are_refused(tmp_path: Path) -> None:
    path = private(tmp_path / "secrets", f"A_TOKEN={SECRET}\n")
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        read_secrets(path)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path)
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match="can run code.*copy it"):
        check_owner(tmp_path)


def test_ones_own_folder_is_taken_unless_everybody_writes_to_it(tmp_path: Path) -> None:
    check_owner(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        check_owner(tmp_path)
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="give the folder of a sweep"):
        check_owner(tmp_path / "missing")


def test_secrets_are_read_from_lines_of_key_and_value(tmp_path: Path) -> None:
    text = f"# of the lab\n\nWANDB_API_KEY={SECRET}\nexport HF_TOKEN = 'hf_ab=c d'\nOTHER=\"quoted\"\n"
    found = read_secrets(private(tmp_path / "secrets", text))
    assert dict(found) == {"WANDB_API_KEY": SECRET, "HF_TOKEN": "hf_ab=c d", "OTHER": "quoted"}


def test_secrets_as_text_show_their_names_alone(tmp_path: Path) -> None:
    found = Secrets({"WANDB_API_KEY": SECRET})
    assert repr(found) == str(found) == f"{found}" == "Secrets(WANDB_API_KEY)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"no assignment {SECRET}", "line 1: a line is KEY=VALUE"),
        (f"A=long enough\n1B={SECRET}", "line 2: a line is KEY=VALUE"),
        (f"A_TOKEN={SECRET}\nA_TOKEN={SECRET}", "line 2: A_TOKEN stands twice"),
        ("A_TOKEN=", "line 1: the value of A_TOKEN has 0 characters"),
        ("A_TOKEN=abc", "line 1: the value of A_TOKEN has 3 characters"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_not_shown(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_secrets(private(tmp_path / "secrets", text))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_secrets_that_others_may_read_are_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "secrets", f"A_TOKEN={SECRET}", mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        read_secrets(path)
    path.chmod(0o400)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400 and len(read_secrets(path)) == 1


def test_secrets_are_replaced_in_every_form() -> None:
    secrets = {"A": SECRET, "B": SECRET + "longer", "C": 'with "quotes" and\ttabs', "D": "no"}
    text = f'plain {SECRET}, longer {SECRET}longer, url s3cret%2Fvalue%2B1, json with \\"quotes\\" and\\ttabs, and no more'
    assert redact(text, secrets) == "plain ***, longer ***, url ***, json ***, and no more"
    assert redact("nothing here", {}) == "nothing here"


class JobServer(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's job server does: 401 without the token where one is asked for."""

    token: str | None = SECRET
    redirect_to: str | None = None
    seen: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.seen.append(given)
        if self.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", self.redirect_to)
        elif self.path != "/api/jobs/":
            self.send_response(404)
        elif self.token is not None and given != f"Bearer {self.token}":
            self.send_response(401 if given is None else 403)
        else:
            self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[http.server.ThreadingHTTPServer]]:
    running: list[http.server.ThreadingHTTPServer] = []
    yield running
    for server in running:
        server.shutdown()
        server.server_close()


def serve(
    servers: list, *, token: str | None, redirect_to: str | None = None, host: str = "127.0.0.1"
) -> tuple[str, type[JobServer]]:
    handler = type("Handler", (JobServer,), {"token": token, "redirect_to": redirect_to, "seen": []})
    server = http.server.ThreadingHTTPServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    servers.append(server)
    return f"http://{host}:{server.server_address[1]}", handler


def own_address() -> str:
    """An address of this machine that is not on the loopback; nothing is sent to find it."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def test_a_job_server_that_takes_the_token_is_used(servers: list) -> None:
    url, _ = serve(servers, token=SECRET)
    check_dashboard(url, SECRET)
    check_dashboard(url + "/", SECRET)


def test_a_wrong_or_missing_token_is_said_without_showing_it(servers: list) -> None:
    url, _ = serve(servers, token=SECRET)
    with pytest.raises(ConfigError, match=r"refuses the token \(403\); give that cluster's own") as caught:
        check_dashboard(url, "another-secret")
    assert "another-secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"refuses a request without a token \(401\)"):
        check_dashboard(url, None)


def test_a_server_on_the_loopback_may_do_without(servers: list) -> None:
    url, _ = serve(servers, token=None)
    check_dashboard(url, None)


def test_a_server_that_others_reach_must_ask_for_the_token(servers: list) -> None:
    host = own_address()
    if is_loopback(host):
        pytest.skip("this machine has no address beside the loopback")
    url, handler = serve(servers, token=None, host=host)
    with pytest.raises(ConfigError, match=r"without a token with 200 instead of 401.*can run code.*RAY_AUTH_MODE=token"):
        check_dashboard(url, SECRET)
    assert handler.seen == [None]  # the token is not shown to a server that asks nobody for one
    asking, _ = serve(servers, token=SECRET, host=host)
    check_dashboard(asking, SECRET)
    with pytest.raises(ConfigError, match="asks for a token, and there is none here"):
        check_dashboard(asking, None)


def test_the_token_is_not_carried_to_another_address(servers: list) -> None:
    other, elsewhere = serve(servers, token=None)
    url, _ = serve(servers, token=None, redirect_to=f"{other}/api/jobs/")
    with pytest.raises(ConfigError, match="answers 302: that is no job server"):
        check_dashboard(url, SECRET)
    assert elsewhere.seen == []


def test_no_answer_is_said_with_the_mend(servers: list) -> None:
    url, _ = serve(servers, token=None)
    servers[0].shutdown()
    servers.pop().server_close()
    with pytest.raises(ConfigError, match=r"no answer .*start the cluster.*ray dashboard FILE"):
        check_dashboard(url, SECRET)
