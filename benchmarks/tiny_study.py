"""tiny_study.py - the tiny comparison over many worlds: main table, every rate, budget, ablations.

    python benchmarks/tiny_study.py --out runs/study --jobs 2
    ... --only main --bases 0 --seeds 0 --methods sails,lora --steps 4    a smoke run
    ... --again 17                                                        is run 17 of the plan reproducible?

A base is a world: language, model, SAEs. An alignment seed draws topics, pairs and batch order in it. Runs
have the settings of `python train.py` and what their variant changes. Bases are the independent units:
intervals are over their means, and learning rates are chosen within them.
"""
import contextlib
import io
import itertools
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
import train
from benchmarks import study, tiny_world
from benchmarks.study import auc, column, paired, pick, rate_counts, reference, spread

LAYER, LAYERS = 2, (0, 1, 2, 3)  # where the SAE is read, and where there is one
METHODS = ("sails", "lora", "full", "random", "random-features", "mean-diff", "raw-pca")
RATES, FULL_RATES, FROZEN_RATES = (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3), (3e-3, 1e-2, 3e-2)
COLUMNS = ("safety rate", "over-refusal", "help", "balance", "look-alike balance", "knowledge")

# ---- the plan ----
ALL_SEVEN = "--targets q,k,v,o,gate,up,down"
NUISANCE = {share: f"--data {{home}}/nuisance-{share}-{{seed}}" for share in ("0.5", "0.9")}
# title: methods, {level: options of train.py}; the first level is the default
ABLATIONS = {
    "k": ("sails", {"k 4": "", "k 2": "--k 2", "k 8": "--k 8", "k 16": "--k 16", "k 32": "--k 32"}),
    "tau": ("sails", {"k 4, tau 1": "", "k 4, tau .8": "--tau .8", "k 16, tau 1": "--k 16",
                      "k 16, tau .8": "--k 16 --tau .8"}),
    "sides": ("sails", {"both": "", "read": "--sides read", "write": "--sides write"}),
    "contrast": ("sails", {"prompts": "", "replies": "--contrast replies"}),
    "score": ("sails", {"absolute (v2)": "", "relative (v1)": "--score relative"}),
    "frozen basis": ("sails,random,random-features,mean-diff,raw-pca",
                     {"trainable": "", "frozen": "--freeze-basis"}),
    "projections": ("sails,random,lora", {"q,k,v,o": "", "all seven": ALL_SEVEN}),
    "rank": ("sails,random,lora", {"r 4": "", "r 2": "--r 2 --k 2", "r 8": "--r 8 --k 8"}),
    "nuisance": ("sails,random,mean-diff,raw-pca,lora", {"0.75": ""} | NUISANCE),
    "style features": ("sails", {
        "kept": "", "struck out": "--drop {style}", "nuisance 0.9, kept": NUISANCE["0.9"],
        "nuisance 0.9, struck out": NUISANCE["0.9"] + " --drop {style}"}),
    "replay": ("sails,lora", {"none": "", "weight 1": "--replay 1"}),
    "norm-aware": ("sails", {"raw": "", "norm-aware": "--norm-aware"}),
    "layers": ("sails", {"layer 2 for all": "", "each its own": "--layers 0,1,2,3"})}

def sections(steps):
    """{title: (bases, seeds, {label: (method, options)})}; of bases and seeds the first so many."""
    crossed = lambda methods, levels: {
        f"{m}, {level}": (m, more) for level, more in levels.items() for m in methods}
    half, every = steps // 2, None
    lengths = {n: "" if n == steps else f"--steps {n}" for n in (half, steps, 2 * steps, 4 * steps)}
    out = {"main": (every, every, {m: (m, "") for m in METHODS}), "budget": (3, 3, crossed(METHODS, lengths)),
           "all seven": (every, 3, {m: (m, "" if m == "full" else ALL_SEVEN) for m in METHODS})}
    for title, more in ("dpo", ""), ("rloo", "--beta .02"):
        # half of the steps by sft: the base never refuses, and a reward can't reinforce what is never drawn
        options = f"--objective {title} --sft-steps {half} {more}"
        out[title] = 3, every, {m: (m, options) for m in ("sails", "lora", "full")}
    return out | {title: (3, 3, crossed(ms.split(","), levels)) for title, (ms, levels) in ABLATIONS.items()}

def plan(args):
    """{section: {label: {(base, seed, rate): settings of a run}}}; equal runs share a folder."""
    known = sections(args.steps)
    data.need(set(args.only or known) <= set(known), f"--only: the sections are {', '.join(known)}")
    out = {}
    for title in args.only or known:
        bases, seeds, variants = known[title]
        size = args.bases[:bases], args.seeds[:seeds], 1 if title == "budget" else None  # the lowest rate
        out[title] = {label: variant(args, method, options, *size)
                      for label, (method, options) in variants.items() if method in args.methods}
    return out

