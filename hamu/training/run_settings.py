"""Settings of a run and of its data; the fields are the flags of `python -m hamu.cli.train`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hamu.errors import ConfigError
from hamu.training.fields import check_choice, check_range, setting, switch

MODALITIES = ("vision", "llm")
PAIRINGS = ("sequential", "split-gpu")
BACKENDS = ("nccl", "gloo")
DATASET_PARTS = ("name", "subset", "split", "prompt_field", "response_field")
"""What names a source of rows: `dataset_<part>`, and the same with `forget_`, `duplicate_`, `test_` before it."""
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
ADDRESS = re.compile(r"auto|([^\s:/]+|\[[0-9a-fA-F:]+\]):\d{1,5}")


def _expand(settings: Any, *names: str) -> None:
    """Replace a leading ~ in the named settings, here alone, so that all who read them mean one folder."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value.startswith("~"):
            object.__setattr__(settings, name, str(Path(value).expanduser()))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Which model, on what, with which seed, and where things are written."""

    _argument_group_name: ClassVar[str] = "run"

    modality: str = setting("vision", "vision (images), or llm (text)")
    model_name: str = setting(
        "resnet20",
        "resnet20, torchvision/<name>, a hub name, or a model folder (unlearning starts from it); "
        "text: tiny-llama (the default), a hub name or a folder (of an adapter too)",
    )
    model_revision: str | None = setting(None, "commit, tag or branch of a hub model; default: main")
    num_labels: int | None = setting(None, "classes of the model; default: those of the dataset")
    img_size: int | None = setting(None, "resize images to this many pixels a side; default: as they are")
    seed: int = setting(42, "seed of the forget set, the initial weights and the order (see shuffle_seed)")
    shuffle_seed: int | None = setting(None, "seed of the order of rows; default: seed")
    gradient_pairing: str = setting("sequential", "sequential (one process) or split-gpu (an even number of processes)")
    num_workers: int = setting(1, "processes of the run, one GPU or core each (NUM_GPUS of the published scripts)")
    backend: str | None = setting(
        None, "split-gpu: nccl or gloo, what the processes talk through; default: nccl on GPUs, else gloo"
    )
    ddp_timeout: float = setting(300.0, "split-gpu: seconds a process waits for another before all are started again")
    ray_address: str | None = setting(
        None, "split-gpu: Ray cluster to join, auto or host:port; default: a Ray of this run's own on this machine"
    )
    device: str | None = setting(None, "cpu, cuda or cuda:<n>; default: a GPU if there is one")
    output_dir: str | None = setting(None, "folder of records and metrics; default: under artifact_root")
    final_model_output_dir: str | None = setting(None, "folder of the final model; default: under artifact_root")
    artifact_root: str = setting("artifacts", "root of checkpoints, results and caches")
    resume: bool = setting(False, "go on from the last checkpoint of the same run")
    dry_run: bool = setting(False, "print what would run and stop")
    fetch: bool = setting(False, "bring the model and the dataset from the hub into the cache, once and with a network, and stop")
    debug: bool = setting(False, "show tracebacks")

    def __post_init__(self) -> None:
        check_choice("modality", self.modality, MODALITIES)
        check_choice("gradient_pairing", self.gradient_pairing, PAIRINGS)
        check_range("num_labels", self.num_labels, low=2)
        check_range("img_size", self.img_size, low=1)
        check_range("num_workers", self.num_workers, low=1)
        if self.backend is not None:
            check_choice("backend", self.backend, BACKENDS)
        check_range("ddp_timeout", self.ddp_timeout, above=0, mend="300 is the default")
        if self.ray_address is not None and not ADDRESS.fullmatch(self.ray_address):
            raise ConfigError(
                f"ray_address must be auto or host:port, got {self.ray_address!r}; leave it out for a Ray on this machine"
            )
        check_range("seed", self.seed, low=0, high=2**32 - 1)
        check_range("shuffle_seed", self.shuffle_seed, low=0, high=2**32 - 1)
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device must be cpu, cuda or cuda:<n>, got {self.device!r}; leave it out for a GPU if there is one"
            )
        if "://" in self.artifact_root:
            raise ConfigError(
                f"artifact_root {self.artifact_root!r} is a URL, and a single run writes into a folder; give one, or run it as a "
                "sweep: launch/sweep.py --storage-path takes URLs"
            )
        _expand(self, "model_name", "output_dir", "final_model_output_dir", "artifact_root")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and which of them are forgotten.

    For images the forget set is drawn from the training rows by `forget_class`, `hard_probability` (rho) and the
    seed; the `forget_` and `duplicate_` sources are for text.
    """

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str = setting(
        "digits",
        "digits (embedded), cifar10, cifar100, a hub name, or a local folder; text: authors (embedded, the default), tofu, "
        "waterdrum_tofu, a hub name, a folder or a file",
    )
    dataset_revision: str | None = setting(None, "commit, tag or branch of a hub dataset; default: main")
    dataset_subset: str | None = setting(None, "configuration of the dataset; default: its only or default one")
    dataset_split: str = setting("train", "split with the training rows; text: with the retain rows")
    dataset_prompt_field: str | None = setting(
        None, "column of the images or prompts; default: img or image; question, prompt, instruction or input; none: plain texts"
    )
    dataset_response_field: str | None = setting(
        None, "column of the labels or responses; default: label or labels; answer, response, output, completion or text"
    )
    forget_pct: int | None = setting(None, "text: percent that TOFU, WaterDrum-TOFU or authors is to forget (1, 5, 10)")
    forget_dataset_name: str | None = setting(None, "text: dataset to forget; default: dataset_name")
    forget_dataset_subset: str | None = setting(None, "text: its configuration")
    forget_dataset_split: str | None = setting(None, "text: its split")
    forget_dataset_prompt_field: str | None = setting(None, "text: its prompt column")
    forget_dataset_response_field: str | None = setting(None, "text: its response column")
    duplicate_dataset_name: str | None = setting(None, "text: dataset of duplicates; default: dataset_name")
    duplicate_dataset_subset: str | None = setting(None, "text: its configuration")
    duplicate_dataset_split: str | None = setting(None, "text: its split")
    duplicate_dataset_prompt_field: str | None = setting(None, "text: its prompt column")
    duplicate_dataset_response_field: str | None = setting(None, "text: its response column")
    test_dataset_name: str | None = setting(None, "dataset of the test rows; default: dataset_name")
    test_dataset_subset: str | None = setting(None, "its configuration; default: dataset_subset")
    test_dataset_split: str | None = setting(None, "its split; default: test")
    test_dataset_prompt_field: str | None = setting(None, "its image column; default: dataset_prompt_field")
    test_dataset_response_field: str | None = setting(None, "its label column; default: dataset_response_field")
    dataset_cache_dir: str | None = setting(None, "cache of decoded datasets; default: <artifact_root>/dataset_cache")
    forget_class: int = setting(0, "class c to forget")
    hard_probability: float = setting(0.0, "rho in [0, 1]: share of the forget set drawn from other rows; 1: at random")
    split_ratio: float = setting(0.1, "share of all rows that is forgotten at rho = 1")
    dataset_repeat: int = setting(1, "read as so many times num_train_epochs: an epoch is one pass")
    shuffle_dataset: bool = setting(True, "order the rows by shuffle_seed, once; False: as stored")
    add_forget_to_train: bool = setting(False, "train on retain and forget rows (the original), not retain rows only")
    add_duplicate_to_retain: bool = setting(False, "text: add the duplicates to the retain rows")
    strict: bool = setting(False, "text: refuse rows with empty answers; default: count and skip them")
    chat_template: bool | None = switch("text: write prompts in the tokenizer's chat template; default: if it has one")
    max_length: int | None = setting(None, "text: longest row in tokens; default: the model's context, at most 1024")
    k_pct: float = setting(0.1, "share of lowest log-probabilities that min-k averages, in (0, 1]")

    def __post_init__(self) -> None:
        check_range("hard_probability (rho)", self.hard_probability, low=0, high=1, mend="0 forgets the class alone")
        check_range("split_ratio", self.split_ratio, above=0, high=1)
        check_range("forget_class", self.forget_class, low=0)
        check_range("dataset_repeat", self.dataset_repeat, low=1)
        check_range("k_pct", self.k_pct, above=0, high=1)
        check_range("max_length", self.max_length, low=8)
        check_range("forget_pct", self.forget_pct, low=1, high=99)
        _expand(self, "dataset_name", "forget_dataset_name", "duplicate_dataset_name", "test_dataset_name", "dataset_cache_dir")

    @property
    def rho(self) -> float:
        """`hard_probability` by its short name, in [0, 1]."""
        return self.hard_probability
