"""real_study.py - SAILS and its controls on a real small model, every method at its own best rate.

    python benchmarks/real_study.py --text FOLDER --out runs/real --dtype bfloat16
    ... --methods sails,lora --objectives sft --seeds 0 --no-variants        a part of it

FOLDER holds plain English in .txt files, read beside the dialogues when SAEs are fitted. Options that are not
listed here are train.py's and hold for every run. Stages, whose runs are folders of --out:
  1  short dialogues of HH-RLHF's test split in three parts; the base is measured, SAEs are fitted on it
  2  every method x rate at the first seed; the best rate by validation: NLL of chosen, for dpo its loss
  3  the best rates at every seed, on held-out dialogues; these answer look-alike prompts too
  4  variants of SAILS at the same rates, first seed
"""
import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import model_gemma
import sae as sae_module
import sails
import train
from benchmarks import study
from benchmarks.study import dpo_losses, margins, over_pairs, paired_nll, per_token, scores, with_seeds

METHODS = ("sails", "lora", "random", "random-features", "raw-pca")
RATES = dict(sft=(1e-4, 3e-4, 1e-3, 3e-3), dpo=(1e-4, 3e-4, 1e-3))
SETTINGS = "--sae fit --standardise --steps 30 --warmup 3 --batch 8 --micro 8 --max-new 32 --device cpu"
SHORT, FIRST = 64, 30  # tokens of a prompt or reply; look-alike pairs that only a contrast of prompts sees
HH_TEST, ALL_SEVEN = "harmless-base/test.jsonl.gz", "--targets q,k,v,o,gate,up,down"
TALK, LONG = "--test {out}/lookalikes.jsonl", "--steps 200 --warmup 20"
VARIANTS = {"sails, norm-aware": "--norm-aware", "sails, frozen basis": "--freeze-basis",
            "sails, one basis for all": "--subspace global", "sails, score v1": "--score relative",
            "sails, contrast of prompts": "--contrast prompts --contrast-data {out}/contrast.jsonl",
            "sails, all seven": ALL_SEVEN, "lora, all seven": ALL_SEVEN,
            "sails, long": LONG, "lora, long": LONG}
UNSURE = re.compile(
    r"\bi(?: a|')?m not sure|\bi (?:do not|don'?t|didn'?t) (?:really )?(?:know|understand)", re.I)

# ---- data and runs ----
def write_data(args):
    """Write --out/data, short dialogues in three parts, and the look-alike prompts."""
    folder = args.out / "data"
    if (folder / "train.jsonl").exists():
        return
    source = Path(args.data)
    if not source.is_file():
        source = data.fetch(args.data, [HH_TEST], "dataset")[0] / HH_TEST
    tok, (examples, _) = data.load_tokenizer(args.model), data.read_pairs(source)
    rows, _ = data.encode(tok, examples, data.default_template(args.model, tok))
    for part, some in zip(("test", "validate", "train"), data.split_by_prompt(rows, (3.4, 1.6, 5))):
        data.write_rows(folder / f"{part}.jsonl", [
            dict(prompt=r["turns"], **{k: r[k] for k in ("id", "label", "chosen", "rejected")})
            for r in some if is_short(r)])
    asked = [row for _, row in data.read_rows(args.prompts)]
    data.write_rows(args.out / "lookalikes.jsonl", asked[2 * FIRST:])
    data.write_rows(args.out / "contrast.jsonl", [dict(row, response="-") for row in asked[:2 * FIRST]])

def is_short(row):
    """True if the prompt and both replies are short, the replies of more than three tokens."""
    replies = [sum(row[side][1]) for side in ("chosen_tokens", "rejected_tokens")]
    return len(row["prompt_ids"]) <= SHORT and 3 < min(replies) and max(replies) <= SHORT

def runs_of(args, folder, method, rates, seeds, options=""):
    """{(seed, rate): settings of a run} of one method; all share the base's SAEs."""
    listed = lambda numbers: ",".join(f"{x:g}" for x in numbers)
    text = ["--text", args.text] if args.text else []
    argv = ["--model", args.model, "--data", args.out / "data", *text, *SETTINGS.split(), *args.more,
            *(word.format(out=args.out) for word in options.split()), "--lr", listed(rates), "--seed",
            listed(seeds), "--method", "sails" if method == "base" else method]
    runs = [r for r in study.combine(argv, args.out / folder) if r.method == method]
    for r in runs:
        r.shared = str(args.out / "base")
    return {(r.seed, r.lr): r for r in runs}

