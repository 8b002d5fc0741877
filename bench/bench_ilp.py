#!/usr/bin/env python3
"""Times snip_ilp.h (through bench_ilp, built beforehand) beside HiGHS, CBC and GLPK on the same problems, in turn.

bench_ilp.py [--bench PATH] [--cases A,B,...] [--limit SECONDS] [--hard]

Prints bench<TAB>case<TAB>ours<TAB>unit<TAB>peer_name<TAB>peer<TAB>ratio; a peer that stops at the limit is marked with '>'; then
'anytime' lines with our gap under limits of 1 ms and 10 ms. Peers that are not installed are named in a 'skipped' line.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = ["snip_560x2", "snip_560x8", "snip_560x8_8stages", "snip_560x27_8stages", "measured_560x8", "measured_560x27_8stages",
         "coupled_snip_560x8", "coupled_measured_560x8", "coupled_measured_560x27", "snip_100000x8", "measured_100000x8",
         "uncorrelated_1000x10", "weak_1000x10", "strong_100x10", "strong_1000x10", "subset_1000x10", "zig_1000x10"]
HARD = ["strong_10000x10", "strong_1000x10_1e6", "weak_10000x10_1e6", "real_subset_40x4", "real_subset_560x8"]


class Problem:
    def __init__(self, text):
        words = iter(text.split())
        assert next(words) == "mckp" and next(words) == "1"
        n, stages, total = int(next(words)), int(next(words)), float(next(words))
        self.targets = [float(next(words)) for _ in range(stages)]
        self.total = total
        self.groups = []                      # (stage, [(cost, gain)])
        for _ in range(n):
            stage, count = int(next(words)), int(next(words))
            self.groups.append((stage, [(float(next(words)), float(next(words))) for _ in range(count)]))

    def rows(self):
        """Covering rows: (target, [(variable, gain)]), variables numbered option after option."""
        rows = [(t, []) for t in self.targets] + [(self.total, [])]
        at = 0
        for stage, options in self.groups:
            for _, gain in options:
                rows[stage][1].append((at, gain))
                rows[-1][1].append((at, gain))
                at += 1
        return [r for r in rows if r[0] > 0]

    def cost(self, choice):
        return sum(options[j][0] for (_, options), j in zip(self.groups, choice))

    def meets(self, choice):
        """Every target to within 1e-12 of the sum of the largest gains."""
        gain, most = [0.0] * (len(self.targets) + 1), [0.0] * (len(self.targets) + 1)
        for (stage, options), j in zip(self.groups, choice):
            for s in (stage, -1):
                gain[s] += options[j][1]
                most[s] += max(g for _, g in options)
        targets = self.targets + [self.total]
        return all(t <= 0 or g >= t - 1e-12 * m for t, g, m in zip(targets, gain, most))

    def scale(self):
        """Costs are brought to a sum near 1e6, which puts the solvers' absolute tolerances out of the way."""
        most = sum(max(c for c, _ in options) for _, options in self.groups)
        return 1e6 / most if most > 0 else 1.0

    def chosen(self, values):
        choice, at = [], 0
        for _, options in self.groups:
            choice.append(max(range(len(options)), key=lambda j: values[at + j]))
            at += len(options)
        return choice

    def write_lp(self, path):
        scale = self.scale()
        with open(path, "w") as f:
            at = 0
            f.write("Minimize\n obj:")
            for _, options in self.groups:
                for cost, _ in options:
                    f.write(" + %.17g x%d\n" % (cost * scale, at))
                    at += 1
            f.write("\nSubject To\n")
            at = 0
            for i, (_, options) in enumerate(self.groups):
                f.write(" g%d: " % i + "".join(" + x%d\n" % (at + j) for j in range(len(options))) + " = 1\n")
                at += len(options)
            for i, (target, terms) in enumerate(self.rows()):
                f.write(" t%d: " % i + "".join(" + %.17g x%d\n" % (g, v) for v, g in terms if g) + " >= %.17g\n" % target)
            f.write("Binary\n" + "".join(" x%d\n" % v for v in range(at)) + "End\n")


# Each solver: (seconds, choice or None, proven). The time is the solver's call alone, without reading where that can be told.
def solve_highs(problem, limit):
    import highspy
    import numpy
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("threads", 1)
    h.setOptionValue("mip_rel_gap", 0.0)
    h.setOptionValue("mip_abs_gap", 0.0)
    h.setOptionValue("mip_feasibility_tolerance", 1e-9)
    h.setOptionValue("primal_feasibility_tolerance", 1e-9)
    h.setOptionValue("time_limit", float(limit))
    scale, lp, at = problem.scale(), highspy.HighsLp(), 0
    costs = [c * scale for _, options in problem.groups for c, _ in options]
    lp.num_col_ = len(costs)
    lp.col_cost_ = numpy.array(costs)
    lp.col_lower_, lp.col_upper_ = numpy.zeros(len(costs)), numpy.ones(len(costs))
    lp.integrality_ = [highspy.HighsVarType.kInteger] * len(costs)
    low, high, start, index, value = [], [], [0], [], []
    for _, options in problem.groups:
        index += range(at, at + len(options))
        value += [1.0] * len(options)
        at += len(options)
        start.append(len(index))
        low.append(1.0)
        high.append(1.0)
    for target, terms in problem.rows():
        most = max(g for _, g in terms)
        index += [v for v, g in terms]
        value += [g / most for v, g in terms]
        start.append(len(index))
        low.append(target / most)
        high.append(highspy.kHighsInf)
    lp.num_row_ = len(low)
    lp.row_lower_, lp.row_upper_ = numpy.array(low), numpy.array(high)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = numpy.array(start), numpy.array(index), numpy.array(value)
    h.passModel(lp)
    begin = time.perf_counter()
    h.run()
    seconds = time.perf_counter() - begin
    values = h.getSolution().col_value
    done = h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return seconds, problem.chosen(values) if len(values) else None, done


