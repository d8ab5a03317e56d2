"""Train a model, or unlearn with one, from the command line.

    python -m hamu.cli.train --add_forget_to_train --target_test_accuracy 0.9 --final_model_output_dir original
    python -m hamu.cli.train --unlearning_method hamu-q --constraint_ratio 0.1 --model_name ./original

Flags are the fields of the configuration; underscores and hyphens both work. Below them in rank are the environment
names of `hamu.cli.environment`. Exit codes: 0 ended (early stops included), 1 the run failed, 2 bad input, 128 + n
stopped by signal n (model and metrics are kept).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hamu.cli.environment import read_environment
from hamu.cli.published import IGNORED, translate
from hamu.errors import ConfigError, HamuError
from hamu.models.record import json_text
from hamu.training.config import ALIASES, GROUPS, KNOWN, TrainConfig
from hamu.training.fields import unknown_key
from hamu.training.inputs import check_inputs, check_start
from hamu.training.ray_workers import WorkersError

if TYPE_CHECKING:
    from hamu.cli.split_run import StopRequest
    from hamu.training.loop import TrainingRun
    from hamu.training.session import Session

_UNSET = object()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Parsed(NamedTuple):
    """A command line that was understood."""

    config: TrainConfig
    sources: dict[str, str]  # setting -> "flag", "environment NAME" or "flag, rewritten"
    warnings: list[str]


def build_parser() -> argparse.ArgumentParser:
    """The argument parser: one flag a field of the five settings groups, and the published flags without effect."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

    parser = Parser(
        tuple(GROUPS.values()),  # type: ignore[arg-type]
        prog="python -m hamu.cli.train",
        usage="python -m hamu.cli.train [--flag value ...]",
        description=(__doc__ or "").split("\n")[0],
        epilog="Short names: " + ", ".join(f"--{short} = --{name}" for short, name in ALIASES.items()),
        allow_abbrev=False,
    )
    group = parser.add_argument_group("accepted from published command lines, no effect")
    for name, instead in IGNORED.items():
        group.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const=True, help=instead)
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Read flags over environment over defaults, and check the result.

    Raises:
        HamuError: a flag or a value is not known, out of range, does not go with another, or points nowhere.
    """
    flags = _given_flags(argv)
    below = read_environment(environ, modality=str(flags.get("modality", "vision")))
    given: dict[str, Any] = {name: value for name, value in below.settings.items() if name not in flags}
    if "hamu_constraint" in flags:
        given.pop("constraint_ratio", None)  # another form of what a flag says already
    given.update(flags)
    if given.get("gradient_pairing") != "split-gpu" and "ray_address" not in flags:
        given.pop("ray_address", None)  # a shell's RAY_ADDRESS is no business of a run without Ray
    flat, warnings = translate(given)
    config = TrainConfig.from_flat(flat)
    check_inputs(config)
    sources = {}
    for name in flat:
        if name in given and given[name] == flat[name]:
            sources[name] = "flag" if name in flags else below.sources[name]
        else:
            sources[name] = "flag, rewritten" if flags else "environment, rewritten"
    return Parsed(config, sources, below.warnings + warnings + config.warnings())


def _given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Setting -> value of the flags that are on the command line, defaults left out."""
    argv = [_canonical(token) for token in argv]
    parser = build_parser()
    namespace = argparse.Namespace(**dict.fromkeys((*KNOWN, *IGNORED), _UNSET))
    namespace, rest = parser.parse_known_args(argv, namespace)
    if rest:
        flag = next((token for token in rest if token.startswith("--")), None)
        if flag is None:
            raise ConfigError(f"{rest[0]!r} is not a flag; flags begin with --")
        raise ConfigError(unknown_key(flag[2:].split("=")[0], (*KNOWN, *IGNORED), kind="flag", prefix="--"))
    return {name: value for name, value in vars(namespace).items() if value is not _UNSET}


def _canonical(token: str) -> str:
    """`--batch-size=8` -> `--per_device_train_batch_size=8`; values are left alone."""
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + ALIASES.get(name, name) + equals + value


