"""What is said of the jobs of a cluster, and the exit codes that stand for their ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray.job_submission import JobDetails, JobStatus

STOPPED = 143  # as of a process that SIGTERM ended


def exit_code(details: JobDetails) -> int:
    """Of a job that has ended: 0, 143 where it was stopped, else that of the sweep, or 1 where it came to none."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    return code if code is not None and 0 < code < 256 else 1


def ended_line(details: JobDetails) -> str:
    """How a job ended, and why where its own log may not say it."""
    took = seconds_text(_seconds(details))
    if details.status == JobStatus.SUCCEEDED:
        return f"{details.submission_id} succeeded after {took}"
    if details.status == JobStatus.STOPPED:
        return f"{details.submission_id} was stopped after {took}"
    if details.driver_exit_code is not None:
        return f"{details.submission_id} failed with exit code {details.driver_exit_code} after {took}"
    why = " ".join((details.message or "Ray gives no reason").split())[:600]
    return f"{details.submission_id} failed after {took}: {why}"


def job_line(details: JobDetails) -> str:
    """A job in a line."""
    metadata = details.metadata or {}
    trials = f"{metadata['trials']} trials" if "trials" in metadata else ""
    more = ", ".join(filter(None, (metadata.get("space", ""), trials, metadata.get("storage", ""))))
    code = details.driver_exit_code
    status = details.status.value + (f" (exit code {code})" if code else "")
    return f"{details.submission_id}  {status}  {_since(details)}  {seconds_text(_seconds(details))}  {more}".rstrip()


def jobs_table(jobs: Sequence[JobDetails]) -> str:
    """The jobs, oldest first."""
    if not jobs:
        return "no jobs"
    rows: list[tuple[str, ...]] = [("job", "status", "started", "took", "sweep", "space", "trials")]
    for job in jobs:
        metadata = job.metadata or {}
        own = (metadata.get(name, "-") or "-" for name in ("sweep", "space", "trials"))
        rows.append((str(job.submission_id), job.status.value, _since(job), seconds_text(_seconds(job)), *own))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def seconds_text(seconds: float) -> str:
    """A span of time in words, as short as it can be said."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _since(details: JobDetails) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((details.start_time or 0) / 1000)) if details.start_time else "-"


def _seconds(details: JobDetails) -> float:
    if not details.start_time:
        return 0.0
    return max(0.0, (details.end_time or time.time() * 1000) / 1000 - details.start_time / 1000)