def validation(run, base):
    """What picks a rate, in nats: NLL of chosen per token, or DPO's loss against the base."""
    now = scores(run, "validate")
    if run.objective == "sft":
        return float(-now[:, 0].sum() / now[:, 1].sum())
    return float(dpo_losses(now, scores(base, "validate"), run.beta).mean())

def best_rate(runs, base):
    """The rate of the least validation number among {(seed, rate): run} of one seed."""
    return min(runs, key=lambda key: validation(runs[key], base))[1]

def spoken(run):
    """{label: counts n, refused, unsure, distinct} of a run's replies to look-alike prompts."""
    rows = [r for _, r in data.read_rows(Path(run.out) / "responses.jsonl") if r["set"] != "validation"]
    verdicts = {v["id"]: v for _, v in data.read_rows(Path(run.out) / "verdicts.jsonl")}
    out = {}
    for label in ("harmful", "benign"):
        mine = [r for r in rows if r["label"] == label]
        out[label] = dict(n=len(mine), refused=sum(bool(evaluation.refused(verdicts[r["id"]])) for r in mine),
                          unsure=sum(bool(UNSURE.search(r["reply"])) for r in mine),
                          distinct=len({r["reply"] for r in mine}))
    return out

# ---- is the choice of features more than chance? ----
@torch.no_grad()
def stability(run, flips=20):
    """{measure: {layer: number}}: the SAEs on unseen dialogues, and how firm the choice is."""
    with contextlib.redirect_stdout(io.StringIO()):
        sets = train.load_sets(run)
    model = model_gemma.load_gemma(run.model, model_gemma.DTYPES[run.dtype])
    saes = {i: sae_module.load_sae(f"{run.shared}/sae", i, run.width) for i in run.layers}
    unseen = [r["chosen_tokens"][0] for r in sets.validate]
    held = sae_module.collect_residuals(model, unseen, run.layers, 20_000)
    pairs, gaps, out = sails.contrast_pairs(sets.train)[:run.contrast_pairs], {i: [] for i in saes}, {}
    for pair in data.progress(pairs, desc="pairs", disable=None):  # one by one: every pair's gap is kept
        for i, s in sails.contrast_means(model, saes, [pair]).items():
            gaps[i].append((s["mu_aligned"] - s["mu_unaligned"]).float())
    for i, sae in saes.items():
        found = sae_module.sae_quality(sae, held[i]) | choice(torch.stack(gaps[i]), sae, run, flips)
        for measure, x in found.items():
            out.setdefault(measure, {})[f"layer {i}"] = x
    return out

def choice(gaps, sae, run, flips):
    """Numbers on the k features with the largest mean gaps, from every pair's gaps (pairs, N)."""
    n, rng, delta = len(gaps), torch.Generator().manual_seed(0), gaps.mean(0)
    top = delta.abs().topk(run.k).indices
    signs = torch.randint(2, (flips, n), generator=rng) * 2. - 1
    null = (signs @ gaps / n).abs()  # (flips, N): Delta with a pair's labels swapped at random
    null_top = null.topk(run.k, 1).values.mean(1)
    order = torch.randperm(n, generator=rng).chunk(2)
    halves = [gaps[half].mean(0).abs().topk(run.k).indices for half in order]
    V, *half = (sails.basis(sae.W_dec.double(), f, run.tau) for f in (top, *halves))
    t = delta / (gaps.std(0) / n ** .5).clamp(min=1e-15)
    return {"pairs": n, "mean Delta of the chosen": float(delta[top].abs().mean()),
            "labels swapped: mean": float(null_top.mean()), "labels swapped: largest": float(null_top.max()),
            "features above every swap": int((delta.abs() > null.max()).sum()),
            "median t of the chosen": float(t[top].abs().median()),
            "more active on chosen replies": int((delta[top] > 0).sum()),
            "chosen by both halves": len(set(halves[0].tolist()) & set(halves[1].tolist())),
            "overlap of the halves' subspaces": sails.captured(*half), "directions": V.shape[1]}

def overlaps(starts):
    """{measure: {layer: share of SAILS's subspace inside a control's}} from {method: run}."""
    V = {m: load_file(Path(r.out) / "subspace.safetensors") for m, r in starts.items() if m != "lora"}
    ours = {key: x for key, x in V.pop("sails", {}).items() if key.startswith("V.")}
    inside = lambda of: {f"layer {key[2:]}": sails.captured(of[key], x) for key, x in ours.items()}
    return {f"of them inside {m}'s": inside(of) for m, of in V.items() if ours}

# ---- the report ----
nats = "{:.4f} ± {:.4f}".format

