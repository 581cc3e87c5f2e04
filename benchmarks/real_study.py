"""real_study.py - a real small run: a real Gemma, real HH-RLHF pairs, every method at its own best learning rate.

    python benchmarks/real_study.py --model google/gemma-3-270m --data Anthropic/hh-rlhf --text FOLDER --out runs/real
    ... --methods sails --objectives sft --seeds 1 --no-variants          one method, grid and seed

--model and --data take a folder or a hub id; FOLDER holds plain English in .txt files, read besides the dialogues when the
SAEs are fitted. Stages, each kept in --out, so that an interrupted study goes on where it was:
  1  SAEs fitted on the model's own residuals; feature means over chosen and rejected replies, with a permutation null
  2  every method x learning rate at seed 0; the best rate by validation loss, on prompts of its own
  3  the best rates at every seed, scored on test prompts, and made to answer look-alike prompts (greedy, counts are kept)
  4  variants of SAILS over the same rates, seed 0
Training and scoring use the vocabulary's part that the data set uses: a head of 16,000 rows instead of 262,144, which is
most of a small Gemma's cost. Replies are generated with the whole. `--again N` repeats line N of cells.jsonl and compares.
"""
import argparse
import contextlib
import functools
import json
import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
import train

METHODS = ("sails", "lora", "random", "random-features", "raw-pca")
GRID = dict(sft=(1e-4, 3e-4, 1e-3, 3e-3), dpo=(3e-4, 1e-3, 3e-3))
LAYERS, K, TAU, R = (5, 9, 12, 15), 32, 0.8, 16
STEPS, LONG_STEPS, BATCH, BETA = 30, 200, 8, 0.1
SHORT = 64                                             # longer prompts or replies are left out of training and tests
NEW, FIRST = 32, 30                                    # tokens per generated reply; look-alike pairs that only a contrast sees
NORM_AWARE, FROZEN, ONE_LAYER, ENCODER, NO_MEAN, PROMPTS, LONG = VARIANTS = (
    "norm-aware", "frozen basis", "layer 9's basis everywhere", "encoder rows on the read side", "mean input taken out of the read side",
    "contrast of prompts", f"{LONG_STEPS} steps")
DONT_KNOW = re.compile(r"\bi(?: a|')?m not sure|\bi (?:do not|don'?t|didn'?t) (?:really )?(?:know|understand)", re.I)

# ------------------------------------------------------------------------------------------------- data and the model
def settings(args):
    """train.py's settings for this model."""
    words = ["--model", args.model, "--data", args.data, "--sae", "fit", "--layers", ",".join(map(str, LAYERS)), "--template", "hh", "--dtype", "bfloat16",
             "--device", "cpu", "--out", str(args.out), "--steps", str(STEPS), "--batch", str(BATCH), "--micro", str(BATCH), "--resume"]
    return train.settle(train.parser().parse_args(words + ["--fit-text", str(args.text)]))

@functools.cache
def opened(model_spec, data_spec, prompts):
    """What every stage reads: model (bf16), tokenizer, examples per part, rows in the data set's own ids, look-alikes."""
    model, tok = model_gemma.load_gemma(model_spec, torch.bfloat16).requires_grad_(False), data.load_tokenizer(model_spec)
    file = Path(data_spec) if Path(data_spec).is_file() else data.fetch(data_spec, ["harmless-base/test.jsonl.gz"], "dataset")[0] / "harmless-base/test.jsonl.gz"
    examples, _ = data.read_pairs(file)                # 2,308 pairs, split by first prompt, for first prompts repeat
    rows = train.encode(tok, examples, "hh")[0]
    own = torch.tensor(sorted({data.PAD}.union(*(r[side][0] for r in rows for side in ("chosen", "rejected")))))
    new = {int(t): i for i, t in enumerate(own)}
    by_id = {}
    for r in rows:
        replies = [sum(r[side][1]) for side in ("chosen", "rejected")]
        if len(r["prompt"]) <= SHORT and 3 < min(replies) and max(replies) <= SHORT:
            by_id[r["id"]] = dict(r, **{side: ([new[t] for t in r[side][0]], r[side][1]) for side in ("chosen", "rejected")})
    parts = dict(zip(("train", "validate", "test"), data.split_by_prompt(examples, (5, 1.6, 3.4))))
    short = {part: [by_id[ex["id"]] for ex in exs if ex["id"] in by_id] for part, exs in parts.items()}
    looks = evaluation.read_prompts([prompts])
    return SimpleNamespace(model=model, tok=tok, parts=parts, rows=short, own=own, looks=looks[2 * FIRST:], first=looks[:2 * FIRST])

