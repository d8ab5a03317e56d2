"""A pool of processes for the tests that need several: `ranks.run(function, ...)` calls a function in each, as a gloo group.

Loading torch and the trainer takes seconds, so a server loads them once and forks the processes, which then serve call after
call; each call has a process group of its own. A call never blocks for ever: when ranks do not answer in time, the test fails
with the stack of every rank, and the next call starts new processes.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LOADED = ["torch.distributed", "hamu.training.loop", "hamu.tasks.own", "hamu.models.resnet", "hamu.tasks.text", "pytest"]
"""What the server loads before it forks."""


class RanksFailed(RuntimeError):
    """Some rank raised, died, or did not answer in time; the text has the traceback or the stack of each."""


class Ranks:
    """Up to `n_most` processes on this machine, one thread each."""

    def __init__(self, n_most: int = 4) -> None:
        self._n_most = n_most
        self._folder = Path(tempfile.mkdtemp(prefix="hamu-ranks-"))
        self._workers: list[tuple[Any, Connection, Path]] = []
        self._numbers = itertools.count()

    def run(self, function: Callable[..., Any], *args: Any, n: int = 2, timeout_s: float = 60.0, **kwargs: Any) -> list[Any]:
        """Call a function on n ranks at once and give what each returned, by rank.

        Args:
            function: of the top level of a module; it finds the process group set up (`Group.current("cpu")`).
            args, kwargs: the same on every rank. They and the results are pickled.
            n: ranks; with 1 there is no process group.
            timeout_s: for the call as a whole.

        Raises:
            RanksFailed: some rank raised, died or hung.
        """
        while len(self._workers) < n:
            self._start()
        used = self._workers[:n]
        store = self._folder / f"store-{next(self._numbers)}"
        for rank, (_, pipe, _) in enumerate(used):
            pipe.send_bytes(pickle.dumps((rank, n, str(store), timeout_s, pickle.dumps((function, args, kwargs)))))
        answers = self._answers(used, time.monotonic() + timeout_s)
        store.unlink(missing_ok=True)
        failures = [f"rank {rank} {answers[rank][1]}" for rank in range(n) if not answers[rank][0]]
        if failures:
            raise RanksFailed("\n".join(failures))
        return [answers[rank][1] for rank in range(n)]

    def close(self) -> None:
        """End all processes."""
        for process, pipe, _ in self._workers:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
            process.join(5)
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        assert len(self._workers) < self._n_most, f"the pool holds {self._n_most} processes at most"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        ours, theirs = context.Pipe()
        stack = self._folder / f"stack-{next(self._numbers)}"
        process = context.Process(target=_serve, args=(theirs, str(stack)), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours, stack))

    def _answers(self, used: list[tuple[Any, Connection, Path]], deadline: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(used):
            waiting = {pipe: rank for rank, (_, pipe, _) in enumerate(used) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                answers |= {rank: (False, f"gave no answer; it was at\n{self._stack(*used[rank])}") for rank in waiting.values()}
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    answers[waiting[pipe]] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = used[waiting[pipe]][0]
                    process.join(5)
                    answers[waiting[pipe]] = False, f"died, exit code {process.exitcode}"
            if not all(answer[0] for answer in answers.values()):
                deadline = min(deadline, time.monotonic() + 10)  # the others meet a closed connection, or hang
        if not all(process.is_alive() and answers[rank][0] for rank, (process, _, _) in enumerate(used)):
            self._kill()
        return answers

    def _stack(self, process: Any, pipe: Connection, stack: Path) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            if stack.exists() and stack.stat().st_size:
                break
        time.sleep(0.05)
        return stack.read_text() if stack.exists() else "an unknown place"

    def _kill(self) -> None:
        for process, pipe, _ in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def _serve(pipe: Connection, stack: str) -> None:
    """Answer calls until an empty one comes, or the pool is gone."""
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host name may resolve to an address that is not this machine's
    with open(stack, "w") as file, contextlib.suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file=file)
        while message := pipe.recv_bytes():
            rank, n, store, timeout_s, call = pickle.loads(message)
            try:
                answer = pickle.dumps((True, _call(rank, n, store, timeout_s, call)))
            except BaseException:
                answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
            pipe.send_bytes(answer)


def _call(rank: int, n: int, store: str, timeout_s: float, call: bytes) -> Any:
    import torch.distributed as dist

    function, args, kwargs = pickle.loads(call)
    if n == 1:
        return function(*args, **kwargs)
    # Longer than the pool waits, so that a hang is reported with all stacks.
    patience = datetime.timedelta(seconds=timeout_s + 30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=patience)
    try:
        result = function(*args, **kwargs)
        dist.barrier()  # no rank takes its connections away while another still receives
        return result
    finally:
        dist.destroy_process_group()
