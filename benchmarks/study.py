"""study.py - what both studies share: runs of train.py done, read back, repeated; intervals over bases.

A study is a list of train.py's own runs, a folder each. A finished folder is skipped, so an interrupted study
continues, and every number of a report is read back from those folders.
"""
import contextlib
import csv
import io
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
from benchmarks.pictures import svg_lines, svg_sheet

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

def again(run):
    """Repeat a finished run in a temporary folder; 0 if every number is the same, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        repeated = SimpleNamespace(**vars(run) | dict(out=f"{folder}/run", resume=False))
        train.quiet_run(repeated)
        old, new = results({0: run, 1: repeated}).values()
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    print(f"{run.out}: " + (f"differs in {', '.join(differ)}" if differ else "reproduced exactly"))
    return 1 if differ else 0

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
def pick(found, how):
    """{(base, seed): row} at one rate a base: "tuned" as train.py chooses it, or the how-th."""
    out = {}
    for base in dict.fromkeys(b for b, _, _ in found):
        mine = {key: r for key, r in found.items() if key[0] == base}
        grid = sorted({lr for _, _, lr in mine})
        [tuned] = evaluation.best_rates(mine.values()).values()
        lr = tuned if how == "tuned" else grid[how]
        out |= {(base, seed): r for (_, seed, rate), r in mine.items() if rate == lr}
    return out

def rate_counts(found, picked):
    """How many bases got which rate, as text; "edge" if most are at an end of the grid."""
    grid = sorted({lr for _, _, lr in found})
    used = Counter({base: r["lr"] for (base, _), r in picked.items()}.values())
    edge = " (edge)" if len(grid) > 1 and 2 * (used[grid[0]] + used[grid[-1]]) > sum(used.values()) else ""
    return ", ".join(f"{lr:g} x{used[lr]}" for lr in grid if used[lr]) + edge

def base_means(found, columns):
    """A dict a base and rate: means over seeds of what chooses a rate and of the columns."""
    for base, lr in dict.fromkeys((base, lr) for base, _, lr in found):
        mine = [r for (b, _, rate), r in found.items() if (b, rate) == (base, lr)]
        mean = lambda name, values: {name: float(np.mean(np.array(values, float)))}  # of None: nan
        row = dict(method=mine[0]["method"], rate=lr, base=base, seeds=len(mine))
        for key in ("balance", "NLL"):
            row |= mean(f"validation {key}", [r["validation"][key] for r in mine])
        for c in columns:
            row |= mean(c, [r[c] for r in mine])
        yield row

def spread(values):
    """(mean, half-width of its 95 % interval) of {(base, seed): value}.
    With three bases or more by Student's t over the bases' means, so that what varies between bases counts;
    with fewer from the seeds within each base: a statement about these bases only. One value: nan."""
    groups = {}
    for (base, _), value in values.items():
        groups.setdefault(base, []).append(value)
    if len(groups) >= 3:
        return data.t_interval([np.mean(group) for group in groups.values()])
    n, df, mean = len(values), len(values) - len(groups), float(np.mean(list(values.values())))
    if df == 0:
        return mean, float("nan")
    squares = sum(np.var(group) * len(group) for group in groups.values())
    t = data.STUDENT[df - 1] if df <= 10 else 1.96 + 2.63 / df
    return mean, float(t * (squares / df / n) ** .5)

def column(picked, name):
    """spread() of one column, or the number alone where there is no interval."""
    mean, half = spread({key: r[name] for key, r in picked.items()})
    return mean if np.isnan(half) else (mean, half)

def paired(ours, theirs, column):
    """spread() of ours less theirs on the same base and seed, in hundredths."""
    assert ours.keys() == theirs.keys()
    return spread({key: 100 * (r[column] - theirs[key][column]) for key, r in ours.items()})

def auc(scores, positive):
    """Area under the ROC curve: how often a positive scores higher, ties counted half."""
    values, back = np.unique(np.asarray(scores), return_inverse=True)
    below = np.concatenate([[0], np.cumsum(np.bincount(back[~positive], minlength=len(values)))])
    return float(((below[:-1] + below[1:]) / 2)[back[positive]].sum() / positive.sum() / (~positive).sum())

def reference(label, variants):
    """What a variant "METHOD, LEVEL" is compared with: SAILS at its level; SAILS with the first."""
    method, comma, level = label.partition(", ")
    other = next(iter(variants)) if method == "sails" else f"sails{comma}{level}"
    return other if other in variants and other != label else None

def differs(variants, columns):
    """One sentence: which gaps to the reference have an interval that leaves out 0."""
    found, ways = [], [("tuned", c) for c in columns] + [(0, "balance")]
    for label in (label for label in variants if reference(label, variants)):
        for how, column in ways:
            mine, other = (pick(variants[x], how) for x in (label, reference(label, variants)))
            gap, half = paired(mine, other, column)
            if abs(gap) > half:
                rate = "tuned" if how == "tuned" else "at the lowest rate"
                found.append(f"{label} {column} {rate} {gap:+.1f} ± {half:.1f}")
    return f"Gaps to a reference without 0, in points (1 in 20 by chance): {'; '.join(found) or 'none'}."

def verdict(leads):
    """One sentence of {method: (SAILS's lead over it, half-width)}: ahead only if 0 is outside."""
    words = {"is ahead of": [], "cannot be told from": [], "is behind": []}
    for m, (gap, half) in leads.items():
        word = "is ahead of" if gap > half else "is behind" if gap < -half else "cannot be told from"
        words[word].append(m)
    return "SAILS " + "; ".join(f"{word} {', '.join(ms)}" for word, ms in words.items() if ms) + "."

# ---- numbers of held-out pairs: scores (n, 4) are log p and tokens of chosen, then of rejected ----
def scores(run, part):
    """(n, 4) of a finished run's held-out pairs of one part."""
    rows = [row for _, row in data.read_rows(Path(run.out) / f"heldout-{part}.jsonl")]
    return np.array([row["chosen"] + row["rejected"] for row in rows])

def per_token(total, tokens):
    """(sum / sum, half-width of its 95 % interval over replies): the interval of a ratio."""
    mean = total.sum() / tokens.sum()
    squares = ((total - mean * tokens) ** 2).sum() * len(total) / (len(total) - 1)
    return float(mean), float(1.96 * squares ** .5 / tokens.sum())

def with_seeds(mean, half, seeds):
    """(mean, half-width) that counts the spread over seeds beside that over replies."""
    return float(mean), float(np.hypot(half, data.t_interval(seeds)[1] if len(seeds) > 1 else 0))

def over_pairs(x):
    """(mean, half-width) of a number per seed and pair (seeds, n)."""
    each = x.mean(0)
    return with_seeds(each.mean(), 1.96 * each.std(ddof=1) / len(each) ** .5, x.mean(1))

def dpo_losses(now, then, beta):
    """DPO's loss of every pair, from scores (..., n, 4) of the model and of the base."""
    gain = now - then
    return np.logaddexp(0, -beta * (gain[..., 0] - gain[..., 2]))

def paired_nll(ours, theirs):
    """(their NLL less ours per token, half-width) of scores (seeds, n, 4) on the same pairs."""
    gaps, tokens = ours[..., 0] - theirs[..., 0], ours[0, :, 1]
    return with_seeds(*per_token(gaps.mean(0), tokens), gaps.sum(1) / tokens.sum())

def margins(test, base):
    """How much more than the base a model prefers chosen, nats per token and pair (..., n)."""
    gain = test - base
    return gain[..., 0] / test[..., 1] - gain[..., 2] / test[..., 3]

def line_chart(panels, xlabel):
    """An SVG of {title: {name: {x: y}}}: a panel a title, y from 0 to 1, x equally spaced."""
    return svg_sheet([
        svg_lines({name: list(curve.items()) for name, curve in curves.items()}, title, xlabel,
                  list(next(iter(curves.values()))), [0, .25, .5, .75, 1])
        for title, curves in panels.items()])