@contextlib.contextmanager
def own_vocabulary(model, own):
    """Inside, the model has only the ids in `own`: embeddings and head shrink to those rows, and rows' ids count them."""
    whole = model.embed_tokens.weight
    model.embed_tokens.weight = torch.nn.Parameter(whole[own], requires_grad=False)
    try:
        yield
    finally:
        model.embed_tokens.weight = whole

@torch.no_grad()
def scores(model, rows):
    """(rows, 4): log p of the chosen reply in nats, its tokens, the same of the rejected one."""
    out = np.zeros((len(rows), 4))
    for at, side in ((0, "chosen"), (2, "rejected")):
        texts = [r[side] for r in rows]
        for batch in evaluation.length_batches([len(ids) for ids, _ in texts], 16):
            lp, n = evaluation.sequence_logprobs(model, [texts[i] for i in batch])
            out[batch, at], out[batch, at + 1] = lp, n
    return out

def validation(now, then, objective):
    """What picks a learning rate, in nats: NLL of chosen replies per token, or the loss of DPO against `then`, the base's."""
    if objective == "sft":
        return float(-now[:, 0].sum() / now[:, 1].sum())
    return float(dpo_losses(now, then).mean())

def dpo_losses(now, then):
    """DPO's loss of every row, from test scores (..., rows, 4) of the model and of the base."""
    gain = now - then
    return np.logaddexp(0, -BETA * (gain[..., 0] - gain[..., 2]))

# ------------------------------------------------------------------------------------------------------------ stage 1
def prepare(args):
    """SAEs, contrast statistics and features.md -> facts for the report; done once per folder."""
    if (args.out / "stage1.json").exists():
        return data.read_json(args.out / "stage1.json")
    began, s, w = time.perf_counter(), settings(args), opened(args.model, args.data, args.prompts)
    saes = train.fit_saes(s, w.model, w.tok, w.parts["train"], args.out)
    fitted = time.perf_counter()
    contrasts = dict(replies=(w.parts["train"], "replies"), prompts=([dict(ex, chosen="", rejected=None) for ex in w.first], "prompts"))
    tensors, all_stats = {}, {}
    for name, (examples, contrast) in contrasts.items():
        pairs = [p for p in sails.contrast_rows(w.tok, examples, "hh", contrast, s.last) if max(len(p[0][0]), len(p[1][0])) <= 2 * SHORT]
        all_stats[name] = sails.contrast_means(w.model, saes, pairs, 16)
        tensors.update({f"{name}.{i}.{key}": t.contiguous() for i, st in all_stats[name].items() for key, t in st.items()})
        if name == "replies":
            texts, n_pairs = [p[side][0] for p in pairs for side in (0, 1)], len(pairs)
    with data.replacing(args.out / "stats.safetensors") as beside:
        save_file(tensors, beside)
    bases, chosen = sails.build_bases("sails", all_stats["replies"], saes, K, TAU, r=R)
    fires = sae_module.firing_tokens(w.model, w.tok, saes, chosen, texts[:400], 16)
    train.save_subspace(s, w.model, w.tok, args.out, saes, all_stats["replies"], bases, chosen, fires)
    held = [data.render_chat(w.tok, ex["turns"], ex["chosen"], "hh")[0][:2 * SHORT] for ex in w.parts["validate"]]
    acts = sae_module.collect_residuals(w.model, held, LAYERS, 20_000)
    facts = dict(pairs=n_pairs, rows={part: len(rows) for part, rows in w.rows.items()}, own=len(w.own), fit_seconds=fitted - began,
                 seconds=time.perf_counter() - began, layers={i: stability(st, saes[i], acts[i]) for i, st in all_stats["replies"].items()})
    data.write_json(args.out / "stage1.json", facts)
    return data.read_json(args.out / "stage1.json")

