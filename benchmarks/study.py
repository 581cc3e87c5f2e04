"""study.py - what the studies share: runs of train.py done, read back and repeated; gaps, tests, verdicts.

A study is a list of train.py's runs, a folder each. What is finished is skipped, so an interrupted study goes
on; every number of a report is read back. Bases (worlds, or dialogues) are the units of intervals and tests.
"""
import contextlib
import csv
import io
import random
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
import train

# ---- runs ----
def call(task):
    """What the task (function, *args) gives, without its words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return task[0](*task[1:])

def combine(argv, folder):
    """{method: its runs (seeds, rates)}, "base" among them, of a command line of train.py."""
    listed = lambda word: ",".join(f"{x:g}" for x in word) if isinstance(word, (list, tuple)) else str(word)
    s = train.settings([*map(listed, argv)])
    call((train.choose_sources, s))
    runs = train.combinations(s, Path(folder))
    grid = lambda method: np.array([r for r in runs if r.method == method]).reshape(len(s.seed), -1)
    return {method: grid(method) for method in ("base", *s.method)}

def ordered(arms):
    """Different runs of {arm: runs}; those that share model and data are neighbours, so these load once."""
    runs = {r.out: r for of in arms.values() for r in of.flat}
    return sorted(runs.values(), key=lambda r: (r.model, r.data, r.out))

def run(r):
    """Do a run if it is not finished; it changes its settings, so it gets a copy."""
    train.quiet_run(SimpleNamespace(**vars(r)))

def each(jobs, function, items, name):
    """[function(item)], `jobs` items at a time in processes, with a bar of this name."""
    return list(data.progress(train.each(jobs, function, items), total=len(items), desc=name, disable=None))

def repeat(r):
    """A sentence on a finished run done again elsewhere: are all its numbers the same?"""
    with tempfile.TemporaryDirectory() as folder:
        run(SimpleNamespace(**vars(r) | dict(out=f"{folder}/again", resume=False)))
        old, new = (data.read_json(Path(home) / "results.json") for home in (r.out, f"{folder}/again"))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return f"{r.out}: differs in {', '.join(changed)}" if changed else f"{r.out}: reproduced exactly"

def again(jobs, runs, count):
    """Repeat `count` finished runs, drawn at random; 0 if all numbers are the same, else 1."""
    finished = [r for r in runs if (Path(r.out) / "results.json").exists()]
    said = each(jobs, repeat, random.Random(0).sample(finished, min(count, len(finished))), "runs")
    data.need(said, "no run is finished: nothing to repeat")
    print("\n".join(said))
    return int(any("differs" in line for line in said))

def write_report(args, script, name, title, lines, files):
    """Write NAME.md, these lines under a head, and other files {name: text}; print where they are."""
    command = shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]])
    folder, text = args.results or args.out, "\n".join([f"# {title}", "", f"`{command}`", "", *lines])
    for file, content in ({f"{name}.md": text} | files).items():
        data.write_text(folder / file, content)
    print(f"saved in {folder}: {name}.md, {', '.join(files)}")

def csv_text(rows):
    """Dicts of the same keys as CSV; numbers to 12 decimals, so a test's ties are kept."""
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({k: round(x, 12) if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    return out.getvalue()

# ---- numbers of runs: an arm is {column: (bases, seeds, rates)}, a rule gives a rate's index (bases,) ----
def read(runs, row):
    """The arm of runs (bases, seeds, rates), objects, whose numbers row(run) gives; None becomes nan."""
    rows = [row(run) for run in runs.flat]
    return {c: np.array([r[c] for r in rows], float).reshape(runs.shape) for c in rows[0]}

def best(first, then):
    """(bases,): the rate of the largest mean over seeds of `first`; of equal ones the largest of `then`."""
    first, then = (np.nan_to_num(x).mean(1).round(9) for x in (first, then))  # (bases, rates)
    return np.where(first == first.max(1, keepdims=True), then, -np.inf).argmax(1)

def tuned(arm):
    """As train.py chooses: validation balance, then validation NLL."""
    return best(arm["validation balance"], -arm["validation NLL"])

def at(arm, column, rule=tuned):
    """(bases,): means over seeds of a column at the rates that the rule chooses."""
    return arm[column].mean(1)[range(len(arm[column])), rule(arm)]

def rate_counts(arm, rule):
    """How many bases got which rate, as text; "edge" if most are at an end of the grid."""
    last, choice = arm["rate"].shape[2] - 1, rule(arm)
    edge = " (edge)" if last and 2 * np.isin(choice, (0, last)).sum() > len(choice) else ""
    return ", ".join(f"{lr:g} x{n}" for lr, n in sorted(Counter(at(arm, "rate", rule)).items())) + edge

def base_rows(arms, bases):
    """A dict an arm, base and rate of {arm: its numbers}: the means over seeds of every column."""
    for name, arm in arms.items():
        for b, i in np.ndindex(len(bases), arm["rate"].shape[2]):
            means = {c: float(x[b, :, i].mean()) for c, x in arm.items()}
            yield dict(arm=name, rate=means["rate"], base=bases[b], seeds=arm["rate"].shape[1]) | means

# ---- tests: gaps (n,) of independent bases ----
def flip_p(gaps):
    """Two-sided p that gaps lie around 0: the exact sign-flip test, all 2^n signs."""
    n = len(gaps)
    signs = 1 - 2 * (np.arange(2 ** n)[:, None] >> np.arange(n) & 1)  # (2^n, n)
    return float(np.mean(abs(signs @ gaps) >= abs(gaps.sum()) - 1e-9))

def holm(ps):
    """{key: p} adjusted for being tested together (Holm 1979)."""
    out, least = {}, 0.0
    for at, key in enumerate(sorted(ps, key=ps.get)):
        out[key] = least = max(least, min(1.0, (len(ps) - at) * ps[key]))
    return out

def verdicts(leads, matters, form):
    """{comparison: row of a table} from {comparison: (lead, half-width, p)}, one family of tests.
    confirmed: adjusted p below .05, the lead positive; refuted: the least that `matters` is above it all."""
    adjusted, rows = holm({key: p for key, (_, _, p) in leads.items()}), {}
    for key, (lead, half, p) in leads.items():
        sure, below = adjusted[key] < .05 and lead > 0, lead + half < matters[key]
        verdict = "refuted" if below else "confirmed" if sure else "undecided"
        rows[key] = {"lead": f"{lead:{form}} ± {half:{form[1:]}}", "matters from": f"{matters[key]:g}",
                     "p": f"{p:.4f}", "p, Holm": f"{adjusted[key]:.4f}", "verdict": verdict}
    return rows
