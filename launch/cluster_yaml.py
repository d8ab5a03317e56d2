"""Reading a cluster file: plain YAML, checked against the schema that Ray ships and by Ray's own functions.

Ray is not imported here. Importing it fixes its settings for the life of the process, so that a `RAY_AUTH_MODE=token` that is set
afterwards would not count; its schema is a file, and its functions run in a process of their own.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hamu.errors import ConfigError

_TIMEOUT_S = 120
_MOVED = 3
_REFUSED = 4
_BOOK = "https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html"
_RAY = (
    "Ray that is installed has no {what} any more, so the file cannot be checked; install the version of constraints.txt "
    "(`make venv`)"
)

# What runs in the other process. Ray prints while it checks, so the answer is the exit code and the last line.
_ASK_RAY = f"""
import json, sys
config = json.load(sys.stdin)
try:
    from ray.autoscaler._private.util import prepare_config, validate_config
except ImportError:
    sys.exit({_MOVED})
try:
    validate_config(prepare_config(config))
except (Exception, SystemExit) as error:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    print("\\n" + str(text).splitlines()[0])
    sys.exit({_REFUSED})
"""


def refusal(path: Path, key: str, what: str) -> ConfigError:
    """An error that names the file, the key in it, what is wrong with it, and the mend."""
    return ConfigError(f"{path}, {key}: {what}" if key else f"{path}: {what}")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where a known word is close, else the known words."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


class _Loader(yaml.SafeLoader):
    """Refuses keys that are no text, as nobody's are, and one that stands twice in a mapping, where PyYAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = f"the key {key.value} is no text" if isinstance(key, yaml.ScalarNode) else "a key is no text"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_MENDS = (
    ("stands twice", "leave one of them"),
    ("is no text", "put it in quotes"),
    ("", "only plain values may stand in it; take it out"),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; of several documents the RayJob.

    Raises:
        ConfigError: no such file, not YAML, more than plain values in it (a tag that makes objects), or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, "", f"byte {error.start} is no UTF-8; save it as UTF-8 text") from None
    except OSError as error:
        raise refusal(path, "", f"{error.strerror or error}; give the path of a cluster file") from None
    loader = _Loader(text)
    found = []
    try:
        while loader.check_data():
            found.append(loader.get_data())
    except yaml.constructor.ConstructorError as error:
        mend = next(mend for part, mend in _MENDS if part in str(error.problem))
        raise refusal(path, _line(error), f"{error.problem}; {mend}") from None
    except yaml.MarkedYAMLError as error:
        mend = "indent with blanks, not tabs" if "'\\t'" in str(error.problem) else "mend the line"
        raise refusal(path, _line(error), f"not YAML: {error.problem or error.context}; {mend}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise refusal(path, "", f"not YAML: {str(error).splitlines()[0]}; mend it") from None
    finally:
        loader.dispose()
    if len(found) > 1:
        found = [each for each in found if isinstance(each, dict) and each.get("kind") == "RayJob"]
        if len(found) != 1:
            raise refusal(path, "", f"of its documents {len(found)} are a RayJob; leave one cluster in a file")
    if not found or not isinstance(found[0], dict):
        kind = type(found[0]).__name__ if found and found[0] is not None else "empty"
        raise refusal(path, "", f"its top is {kind}, not a mapping; a cluster file is lines of `key: value`, see {_BOOK}")
    return found[0]


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}" if mark else ""


def ray_schema() -> dict[str, Any]:
    """The schema of cluster files that the installed Ray ships.

    Raises:
        ConfigError: it has none where it used to be.
    """
    spec = importlib.util.find_spec("ray")
    place = Path(spec.origin).parent / "autoscaler" / "ray-schema.json" if spec and spec.origin else Path("ray")
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{place}: {_RAY.format(what='autoscaler/ray-schema.json')}") from None


def check_schema(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what Ray's schema refuses, by the first key that is wrong.

    Raises:
        ConfigError: with the file, the key and the mend.
    """
    import jsonschema

    errors = jsonschema.Draft7Validator(ray_schema()).iter_errors(config)

    def order(error: Any) -> tuple[bool, list[str]]:
        # A key that nobody knows is often the one that is missing, misspelt.
        return error.validator != "additionalProperties", list(map(str, error.absolute_path))

    for error in sorted(errors, key=order):
        key = ".".join(map(str, error.absolute_path))
        rule = error.validator_value
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            stranger = next(name for name in error.instance if name not in known)
            where = f"{key}.{stranger}" if key else stranger
            beside = f"; what is ours stands in {settings_path(path).name}" if not key else ""
            raise refusal(path, where, f"Ray knows no such key; {nearest(stranger, known)}{beside}")
        if error.validator == "required":
            missing = next(name for name in rule if name not in error.instance)
            raise refusal(path, f"{key}.{missing}" if key else missing, f"it is missing, and Ray needs it; add it, see {_BOOK}")
        if error.validator == "type":
            raise refusal(path, key, f"{error.instance!r} is no {rule}; give a value of that kind")
        if error.validator == "minimum":
            raise refusal(path, key, f"{error.instance} is less than {rule}; give {rule} or more")
        raise refusal(path, key, f"{error.message}; see {_BOOK}")


def ask_ray(path: Path, config: Mapping[str, Any]) -> None:
    """Let Ray's own `validate_config(prepare_config(config))` judge a cluster file, in a process of its own (0.7 s).

    Raises:
        ConfigError: it refuses the file, or the installed Ray has these functions no more.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A folder that is not on the path: Python puts its working directory first for -c.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ASK_RAY], input=json.dumps(config, default=str), env=environment, text=True,
        capture_output=True, timeout=_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode == 0:
        return
    if done.returncode == _MOVED:
        raise refusal(path, "", _RAY.format(what="ray.autoscaler._private.util.prepare_config and validate_config"))
    said = (done.stdout.strip() or done.stderr.strip() or "no reason given").splitlines()[-1]
    raise refusal(path, "as a whole", f"Ray refuses it: {said}; mend it as {_BOOK} says")


def settings_path(path: Path) -> Path:
    """The file beside a cluster file that holds what is ours."""
    return path.with_name(f"{path.stem}.settings.yaml")