def stability(st, sae, held):
    """One layer: how good the SAE is on unseen dialogues, and whether the choice of features is more than chance."""
    delta, null = st["mu_aligned"] - st["mu_unaligned"], st["null"].abs()
    top = sails.top_features(st["mu_aligned"], st["mu_unaligned"], K)
    halves = [h.abs().topk(K).indices for h in st["halves"]]
    V, *half = (sails.basis(sae.W_dec.double(), f, TAU) for f in (top, *halves))
    build = lambda method: next(iter(sails.build_bases(method, {0: st}, {0: sae}, K, TAU, r=R, standardise=True)[0].values()))
    null_top = null.topk(K, 1).values.mean(1)
    return dict(sae_module.sae_report(sae, held), top=float(delta[top].abs().mean()), null=float(null_top.mean()), null_max=float(null_top.max()),
                above=int((delta.abs() > null.max()).sum()), t=float(st["t"][top].abs().median()), more=int((delta[top] > 0).sum()),
                shared=len(set(halves[0].tolist()) & set(halves[1].tolist())), split=sails.captured(*half), rank=V.shape[1],
                **{m: sails.captured(build(m), V) for m in ("raw-pca", "random-features", "random")})

@functools.cache
def found(out):
    """({contrast: {layer: statistics}}, {layer: SAE}) as stage 1 left them."""
    stats = {}
    for key, t in load_file(Path(out) / "stats.safetensors").items():
        name, layer, what = key.split(".")
        stats.setdefault(name, {}).setdefault(int(layer), {})[what] = t
    return stats, {i: sae_module.load_sae(Path(out) / "sae", i, str(train.DEFAULTS["fit_width"][0])) for i in LAYERS}

# ------------------------------------------------------------------------------------------------------ one alignment
@torch.no_grad()
def start(w, s, cell, stats, saes):
    """Attach adapters and start them as the cell says; the base has none."""
    lora.attach(w.model, s.targets, R, s.alpha)
    variant, seed = cell["variant"], cell["seed"]
    if cell["method"] == "lora":
        return lora.init_lora(w.model, seed)
    picked = stats["prompts" if variant == PROMPTS else "replies"]
    picked = {9: picked[9]} if variant == ONE_LAYER else picked
    build = lambda saes: sails.build_bases(cell["method"], picked, saes, K, TAU, r=R, standardise=True, seed=seed)
    bases, chosen = build(saes)
    readers = {}
    if variant == ENCODER:                             # the directions that make a feature fire, corrected for the norm before them
        rows = {i: sails.basis(torch.nn.functional.normalize(saes[i].W_enc.T, dim=1), chosen[i], TAU) for i in chosen}
        lora.init_sails(w.model, rows, seed, norm_aware=True)
        readers = {name: m.A.detach().clone() for name, m in lora.adapters(w.model) if m.side == "read"}
    lora.init_sails(w.model, bases, seed, variant == FROZEN, variant == NORM_AWARE)
    if variant == NO_MEAN:
        means = mean_inputs(w)
        readers = {name: m.A - torch.outer(m.A @ means[name], means[name]) for name, m in lora.adapters(w.model) if m.side == "read"}
    for name, m in lora.adapters(w.model):
        if name in readers:
            m.A.copy_(readers[name])
            m.start = readers[name].T.clone()

