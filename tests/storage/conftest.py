"""A store with two mirrors: moto's S3, in this process, on the loopback; "another machine" is another mirror of its bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hamu.storage import mount

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
}  # fmt: skip


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: uv pip install 's3fs'")
    pytest.importorskip("moto.server", reason="moto is not installed: uv pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    before = {name: os.environ.get(name) for name in (*SETTINGS, "AWS_ENDPOINT_URL")}
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    os.environ.update(SETTINGS, AWS_ENDPOINT_URL=address)
    try:
        yield address
    finally:
        running.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> str:
    import s3fs

    bucket = "bucket" + str(abs(hash(request.node.name)))
    s3fs.S3FileSystem().mkdir(f"/{bucket}")
    return f"s3://{bucket}/hamu"


@pytest.fixture
def here(url: str, tmp_path: Path) -> Path:
    return mount.mount(url, tmp_path / "here")


@pytest.fixture
def there(url: str, tmp_path: Path) -> Path:
    return mount.mount(url, tmp_path / "there", probe=False)
