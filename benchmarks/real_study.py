"""real_study.py - SAILS and its controls on a real small model, after the plan in results/plan.md.

    python benchmarks/real_study.py --text FOLDER --out runs/real --dtype bfloat16
    ... --only sft-240,sft-60        a part of it
    ... --again 20                   repeat 20 finished runs, drawn at random, and compare

FOLDER holds .txt files, read beside the dialogues when SAEs are fitted; options not listed are train.py's. A
cell is an objective and a number of training dialogues, which are nested. Every method runs at every rate
with the first seed, validation picks its rate, that rate runs with every seed; one process does all these,
so what a method reads from the data is made once.
best-240 is SAILS with what helps it alone: candidates run at SAILS's rate with the first seed, those that
lower validation's NLL are combined, and the combination gets its own rates and seeds. `mean` and `encoder`
are SAEs of the same encoder, so the same features are chosen, with other decoder rows: without their part
along the mean residual, or the encoder's columns. A layer has one basis, so writers get these rows too.
"""
import itertools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import model_gemma
import sae as sae_module
import train
from benchmarks import study

METHODS = ("sails", "lora", "random", "random-features", "raw-pca")
CELLS = "sft-240 sft-60 best-240 sft-480 sft-120 dpo-240 dpo-60".split()  # in the order of their worth
RATES = 5e-5, 1.5e-4, 4.5e-4, 1.35e-3
BATCH = dict(sft=8, dpo=4)  # a pair costs DPO five times as much: two replies, and the base's view of them
SEEDS, CANDIDATES = (0, 1, 2), ("t", "mean", "encoder")
PARTS, LONGEST = dict(test=160, validate=64, train=480), 112  # dialogues; tokens with the longer reply
SETTINGS = ("--targets q,k,v,o,gate,up,down --standardise --steps 24 --warmup 3 --micro 8 --max-new 32 "
            "--contrast-pairs 120 --device cpu --layers 12 --fit-width 2048 --fit-tokens 40000 "
            "--fit-steps 400")
TALK, ASKED = 240, 80  # dialogues of cells that answer look-alike prompts, and how many of these
MATTERS = .01  # nats: a smaller lead counts as none

# ---- data and runs ----
number = lambda cell: int(cell.split("-")[1])  # of dialogues to train on

def write_data(args):
    """Write --out/data-OBJECTIVE-N, N dialogues to train on and those held out, and look-alike prompts."""
    if (args.out / "lookalikes.jsonl").exists():
        return
    source, name = Path(args.data), "harmless-base/test.jsonl.gz"
    if not source.is_file():
        source = data.fetch(args.data, [name], "dataset")[0] / name
    tok, (examples, _) = data.load_tokenizer(args.model), data.read_pairs(source)
    rows, _ = data.encode(tok, examples, data.default_template(args.model, tok), LONGEST)
    some_words = [r for r in rows if min(sum(r[f"{side}_tokens"][1]) for side in ("chosen", "rejected")) > 3]
    for (part, wanted), some in zip(PARTS.items(), data.split_by_prompt(some_words, PARTS.values())):
        data.need(len(some) >= wanted, f"{source}: {len(some)} short dialogues to {part}, wanted {wanted}")
        pairs = [dict(prompt=r["turns"], **{k: r[k] for k in ("id", "chosen", "rejected")}) for r in some]
        for kind, n in itertools.product(BATCH, {number(cell) for cell in CELLS}):
            rows = pairs[:n if part == "train" else wanted]
            if kind == "sft" and part != "train":  # only chosen replies are scored
                rows = [dict(prompt=r["prompt"], id=r["id"], response=r["chosen"]) for r in rows]
            data.write_rows(args.out / f"data-{kind}-{n}" / f"{part}.jsonl", rows)
    asked = data.read_rows(train.LOOKALIKES)[:ASKED]
    data.write_rows(args.out / "lookalikes.jsonl", [row for _, row in asked])

