"""study.py - what both studies share: runs of train.py done, read back and repeated; gaps, tests, verdicts.

A study is a list of train.py's own runs, a folder each. A finished folder is skipped, so an interrupted study
continues, and every number of a report is read back from those folders. Bases (worlds, or dialogues) are the
independent units of every interval and test.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import train

# ---- runs ----
def combine(argv, folder):
    """The runs that a command line of train.py stands for, the base first; prints nothing."""
    s = train.settings([str(word) for word in argv])
    with contextlib.redirect_stdout(io.StringIO()):
        train.choose_sources(s)
    return train.combinations(s, Path(folder))

def ordered(runs):
    """Different runs; those that share model and data are neighbours, so these load once."""
    return sorted({r.out: r for r in runs}.values(), key=lambda r: (r.model, r.data, r.out))

def do(jobs, runs):
    """Do those runs that are not finished yet. A run changes its settings, so it gets a copy."""
    runs = [SimpleNamespace(**vars(r)) for r in runs]
    for _ in data.progress(train.each(jobs, runs), total=len(runs), desc="runs", disable=None):
        pass

def results(runs):
    """{key: results.json} of {key: settings of a finished run}."""
    return {key: data.read_json(Path(r.out) / "results.json") for key, r in runs.items()}

def again(runs, count):
    """Repeat `count` finished runs, drawn at random, elsewhere; 0 if all numbers are the same, else 1."""
    finished = [r for r in runs if (Path(r.out) / "results.json").exists()]
    differ = 0
    for run in random.Random(0).sample(finished, min(count, len(finished))):
        with tempfile.TemporaryDirectory() as folder:
            repeated = SimpleNamespace(**vars(run) | dict(out=f"{folder}/run", resume=False))
            train.quiet_run(repeated)
            old, new = results({0: run, 1: repeated}).values()
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        print(f"{run.out}: " + (f"differs in {', '.join(changed)}" if changed else "reproduced exactly"))
        differ += bool(changed)
    return min(differ, 1)

def command(script):
    """The command line that is running, for the head of a report."""
    return f"`{shlex.join(['python', f'benchmarks/{script}', *sys.argv[1:]])}`"

def write_files(folders, files):
    """Write files {name: text} into each of these folders and print where they are."""
    for folder in dict.fromkeys(folders):
        for name, text in files.items():
            data.write_text(folder / name, text)
        print(f"saved in {folder}: {', '.join(files)}")

def csv_text(rows):
    """Dicts of the same keys as CSV, numbers to 9 decimals."""
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({k: round(x, 9) if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    return out.getvalue()

# ---- numbers of runs, {(base, seed, rate): row} ----
def tuned(found):
    """{base: rate}: the best by validation, as train.py chooses it."""
    rows = {}
    for (base, _, _), r in found.items():
        rows.setdefault(base, []).append(r)
    return {base: lr for base, some in rows.items() for lr in evaluation.best_rates(some).values()}

def at(found, rates):
    """{(base, seed): row} at these rates, {base: rate}."""
    return {(base, seed): r for (base, seed, lr), r in found.items() if lr == rates[base]}

def rate_counts(found, rates):
    """How many bases got which rate, as text; "edge" if most are at an end of the grid."""
    grid, used = sorted({lr for _, _, lr in found}), Counter(rates.values())
    edge = " (edge)" if len(grid) > 1 and 2 * (used[grid[0]] + used[grid[-1]]) > len(rates) else ""
    return ", ".join(f"{lr:g} x{used[lr]}" for lr in grid if used[lr]) + edge

def base_rows(found, columns):
    """A dict a base and rate: means over seeds of what chooses a rate and of the columns."""
    for base, lr in dict.fromkeys((base, lr) for base, _, lr in found):
        mine = [r for (b, _, rate), r in found.items() if (b, rate) == (base, lr)]
        mean = lambda values: float(np.mean(np.array(values, float)))  # of None: nan
        row = dict(rate=lr, base=base, seeds=len(mine))
        row |= {f"validation {key}": mean([r["validation"][key] for r in mine]) for key in ("balance", "NLL")}
        yield row | {c: mean([r.get(c) for r in mine]) for c in columns}

def over_bases(picked, column):
    """(bases,): means over seeds of a column of {(base, seed): row}."""
    bases = dict.fromkeys(base for base, _ in picked)
    return np.array([np.mean([r[column] for (b, _), r in picked.items() if b == base]) for base in bases])

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
        least = max(least, min(1.0, (len(ps) - at) * ps[key]))
        out[key] = least
    return out

def verdict(lead, half, p, matters):
    """What a lead says of "it is positive": its mean, interval's half-width, adjusted p.
    refuted: what would matter lies above the interval. confirmed: p below .05, the lead positive."""
    if lead + half < matters:
        return "refuted"
    return "confirmed" if p < .05 and lead > 0 else "undecided"

def verdicts(leads, matters, form, missing=0):
    """{comparison: row of a table} from {comparison: (lead, half-width, p)}, one family of tests.
    matters: {comparison: the smallest lead that matters}. missing: tests that were not run count as p = 1."""
    adjusted = holm({key: p for key, (_, _, p) in leads.items()} | {n: 1. for n in range(missing)})
    return {key: {"lead": f"{lead:{form}} ± {half:{form[1:]}}", "matters from": f"{matters[key]:g}",
                  "p": f"{p:.4f}", "p, Holm": f"{adjusted[key]:.4f}",
                  "verdict": verdict(lead, half, adjusted[key], matters[key])}
            for key, (lead, half, p) in leads.items()}