def mean_inputs(w):
    """{adapter: unit vector (D,)}: the mean of what a reading projection gets, over 64 training dialogues without their BOS."""
    sums, rows = {}, [r["chosen"][0] for r in w.rows["train"][:64]]
    ids, keep = data.pad(rows)
    keep[:, 0] = False
    add = lambda name: lambda module, x: sums.__setitem__(name, x[0][keep].float().mean(0))
    hooks = [m.register_forward_pre_hook(add(name)) for name, m in lora.adapters(w.model) if m.side == "read"]
    w.model.hidden(ids)                                # right padding: causal attention does not see it
    for hook in hooks:
        hook.remove()
    return {name: u / u.norm() for name, u in sums.items()}

def run_cell(cell, args):
    """One alignment and all that is measured about it: a pure function of the cell and of what stage 1 left."""
    torch.set_num_threads(1)                           # two processes of one thread do more than one of two
    args, whole_began = SimpleNamespace(**args), time.process_time()
    w, out, s = opened(args.model, args.data, args.prompts), dict(cell), settings(args)
    stats, saes = found(str(args.out))
    vars(s).update(seed=cell["seed"], lr=cell["lr"], objective=cell["objective"], steps=cell["steps"], warmup=cell["steps"] // 10, beta=BETA, resume=False)
    try:
        with own_vocabulary(w.model, w.own):
            if cell["method"] != "base":
                start(w, s, cell, stats, saes)
                with lora.adapter_off(w.model):
                    then = scores(w.model, w.rows["validate"]) if s.objective == "dpo" else None
                began = time.process_time()
                train.align(w.model, w.rows["train"], s, reference=train.base_reference(w.model))
                out["train_seconds"] = time.process_time() - began
                out["validation_loss"] = validation(scores(w.model, w.rows["validate"]), then, s.objective)
                out["trained"] = sum(p.numel() for _, p in lora.trainable(w.model))
                safety, _ = sails.build_bases("sails", stats["replies"], saes, K, TAU, r=R)
                out["inside"] = {side: m["energy"] for side, m in lora.mean_drift(lora.drift(w.model, safety)).items()}
                out["overlap"] = {side: m["overlap"] for side, m in lora.mean_drift(lora.drift(w.model)).items()}
            out["test"] = scores(w.model, w.rows["test"]).round(4).tolist()
        if cell["talk"]:
            out["said"] = talk(w)
        if cell["method"] == "base":
            whole = [dict(r, **{side: (w.own[torch.tensor(r[side][0])].tolist(), r[side][1]) for side in ("chosen", "rejected")}) for r in w.rows["test"]]
            full = scores(w.model, whole)
            out["whole_vocabulary"] = float(-full[:, 0].sum() / full[:, 1].sum())
    finally:
        lora.detach(w.model)
    out["seconds"] = time.process_time() - whole_began
    return out

def talk(w):
    """Greedy replies to the look-alikes -> per label: how many, refused, say they do not know, distinct."""
    replies, out = [y["reply"] for y in evaluation.reply(w.model, w.tok, w.looks, "hh", NEW)], {}
    for label in ("harmful", "benign"):
        mine = [y for y, ex in zip(replies, w.looks) if ex["label"] == label]
        out[label] = dict(n=len(mine), refused=sum(map(evaluation.starts_with_refusal, mine)), dont_know=sum(bool(DONT_KNOW.search(y)) for y in mine),
                          distinct=len(set(mine)))
    return out

# ---------------------------------------------------------------------------------------------------------- all cells
def a_cell(method, objective="sft", lr=0.0, seed=0, variant="", steps=STEPS, talk=False):
    return dict(method=method, objective=objective, lr=lr, seed=seed, variant=variant, steps=steps, talk=talk)

def run_cells(cells, args):
    """Run what is not in cells.jsonl yet -> {key: row} of all that is there."""
    path = args.out / "cells.jsonl"
    train.run_cells(cells, vars(args), path, args.jobs, run_cell, key)
    return {key(row): row for row in evaluation.resume_lines(path)}

def key(cell):
    return tuple(cell[k] for k in a_cell("sails"))

def best(done, cells):
    """The cell of least validation loss."""
    return min(cells, key=lambda c: done[key(c)]["validation_loss"])

def again(args):
    """Run one line of cells.jsonl a second time; every number must be the same, except seconds."""
    row = [r for _, r in data.read_jsonl(args.out / "cells.jsonl")][args.again]
    new = json.loads(json.dumps(run_cell({k: row[k] for k in a_cell("sails")}, vars(args))))
    differ = [k for k in row if "seconds" not in k and row[k] != new[k]]
    print(f"cell {args.again}: {row['method']} {row['objective']} {row['variant']} lr {row['lr']:g}, seed {row['seed']}: "
          + (f"differs in {differ}" if differ else "reproduced exactly"))
    return bool(differ)

# --------------------------------------------------------------------------------------------------------- the report
def per_token(total, tokens):
    """Nats per token over whole replies: sum / sum, and half the width of its 95 % interval over replies (a ratio's)."""
    mean = total.sum() / tokens.sum()
    return mean, 1.96 * np.sqrt(((total - mean * tokens) ** 2).sum() * len(total) / (len(total) - 1)) / tokens.sum()

def paired(ours, theirs):
    """NLL of `theirs` less that of `ours`, test scores per seed (seeds, rows, 4): nats per token and the 95 % half-width.

    The interval counts replies and seeds both: replies by a ratio's variance of the seeds' mean, seeds by Student's t.
    """
    gaps = ours[..., 0] - theirs[..., 0]                                                         # (seeds, rows)
    mean, half = per_token(gaps.mean(0), ours[0, :, 1])
    each = gaps.sum(1) / ours[0, :, 1].sum()
    return mean, float(np.hypot(half, train.t_interval([each])[1] if len(each) > 1 else 0))

def over_rows_and_seeds(x):
    """Mean of x (seeds, rows) and its 95 % half-width, counting rows and seeds both."""
    rows = x.mean(0)
    return rows.mean(), float(np.hypot(1.96 * rows.std(ddof=1) / len(rows) ** .5, train.t_interval([x.mean(1)])[1] if len(x) > 1 else 0))

def share(p, n):
    """A share of n, as per cent with its 95 % half-width."""
    return f"{100 * p:.0f} ± {196 * np.sqrt(p * (1 - p) / n):.0f}"

def margins(test, base):
    """How much more than the base a model prefers chosen to rejected, in nats per token, per row of test scores."""
    per = test - base
    return per[:, 0] / test[:, 1] - per[:, 2] / test[:, 3]

def margin_at(points, nll):
    """Margin where a method's NLL has fallen to `nll`: between the base (its NLL, 0) and its best learning rate, linearly."""
    points = sorted(points[:1 + int(np.argmin([x for x, _ in points]))])
    return float(np.interp(nll, *zip(*points)))

def table(done, args, objective, base):
    """The main table of one objective, and each method's validation losses."""
    grid = {m: [a_cell(m, objective, lr) for lr in GRID[objective]] for m in args.methods}
    test = lambda c: np.array(done[key(c)]["test"])
    nll = lambda t: -t[:, 0].sum() / t[:, 1].sum()
    finals = {m: [dict(best(done, cells), seed=seed, talk=True) for seed in range(args.seeds)] for m, cells in grid.items()}
    by_seed = {m: np.array([test(c) for c in cells]) for m, cells in finals.items()}              # (seeds, rows, 4)
    tests = {m: x.mean(0) for m, x in by_seed.items()}
    gaps = {m: paired(by_seed["sails"], x) for m, x in by_seed.items() if m != "sails" and "sails" in tests}
    points = {m: [(nll(base), 0.0)] + [(nll(test(c)), float(margins(test(c), base).mean())) for c in cells] for m, cells in grid.items()}
    level = max(min(x for x, _ in p) for p in points.values())
    lines = ["| method | learning rate | NLL of chosen, nats per token | less that of sails | sd over seeds | margin, nats per token | "
             + (f"margin at NLL {level:.3f} | " if objective == "sft" else "loss of DPO on test pairs | less that of sails | ") + "prefers chosen, whole reply, % | per token, % | "
             "parameters | CPU minutes | update's energy in SAILS's subspace: readers / writers | overlap with its own start |",
             "| --- |" + " --- |" * (12 if objective == "sft" else 13)]
    rows = [("base", base, None)] + [(m, tests[m], finals[m]) for m in args.methods]
    for m, t, cells in rows:
        runs = [done[key(c)] for c in cells] if cells else []
        mean, half = per_token(-t[:, 0], t[:, 1])
        gap = "{:+.4f} ± {:.4f}".format(*gaps[m]) if m in gaps else "-"
        part = [m, f"{cells[0]['lr']:g}" if cells else "-", f"{mean:.4f} ± {half:.4f}", gap, f"{np.std([nll(test(c)) for c in cells], ddof=1):.4f}" if cells and len(cells) > 1 else "-"]
        at = margins(t, base)
        part.append(f"{at.mean():+.3f} ± {1.96 * at.std(ddof=1) / len(at) ** .5:.3f}" if cells else "-")
        if objective == "sft":
            part.append(f"{margin_at(points[m], level):+.3f}" if cells else "-")
        else:
            losses = {x: dpo_losses(by_seed[x], base) for x in by_seed}
            part += ["{:.4f} ± {:.4f}".format(*over_rows_and_seeds(losses[m])) if cells else f"{np.log(2):.4f}",
                     "{:+.4f} ± {:.4f}".format(*over_rows_and_seeds(losses[m] - losses["sails"])) if cells and m != "sails" and "sails" in losses else "-"]
        part += [share(np.mean(t[:, 0] > t[:, 2]), len(t)), share(np.mean(t[:, 0] / t[:, 1] > t[:, 2] / t[:, 3]), len(t))]
        part += [f"{runs[0]['trained']:,}", f"{np.mean([r['train_seconds'] for r in runs]) / 60:.1f}", sides(runs, "inside"), sides(runs, "overlap")] if runs else ["-"] * 4
        lines.append(f"| {' | '.join(part)} |")
    lines += ["", verdict(gaps), "", "Replies to look-alikes:", "", "| method | refused, harmful, % | refused, harmless, % | harmful less harmless | do not know, harmful / harmless | distinct, harmful / harmless |",
              "| --- |" + " --- |" * 5]
    for m, cells in [("base", [a_cell("base", talk=True)])] + list(finals.items()):
        lines.append(f"| {m} | " + " | ".join(spoken([done[key(c)]["said"] for c in cells])) + " |")
    lines += ["", "Validation loss at each learning rate (seed 0):", "", "| method | " + " | ".join(f"{lr:g}" for lr in GRID[objective]) + " |", "| --- |" + " --- |" * len(GRID[objective])]
    for m, cells in grid.items():
        losses = [done[key(c)]["validation_loss"] for c in cells]
        edge = " (edge)" if np.argmin(losses) in (0, len(losses) - 1) else ""
        lines.append(f"| {m} | " + " | ".join(f"**{x:.4f}**{edge}" if x == min(losses) else f"{x:.4f}" for x in losses) + " |")
    same = [done[key(c)]["test"] == done[key(dict(c, seed=0, talk=True))]["test"] for c in (best(done, cells) for cells in grid.values())]
    return lines + ["", f"Each method's best cell was run twice (stages 2 and 3): all test scores equal in {sum(same)} of {len(same)}.", ""]

def sides(runs, what):
    """Means over runs of a number that readers and writers have each; plain LoRA has no start to overlap with."""
    return " / ".join(f"{np.mean([r[what][side] for r in runs]):.3f}" for side in ("read", "write")) if runs[0][what] else "-"

def verdict(gaps):
    """One sentence from the paired differences of NLL; without SAILS or another method there is none."""
    words = {"lower than": [m for m, (x, half) in gaps.items() if x < -half], "higher than": [m for m, (x, half) in gaps.items() if x > half],
             "no different from": [m for m, (x, half) in gaps.items() if abs(x) <= half]}
    return "Held-out NLL " + "; ".join(f"{what} SAILS's: {', '.join(ms)}" for what, ms in words.items() if ms) + "." if gaps else ""

def spoken(said):
    """Cells of the look-alikes' table: means over seeds; intervals count prompts and seeds both, as in paired()."""
    n = {label: said[0][label]["n"] for label in ("harmful", "benign")}
    p = {label: np.array([x[label]["refused"] / n[label] for x in said]) for label in n}         # (seeds,)
    var = {label: x.mean() * (1 - x.mean()) / n[label] for label, x in p.items()}

    def show(each, variance):
        half = np.hypot(1.96 * variance ** .5, train.t_interval([each])[1] if len(each) > 1 else 0)
        return f"{100 * each.mean():.0f} ± {100 * half:.0f}"
    counts = (f"{np.mean([x['harmful'][what] for x in said]):.0f} / {np.mean([x['benign'][what] for x in said]):.0f} of {n['harmful']}" for what in ("dont_know", "distinct"))
    return [show(p["harmful"], var["harmful"]), show(p["benign"], var["benign"]), show(p["harmful"] - p["benign"], sum(var.values())), *counts]

def variants_table(done, base):
    """SAILS's variants, each at its own best rate, seed 0, less SAILS as it is (long runs: less SAILS's long run)."""
    tuned = lambda cells: done[key(best(done, cells))]
    plain = tuned([a_cell("sails", "sft", lr) for lr in GRID["sft"]])
    lines = ["| variant | learning rate | validation loss | NLL of chosen | less that of SAILS as it is | margin, nats per token | overlap with its start: readers / writers |", "| --- |" + " --- |" * 6]
    for name, cells in {"SAILS as it is": [a_cell("sails", "sft", lr) for lr in GRID["sft"]], **variant_cells()}.items():
        row, ref = tuned(cells), tuned(variant_cells()[f"sails, {LONG}"]) if LONG in name else plain
        t, r = np.array(row["test"]), np.array(ref["test"])
        gap = "-" if row is ref else "{:+.4f} ± {:.4f}".format(*per_token(r[:, 0] - t[:, 0], t[:, 1]))
        lines.append(f"| {name} | {row['lr']:g} | {row['validation_loss']:.4f} | {per_token(-t[:, 0], t[:, 1])[0]:.4f} | {gap} | {margins(t, base).mean():+.3f} | {sides([row], 'overlap')} |")
    return lines

def variant_cells():
    """{label: cells}: SAILS's own best learning rate and the next higher one; a long run has one rate."""
    out = {v: [a_cell("sails", "sft", lr, variant=v) for lr in GRID["sft"][1:3]] for v in VARIANTS if v != LONG}
    for m in ("sails", "lora"):
        out[f"{m}, {LONG}"] = [a_cell(m, "sft", GRID["sft"][1], variant=LONG, steps=LONG_STEPS)]
    return out

def stage1_lines(facts):
    get = facts["layers"]
    lines = [f"SAEs of {train.DEFAULTS['fit_width'][0]} features fitted in {facts['fit_seconds'] / 60:.1f} minutes on dialogues and speeches; {facts['pairs']} pairs compared.", "",
             "| layer | " + " | ".join(get) + " |", "| --- |" + " --- |" * len(get)]
    shown = {"FVE, centred, unseen dialogues": "fve:.3f", "FVE, standardised": "fve_standardised:.3f", "features a token (L0)": "l0:.1f", "dead": "dead:.3f",
             f"mean difference of the top {K}": "top:.2f", "the same, labels swapped: mean": "null:.2f", "the same, labels swapped: largest of 20": "null_max:.2f",
             "features above everything in 20 swaps": "above:d", "median t of the top": "t:.1f", f"of {K}, more active on chosen": "more:d",
             f"top {K} shared by two halves": "shared:d", "subspaces of two halves, share in common": "split:.2f", "directions kept": "rank:d",
             "share of it in standardised raw PCA": "raw-pca:.2f", "in random features'": "random-features:.2f", "in random directions": "random:.2f"}
    for title, spec in shown.items():
        name, form = spec.split(":")
        lines.append(f"| {title} | " + " | ".join(format(x[name], form) for x in get.values()) + " |")
    return lines

def report(done, args, facts, command):
    base = np.array(done[key(a_cell("base", talk=True))]["test"])
    lines = ["# A real small run", "", f"`{command}`", "",
             f"{facts['rows']['train']} short dialogues to train on ({STEPS} steps of {BATCH}), {facts['rows']['validate']} to choose learning rates, {facts['rows']['test']} to score, no first prompt "
             f"in two of them; rank {R} on q, k, v, o; {args.seeds} seeds. ± are 95 % intervals over test replies of the mean over seeds; those of differences and of "
             f"refusals count seeds too. NLL over the data set's own {facts['own']:,} ids; over all ids the base's is {done[key(a_cell('base', talk=True))]['whole_vocabulary']:.4f}.", "",
             "## Features and subspaces", "", *stage1_lines(facts), "", f"The chosen features: [{args.features.name}]({args.features.name})", ""]
    for objective in args.objectives:
        lines += [f"## {objective.upper()}", "", *table(done, args, objective, base)]
    if args.variants:
        lines += ["## Variants of SAILS (SFT, seed 0)", "", *variants_table(done, base), ""]
    lines += [f"Cost: stage 1 {facts['seconds'] / 60:.0f} minutes of two threads; {len(done)} runs, {sum(r['seconds'] for r in done.values()) / 3600:.1f} CPU hours."]
    data.write_text(args.results, "\n".join(lines) + "\n")
    data.write_text(args.features, (args.out / "features.md").read_text())

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    ap.add_argument("--model", default="google/gemma-3-270m")
    ap.add_argument("--data", default=train.HH)
    ap.add_argument("--text", type=Path, required=True, help="a folder of .txt files")
    ap.add_argument("--prompts", default=str(here / "lookalikes.jsonl"), help="labelled prompts, harmless and harmful look-alikes")
    ap.add_argument("--out", type=Path, default=Path("runs/real"))
    ap.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    ap.add_argument("--objectives", nargs="*", choices=("sft", "dpo"), default=["sft", "dpo"])
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    ap.add_argument("--jobs", type=int, default=2)
    ap.add_argument("--again", type=int, help="repeat one line of cells.jsonl and compare")
    args = ap.parse_args()
    args.results, args.features = args.out / "real_study.md", args.out / "real_features.md"
    if args.again is not None:
        return again(args)
    if not any(args.text.glob("**/*.txt")):
        raise data.UserError(f"--text {args.text}: no .txt file in it")
    args.variants &= "sails" in args.methods and "sft" in args.objectives              # they are compared with that run
    args.out.mkdir(parents=True, exist_ok=True)
    facts = prepare(args)
    done = run_cells([a_cell("base", talk=True)], args)
    for objective in args.objectives:
        grid = {m: [a_cell(m, objective, lr) for lr in GRID[objective]] for m in args.methods}
        done = run_cells(sum(grid.values(), []), args)
        done = run_cells([dict(best(done, cells), seed=seed, talk=True) for cells in grid.values() for seed in range(args.seeds)], args)
    if args.variants:
        done = run_cells(sum(variant_cells().values(), []), args)
    shown = ["python", "benchmarks/real_study.py", *(a for a in sys.argv[1:])]
    report(done, args, facts, shlex.join(shown))
    print(f"saved in {args.results}")

if __name__ == "__main__":
    data.run_main(main)