def variant(args, method, options, bases, seeds, rates):
    """{(base, seed, rate): settings of a run}, at the first `rates` of the method's grid."""
    grid = FULL_RATES if method == "full" else FROZEN_RATES if "--freeze-basis" in options else RATES
    listed = lambda numbers: ",".join(f"{x:g}" for x in numbers)
    folder, out = "-".join(re.findall(r"[\w.,]+", options)) or "default", {}
    for base in bases:
        home = args.out / f"world-{base}"
        style = listed(data.read_json(home / "described.json")["style"])
        argv = ["--model", home, *(word.replace(str(train.WORLD), str(home)) for word in train.TINY),
                "--device", "cpu", "--steps", args.steps,
                *(word.format(home=home, seed="{seed}", style=style) for word in options.split()),
                "--method", method, "--lr", listed(grid[:rates]), "--seed", listed(seeds)]
        for r in study.combine(argv, args.out / f"base-{base}" / folder):
            if r.method == method:
                out[base, r.seed, r.lr] = r
    return out

# ---- the worlds ----
def make_base(home, base, seeds):
    """Write a world, an SAE for each of its layers, its data folders, and what is known of it."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        tiny_world.make_world(home, base, seeds, LAYERS)
    for share, seed in itertools.product(NUISANCE, seeds):
        folder = home / f"nuisance-{share}-{seed}"
        if not (folder / "text.txt").exists():
            tiny_world.write_split(tiny_world.tiny_world(base), folder, seed, float(share))
    if not (home / "described.json").exists():
        data.write_json(home / "described.json", describe(home))

@torch.no_grad()
def describe(home):
    """What model and SAE know of harm before alignment; the harm direction; style features."""
    made, model = data.read_json(home / "world.json"), model_gemma.load_gemma(home)
    world, sae = tiny_world.tiny_world(made["seed"]), sae_module.load_sae(home / "sae", LAYER, "256")
    asked = tiny_world.all_requests(world, np.arange(len(world.topic)))
    prompts = [row["prompt_ids"] for row in data.encode(world.tok, asked, "tiny")[0]]  # of one length
    h = model.residuals(data.pad(prompts)[0], [LAYER])[LAYER][:, -3:]  # (n, 3, D): object, ?, <model>
    harmful = np.array([ex["label"] == "harmful" for ex in asked])
    hey = np.array([ex["id"].startswith("hey") for ex in asked])
    seen = world.topic[[int(ex["id"].split("-")[2]) for ex in asked]] < 4  # the probe's topics
    x = h[:, 1].double() - h[seen, 1].double().mean(0)
    gram = x[seen].T @ x[seen]
    ridge = .01 * gram.trace() / len(gram) * torch.eye(len(gram))
    probe = torch.linalg.solve(gram + ridge, x[seen].T @ torch.tensor(harmful[seen] * 2. - 1))
    acts = sae.encode(h).mean(1).numpy().T  # (N, n)
    of_harm, of_style = (np.array([abs(auc(a, what) - .5) for a in acts]) for what in (harmful, hey))
    harm, best = F.normalize(h[harmful].mean((0, 1)) - h[~harmful].mean((0, 1)), dim=0), int(of_harm.argmax())
    return {"probe AUC": auc((x @ probe)[~seen], harmful[~seen]), "best feature's AUC": .5 + of_harm[best],
            "its cosine with harm": abs(float(sae.W_dec[best] @ harm)), "FVE": made["sae"][str(LAYER)]["fve"],
            "harm": harm.tolist(), "style": np.flatnonzero(of_style > of_harm).tolist()}

def harm_inside(run, harm):
    """Share of the harm direction (D,) inside a run's start, 0 to 1; None without a subspace."""
    path = Path(run.out) / "subspace.safetensors"
    if not path.exists():
        return None
    filler = torch.Generator().manual_seed(run.seed + 1)  # as lora.init_sails fills up to rank r
    start = lora.fit_to_rank(load_file(path)[f"V.{LAYER}"], run.r, filler)
    return sails.captured(start, torch.tensor(harm)[:, None])

def base_table(args, runs):
    """A row a base: what is known of harm before alignment, how much of it is in each start."""
    rows = {}
    for base in args.bases:
        known = data.read_json(args.out / f"world-{base}" / "described.json")
        rows[str(base)] = {k: x for k, x in known.items() if k not in ("harm", "style")}
        for method, found in runs.items():
            shares = [harm_inside(r, known["harm"]) for (b, _, _), r in found.items() if b == base]
            rows[str(base)][f"harm in {method}"] = None if None in shares else float(np.mean(shares))
    return evaluation.markdown("base", rows)

# ---- the report ----
def flat(r):
    """results.json with the columns beside its other keys; nan where no reply could be judged."""
    found = evaluation.headline(r) | {"look-alike balance": r["sets"]["lookalike"]["balance"]}
    return r | {c: float("nan") if found.get(c) is None else evaluation.mean(found[c]) for c in COLUMNS}

