"""The compose file and what it mounts: of its schema, on the loopback, with a token that stands in no file of ours."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.test_dockerfiles import SECRET, tool


@pytest.fixture(scope="module")
def compose(repo_root: Path) -> dict[str, Any]:
    return yaml.safe_load((repo_root / "docker" / "compose.yaml").read_text())


def test_it_is_of_the_schema(repo_root: Path) -> None:
    path = repo_root / "docker" / "compose.yaml"
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_head_and_two_workers_of_one_image(compose: dict[str, Any]) -> None:
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    assert head["command"] == ["head"]
    assert worker["command"] == ["worker"]
    assert worker["deploy"]["replicas"] == 2
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert head["image"] == worker["image"]
    shared = [each for each in worker["volumes"] if each["target"] == "/artifacts"]
    assert shared[0] in head["volumes"]


def test_only_the_loopback_is_published(compose: dict[str, Any]) -> None:
    published = {port for service in compose["services"].values() for port in service.get("ports", ())}
    assert published == {"127.0.0.1:8265:8265", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"}
    assert not any("network_mode" in service for service in compose["services"].values())


def test_the_token_is_a_file_and_its_text_nowhere(compose: dict[str, Any], repo_root: Path) -> None:
    assert compose["secrets"] == {"ray_token": {"file": "${HAMU_TOKEN_FILE:-./ray_token}"}}
    for name in ("head", "worker"):
        service = compose["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["secrets"] == ["ray_token"]
    for service in compose["services"].values():
        for key, value in service.get("environment", {}).items():
            assert not SECRET.search(key) or key == "RAY_AUTH_TOKEN_PATH" or value in ("true", "false"), key
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "docker/ray_token"], cwd=repo_root)
    assert ignored.returncode == 0, "docker/ray_token can be committed by mistake"


def test_every_service_is_pinned_watched_and_started_again(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert tag and tag != "latest", name
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert compose["services"]["head"]["shm_size"] == compose["services"]["worker"]["shm_size"] == "2gb"


def test_every_mounted_file_of_ours_is_there(compose: dict[str, Any], repo_root: Path) -> None:
    mounts = [each for service in compose["services"].values() for each in service["volumes"] if isinstance(each, str)]
    ours = [each.split(":")[0] for each in mounts if each.startswith("./")]
    assert sorted(ours) == ["./grafana", "./prometheus.yml"]
    assert all((repo_root / "docker" / each).exists() for each in ours)
    named = {each.split(":")[0] for each in mounts if not each.startswith("./")}
    assert named == set(compose["volumes"])


def test_metrics_are_looked_for_where_the_head_writes_them(compose: dict[str, Any], repo_root: Path) -> None:
    docker = repo_root / "docker"
    prometheus = yaml.safe_load((docker / "prometheus.yml").read_text())
    found = prometheus["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert found == ["/tmp/ray/prom_metrics_service_discovery.json"]
    provider = yaml.safe_load((docker / "grafana" / "dashboards" / "ray.yaml").read_text())["providers"][0]
    root = compose["services"]["head"]["environment"]["RAY_METRICS_OUTPUT_ROOT"]
    assert provider["options"]["path"] == f"{root}/grafana/dashboards"
    source = yaml.safe_load((docker / "grafana" / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert source["name"] == "Prometheus"  # of Ray's dashboards
    assert source["url"] == compose["services"]["head"]["environment"]["RAY_PROMETHEUS_HOST"]
    for name in ("head", "prometheus", "grafana"):
        volumes = compose["services"][name]["volumes"]
        assert any(isinstance(each, str) and each.startswith("ray:/tmp/ray") for each in volumes), name