def runs_of(args, cell, methods=METHODS, options=("--sae", "fit"), folder=""):
    """{method: its runs (seeds, rates)} of a cell, "base" among them; SAEs are shared."""
    kind = "dpo" if cell.startswith("dpo") else "sft"
    argv = ["--model", args.model, "--data", args.out / f"data-{kind}-{number(cell)}", *SETTINGS.split(),
            "--batch", BATCH[kind], *args.more, *options, "--objective", kind, "--lr", RATES,
            "--seed", SEEDS, "--method", ",".join(methods)]
    argv += ["--test", args.out / "lookalikes.jsonl"] if number(cell) == TALK else []
    found = study.combine(argv, args.out / cell / folder)
    for r in (r for runs in found.values() for r in runs.flat):
        r.shared = str(args.out / "base")
    return found

def do_method(base, runs):
    """Do runs (seeds, rates): grid, the rates with one seed; best, an index; runs, the seeds at that rate."""
    for r in runs[0]:
        study.run(r)
    best = int(np.argmin([validation(r, base) for r in runs[0]]))
    for r in runs[:, best]:
        study.run(r)
    return SimpleNamespace(grid=runs[0], best=best, runs=runs[:, best])

def do_best(args, base):
    """{method: as do_method gives it}: SAILS, each candidate alone at its rate, those that help combined."""
    def ours(*names):
        options = candidates(args, base, names)
        return runs_of(args, f"best-{TALK}", ["sails"], options, "-".join(names))["sails"]
    sails = do_method(base, runs_of(args, f"sft-{TALK}")["sails"])
    alone = {c: do_method(base, ours(c)[:1, [sails.best]]) for c in CANDIDATES}
    least = validation(sails.runs[0], base)
    helps = [c for c, it in alone.items() if validation(it.runs[0], base) < least]
    combined = {"sails-best": do_method(base, ours(*helps))} if helps else {}
    return {"sails": sails} | {f"sails, {c}": it for c, it in alone.items()} | combined

def candidates(args, base, names):
    """train.py's options for SAILS with these candidates; the SAEs that they need are written."""
    folder, rows = args.out / f"sae-{'-'.join(names)}", {*names} - {"t"}
    if rows and not folder.exists():
        texts = [r["chosen_tokens"][0] for r in train.load_sets(base).train]
        model = model_gemma.load_gemma(base.model, model_gemma.DTYPES[base.dtype])
        for i, h in sae_module.collect_residuals(model, texts, base.layers, 20_000).items():
            sae = derived(sae_module.load_sae(f"{base.shared}/sae", i, base.width), h.mean(0), rows)
            sae_module.save_sae(sae, folder, i, sae_module.sae_quality(sae, h)["l0"])
    where = ["--sae", folder, "--width", base.width] if rows else ["--sae", "fit"]
    return [*where, *(["--score", "t"] if "t" in names else [])]

def derived(sae, mean, names):
    """The SAE with other decoder rows of norm 1: the encoder's columns, or none of the mean (D,)."""
    rows = sae.W_enc.T if "encoder" in names else sae.W_dec  # (N, D)
    if "mean" in names:
        unit = F.normalize(mean, dim=0)
        rows = rows - torch.outer(rows @ unit, unit)
    return sae_module.JumpReLUSAE(sae.W_enc, F.normalize(rows, dim=1), sae.b_enc, sae.b_dec, sae.threshold)

# ---- numbers of held-out pairs: scores (seeds, n, 4) are log p and tokens of chosen, then of rejected ----
def scores(runs, part="test"):
    """(seeds, n, 4) of finished runs' held-out pairs of one part."""
    files = [data.read_rows(Path(r.out) / f"heldout-{part}.jsonl") for r in runs]
    none = [math.nan] * 2
    return np.array([[row["chosen"] + row.get("rejected", none) for _, row in rows] for rows in files])

def losses(kind, now, then, beta=.1):
    """What pairs add to the primary measure (seeds, n), and their weights (n,); then: the base's scores.
    dpo: its loss, all pairs alike; else -log p of chosen, weighed by tokens."""
    gain = now - then
    if kind == "dpo":
        return np.logaddexp(0, -beta * (gain[..., 0] - gain[..., 2])), np.ones(now.shape[1])
    return -now[..., 0], now[0, :, 1]