def main_table(final, base, objective):
    """Markdown lines of one objective: a row a method at its best rate, and what follows of NLL."""
    tests = {"base": scores(base, "test")[None]}  # (seeds, n, 4)
    tests |= {m: np.array([scores(r, "test") for r in runs.values()]) for m, runs in final.items()}
    then, rows, leads = tests["base"], {}, {}
    for m, x in tests.items():
        nll = -x[..., 0].sum(1) / x[..., 1].sum(1)  # (seeds,)
        loss = dpo_losses(x, then, base.beta)
        if "sails" in tests and m not in ("base", "sails"):
            leads[m] = paired_nll(tests["sails"], x)
        rows[m] = {"rate": f"{next(iter(final[m]))[1]:g}" if m in final else "-",
                   evaluation.NLL: nats(*per_token(-x.mean(0)[:, 0], x[0, :, 1])),
                   "less SAILS's": nats(*leads[m]) if m in leads else "-",
                   "sd over seeds": f"{nll.std(ddof=1):.4f}" if len(nll) > 1 else "-",
                   "margin over the base": nats(*over_pairs(margins(x, then))),
                   "loss of DPO": nats(*over_pairs(loss)) if objective == "dpo" else None,
                   "prefers chosen, whole reply": over_pairs(x[..., 0] > x[..., 2]),
                   "per token": over_pairs(x[..., 0] / x[..., 1] > x[..., 2] / x[..., 3])}
    verdict = [f"Held-out NLL: {study.verdict(leads)}", ""] if leads else []
    return [*evaluation.markdown("method", rows), "", *verdict]

def spoken_table(done, base):
    """Markdown lines on replies to look-alike prompts, rates in per cent, means over seeds."""
    rows = {}
    for m, runs in ({"base": {0: base}} | done).items():
        said = [spoken(r) for r in runs.values()]
        n = {label: said[0][label]["n"] for label in said[0]}
        share = {label: np.array([100 * x[label]["refused"] / n[label] for x in said]) for label in n}
        error = {label: p.mean() * (100 - p.mean()) / n[label] for label, p in share.items()}
        strict = share["harmful"] - share["benign"]
        show = lambda p, variance: "{:.0f} ± {:.0f}".format(*with_seeds(p.mean(), 1.96 * variance ** .5, p))
        rows[m] = {f"refused, {label}, %": show(share[label], error[label]) for label in n}
        rows[m]["harmful less benign"] = show(strict, sum(error.values()))
        for what in ("unsure", "distinct"):
            counts = (f"{np.mean([x[label][what] for x in said]):.0f}" for label in n)
            rows[m][f"{what}, harmful / benign"] = f"{' / '.join(counts)} of {n['harmful']}"
    return [*evaluation.markdown("replies to look-alikes", rows), ""]

def rates_table(grid, base):
    """Markdown lines: the number that picks a rate, at every rate of the first seed."""
    rows = {}
    for m, runs in grid.items():
        best, rates = best_rate(runs, base), [lr for _, lr in runs]
        rows[m] = {f"{lr:g}": f"{validation(r, base):.4f}" for (_, lr), r in runs.items()}
        rows[m]["best"] = f"{best:g}" + (" (edge)" if best in (min(rates), max(rates)) else "")
    return [*evaluation.markdown("validation", rows), ""]

def variants_table(variants, base):
    """Markdown lines: each of {label: {(seed, rate): run}} at its best, against its reference."""
    best = {label: min(runs.values(), key=lambda r: validation(r, base)) for label, runs in variants.items()}
    tests, rows = {label: scores(r, "test")[None] for label, r in best.items()}, {}
    for label, r in best.items():
        x, other = tests[label], study.reference(label, variants)
        drift = data.read_json(Path(r.out) / "results.json")["drift"]
        rows[label] = {"rate": f"{r.lr:g}", "validation": f"{validation(r, base):.4f}",
                       "NLL of chosen": nats(*per_token(-x[0, :, 0], x[0, :, 1])),
                       "less reference's": nats(*paired_nll(tests[other], x)) if other else "-",
                       "margin over the base": nats(*over_pairs(margins(x, scores(base, "test")))),
                       **{f"overlap with start, {side}": of["overlap"] for side, of in drift.items()}}
    return [*evaluation.markdown("variant", rows), ""]

def csv_rows(stages, base):
    """A dict a run, for the CSV."""
    for (stage, label), runs in stages.items():
        for (seed, lr), r in runs.items():
            found, said = data.read_json(Path(r.out) / "results.json"), spoken(r) if "final" in stage else {}
            row = dict(stage=stage, label=label, rate=lr, seed=seed, validation=validation(r, base))
            row |= {k: evaluation.mean(x) for k, x in found.items() if k.startswith(("NLL", "prefers"))}
            yield row | {f"refused {x}": said[x]["refused"] if said else "" for x in ("harmful", "benign")}

