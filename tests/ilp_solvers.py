#!/usr/bin/env python3
"""Checks snip_ilp.h against HiGHS, CBC and GLPK: no solver may find a choice that meets the targets and costs less.

ilp_solvers.py [--bench PATH] [--seeds N] [--limit SECONDS]

Needs bench_ilp (bench/bench_ilp.c, built beforehand). Solvers that are not installed are skipped, and said to be. The choices of the
others are verified here, as they meet targets only to within their own tolerances.
"""
import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "bench"))
import bench_ilp  # noqa: E402

CASES = ["snip_560x2", "snip_560x8", "snip_560x8_8stages", "measured_560x8", "coupled_snip_560x8", "coupled_measured_560x8",
         "uncorrelated_1000x10", "weak_1000x10", "strong_100x10", "subset_1000x10", "zig_1000x10", "measured_560x27_8stages",
         "coupled_measured_560x27"]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--bench", default=os.path.join(HERE, "..", "bench", "bench_ilp"))
    a.add_argument("--seeds", type=int, default=2)
    a.add_argument("--limit", type=float, default=10)
    a = a.parse_args()
    found, missing = bench_ilp.peers()
    passed = failed = skipped = 0
    for case in CASES:
        for seed in range(1, a.seeds + 1):
            problem = bench_ilp.dump(a.bench, case, seed)
            _, status, _, cost = bench_ilp.ours(a.bench, case, "--seed", str(seed), "--repeat", "1")
            for name, function in found:
                _, choice, done = function(problem, a.limit)
                if choice is None or not problem.meets(choice):
                    skipped += 1
                    print("SKIPPED %s seed %d: %s gave no choice that meets the targets" % (case, seed, name))
                    continue
                theirs = problem.cost(choice)
                # 1e-11: our cost was printed with 12 digits
                ok = status == "optimal" and cost <= theirs * (1 + 1e-11) and (not done or cost >= theirs * (1 - 1e-5))
                passed, failed = passed + ok, failed + (not ok)
                if not ok:
                    print("FAILED %s seed %d: ours %s %.12g, %s %.12g%s" % (case, seed, status, cost, name, theirs, "" if done else " (stopped)"))
    for name in missing:
        skipped += 1
        print("SKIPPED: %s is not installed" % name)
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