def table(variants, how):
    """A row a variant at one rate a base: every measure, the gap to its reference, its rates."""
    picked, rows = {label: pick(found, how) for label, found in variants.items()}, {}
    for label, mine in picked.items():
        rows[label], other = {c: column(mine, c) for c in COLUMNS}, reference(label, variants)
        gap = "{:+.1f} ± {:.1f}".format(*paired(mine, picked[other], "balance")) if other else "-"
        rows[label] |= {"balance, points over reference": gap}
        if how == "tuned":
            rows[label] |= {"balance at the lowest rate": column(pick(variants[label], 0), "balance"),
                            "rates of bases": rate_counts(variants[label], mine)}
        rows[label] |= dict(parameters=next(iter(mine.values()))["parameters"])
    return evaluation.markdown("unseen topics", rows)

def comparison(variants):
    """Lines on methods side by side: tuned, then at each rate of the grid."""
    out = []
    for how, name in {"tuned": "Tuned", 0: "Lowest rate", 1: "Middle rate", 2: "Highest rate"}.items():
        picked = {label: pick(found, how) for label, found in variants.items()}
        out += [f"**{name}**", "", *table(variants, how), ""]
        if "sails" in picked and len(picked) > 1:
            ours = picked.pop("sails")
            leads = {m: paired(ours, mine, "balance") for m, mine in picked.items()}
            out += [f"{name}, balance: {study.verdict(leads)}", ""]
    return out

def budget(variants):
    """{measure: {method: {steps: mean}}} at the lowest rate."""
    out = {"safety rate": {}, "balance": {}}
    for label, found in variants.items():
        method, steps = label.split(", ")
        for name, curves in out.items():
            mean, _ = spread({key: r[name] for key, r in pick(found, 0).items()})
            curves.setdefault(method, {})[int(steps)] = mean
    return out

def report(args, runs, done):
    """{file: text} of the report, its CSV and figure, from {section: {label: rows}}."""
    lines = ["# The tiny world: main table, budget curve, ablations", "", study.command("tiny_study.py"), "",
             f"Bases {args.bases}, alignment seeds {args.seeds}; small sections take the first three.",
             "±: 95 % t-interval over bases' means; of fewer than three bases, over the seeds within them.",
             "Tuned: a base's rate has the best balance on validation prompts, of equal ones the least NLL.",
             "Reference: SAILS at the same level; of SAILS itself the first row.", "",
             *base_table(args, runs.get("main", {})), ""]
    curves, rows = {}, []
    for title, variants in done.items():
        lines += [f"## {title}", ""]
        if title == "budget":
            curves = budget(variants)
            for name, of in curves.items():
                shown = {m: {f"{n} steps": y for n, y in curve.items()} for m, curve in of.items()}
                lines += [*evaluation.markdown(f"{name}, lowest rate", shown), ""]
        elif title in ABLATIONS:
            lines += [*table(variants, "tuned"), "", study.differs(variants, COLUMNS), ""]
        else:
            lines += comparison(variants)
        rows += [dict(section=title, variant=label, **row) for label, found in variants.items()
                 for row in study.base_means(found, COLUMNS)]
    files = {"tiny_study.md": "\n".join(lines) + "\n", "tiny_study.csv": study.csv_text(rows)}
    return files | ({"tiny_budget.svg": study.line_chart(curves, "training steps")} if curves else {})

def main():
    ap = data.Arguments(description=__doc__.splitlines()[0])
    a, some = ap.add_argument, data.list_of
    a("--out", type=Path, default=Path("runs/study"), help="worlds, runs and report")
    a("--results", type=Path, help="a second folder for the report")
    a("--bases", type=some(int), default=list(range(8)), help="seeds of the worlds")
    a("--seeds", type=some(int), default=list(range(8)), help="alignment seeds")
    a("--methods", type=some(str, METHODS), default=list(METHODS))
    a("--steps", type=data.at_least(2), default=80, help="of training; the budget has a half to four times")
    a("--only", nargs="+", metavar="SECTION", help="main, budget, all seven, dpo, rloo, or an ablation")
    a("--jobs", type=int, default=2)
    a("--again", type=int, metavar="N", help="repeat one finished run and compare")
    args = ap.parse_args()
    torch.set_num_threads(1)  # as in the processes of --jobs: numbers depend on it
    homes = [args.out / f"world-{base}" for base in args.bases]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        make = map if args.jobs == 1 else pool.map
        list(make(make_base, homes, args.bases, [args.seeds] * len(homes)))
    runs = plan(args)
    found = [found for variants in runs.values() for found in variants.values()]
    every = study.ordered([r for of in found for r in of.values()])
    if args.again is not None:
        return study.again(every[args.again])
    study.do(args.jobs, every)
    rows = lambda found: {key: flat(r) for key, r in study.results(found).items()}
    done = {title: {label: rows(f) for label, f in variants.items()} for title, variants in runs.items()}
    study.write_files([args.out, args.results or args.out], report(args, runs, done))

if __name__ == "__main__":
    data.run_main(main)