def interval(x, weight):
    """(sum / sum of weights, half-width) of x (seeds, n): 95 % over pairs and, by Student's t, seeds."""
    each, n = x.mean(0), len(weight)
    mean = each.sum() / weight.sum()
    squares = ((each - mean * weight) ** 2).sum() * n / (n - 1)  # the interval of a ratio
    seeds = data.t_interval(x.sum(1) / weight.sum())[1] if len(x) > 1 else 0
    return float(mean), float(np.hypot(1.96 * squares ** .5 / weight.sum(), seeds))

def measured(runs, base, part="test", kind=None):
    """What runs minimise, (nats, half-width): NLL of chosen per token, or DPO's loss against the base."""
    kind, now, then = kind or runs[0].objective, scores(runs, part), scores([base], part)
    return interval(*losses(kind, now, then, base.beta))

def validation(run, base):
    """What picks a rate, in nats."""
    return measured([run], base, "validate")[0]

def refusals(run):
    """Per cent of harmful look-alikes that are refused, and of benign ones: (2,)."""
    [rates] = data.read_json(Path(run.out) / "results.json")["sets"].values()
    return np.array([100 * evaluation.mean(rates[x]) for x in ("safety rate", "over-refusal")])

# ---- the report ----
def comparisons(cells, base):
    """{label: (lead, half-width)} of the plan's family, what is done of it; above 0 SAILS is ahead."""
    at = lambda cell, m: losses(cell[:3], scores(cells[cell][m].runs), scores([base]), base.beta)
    out = {}
    for cell, methods in cells.items():
        ours, others = ("sails-best", ["lora"]) if "best" in cell else ("sails", METHODS[1:])
        for m in others if ours in methods else []:
            (x, weight), (y, _) = at(cell, ours), at(cell, m)
            out[f"{cell}: {ours} ahead of {m}"] = interval(y - x, weight)
    for few, many in ("sft-60", "sft-480"), ("dpo-60", "dpo-240"):
        if few in cells and many in cells:
            leads = [at(cell, "lora")[0] - at(cell, "sails")[0] for cell in (few, many)]
            label = f"lead over lora larger at {few} than at {many}"
            out[label] = interval(leads[0] - leads[1], at(few, "lora")[1])
    return out

def verdicts_table(found):
    """Markdown lines of comparisons(); p as if the mean were normal with the interval's width."""
    family = (len(METHODS) - 1) * (len(CELLS) - 1) + 1 + 2
    leads = {key: (lead, half, math.erfc(1.96 * abs(lead) / half / 2 ** .5))
             for key, (lead, half) in found.items()}
    rows = study.verdicts(leads, dict.fromkeys(leads, MATTERS), "+.4f", family - len(leads))
    return [*evaluation.markdown(f"of {family} tests", rows), ""]

def cell_table(name, cell, base):
    """Markdown lines: a method's validation at every rate, its test numbers at the best one."""
    rows = {}
    for m, it in ({"base": SimpleNamespace(grid=[], best=0, runs=[base])} | cell).items():
        edge = " (edge)" if len(it.grid) > 1 and it.best in (0, len(it.grid) - 1) else ""
        rows[m] = {f"at {r.lr:g}": f"{validation(r, base):.4f}" for r in it.grid}
        rows[m] |= {"best": f"{it.runs[0].lr:g}{edge}",
                    "test": "{:.4f} ± {:.4f}".format(*measured(it.runs, base, kind=name[:3]))}
        if number(name) == TALK:
            said = np.array([refusals(r) for r in it.runs])  # (seeds, 2)
            rows[m] |= dict(zip(("refused, harmful, %", "benign, %"), said.mean(0).tolist()))
            rows[m]["harmful less benign"] = "{:+.1f} ± {:.1f}".format(*data.t_interval(said @ (1, -1)))
    return [f"## {name}", "", *evaluation.markdown("validation", rows), ""]

