"""Jobs of a Ray cluster, through its job server: submit, follow, stop, list.

Ray's `JobSubmissionClient` does the work. What is added here: requests that end when the network does not answer, a log that goes
on after a lost connection, and errors of one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from hamu.errors import ConfigError

STOP_WAIT_S = 30
"""Seconds from SIGTERM to SIGKILL when a job is stopped: Ray's three are too few for its trials to save their checkpoints."""

STOPPED_WITHIN_S = STOP_WAIT_S + 15
_TOLD_WITHIN_S = 15.0
"""Seconds from the request to the end of a job that Ray stops, its own work included."""

_OF_JOB = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # the sweep gives its workers an environment, in which names of the job's come again
}
_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
_TIMEOUT_S = (10.0, 60.0)  # to connect, and between two bytes
_QUIET_S = 10.0  # without a line, after which the job's status is looked at
_DEAF_S = 120.0  # without a line, after which the connection is made anew: a cut one does not always tell
_RETRY_S = 2.0
_WORKER = re.compile(r"--python_worker_command=(.+?) \S+/setup_worker\.py")


class LostError(Exception):
    """The job server does not answer; whatever runs there runs on."""


class _Client(JobSubmissionClient):
    """A client whose requests end."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT_S, **given})


class Jobs:
    """The job server of a cluster.

    Args:
        url: of the dashboard, such as http://10.0.0.1:8265. The token comes from Ray's own environment names.

    Raises:
        ConfigError: it wants a token, or another one.
        LostError: nothing answers there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would go there instead
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _in_one_line(url):
            self._client = _Client(url)

    def submit(
        self, *, entrypoint: str, submission_id: str, folder: Path, environment: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Send a working directory, unless the cluster has it already, and start a command in it.

        environment is shown by the dashboard to all who may see it: nothing secret belongs there.
        """
        settings = {**environment, **_OF_JOB}
        with _in_one_line(self.url):
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env={"working_dir": str(folder), "env_vars": settings},
                metadata=dict(metadata),
            )

    def details(self, job: str) -> JobDetails:
        """What the server knows of a job.

        Raises:
            ConfigError: it does not know the job.
        """
        with _in_one_line(self.url, job):
            return self._client.get_job_info(job)

    def all(self) -> list[JobDetails]:
        """The jobs that were submitted, oldest first."""
        with _in_one_line(self.url):
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def logs(self, job: str) -> str:
        """What a job has printed so far."""
        with _in_one_line(self.url, job):
            return self._client.get_job_logs(job)

    def stop(self, job: str, *, say: Callable[[str], None]) -> JobDetails:
        """Ask a job to end, and wait until it has, for `STOPPED_WITHIN_S` at most; `say` is told that it takes a while."""
        with _in_one_line(self.url, job):
            self._client.stop_job(job)
        deadline, is_said = time.monotonic() + STOPPED_WITHIN_S, False
        while not (found := self.details(job)).status.is_terminal() and time.monotonic() < deadline:
            if not is_said:
                say(f"{job} has been asked to stop; its trials save their checkpoints (up to {STOP_WAIT_S} s)")
                is_said = True
            time.sleep(0.5)
        return found

    def node_python(self) -> str | None:
        """The interpreter that runs Ray on the head, where a job's command starts; None: the server does not tell.

        A head that has just started tells it some seconds later.
        """
        deadline = time.monotonic() + _TOLD_WITHIN_S
        while (found := self._node_python()) is None and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _node_python(self) -> str | None:
        with contextlib.suppress(LostError, ConfigError, KeyError, TypeError, ValueError):
            nodes = self._get("/nodes?view=summary")["data"]["summary"]
            head = next((node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("isHeadNode")), None)
            command = self._get(f"/nodes/{head}")["data"]["detail"]["cmdline"] if head else []
            return _worker_python(" ".join(command))
        return None

    def follow(
        self, job: str, *, write: Callable[[str], None], say: Callable[[str], None], patience_s: float = 600.0
    ) -> JobDetails:
        """Write what a job prints, from its beginning, until it ends.

        Args:
            job: its id.
            write: given the text, each character once, also after the connection was lost and made again.
            say: told when the connection is lost, and when it is back.
            patience_s: how long to try again.

        Raises:
            LostError: nothing answered for that long.
            ConfigError: there is no such job.
        """
        tail = _Tail(self, job, write)
        lost_since: float | None = None
        while True:
            try:
                details = self.details(job)
                if lost_since is not None:
                    say(f"{self.url} answers again")
                    lost_since = None
                asyncio.run(tail.read())
                if (details := self.details(job)).status.is_terminal():
                    tail.finish()
                    return details
            except LostError:
                if lost_since is None:
                    lost_since = time.monotonic()
                    say(f"the connection to {self.url} is lost; the job goes on, trying again")
                if time.monotonic() - lost_since > patience_s:
                    raise
            time.sleep(_RETRY_S)

    def _get(self, path: str) -> Any:
        with _in_one_line(self.url):
            return self._client._do_request("GET", path).json()


class _Tail:
    """The log of a job, of which each character is written once: the server sends it from its beginning at each connection."""

    def __init__(self, jobs: Jobs, job: str, write: Callable[[str], None]) -> None:
        self._jobs, self._job, self._write = jobs, job, write
        self._n_written = 0

    async def read(self) -> None:
        """Write what comes, until the server says that it was all, or nothing has come for long.

        Raises:
            LostError: the connection broke.
        """
        n_seen, quiet_s = 0, 0.0
        lines = self._jobs._client.tail_job_logs(self._job).__aiter__()
        coming = asyncio.ensure_future(lines.__anext__())
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=_QUIET_S)
                if not done:
                    quiet_s += _QUIET_S
                    if quiet_s >= _DEAF_S or self._jobs.details(self._job).status.is_terminal():
                        return
                    continue
                text, quiet_s = coming.result(), 0.0
                self._write_from(n_seen, text)
                n_seen += len(text)
                coming = asyncio.ensure_future(lines.__anext__())
        except StopAsyncIteration:
            return
        except (OSError, RuntimeError, TimeoutError) as error:
            raise LostError(str(error)) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "aiohttp":
                raise
            raise LostError(str(error)) from error
        finally:
            coming.cancel()
            with contextlib.suppress(BaseException):
                await coming

    def finish(self) -> None:
        """Write the end of the log of a job that has ended, if the connection has not brought it."""
        self._write_from(0, self._jobs.logs(self._job))

    def _write_from(self, n_before: int, text: str) -> None:
        new = text[max(0, self._n_written - n_before) :]
        if new and n_before + len(text) > self._n_written:
            self._write(new)
            self._n_written = n_before + len(text)


def has_failed(details: JobDetails) -> bool:
    """Whether a job ended badly; one that was stopped did not."""
    return details.status == JobStatus.FAILED


def _worker_python(command: str) -> str | None:
    found = _WORKER.search(command)
    return found[1] if found else None


@contextlib.contextmanager
def _in_one_line(url: str, job: str | None = None) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        if str(error).startswith("Authentication failed"):
            why = "refuses this token (403); RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH has to be the cluster's"
        else:
            why = "asks for a token (401); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's"
        raise ConfigError(f"{url} {why}") from None
    except (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise LostError(f"{url} does not answer ({_short(error)})") from None
    except RuntimeError as error:
        if "404" in str(error) and job is not None:
            raise ConfigError(f"{url} knows no job {job!r}; `python launch/submit.py list` names those it knows") from None
        if re.search(r"status code 5\d\d", str(error)):
            raise LostError(f"{url}: {_short(error)}") from None
        raise ConfigError(f"{url}: {_short(error)}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