def solve_command(problem, limit, command, read):
    with tempfile.TemporaryDirectory() as folder:
        lp, out = os.path.join(folder, "p.lp"), os.path.join(folder, "p.sol")
        problem.write_lp(lp)
        begin = time.perf_counter()
        try:
            log = subprocess.run(command(lp, out, limit), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit + 30).stdout
        except subprocess.TimeoutExpired:
            return time.perf_counter() - begin, None, False
        seconds = time.perf_counter() - begin
        if not os.path.exists(out):
            return seconds, None, False
        with open(out) as f:
            values, done = read(f.read(), log, sum(len(o) for _, o in problem.groups))
        return seconds, problem.chosen(values) if values else None, done


def read_cbc(text, log, n):
    values = [0.0] * n
    for line in text.splitlines()[1:]:
        words = line.replace("**", "").split()
        values[int(words[1][1:])] = float(words[2])
    return values, text.startswith("Optimal")


def read_glpk(text, log, n):
    values = [0.0] * n
    columns = 0
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["j"]:
            values[int(words[1]) - 1] = float(words[2])
            columns += 1
    return values if columns else None, "INTEGER OPTIMAL" in log


def solve_cbc(problem, limit):
    return solve_command(problem, limit, lambda lp, out, s: ["cbc", lp, "-threads", "1", "-ratio", "0", "-allow", "0", "-sec", str(s), "-solve", "-solu", out], read_cbc)


def solve_glpk(problem, limit):
    return solve_command(problem, limit, lambda lp, out, s: ["glpsol", "--lp", lp, "--tmlim", str(int(s)), "--mipgap", "0", "-w", out], read_glpk)


def peers():
    """[(name, function)] of those installed, and the names of the others."""
    found, missing = [], []
    try:
        import highspy, numpy  # noqa: F401
        found.append(("highs", solve_highs))
    except ImportError:
        missing.append("highs (pip: highspy)")
    for name, program, function in (("cbc", "cbc", solve_cbc), ("glpk", "glpsol", solve_glpk)):
        if shutil.which(program):
            found.append((name, function))
        else:
            missing.append(name)
    return found, missing


def ours(bench, case, *options):
    """(milliseconds, status, relative gap, cost) of one case."""
    out = subprocess.run([bench, "--exact", case, *options], stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in out.splitlines():
        f = line.split("\t")
        if f[0] == "bench" and f[1] == "ilp_" + case:
            keys = dict(w.split("=") for w in f[8:])
            return float(f[2]), f[7], float(keys["gap"]), float(keys["cost"])
    raise SystemExit("bench_ilp printed no line for " + case)


def dump(bench, case, seed=1):
    return Problem(subprocess.run([bench, "--seed", str(seed), "--dump", case], stdout=subprocess.PIPE, text=True, check=True).stdout)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--bench", default=os.path.join(HERE, "bench_ilp"))
    a.add_argument("--cases", default="")
    a.add_argument("--limit", type=float, default=60)
    a.add_argument("--hard", action="store_true")
    a = a.parse_args()
    found, missing = peers()
    cases = a.cases.split(",") if a.cases else CASES + (HARD if a.hard else [])
    for case in cases:
        extra = ["--time-limit", "60"] if case in HARD else []
        problem = dump(a.bench, case)
        for name, function in found:
            pairs = []
            while not pairs or (len(pairs) < 3 and pairs[-1][1] < 2):
                mine = ours(a.bench, case, *extra)[0]
                seconds, choice, done = function(problem, a.limit)
                pairs.append((mine, seconds, done and choice is not None))
            mine, seconds = statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)
            more = "" if pairs[-1][2] else ">"
            print("bench\tilp_%s\t%.4f\tms\t%s\t%s%.2f\t%s%.1f" % (case, mine, name, more, 1e3 * seconds, more, 1e3 * seconds / mine), flush=True)
    for case in cases:
        for limit in ("0.001", "0.01"):
            ms, status, gap, _ = ours(a.bench, case, "--time-limit", limit, "--repeat", "3")
            print("anytime\tilp_%s\tlimit_s=%s\t%.4f\tms\t%s\tgap=%.3g" % (case, limit, ms, status, gap), flush=True)
    for name in missing:
        print("skipped\tilp\t%s is not installed" % name)


if __name__ == "__main__":
    main()
