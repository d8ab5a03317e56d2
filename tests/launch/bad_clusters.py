"""Bad variants of the cluster files that come with the repository, as edits of them: case -> file, edits, key, mend."""

from __future__ import annotations

import shutil
from pathlib import Path

CLUSTERS = Path(__file__).resolve().parents[2] / "launch" / "clusters"


def edited(folder: Path, name: str, *edits: tuple[str, str], part: str = "") -> Path:
    """A copy of a cluster file and its settings, with text replaced in the file, or in its settings (part ".settings").

    An old text that is not there is a mistake of the test; "" appends the new text.
    """
    for suffix in ("", ".settings"):
        shutil.copy(CLUSTERS / f"{name}{suffix}.yaml", folder / f"{name}{suffix}.yaml")
    path = folder / f"{name}{part}.yaml"
    text = path.read_text()
    for old, new in edits:
        assert old in text, f"{path.name} has no {old!r}"
        text = text.replace(old, new) if old else f"{text}\n{new}\n"
    path.write_text(text)
    return folder / f"{name}.yaml"


BAD_FILES = {
    "aws without region": ("aws-a100", [("  region: us-west-2\n", "")], "provider.region", "give e.g. us-west-2"),
    "zone of another region": ("aws-a100", [("us-west-2a,us-west-2b", "us-west-2a,us-east-1b")],
        "provider.availability_zone", "give one"),
    "gcp without project": ("gcp-a100", [("  project_id: example-project", "  project_id:")], "provider.project_id", "give e.g."),
    "gcp without zone": ("gcp-a100", [("  availability_zone: us-central1-a\n", "")], "provider.availability_zone", "give e.g."),
    "min above max": ("aws-a100", [("min_workers: 0", "min_workers: 5")],
        "available_node_types.a100.min_workers", "give at most 4"),
    "min above the limit of all": (
        "aws-a100",
        [("min_workers: 0", "min_workers: 4"), ("hamu-aws-a100\nmax_workers: 4", "hamu-aws-a100\nmax_workers: 3")],
        "max_workers",
        "give",
    ),
    "negative min": ("aws-a100", [("min_workers: 0", "min_workers: -1")],
        "available_node_types.a100.min_workers", "give 0 or more"),
    "unknown head type": ("aws-a100", [("head_node_type: head", "head_node_type: haed")],
        "head_node_type", "did you mean 'head'"),
    "no head type": ("aws-a100", [("head_node_type: head", "")], "head_node_type", "give one of head, a100"),
    "no node types": (
        "aws-a100", [("available_node_types:", "metadata:")], "available_node_types", "name their types",
    ),
    "empty name": ("onprem", [("cluster_name: hamu-onprem", "cluster_name: ''")], "cluster_name", "use letters"),
    "name with blanks": ("onprem", [("cluster_name: hamu-onprem", "cluster_name: my cluster")], "cluster_name", "use letters"),
    "no name": ("onprem", [("cluster_name: hamu-onprem", "")], "cluster_name", "add it"),
    "no head_ip": ("onprem", [("  head_ip: 192.0.2.10", "  ")], "provider.head_ip", "give the address"),
    "no worker_ips": ("onprem", [("worker_ips:", "worker_ipz:")], "provider.worker_ips", "write []"),
    "one machine twice": ("onprem", [("- 192.0.2.12", "- 192.0.2.11")], "provider.worker_ips[1]", "name each machine once"),
    "head among the workers": ("onprem", [("- 192.0.2.12", "- 192.0.2.10")], "provider.worker_ips[1]", "provider.head_ip too"),
    "no address": ("onprem", [("- 192.0.2.12", "- 192.0.2.1200")], "provider.worker_ips[1]", "give e.g."),
    "loopback with workers": ("onprem", [("head_ip: 192.0.2.10", "head_ip: 127.0.0.1")], "provider.head_ip", "the others reach"),
    "unknown key": ("onprem", [("cluster_name: hamu-onprem", "cluster_nam: hamu")], "cluster_nam", "did you mean 'cluster_name'"),
    "ours among Ray's": ("onprem", [("", "storage_path: /shared")], "storage_path", "onprem.settings.yaml"),
    "unknown key of a node type": ("aws-a100", [("min_workers: 0", "minworkers: 0")],
        "available_node_types.a100.minworkers", "did you"),
    "text for a number": ("aws-a100", [("idle_timeout_minutes: 10", "idle_timeout_minutes: ten")],
        "idle_timeout_minutes", "number"),
    "negative number": ("aws-a100", [("upscaling_speed: 1.0", "upscaling_speed: -1")], "upscaling_speed", "give 0 or more"),
    "never scales": ("aws-a100", [("upscaling_speed: 1.0", "upscaling_speed: 0")], "upscaling_speed", "give e.g. 1.0"),
    "idle_timeout 0": ("gcp-a100", [("idle_timeout_minutes: 10", "idle_timeout_minutes: 0")],
        "idle_timeout_minutes", "give e.g. 10"),
    "image without tag": ("aws-a100", [("hamu-sweeps:2.60.0-gpu", "hamu-sweeps")], "docker.image", "give a fixed tag"),
    "image latest": ("aws-a100", [("hamu-sweeps:2.60.0-gpu", "hamu-sweeps:latest")], "docker.image", "give a fixed tag"),
    "image without container": ("aws-a100", [("  container_name: hamu\n", "")], "docker.container_name", "give e.g. hamu"),
    "more GPUs than there are": ("aws-a100", [("GPU: 8", "GPU: 16")], "available_node_types.a100.resources.GPU", "give 8"),
    "unknown machine": (
        "aws-a100", [("p4d.24xlarge", "x9.huge"), ("    resources: {CPU: 96, GPU: 8}\n", "")],
        "available_node_types.a100.resources",
        "write resources",
    ),
    "gcp resources": (
        "gcp-a100", [("    resources: {CPU: 12, GPU: 1}\n", "")], "available_node_types.a100.resources", "{CPU: 12, GPU: 1}",
    ),
    "unknown provider": ("onprem", [("type: local", "type: azurre")], "provider.type", "did you mean 'azure'"),
    "provider without type": ("onprem", [("  type: local\n", "")], "provider.type", "add it"),
    "no token asked": ("onprem", [("RAY_AUTH_MODE=token", "FOO=1")],
        "head_start_ray_commands", "write `export RAY_AUTH_MODE=token"),
    "token in it": ("onprem", [("ulimit -n 65536;", "export RAY_AUTH_TOKEN=s3cret;")],
        "head_start_ray_commands[1]", "file_mounts"),
    "open dashboard": ("onprem", [("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")],
        "head_start_ray_commands[1]", "127.0.0.1"),
    "a tab": ("onprem", [("  type: local", "\ttype: local")], "line ", "indent with blanks"),
    "a key twice": ("onprem", [("", "cluster_name: again")], "line ", "leave one of them"),
    "not YAML": ("onprem", [("worker_ips:  #", "worker_ips: [ #")], "line ", "not YAML"),
    "a list": ("onprem", [], "", "not a mapping"),
    "nothing": ("onprem", [], "", "empty"),
    "a Python tag": ("onprem", [("", "metadata: !!python/object/apply:os.system ['true']")], "line ", "take it out"),
    "a number for a key": ("onprem", [("", "7: seven")], "line ", "put it in quotes"),
    "a number for a machine": (
        "aws-a100",
        [("InstanceType: p4d.24xlarge", "InstanceType: 4")],
        "available_node_types.a100.node_config.InstanceType",
        "give its name",
    ),
    "another API": ("kuberay-rayjob", [("ray.io/v1", "ray.io/v1alpha1")], "apiVersion", "give ray.io/v1"),
    "another kind": ("kuberay-rayjob", [("kind: RayJob", "kind: RayCluster")], "kind", "give RayJob"),
    "another Ray": ("kuberay-rayjob", [('"2.60.0"', '"2.9.0"')], "spec.rayClusterSpec.rayVersion", "give '2."),
    "no sweep": ("kuberay-rayjob", [("launch/sweep.py", "train.py")], "spec.entrypoint", "give `python launch/sweep.py"),
    "no root for the job": ("kuberay-rayjob", [(" --storage-path /shared/hamu", "")], "spec.entrypoint", "add --storage-path"),
    "another root": ("kuberay-rayjob", [("--storage-path /shared", "--storage-path /other")], "spec.entrypoint", "give"),
    "open quote": ("kuberay-rayjob", [("--name run1", "--name 'run1")], "spec.entrypoint", "close it"),
    "no authentication": ("kuberay-rayjob", [("mode: token", "mode: disabled")],
        "spec.rayClusterSpec.authOptions.mode", "give token"),
    "unknown key of a job": ("kuberay-rayjob", [("backoffLimit", "backofLimit")],
        "spec.backofLimit", "did you mean 'backoffLimit'"),
    "unknown mode": ("kuberay-rayjob", [("K8sJobMode", "K8JobMode")], "spec.submissionMode", "did you mean 'K8sJobMode'"),
    "fewer than the minimum": ("kuberay-rayjob", [("minReplicas: 0", "minReplicas: 5")], "minReplicas", "give at most 4"),
    "GPUs of request and limit": (
        "kuberay-rayjob",
        [("nvidia.com/gpu: 2}\n                  limits", "nvidia.com/gpu: 1}\n                  limits")],
        "requests.nvidia.com/gpu", "give 2",
    ),
    "half a GPU": ("kuberay-rayjob", [("nvidia.com/gpu: 2", "nvidia.com/gpu: 0.5")], "limits.nvidia.com/gpu", "whole number"),
    "pod image latest": ("kuberay-rayjob", [("2.60.0-gpu", "latest")], "containers[0].image", "give a fixed tag"),
    "root on no volume": ("kuberay-rayjob", [("mountPath: /shared", "mountPath: /other")],
        "volumeMounts", "mount a shared volume"),
    "packages anew for each job": (
        "kuberay-rayjob", [("    env_vars:", "    pip: [torch]\n    env_vars:")],
        "spec.runtimeEnvYAML.pip", "image",
    ),
    "a secret shown with the job": (
        "kuberay-rayjob", [("    env_vars:", "    env_vars:\n      HF_TOKEN: hf_abc123")],
        "spec.runtimeEnvYAML.env_vars.HF_TOKEN", "secretKeyRef",
    ),
    "a secret in a pod": (
        "kuberay-rayjob",
        [("              volumeMounts:\n                - {name: shared, mountPath: /shared}\n          volumes",
        "              env: [{name: HF_TOKEN, value: hf_abc123}]\n              volumeMounts:\n"
        "                - {name: shared, mountPath: /shared}\n          volumes")], "env[0].value", "secretKeyRef",
    ),
}  # fmt: skip