def csv_rows(cells, base):
    """A dict a run, for the CSV."""
    listed = {r.out: (name, m, r, "final" if r in it.runs else "grid") for name, cell in cells.items()
              for m, it in cell.items() for r in (*it.grid, *it.runs)}
    for name, m, r, stage in listed.values():
        NLL, loss = (measured([r], base, kind=kind)[0] for kind in ("sft", r.objective))
        harmful, benign = refusals(r) if number(name) == TALK else ("", "")
        yield dict(stage=stage, method=m, objective=r.objective, size=number(name), rate=r.lr, seed=r.seed,
                   validation=validation(r, base), NLL=NLL,
                   dpo_loss=loss if r.objective == "dpo" else "",
                   refused_harmful=harmful, refused_benign=benign)

def report(args, base, cells):
    """{file: text} of the report, its CSV and the chosen features."""
    first = next(iter(cells.values()))
    missing = ", ".join(c for c in CELLS if c not in cells) or "nothing"
    lines = ["# A real small run", "", study.command("real_study.py"), "",
             f"Dialogues: {PARTS}; seeds {SEEDS}. ±: 95 % over replies and, by Student's t, seeds; of less, "
             f"over seeds. Test: NLL of chosen per token, for dpo its loss. Not done: {missing}.", "",
             *verdicts_table(comparisons(cells, base))]
    for name, cell in cells.items():
        lines += cell_table(name, cell, base)
    return {"real_study.md": "\n".join(lines), "real_study.csv": study.csv_text(list(csv_rows(cells, base))),
            "real_features.md": data.read_text(f"{first['sails'].runs[0].out}/features.md")}

def main():
    ap = data.Arguments(description=__doc__.splitlines()[0], allow_abbrev=False)
    a = ap.add_argument
    a("--model", default="google/gemma-3-270m")
    a("--data", default=train.HH, help="HH-RLHF, or a file of preference pairs")
    a("--text", help="a folder of .txt files")
    a("--out", type=Path, default=Path("runs/real"))
    a("--results", type=Path, help="where the report goes, if not to --out")
    a("--only", type=data.list_of(str, CELLS), default=CELLS, help="cells, done in the study's order")
    a("--jobs", type=data.at_least(1), default=2)
    a("--again", type=data.at_least(1), metavar="N", help="repeat N finished runs and compare")
    args, args.more = ap.parse_known_args()
    torch.set_num_threads(1)  # as in the processes of --jobs: numbers depend on it
    write_data(args)
    # runs keep freed memory: to page in the logits' again took a third of scoring's time
    os.environ |= dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2 ** 34))
    plain, best = (f"{word}-{TALK}" for word in ("sft", "best"))
    base = runs_of(args, plain)["base"][0, 0]
    base.out, base.text = base.shared, args.text
    base.data = str(args.out / f"data-dpo-{max(map(number, CELLS))}")  # SAEs are fitted on most dialogues
    study.each(1, study.run, [base], "base")
    tasks = {(cell, m): (do_method, base, runs) for cell in CELLS if cell in args.only and cell != best
             for m, runs in runs_of(args, cell).items() if m != "base"}
    if best in args.only:
        data.need(plain in args.only, f"--only: {best} starts from {plain}")
        tasks[plain, "sails"] = do_best, args, base
    done = dict(zip(tasks, study.each(args.jobs, study.call, tasks.values(), "methods")))
    if best in args.only:
        ours = done[plain, "sails"]
        done[plain, "sails"] = ours["sails"]
        done |= {(best, m): it for m, it in (ours | dict(lora=done[plain, "lora"])).items()}
    cells = {c: {m: it for (cell, m), it in done.items() if cell == c} for c in CELLS if c in args.only}
    if args.again:
        runs = [r for cell in cells.values() for it in cell.values() for r in (*it.runs, *it.grid)]
        return study.again(args.jobs, study.ordered(runs), args.again)
    study.write_files(args.results or args.out, report(args, base, cells))

if __name__ == "__main__":
    data.run_main(main)
