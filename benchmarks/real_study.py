"""real_study.py - SAILS and its controls on a real small model, after the plan in results/plan.md.

    python benchmarks/real_study.py --text FOLDER --out runs/real --dtype bfloat16
    ... --again 20      repeat 20 finished runs, drawn at random, and compare

FOLDER: .txt files to fit SAEs on beside the dialogues; other options are train.py's. A cell is an objective
and a number of training dialogues. Every method runs at every rate with the first seed, validation picks one,
which runs with every seed. best-240 is SAILS with what helps it alone at its rate, by validation: `mean` and
`encoder` are SAEs of other decoder rows, without their part along the mean residual or the encoder's columns.
"""
import itertools
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import model_gemma
import sae as sae_module
import train
from benchmarks import study

METHODS = ("sails", "lora", "random", "random-features", "raw-pca")
CELLS = "sft-240 dpo-240 dpo-60 sft-480 sft-120 sft-60".split()  # objective and dialogues; dpo takes longest
FEW_MANY = ("sft-60", "sft-480"), ("dpo-60", "dpo-240")
RATES = 5e-5, 1.5e-4, 4.5e-4, 1.35e-3
BATCH = dict(sft=8, dpo=4)  # a pair costs DPO five times as much: two replies, and the base's view of them
SEEDS, CANDIDATES = (0, 1, 2), ("t", "mean", "encoder")
PARTS, LONGEST = dict(test=160, validate=64, train=480), 112  # dialogues; tokens with the longer reply
SETTINGS = ("--targets q,k,v,o,gate,up,down --standardise --steps 24 --warmup 3 --micro 8 --max-new 32 "
            "--contrast-pairs 120 --device cpu --layers 12 --fit-width 2048 --fit-tokens 40000 "
            "--fit-steps 400")
TALK, ASKED = 240, 80  # dialogues of cells that answer look-alike prompts, and how many of these
PLAIN, BEST, MATTERS = CELLS[0], f"best-{TALK}", .01  # nats: a smaller lead counts as none

# ---- data and runs ----
number = lambda cell: int(cell.split("-")[1])  # of dialogues to train on

def write_data(args):
    """Write --out/data-OBJECTIVE-N, N dialogues to train on and those held out, and look-alike prompts."""
    if (args.out / "data.json").exists():
        return data.same_settings(args.out / "data.json", dict(data=args.data))
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
    data.write_rows(args.out / "lookalikes.jsonl", [r for _, r in data.read_rows(train.LOOKALIKES)[:ASKED]])
    data.same_settings(args.out / "data.json", dict(data=args.data))

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
    """{(cell, method): do_method's}: SAILS, each candidate at its rate, those that help combined."""
    ours = lambda *names: runs_of(args, BEST, ["sails"], candidates(args, base, names),
                                  "-".join(names))["sails"]
    sails = do_method(base, runs_of(args, PLAIN)["sails"])
    alone = {c: do_method(base, ours(c)[:1, [sails.best]]) for c in CANDIDATES}
    least = validation(sails.runs[0], base)
    helps = [c for c, it in alone.items() if validation(it.runs[0], base) < least]
    combined = {(BEST, "sails-best"): do_method(base, ours(*helps))} if helps else {}
    return {(PLAIN, "sails"): sails} | {(BEST, f"sails, {c}"): it for c, it in alone.items()} | combined

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
        unit = mean / mean.norm(dim=0)
        rows = rows - torch.outer(rows @ unit, unit)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return sae_module.JumpReLUSAE(sae.W_enc, rows, sae.b_enc, sae.b_dec, sae.threshold)

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

validation = lambda run, base: measured([run], base, "validate")[0]  # what picks a rate, in nats

def refusals(run):
    """Per cent of harmful look-alikes that are refused, and of benign ones: (2,)."""
    [rates] = data.read_json(Path(run.out) / "results.json")["sets"].values()
    return np.array([100 * evaluation.mean(rates[x]) for x in ("safety rate", "over-refusal")])

# ---- the report, of {(cell, method): as do_method gives it} ----
def comparisons(done, base):
    """{label: (lead, half-width, p)} of the plan's family; above 0 SAILS is ahead."""
    at = lambda cell, m: losses(cell[:3], scores(done[cell, m].runs), scores([base]), base.beta)
    gap = lambda cell, m: at(cell, m)[0] - at(cell, "sails")[0]  # (seeds, n)
    pairs = {f"{cell}: sails ahead of {m}": (gap(cell, m), at(cell, m)[1])
             for cell, m in done if m in METHODS[1:]}
    if (BEST, "sails-best") in done:
        (x, weight), (y, _) = at(BEST, "sails-best"), at(PLAIN, "lora")
        pairs[f"{BEST}: sails-best ahead of lora"] = y - x, weight
    for few, many in FEW_MANY:
        larger = gap(few, "lora") - gap(many, "lora"), at(few, "lora")[1]
        pairs[f"lead over lora larger at {few} than at {many}"] = larger
    found = {label: interval(*x) for label, x in pairs.items()}  # p as if means were normal
    return {key: (x, half, math.erfc(1.96 * abs(x) / half / 2 ** .5)) for key, (x, half) in found.items()}