BAD_SETTINGS = {
    "unknown key": ("onprem", [("storage_path", "storage_pat")], "storage_pat", "did you mean 'storage_path'"),
    "unknown key of nodes": ("onprem", [("gpu_name:", "gpu_nam:")], "nodes.gpu_nam", "did you mean 'gpu_name'"),
    "relative root": ("onprem", [("/shared/hamu", "artifacts")], "storage_path", "give a folder that all nodes mount"),
    "root of one node": ("onprem", [("/shared/hamu", "/tmp/hamu")], "storage_path", "give a folder that all nodes mount"),
    "root by file URL": ("onprem", [("/shared/hamu", "file:///data")], "storage_path", "give a folder that all nodes mount"),
    "root with a password": (
        "aws-a100",
        [("s3://example-bucket", "s3://me:hf_abc123@example-bucket")],
        "storage_path",
        "credentials",
    ),
    "root with a query": (
        "aws-a100",
        [("example-bucket/hamu", "example-bucket/hamu?key=hf_abc123")],
        "storage_path",
        "credentials",
    ),
    "no root": ("aws-a100", [("storage_path: s3://example-bucket/hamu", "")], "storage_path", "it is missing"),
    "a token": ("onprem", [('HF_HUB_OFFLINE: "1"', "HF_TOKEN: hf_abc123")], "environment.HF_TOKEN", "secrets_file"),
    "a key": ("onprem", [('HF_HUB_OFFLINE: "1"', "WANDB_API_KEY: hf_abc123")], "environment.WANDB_API_KEY", "secrets_file"),
    "a password": ("onprem", [('HF_HUB_OFFLINE: "1"', "DB_PASSWORD: hf_abc123")], "environment.DB_PASSWORD", "secrets_file"),
    "authentication": ("onprem", [('HF_HUB_OFFLINE: "1"', "RAY_AUTH_MODE: disabled")], "environment.RAY_AUTH_MODE", "README"),
    "negative share": ("onprem", [("gpus_per_worker: 1", "gpus_per_worker: -0.5")], "gpus_per_worker", "give e.g. 0.5"),
    "one and a half": ("onprem", [("gpus_per_worker: 1", "gpus_per_worker: 1.5")], "gpus_per_worker", "give e.g. 0.5"),
    "not a number": ("onprem", [("gpus_per_worker: 1", "gpus_per_worker: .nan")], "gpus_per_worker", "give e.g. 0.5"),
    "no cores": ("onprem", [("# cpus_per_worker: 8", "cpus_per_worker: 0")], "cpus_per_worker", "give e.g. 1"),
    "none at once": ("onprem", [("# max_concurrent: 12", "max_concurrent: 0")], "max_concurrent", "give e.g. 1"),
    "machines of no cores": ("onprem", [("cpus: 32", "cpus: 0")], "nodes.cpus", "give e.g. 1"),
    "machines not described": (
        "onprem",
        [("nodes: {cpus: 32, gpus: 4, ", "nodes: {")],
        "nodes",
        "write nodes: {cpus: 32, gpus: 4}",
    ),
    "address without port": ("onprem", [("", "address: 192.168.1.10")], "address", "give that of Ray's head"),
    "dashboard without scheme": ("onprem", [("", "dashboard: 127.0.0.1:8265")], "dashboard", "give e.g. http"),
    "password in the dashboard": ("onprem", [("", "dashboard: 'http://me:hf_abc123@head:8265'")], "dashboard", "comes from"),
    "relative secrets": ("onprem", [("", "secrets_file: secrets.env")], "secrets_file", "give a path with / or ~"),
    "this machine described": ("local", [("", "nodes: {cpus: 64, gpus: 8}")], "nodes", "leave it out"),
    "a tab": ("onprem", [("environment:\n  HF", "environment:\n\tHF")], "line ", "indent with blanks"),
}