def describe(parsed: Parsed, start: Path | None = None) -> str:
    """The resolved configuration: what was given and where, then what follows from it by default, and the `start` model."""
    config, flat = parsed.config, parsed.config.to_flat()
    resolved: dict[str, Any] = {
        "unlearning_method": config.method_name,
        "model_name": config.run.model_name,
        "dataset_name": config.data.dataset_name,
        **_of_modality(config),
        "seed": config.run.seed,
        "num_train_epochs": config.training.num_train_epochs,
        "per_device_train_batch_size": config.training.per_device_train_batch_size,
        "learning_rate": config.lr,
        "optimizer": config.optimizer_name,
    }
    if config.is_hamu:
        resolved |= {
            "constraint_ratio": f"{config.constraint_ratio:g}" + " of S" * config.method.relative_constraint,
            "hamu_constraint": f"{config.constraint:g} nats" + " times S" * config.method.relative_constraint,
            "radius": "learning rate * gradient norm" if config.radius is None else config.radius,
            "split": config.split,
        }
    resolved |= {name: flat[name] for name in parsed.sources if name not in resolved}
    width = max(map(len, resolved))
    lines = []
    for name, value in resolved.items():
        source = parsed.sources.get(name, "default")
        if name in ("constraint_ratio", "hamu_constraint") and name not in parsed.sources:
            other = {"constraint_ratio": "hamu_constraint", "hamu_constraint": "constraint_ratio"}[name]
            source = f"from {other}" if other in parsed.sources else "default"
        lines.append(f"  {name:<{width}}  {value}  ({source})")
    if start is not None:
        lines.append(f"  {'starts from':<{width}}  {start}")
    return "\n".join(lines)


def _of_modality(config: TrainConfig) -> dict[str, Any]:
    """What is said of every run on one kind of data."""
    if not config.is_text:
        return {name: getattr(config.data, name) for name in ("forget_class", "hard_probability")} | {
            "freeze_batchnorm": config.freeze_batchnorm
        }
    from hamu.data.texts import resolve_sources

    said: dict[str, Any] = {f"{part} rows": source.describe() for part, source in resolve_sources(config.data).items()}
    training = config.training
    if config.is_unlearning and not training.add_lora:
        return said  # whether there is an adapter is the start model's to say
    return said | {"add_lora": f"r {training.lora_r}, alpha {training.lora_alpha:g}" if training.add_lora else False}


class Cancelled(SystemExit):
    """A signal came before there was a run to end; the code is 128 + its number."""


class SignalStop:
    """SIGINT and SIGTERM end the attached run at its next step; with none attached, or a second time, at once."""

    def __init__(self) -> None:
        self.number: int | None = None  # the signal that came
        self.run: TrainingRun | StopRequest | None = None  # the run to end
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def install(self) -> None:
        """Take the signals; to be called again after a library took them."""
        # Outside the main thread Python refuses handlers: whoever runs us there has the signals.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_second, self.number = self.number is not None, number
        if is_second or self.run is None:
            raise Cancelled(128 + number)
        from hamu.training.stop import StopReason

        print("stopping after this step; model and metrics are kept (again: stop at once)", file=sys.stderr)
        self.run.request_stop(StopReason.CANCELLED)


def run(parsed: Parsed) -> int:
    """Run what was parsed, or with `dry_run` say what it would do; print metrics and path; returns the exit code."""
    config = parsed.config
    with SignalStop() as signals, _said_on_stderr():
        if config.run.dry_run:
            return dry_run(config)
        row, model_folder = _run_in_workers(config, signals) if config.is_split else _run_here(config, signals)
    print(json_text({**row, "model_path": str(model_folder)}))
    if row.get("message"):
        print(row["message"], file=sys.stderr)
    if signals.number is not None and row["stop_reason"] == "cancelled":
        return 128 + signals.number
    return 1 if row["stop_reason"] == "non_finite" else 0


