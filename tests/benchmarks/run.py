"""All benchmarks, each in a process of its own; prints a table and keeps the figures with date and hardware.

    make bench

Writes tests/benchmarks/results/bench.json. Each figure stands beside the limit that the project holds itself to; the exit code
is 1 if one is missed.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks import bench_combine, bench_exchange, bench_quickstart, bench_step, bench_text
from tests.benchmarks.measure import hardware, has_amx

RESULTS = Path(__file__).parent / "results"


def in_own_process(measure: Callable[[], Any]) -> Any:
    """Run one benchmark where no other's threads, caches or compiled graphs are."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def main() -> int:
    """Measure everything, write and print it."""
    figures: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware()}
    for name, module in (("combine", bench_combine), ("step", bench_step), ("quickstart", bench_quickstart)):
        print(f"{name} ...", flush=True)
        figures[name] = in_own_process(module.measure)
    print("text step ...", flush=True)
    figures["text_step"] = in_own_process(bench_text.measure_step)
    print("exchange ...", flush=True)
    figures["exchange"] = bench_exchange.measure()  # in processes of its own, which a pool's worker may not start
    step, quick, split = figures["step"], figures["quickstart"], figures["exchange"]
    combine, one_thread = figures["combine"]["default_threads"], figures["combine"]["one_thread"]
    checks = [
        ("combine step, times faster than per tensor", combine["speedup"], ">=", 8.0),
        ("combine step, share of two backward passes", combine["share_of_two_passes"], "<=", 0.003),
        ("the same share at one thread", one_thread["share_of_two_passes"], "<=", 0.003),
        ("step, channels-last against contiguous eager", step["channels_last"]["speedup"], ">=", 1.25),
        ("loading, share of a step", step["channels_last"]["loading_share"], "<=", 0.02),
        *(
            (f"split, {n} ranks: bytes sent, share of the least", row["share_of_least"], "<=", 1.1)
            for n, row in split["traffic"].items()
        ),
        ("split, exchange of ResNet-20: share of naive", split["exchange"]["resnet20"]["share_of_naive"], "<=", 0.2),
        ("split, exchange of 10 M: share of naive", split["exchange"]["mlp_10m"]["share_of_naive"], "<=", 0.5),
        ("split step of 2 ranks, times sequential", split["step"]["speedup"], ">=", 1.85),
        ("text step: loading, share of it", figures["text_step"]["loading_share"], "<=", 0.03),
        ("text step: combining, share of it", figures["text_step"]["combine_share"], "<=", 0.03),
        ("text step: KL, times GDiff", figures["text_step"]["kl_over_gdiff"], "<=", 1.4),
        ("quickstart: wall_s", quick["wall_s"], "<=", quick["wall_limit_s"]),
        ("quickstart: warm slot's set-up, s", quick["warm_setup_max_s"], "<=", 0.5),
        ("quickstart: the whole command, s", quick["command_s"], "<=", 150.0),
        ("quickstart: trials on the front of the paper view", quick["front"], ">=", 4),
        ("quickstart: trials ended within 5 steps", quick["within_5_steps"], "<=", quick["trials"] / 4),
    ]
    if has_amx():
        checks.insert(3, ("step, bf16 against contiguous eager", step["bf16"]["speedup"], ">=", 2.2))
    figures["checks"] = [
        {"what": what, "value": value, "rule": rule, "limit": limit, "met": value >= limit if rule == ">=" else value <= limit}
        for what, value, rule, limit in checks
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{figures['hardware']}, {figures['date']}\n")
    print(f"{'step variant':16s} {'start-up s':>10s} {'ms a step':>10s} {'times eager':>12s}")
    for name, row in step.items():
        print(f"{name:16s} {row['startup_s']:10.2f} {row['step_ms']:10.1f} {row['speedup']:12.2f}")
    print(f"\ncombine step, times faster than per tensor at one thread: {one_thread['speedup']:.2f}\n")
    bench_exchange.print_figures(split)
    print()
    for check in figures["checks"]:
        mark = "met   " if check["met"] else "MISSED"
        print(f"{mark} {check['what']:48s} {check['value']:10.4g} {check['rule']} {check['limit']:.4g}")
    return 0 if all(check["met"] for check in figures["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