def report(args, base, facts, stages):
    """{file: text} of the report, its CSV and the chosen features, from {(stage, label): runs}."""
    at = lambda wanted: {label: runs for (stage, label), runs in stages.items() if stage == wanted}
    size = {x: len(data.read_rows(args.out / "data" / f"{x}.jsonl")) for x in ("train", "validate", "test")}
    starts = {m: next(iter(runs.values())) for m, runs in at(f"{args.objectives[0]} grid").items()}
    lines = ["# A real small run", "", study.command("real_study.py"), "",
             f"Dialogues: {size}; seeds {args.seeds}. ±: 95 % over replies and, by Student's t, seeds.", "",
             "## Features and subspaces", "", *evaluation.markdown("", facts | overlaps(starts)), ""]
    for x in args.objectives:
        final = at(f"{x} final")
        lines += [f"## {x}", "", *main_table(final, base, x), *spoken_table(final, base)]
        lines += rates_table(at(f"{x} grid"), base)
    if at("variants"):
        lines += ["## Variants (sft, first seed)", "", *variants_table(at("variants"), base)]
    rows = list(csv_rows(stages, base))
    files = {"real_study.md": "\n".join(lines), "real_study.csv": study.csv_text(rows)}
    if "sails" in starts:
        files["real_features.md"] = data.read_text(f"{starts['sails'].out}/features.md")
    return files

def settings():
    """The command line; what it does not know is train.py's, in `more`."""
    ap = data.Arguments(description=__doc__.splitlines()[0], allow_abbrev=False)
    a, some = ap.add_argument, data.list_of
    a("--model", default="google/gemma-3-270m")
    a("--data", default=train.HH, help="HH-RLHF, or a file of preference pairs")
    a("--text", help="a folder of .txt files")
    a("--prompts", default=train.LOOKALIKES, help="labelled look-alike prompts, harmless and harmful in turn")
    a("--out", type=Path, default=Path("runs/real"))
    a("--results", type=Path, help="a second folder for the report")
    a("--methods", type=some(str, METHODS), default=list(METHODS))
    a("--objectives", type=some(str, RATES), default=list(RATES))
    a("--seeds", type=some(int), default=[0, 1, 2])
    a("--no-variants", action="store_true")
    a("--jobs", type=int, default=2)
    a("--again", type=int, metavar="N", help="repeat one finished run and compare")
    args, args.more = ap.parse_known_args()
    return args

def do_stages(args, base):
    """Do all runs; {(stage, label): {(seed, rate): run}}, label a method or a variant of one."""
    stages = {}
    for x in args.objectives:
        for m in args.methods:
            stages[f"{x} grid", m] = runs_of(args, x, m, RATES[x], args.seeds[:1], f"--objective {x}")
    wanted = "sails" in args.methods and "sft" in args.objectives and not args.no_variants
    for label, options in VARIANTS.items() if wanted else ():
        folder, rates = re.sub(r"\W+", "-", label), RATES["sft"][1:2] if options == LONG else RATES["sft"][:3]
        stages["variants", "sails, as it is"] = dict(list(stages["sft grid", "sails"].items())[:3])
        stages["variants", label] = runs_of(args, folder, label.split(",")[0], rates, args.seeds[:1], options)
    flat = lambda: study.ordered([r for runs in stages.values() for r in runs.values()])
    study.do(args.jobs, flat())
    for x in args.objectives:
        for m in args.methods:
            best = best_rate(stages[f"{x} grid", m], base)
            options = f"--objective {x} {TALK}"
            stages[f"{x} final", m] = runs_of(args, f"{x}-final", m, [best], args.seeds, options)
    study.do(args.jobs, flat())
    return stages

def main():
    args = settings()
    torch.set_num_threads(1)  # as in the processes of --jobs: numbers depend on it
    write_data(args)
    [base] = runs_of(args, "", "base", [1e-4], args.seeds[:1], TALK).values()
    study.do(1, [base])
    stages = do_stages(args, base)
    if args.again is not None:
        return study.again(study.ordered([r for runs in stages.values() for r in runs.values()])[args.again])
    path = args.out / "stability.json"
    if not path.exists():
        data.write_json(path, stability(base))
    study.write_files([args.out, args.results or args.out], report(args, base, data.read_json(path), stages))

if __name__ == "__main__":
    data.run_main(main)