def _run_here(config: TrainConfig, signals: SignalStop) -> tuple[dict[str, Any], Path]:
    from hamu.training.session import run_training

    def on_start(run: TrainingRun, session: Session) -> None:
        signals.run = run
        so_far = session.hardness_so_far()
        measured = run.measure_hardness() if so_far is None and config.is_hamu else so_far
        print(hardness_line(config, measured, is_resumed=so_far is not None), end="", flush=True)

    row, session = run_training(config, progress=True, on_start=on_start)
    return row, session.model_folder


def _run_in_workers(config: TrainConfig, signals: SignalStop) -> tuple[dict[str, Any], Path]:
    from hamu.cli.split_run import StopRequest, run_split

    stop = StopRequest()

    def on_start(hardness: Mapping[str, float], is_resumed: bool) -> None:
        signals.run = stop
        print(hardness_line(config, hardness, is_resumed=is_resumed), end="", flush=True)

    return run_split(config, stop=stop, on_ray=signals.install, on_start=on_start)


def dry_run(config: TrainConfig) -> int:
    """Load data and model, print the plan, the memory and the hardness at the first batches, and train nothing."""
    from hamu.training.loop import TrainingRun
    from hamu.training.memory import estimate_memory
    from hamu.training.session import Session

    if config.is_split:
        from hamu.cli.split_run import check_place

        check_place(config)
    session = Session(config)
    planned = TrainingRun(session.config, session.task, session.load_start())
    rows = ", ".join(f"{split} {session.task.n_rows(split)}" for split in ("retain", "forget", "test"))
    memory = estimate_memory(
        session.task,
        planned.engine,
        optimizer_name=config.optimizer_name,
        size=config.run.num_workers,
        batch_size=config.training.per_device_train_batch_size,
    )
    processes = f"{config.run.num_workers} processes" if config.is_split else "one process"
    print(f"plan\n  rows: {rows}\n  steps: {planned.total_steps}, in {processes}")
    print(f"  memory: {memory.describe()}\n  model to: {session.model_folder}")
    so_far = session.hardness_so_far()
    measured = planned.measure_hardness() if so_far is None and config.is_hamu else so_far
    print(hardness_line(config, measured, is_resumed=so_far is not None), end="")
    return 0


def hardness_line(config: TrainConfig, hardness: Mapping[str, float] | None, *, is_resumed: bool = False) -> str:
    """What decides whether a HAMU run does anything: S and the largest feasible ratio; empty where they are not known.

    Args:
        config: of the run.
        hardness: at its first batches; none for a method without a constraint.
        is_resumed: whether they were measured when the run began, before it was gone on with.
    """
    if not config.is_hamu or not hardness:
        return ""
    when = " at step 0" if is_resumed else ""
    return (
        f"hardness{when}: S = {hardness['gradient_product']:.4g}, largest feasible constraint ratio "
        f"{hardness['max_constraint_ratio']:.4g} (asked for: {config.ratio_words(hardness['gradient_product'])})\n"
    )


class _Plainly(logging.Formatter):
    """The message alone, with `warning:` before what is one."""

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + super().format(record)


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[None]:
    """Print what the parts of this program log, a line each; the progress line stays at the bottom."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plainly())
    handler.addFilter(lambda record: not str(record.msg).startswith("hardness"))  # printed before the run already
    logger = logging.getLogger("hamu")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m hamu.cli.train`; returns the exit code."""
    try:
        parsed = parse(sys.argv[1:] if argv is None else argv, os.environ)
        if parsed.config.run.fetch:
            from hamu.cli.fetch import fetch_for

            return fetch_for([parsed.config], say=print)
        start = check_start(parsed.config)
        for line in parsed.warnings:
            print(f"warning: {line}", file=sys.stderr)
        print("configuration\n" + describe(parsed, start), flush=True)
        return run(parsed)
    except HamuError as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Cancelled as cancelled:
        return int(cancelled.code or 0)
    except WorkersError as error:  # the traceback would be of this process, which has only waited
        print(f"error: the run failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: the run failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
