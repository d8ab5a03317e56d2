"""The cluster files that come with the repository, and what a sweep reads from them."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hamu.errors import ConfigError
from launch.cluster import Cluster, NodeGroup, Span, cluster_machine, read_cluster, with_cores
from launch.cluster_settings import ClusterSettings
from launch.cluster_text import cluster_text, count_at_minimum
from launch.machine import Machine, Slots, choose_slots
from launch.node_types import NODE_TYPES, node_type
from launch.plan import make_plan
from launch.sweep import main
from tests.launch.bad_clusters import CLUSTERS, edited
from tune_spaces.space import load_space

FILES = ("local", "onprem", "aws-a100", "gcp-a100", "kuberay-rayjob")
LAUNCHED = FILES[:-1]


@pytest.fixture(scope="module")
def clusters() -> dict[str, Cluster]:
    """Every file, read once: Ray's own functions take 0.7 s for each."""
    return {name: read_cluster(CLUSTERS / f"{name}.yaml") for name in FILES}


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """The launcher files as Ray's own `prepare_config` fills them in, when its `validate_config` has passed them.

    In another process, as in launch/cluster_yaml.py: importing Ray here would fix its settings for the tests that follow.
    """
    code = (
        "import json, sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "found = {}\n"
        "for path in sys.argv[1:]:\n"
        "    found[path] = prepare_config(yaml.safe_load(open(path)))\n"
        "    validate_config(found[path])\n"
        "print('\\n' + json.dumps(found))\n"
    )
    paths = [str(CLUSTERS / f"{name}.yaml") for name in LAUNCHED]
    done = subprocess.run([sys.executable, "-P", "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {Path(path).stem: config for path, config in yaml.safe_load(done.stdout.splitlines()[-1]).items()}


def test_every_cluster_file_is_tried_here() -> None:
    found = {path.name.removesuffix(".yaml") for path in CLUSTERS.glob("*.yaml")}
    assert {name for name in found if not name.endswith(".settings")} == set(FILES)
    assert found >= {f"{name}.settings" for name in FILES}


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_schema_takes_the_file_as_it_is(prepared: dict[str, Any], name: str) -> None:
    assert prepared[name]["cluster_name"] == f"hamu-{name}"


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_are_counted_as_ray_counts_them(prepared: dict[str, Any], clusters: dict[str, Cluster], name: str) -> None:
    """Ray's defaults for what a file leaves out are ours too."""
    config, cluster = prepared[name], clusters[name]
    types = config["available_node_types"]
    assert cluster.n_nodes.minimum == 1 + sum(each["min_workers"] for each in types.values())
    assert cluster.n_nodes.maximum == 1 + min(config["max_workers"], sum(each["max_workers"] for each in types.values()))


def test_what_each_file_says(clusters: dict[str, Cluster]) -> None:
    found = {
        name: (each.provider, each.address, each.n_nodes, each.n_gpus, each.settings.storage_path)
        for name, each in clusters.items()
        if name != "local"
    }
    assert found == {
        "onprem": ("local", "192.0.2.10:6379", Span(3, 3), Span(12, 12), "/shared/hamu"),
        "aws-a100": ("aws", "auto", Span(1, 5), Span(0, 32), "s3://example-bucket/hamu"),
        "gcp-a100": ("gcp", "auto", Span(1, 17), Span(0, 16), "gs://example-bucket/hamu"),
        "kuberay-rayjob": ("kuberay", "auto", Span(1, 5), Span(0, 8), "/shared/hamu"),
    }
    assert {each.dashboard for name, each in clusters.items() if name != "local"} == {"http://127.0.0.1:8265"}


def test_the_local_file_is_this_machine(clusters: dict[str, Cluster]) -> None:
    cluster = clusters["local"]
    assert cluster.is_this_machine and cluster.address is None and cluster.dashboard is None
    assert cluster.n_nodes == Span(1, 1) and cluster.n_cpus.maximum == cluster_machine(cluster).cpus > 0
    assert [name for name, each in clusters.items() if each.is_this_machine] == ["local"]


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_no_secret_and_ask_for_a_token(name: str) -> None:
    text = (CLUSTERS / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    assert "RAY_AUTH_TOKEN" not in text and "0.0.0.0" not in text
    if name == "kuberay-rayjob":
        assert config["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        return
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert starts and all("RAY_AUTH_MODE=token" in line for line in starts)


def test_a_cluster_as_a_machine_has_the_cores_and_gpus_of_its_nodes(clusters: dict[str, Cluster]) -> None:
    machine = cluster_machine(clusters["aws-a100"])
    assert (machine.cpus, machine.gpus) == (388, 32)
    assert sorted(machine.nodes) == [(4, 0), *[(96, 8)] * 4]
    assert machine.gpu_memory_bytes == 40 * 2**30 and machine.gpu_name == "NVIDIA A100 40GB"
    assert cluster_machine(clusters["aws-a100"], at_most=False).nodes == ((4, 0),)


def group(name: str, minimum: int, maximum: int, *, cpus: int = 4, gpus: int = 0, is_head: bool = False) -> NodeGroup:
    return NodeGroup(name=name, cpus=cpus, gpus=gpus, minimum=minimum, maximum=maximum, is_head=is_head)


def test_a_limit_below_the_sum_of_the_groups_leaves_the_largest_nodes() -> None:
    groups = (group("head", 1, 1, is_head=True), group("small", 1, 5), group("gpu", 0, 3, gpus=2))
    cluster = Cluster(
        path=Path("x.yaml"), name="x", provider="aws", address="auto", dashboard=None, groups=groups, most_nodes=4,
        settings=ClusterSettings(),
    )  # fmt: skip
    assert [node.name for node in cluster.nodes()] == ["head", "small", "gpu", "gpu"]
    assert cluster.n_nodes == Span(2, 4) and cluster.n_gpus == Span(0, 4)


def test_what_a_known_instance_has_needs_not_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = edited(tmp_path, "aws-a100", ("    resources: {CPU: 96, GPU: 8}\n", ""))
    cluster = read_cluster(said)  # Ray's own functions see what `ray up` would find out from AWS
    assert (cluster.groups[1].cpus, cluster.groups[1].gpus) == (96, 8)


def test_a_file_without_settings_has_the_defaults(tmp_path: Path) -> None:
    shutil.copy(CLUSTERS / "local.yaml", tmp_path / "mine.yaml")
    assert read_cluster(tmp_path / "mine.yaml").settings == ClusterSettings()


def test_the_settings_alone_are_no_cluster_file() -> None:
    with pytest.raises(ConfigError, match=r"settings beside a cluster file; give .*onprem\.yaml"):
        read_cluster(CLUSTERS / "onprem.settings.yaml")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*give the path of a cluster file"):
        read_cluster(tmp_path / "nowhere.yaml")


def test_settings_go_before_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    extra = "address: 192.168.1.9:7000\ndashboard: https://ray.lab.org\nhead: {cpus: 16, gpus: 0}"
    path = edited(tmp_path, "onprem", ("", extra), part=".settings")
    cluster = read_cluster(path)
    assert (cluster.address, cluster.dashboard) == ("192.168.1.9:7000", "https://ray.lab.org")
    assert [(each.cpus, each.gpus) for each in cluster.nodes()] == [(16, 0), (32, 4), (32, 4)]


def test_the_port_of_the_head_is_that_of_its_start_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    assert read_cluster(edited(tmp_path, "onprem", ("--port=6379", "--port=6400"))).address == "192.0.2.10:6400"


def test_pods_that_are_not_scaled_are_as_many_as_their_replicas(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        "kuberay-rayjob",
        ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false"),
        ("replicas: 0", "replicas: 3"),
    )
    cluster = read_cluster(path)
    assert cluster.n_nodes == Span(4, 4)


def test_a_rayjob_may_stand_among_other_documents(tmp_path: Path) -> None:
    path = edited(tmp_path, "kuberay-rayjob", ("", "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: other}"))
    assert read_cluster(path).name == "hamu-sweep"


@pytest.mark.parametrize(
    ("name", "cpus", "gpus"),
    [("p4d.24xlarge", 96, 8), ("a2-highgpu-1g", 12, 1), ("a2-highgpu-8g", 96, 8), ("n2-standard-16", 16, 0), ("m5.xlarge", 4, 0)],
)
def test_instance_types_are_known(name: str, cpus: int, gpus: int) -> None:
    found = node_type(name)
    assert found is not None and (found.cpus, found.gpus) == (cpus, gpus)
    assert node_type("x9.huge") is None and node_type(None) is None


def test_every_known_type_with_gpus_says_which() -> None:
    assert all((each.gpus > 0) == bool(each.gpu_name) == bool(each.gpu_memory_bytes) for each in NODE_TYPES.values())


@pytest.mark.parametrize(
    ("slots", "cores", "expected"),
    [
        (Slots(count=8, cpus_per_trial=8, gpus_per_trial=1.0), 8, (8, 8)),
        (Slots(count=8, cpus_per_trial=8, gpus_per_trial=1.0), 16, (4, 16)),  # the cores of a node hold two
        (Slots(count=16, cpus_per_trial=4, gpus_per_trial=0.5), 2, (16, 2)),
        (Slots(count=4, cpus_per_trial=16, gpus_per_trial=2.0, workers_per_trial=2), 11, (2, 22)),
        (Slots(count=64, cpus_per_trial=1), 4, (16, 4)),
    ],
)
def test_cores_asked_for_limit_how_many_run_at_once(slots: Slots, cores: int, expected: tuple[int, int]) -> None:
    machine = Machine(cpus=64, cpu_name="2 nodes", memory_bytes=0, gpus=8, nodes=((32, 4), (32, 4)))
    given = with_cores(slots, machine, cores)
    assert (given.count, given.cpus_per_trial) == expected
    assert with_cores(slots, machine, None) is slots


def test_more_cores_than_a_node_has_are_refused() -> None:
    machine = Machine(cpus=64, cpu_name="2 nodes", memory_bytes=0, gpus=0, nodes=((32, 0), (32, 0)))
    with pytest.raises(ConfigError, match="cpus_per_worker 33: nodes of up to 32 cores.*give less"):
        with_cores(Slots(count=2), machine, 33)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_plan(load_space("digits/quickstart"), name="tried", overrides={}, root=tmp_path_factory.mktemp("root"))


def test_the_text_says_what_a_sweep_gets_at_the_fewest_and_at_the_most_nodes(clusters: dict[str, Cluster], plan: Any) -> None:
    cluster = clusters["gcp-a100"]
    slots = choose_slots(cluster_machine(cluster), n_trials=plan.n_to_run, gpus=1.0)
    text = cluster_text(cluster, plan=plan, slots=slots)
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines() if not line.startswith("nodes"))
    assert lines["cluster"].startswith("hamu-gcp-a100 (gcp), ")
    assert lines["in all"] == "1 to 17 nodes, 4 to 196 cores, 0 to 16 GPUs"
    assert lines["a trial"] == "1 worker, each with 12 cores and 1 GPU"
    assert lines["at once"] == f"0 at the fewest nodes, {slots.count} at the most; trials begin when nodes have been added"
    assert lines["storage"] == "gs://example-bucket/hamu"
    assert "ray dashboard" in lines["jobs"] and lines["jobs"].endswith("http://127.0.0.1:8265")
    assert "nodes      0 to 16 nodes a100: 12 cores, 1 x NVIDIA A100 40GB" in text


def test_the_text_shows_names_of_variables_and_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Any) -> None:
    monkeypatch.setattr("launch.cluster.ask_ray", lambda path, config: None)
    edits = [('HF_HUB_OFFLINE: "1"', "MY_FOLDER: /somewhere/private"), ("# secrets_file: ~", "secrets_file: ~")]
    cluster = read_cluster(edited(tmp_path, "onprem", *edits, part=".settings"))
    text = cluster_text(cluster, plan=plan, slots=Slots(count=2, gpus_per_trial=1.0))
    assert "variables  MY_FOLDER" in text and "/somewhere/private" not in text
    assert "secrets    from ~/.config/hamu/secrets there" in text


def test_what_runs_at_the_fewest_nodes_is_counted(clusters: dict[str, Cluster], plan: Any) -> None:
    assert count_at_minimum(clusters["aws-a100"], Slots(count=8, gpus_per_trial=1.0), plan) == 0
    assert count_at_minimum(clusters["aws-a100"], Slots(count=8), plan) == 4  # the head's cores
    assert count_at_minimum(clusters["kuberay-rayjob"], Slots(count=8), plan) == 0  # whose head gives none
    assert count_at_minimum(clusters["onprem"], Slots(count=2, gpus_per_trial=1.0), plan) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_contacts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """Neither the head nor the store of the artifacts: any connection would fail here."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"something was contacted: {args}")

    monkeypatch.chdir(tmp_path)
    for place in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(f"socket.socket.{place}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    code = main(["--space", "digits/quickstart", "--cluster", str(CLUSTERS / f"{name}.yaml"), "--dry-run"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.startswith("cluster    hamu-") and re.search(r"^trials: \d+$", said.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_file_imports_no_ray_and_changes_nothing(tmp_path: Path) -> None:
    """Ray reads its settings when it is imported, so RAY_AUTH_MODE would come too late afterwards."""
    code = (
        f"import os, sys\nbefore = dict(os.environ)\nfrom launch.cluster import read_cluster\n"
        f"read_cluster({str(CLUSTERS / 'onprem.yaml')!r})\n"
        "assert 'ray' not in sys.modules and 'torch' not in sys.modules\nassert dict(os.environ) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CLUSTERS.parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_file_is_not_changed_by_reading_it() -> None:
    from launch.launcher_checks import filled_resources

    config = yaml.safe_load((CLUSTERS / "aws-a100.yaml").read_text())
    del config["available_node_types"]["a100"]["resources"]
    kept = copy.deepcopy(config)
    assert filled_resources(CLUSTERS / "aws-a100.yaml", config)["available_node_types"]["a100"]["resources"] == {
        "CPU": 96,
        "GPU": 8,
    }
    assert config == kept