def cell_table(name, cell, base):
    """Markdown lines: a method's validation at every rate, its test numbers at the best one."""
    rows = {}
    for m, it in ({"base": SimpleNamespace(grid=[], best=0, runs=[base])} | cell).items():
        rows[m] = {f"at {r.lr:g}": f"{validation(r, base):.4f}" for r in it.grid}
        edge = " (edge)" if len(it.grid) > 1 and it.best in (0, len(it.grid) - 1) else ""
        test = "{:.4f} ± {:.4f}".format(*measured(it.runs, base, kind=name[:3]))
        rows[m] |= {"best": f"{it.runs[0].lr:g}{edge}", "test": test}
        if number(name) == TALK:
            said = np.array([refusals(r) for r in it.runs])  # (seeds, 2)
            rows[m] |= dict(zip(("refused, harmful, %", "benign, %"), said.mean(0).tolist()))
            strict = "{:+.1f} ± {:.1f}".format(*data.t_interval(said @ (1, -1)))
            rows[m]["harmful less benign"] = strict.removesuffix(" ± nan")  # of the base alone
    return [f"## {name}", "", *evaluation.markdown("validation", rows), ""]

def csv_rows(done, base):
    """A dict a run, for the CSV."""
    for (cell, m), it in done.items():
        for r in {r.out: r for r in (*it.grid, *it.runs)}.values():
            NLL, loss = (measured([r], base, kind=kind)[0] for kind in ("sft", r.objective))
            harmful, benign = refusals(r) if number(cell) == TALK else ("", "")
            yield dict(stage="final" if r.lr == it.runs[0].lr else "grid", method=m, objective=r.objective,
                       size=number(cell), rate=r.lr, seed=r.seed, validation=validation(r, base), NLL=NLL,
                       dpo_loss=loss if r.objective == "dpo" else "",
                       refused_harmful=harmful, refused_benign=benign)

def report(args, base, done):
    """Write the report, its CSV and the chosen features."""
    found = comparisons(done, base)
    rows = study.verdicts(found, dict.fromkeys(found, MATTERS), "+.4f")
    lines = [f"Dialogues: {PARTS}; seeds {SEEDS}. ±: 95 % over replies and, by Student's t, seeds; of less, "
             "over seeds. Test: NLL of chosen per token, for dpo its loss.", "",
             *evaluation.markdown(f"of {len(found)} tests", rows), ""]
    for cell in dict.fromkeys(cell for cell, _ in done):
        lines += cell_table(cell, {m: it for (of, m), it in done.items() if of == cell}, base)
    features = data.read_text(Path(next(iter(done.values())).runs[0].out) / "features.md")
    study.write_report(args, "real_study", "real_study", "A real small run", lines, {
        "real_study.csv": study.csv_text(list(csv_rows(done, base))), "real_features.md": features})

def main():
    ap = data.Arguments(description=__doc__.splitlines()[0], allow_abbrev=False)
    a = ap.add_argument
    a("--model", default="google/gemma-3-270m")
    a("--data", default=train.HH, help="HH-RLHF, or a file of preference pairs")
    a("--text", help="a folder of .txt files")
    a("--out", type=Path, default=Path("runs/real"))
    a("--results", type=Path, help="where the report goes, if not to --out")
    a("--jobs", type=data.at_least(1), default=2)
    a("--again", type=data.at_least(1), metavar="N", help="repeat N finished runs and compare")
    args, args.more = ap.parse_known_args()
    torch.set_num_threads(1)  # as in the processes of --jobs: numbers depend on it
    write_data(args)
    # runs keep freed memory: to page in the logits' again took a third of scoring's time
    os.environ |= dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2 ** 34))
    base = runs_of(args, PLAIN)["base"][0, 0]
    base.out, base.text = base.shared, args.text
    base.data = str(args.out / f"data-dpo-{max(map(number, CELLS))}")  # SAEs are fitted on most dialogues
    study.each(1, study.run, [base], "base")
    tasks = {(cell, m): (do_method, base, runs) for cell in CELLS
             for m, runs in runs_of(args, cell).items() if m != "base"}
    tasks[PLAIN, "sails"] = do_best, args, base  # which goes on where SAILS ends
    done = dict(zip(tasks, study.each(args.jobs, study.call, tasks.values(), "methods")))
    done |= done[PLAIN, "sails"]
    if args.again:
        runs = {key: np.array([*it.runs, *it.grid]) for key, it in done.items()}
        return study.again(args.jobs, study.ordered(runs), args.again)
    report(args, base, done)

if __name__ == "__main__":
    data.run_main(main)
