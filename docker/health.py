"""Whether the Ray node of this container is well: its agent is asked for its raylet, which asks nothing of the head.

Standard library alone: `ray health-check` takes seconds of a core to start, several times a minute. Neither address asks for
the token. Exit code 0: well, 1: not.
"""

from __future__ import annotations

import os
import sys
import urllib.request

RAYLET = "http://127.0.0.1:52365/api/local_raylet_healthz"


def is_well(url: str, timeout_s: float = 4.0) -> bool:
    """Whether the address answers that all is well."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status == 200 and b"success" in answer.read()
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
        return False


if __name__ == "__main__":
    sys.exit(0 if is_well(os.environ.get("HAMU_HEALTH_URL", RAYLET)) else 1)
