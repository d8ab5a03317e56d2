"""Says in one line that this interpreter cannot run a sweep; run by a job before `launch/sweep.py`, in any Python 3.

    python launch/interpreter.py && exec python launch/sweep.py ...

Exit codes: 0 it can, 2 it lacks a package or is too old.
"""

import importlib.util
import sys

NEEDED = ("ray", "torch", "torchvision", "transformers", "datasets", "pyarrow", "numpy", "sklearn", "rich")
OLDEST = (3, 11)


def lacking(names=NEEDED):
    """Names of the packages that are not installed here."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main():
    """Entry of `python launch/interpreter.py`; returns the exit code."""
    here = "%s (Python %d.%d)" % (sys.executable, sys.version_info[0], sys.version_info[1])  # noqa: UP031 - as old as they come
    missing = lacking()
    if sys.version_info[:2] >= OLDEST and not missing:
        return 0
    why = "lacks " + ", ".join(missing) if missing else "is older than %d.%d" % OLDEST  # noqa: UP031
    print(
        "error: %s %s; set `python:` in the cluster's settings file to the interpreter that Ray's nodes run" % (here, why),  # noqa: UP031
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
