"""train.py - the command: build the safety subspace, start LoRA in it, align, measure; a run or a comparison.

    python train.py                              the whole story on a tiny made-up world, 1.5 minutes
    python train.py --model google/gemma-2-9b    the paper's run: Gemma Scope, HH-RLHF, r = 16 on q,k,v,o
    python train.py --model DIR --sae DIR|fit --data FILE      the same from local folders
    ... --method sails,lora --lr 1e-4,3e-4 --seed 0,1,2        a comparison: a run each, one table
Letters: B batch, n tokens or rows, D d_model; a subspace's basis V is (D, r_s), r the LoRA rank.
"""
import contextlib
import copy
import io
import math
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
from benchmarks import explain, pages, plan, tiny_world
from data import UserError, gather, lead, need, ranks, say, together

# ---- settings ----
HH, LOOKALIKES = "Anthropic/hh-rlhf", explain.LOOKALIKES
METHODS = (*sails.METHODS, "lora", "full")
WORLD = Path("runs/world-0")
# What the tiny world asks for, as if it had been typed; without --model the lists too
TINY = (f"--sae {WORLD}/sae --layers 2 --width 256 --data {WORLD}/data-{{seed}} --r 4 --k 4 --tau 1 "
        "--contrast prompts --steps 80 --watch 20 --batch 16 --micro 64 --warmup 10 --lr 3e-3 "
        "--max-new 12").split()
LISTS = ("--method sails,random,lora,full --lr 1e-3,3e-3,1e-2 --full-lr 1e-4,3e-4,1e-3 --seed 0,1,2 "
         "--jobs 2").split()

def parser():
    """Every setting. r, tau and k are as reported of the paper, other defaults ours."""
    ap = data.Arguments(description=__doc__.splitlines()[0])
    a, count, rate, some = ap.add_argument, data.at_least(1), data.at_least(0, float), data.list_of
    a("--model", help="folder or hub id[@revision], or `tiny`; without it: a comparison on the tiny world")
    a("--data", help=f"file, folder or hub dataset ({HH}); {{seed}} is replaced")
    a("--test", nargs="+", action="extend", help="labelled prompts (--data's, else look-alikes on a GPU)")
    a("--text", help="plain text for --replay and --sae fit (--data's)")
    a("--sae", help="folder or hub id laid out like Gemma Scope, or `fit` to train them")
    a("--out", help="folder of the run (runs/MODEL-METHOD-SEED), of a comparison (runs/MODEL)")
    a("--resume", action="store_true", help="continue a run; a comparison always does")
    a("--dry-run", action="store_true", help="print what would be trained, and memory")
    a("--jobs", type=count, default=1, help="runs of a comparison at a time")
    a = ap.add_argument_group("the subspace").add_argument
    a("--method", type=some(str, METHODS), default=["sails"], help=f"a list of {','.join(METHODS)}")
    a("--layers", type=some(int), help="layers whose SAEs are used (the family's)")
    a("--width", help="SAE width as its folder says (the family's)")
    a("--k", type=count, default=32, help="features chosen per layer")
    a("--tau", type=data.at_least(1e-9, float, 1), default=.8, help="share of the rows' variance to keep")
    a("--score", choices=("absolute", "relative", "t"), default="absolute",
      help="the paper's v2 or v1; or |t|, which has no scale")
    a("--center", action="store_true", help="centre the decoder rows before PCA")
    a("--contrast", choices=("replies", "prompts"), default="replies", help="see sails.contrast_pairs")
    a("--last", type=count, default=3, help="prompt tokens that --contrast prompts averages")
    a("--contrast-data", help="a labelled file for --contrast prompts (--data)")
    a("--contrast-pairs", type=count, default=1000, help="pairs used to choose features")
    a("--subspace", choices=("nearest", "global"), default="nearest", help="by SAE layer, or one for all")
    a("--standardise", action="store_true", help="raw-pca: divide dimensions by their standard deviations")
    a("--drop", type=some(int), default=[], help="features never to choose, in any layer")
    a("--norm-aware", action="store_true", help="undo the norms, see lora.init_sails")
    a("--freeze-basis", action="store_true", help="the factor that holds the basis does not train")
    a("--show-texts", action="store_true", help="features are shown in the contrast's texts, not in --text")
    a("--sides", choices=("both", "read", "write"), default="both", help="where the basis is used")
    a = ap.add_argument_group("the adapter and its training").add_argument
    a("--r", "--rank", type=count, default=16, help="LoRA rank (under torchrun: --rank)")
    a("--alpha", type=data.at_least(1e-6, float, 1e6), help="scale is alpha / r (2 r)")
    a("--targets", type=some(str, lora.PLACES), default=list("qkvo"), help=f"of {','.join(lora.PLACES)}")
    a("--objective", choices=("sft", "dpo", "rloo"), default="sft", help="sft reads chosen replies alone")
    a("--steps", type=count, default=500)
    a("--batch", type=data.at_least(1, high=10 ** 6), default=32, help="pairs or replies per step")
    a("--micro", type=plan.micro, default="auto", help="of these at a time in memory; auto: what fits")
    a("--lr", type=some(rate), default=[2e-4], help="a list: the best by validation is reported")
    a("--full-lr", type=some(rate), help="the same for full, which moves every weight (--lr)")
    a("--warmup", type=data.at_least(0), default=20, help="steps of linear warm-up, then linear decay to 0")
    a("--clip", type=data.at_least(1e-9, float), default=1.0, help="gradient norm")
    a("--beta", type=rate, default=.1, help="dpo, rloo: pull to the reference")
    a("--samples", type=data.at_least(2, high=1000), default=4, help="rloo: replies drawn per prompt")
    a("--sft-steps", type=data.at_least(0), default=0, help="first steps by sft: rloo reinforces draws")
    a("--max-new", type=count, default=64, help="rloo and --test: tokens per reply")
    a("--replay", type=rate, default=0., help="weight of a KL to the base on --text")
    a("--max-tokens", type=count, default=512, help="longer examples are left out")
    a("--template", choices=data.TEMPLATES, help="chat form (by the model's name)")
    a("--seed", type=some(data.at_least(0)), default=[0], help="a list: data order and random starts")
    a("--shard", action="store_true", help="torchrun: a part of the base on each device (always for full)")
    a("--checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    a("--save-every", type=count, default=50, help="steps between checkpoints")
    a("--watch", type=data.at_least(0), default=0, help="steps between looks at validation's rates")
    a("--dtype", choices=model_gemma.DTYPES, help="base weights (bfloat16 on a GPU, float32 on a CPU)")
    a("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.add_argument_group("--sae fit").add_argument
    a("--fit-width", type=data.at_least(1, high=2 ** 20), default=4096, help="features")
    a("--fit-active", type=count, default=48, help="features per token")
    a("--fit-tokens", type=count, default=180_000)
    a("--fit-steps", type=count, default=800)
    return ap

def settings(argv=None):
    """The command line, settled; method, lr and seed stay lists."""
    typed = sys.argv[1:] if argv is None else argv
    s = parser().parse_args(typed)
    need(s.model or not s.dry_run, "--dry-run needs --model")
    s.tiny = s.model in (None, "tiny")
    if s.tiny:
        s = parser().parse_args([*TINY, *([] if s.model else LISTS), *typed, "--model", str(WORLD)])
        s.tiny = True
    s.alpha = 2.0 * s.r if s.alpha is None else s.alpha
    s.dtype = s.dtype or ("float32" if s.tiny or s.device == "cpu" else "bfloat16")
    s.replies = None if s.micro == "auto" else 8 * s.micro  # at a time; what trains takes more memory
    fine = "full" not in s.method or s.dtype == "float32"
    need(fine, "--method full takes steps that bfloat16 rounds away: add --dtype float32")
    need(s.beta > 0 or s.objective != "dpo", "--beta 0: dpo would learn nothing")
    used = s.sides == "both" or {t in lora.WRITERS for t in s.targets} & {s.sides == "write"}
    need(used, f"--sides {s.sides}: no --targets for it")
    return s

def refuse_unread(s):
    """UserError for an option in the command line that no run of these settings reads."""
    of = lambda names: (set(s.method) & set(names), "--method " + " or ".join(names))
    runs = len(s.method) * len(s.seed) * max(len(s.lr), len(s.full_lr or []))
    parser().refuse_unread(
        (*of(sails.METHODS), "layers norm_aware freeze_basis sides"), (*of(["full"]), "full_lr"),
        (*of(sails.READS_SAE), "sae width k tau center subspace drop show_texts"), (*of(["sails"]), "score"),
        (*of(sails.READS_DATA), "contrast contrast_data contrast_pairs"), (*of(["raw-pca"]), "standardise"),
        (*of(METHODS[:-1]), "r alpha targets"), (s.contrast == "prompts", "--contrast prompts", "last"),
        (s.sae == "fit", "--sae fit", "fit_width fit_active fit_tokens fit_steps"),
        (s.sae != "fit", "published SAEs; use --fit-width", "width"),
        (s.replay or of(sails.READS_SAE)[0], "--replay or an SAE", "text"),
        (s.objective != "sft", "--objective dpo or rloo", "beta sft_steps"), (runs > 1, "more runs", "jobs"),
        (s.objective == "rloo", "--objective rloo", "samples"), ("RANK" in os.environ, "torchrun", "shard"))

# ---- objectives ----
# Each takes the rows of a micro-batch and of the whole batch: (loss to add up, numbers to log). Divided by
# the whole batch's count, the losses of micro-batches, and machines, add up to the batch's.
def sft_loss(model, rows, batch):
    """-log p of chosen replies, nats, over all supervised tokens of the batch."""
    nll, _ = model.reply_nll([r["chosen_tokens"] for r in rows])
    return nll.sum() / sum(sum(r["chosen_tokens"][1]) for r in batch), {}

def dpo_loss(model, reference, rows, batch, s, step):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta * margin).
    The margin, nats: how much more the policy prefers chosen to rejected than the reference does."""
    both = [r["chosen_tokens"] for r in rows] + [r["rejected_tokens"] for r in rows]
    with torch.no_grad(), reference() as ref:  # runs of one seed meet the same rows
        before = keep(("before", s.seed, step, rows[0]["at"]), (s.model, s.dtype, s.shard, both),
                      lambda: evaluation.sequence_logprobs(ref, both)[0])
    gain = evaluation.sequence_logprobs(model, both)[0] - before
    margin = gain[:len(rows)] - gain[len(rows):]  # (B,)
    loss = -torch.nn.functional.logsigmoid(s.beta * margin).sum() / len(batch)
    return loss, {"margin": float(margin.detach().sum()) / len(batch)}

def rloo_loss(model, reference, rows, batch, reward, s, seeds):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740), s.samples draws a prompt.
    A reply's advantage is its reward less the mean of the prompt's other replies; -advantage * log p is
    minimised. The reward carries the pull to the reference: reward - beta * (log p - log p_ref)."""
    prompts = [r["prompt_ids"] for r in rows for _ in range(s.samples)]
    draws = [seed * s.samples + j for seed in seeds for j in range(s.samples)]
    new = model_gemma.generate(model, prompts, s.max_new, s.stop, 1.0, draws)
    texts = [(p + y, [0] * len(p) + [1] * len(y)) for p, y in zip(prompts, new)]
    logp, _ = evaluation.sequence_logprobs(model, texts)
    with torch.no_grad(), reference() as ref:
        kl = logp.detach() - evaluation.sequence_logprobs(ref, texts)[0]
    gain = torch.tensor([reward(rows[i // s.samples], y) for i, y in enumerate(new)], device=logp.device)
    advantage = leave_one_out((gain - s.beta * kl).view(len(rows), s.samples)).view(-1)
    count = len(batch) * s.samples
    logged = {"reward": float(gain.sum()) / count, "kl": float(kl.sum()) / count}
    return -(advantage * logp).sum() / count, logged

def leave_one_out(reward):
    """reward (prompts, samples) -> each less the mean of the others in its row."""
    m = reward.shape[1]
    return (reward - reward.mean(1, keepdim=True)) * m / (m - 1)

def judge_reward(tok, s):
    """The reward of rloo by eval's judge: 1 for refusing harmful, or not refusing benign."""
    def reward(row, ids):
        reply = data.own_turn(tok.decode([t for t in ids if t not in s.stop]), s.template)
        return float(evaluation.starts_with_refusal(reply) == (row["label"] == "harmful"))
    return reward

def make_loss(s, model, reference=None, reward=None, neutral=()):
    """The objective as align calls it, loss(rows, batch, step); rows hold their place `at`.
    reference lends the model as it was; reward(row, new ids) -> number; neutral: texts, lists of ids, for
    --replay: as many a step as rows."""
    def loss(rows, batch, step):
        if s.objective == "sft" or step < s.sft_steps:
            value, logged = sft_loss(model, rows, batch)
        elif s.objective == "dpo":
            value, logged = dpo_loss(model, reference, rows, batch, s, step)
        else:
            seeds = [(s.seed * 1_000_003 + step) * s.batch + r["at"] for r in rows]
            value, logged = rloo_loss(model, reference, rows, batch, reward, s, seeds)
        if s.replay > 0:
            texts = [neutral[i] for i in data.batch_at(len(neutral), s.batch, s.seed + 1, step)]
            kl, _ = evaluation.kl_sums(model, reference, [texts[r["at"]] for r in rows])
            value = value + s.replay * kl.sum() / sum(map(len, texts))
        return value, logged
    return loss

def base_reference(model, again=None):
    """A context that lends the model as it is now: adapters off, or for `full` a frozen copy.
    again() -> the base once more, for a sharded model, which can't be copied."""
    if lora.adapters(model):
        return lambda: lora.adapter_off(model)
    frozen = (again() if model.sharded else copy.deepcopy(model)).requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)

# ---- training loop ----
def lr_at(step, s):
    """Linear warm-up to s.lr, then linear decay that would reach 0 one step after the last."""
    return s.lr * min((step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.steps - s.warmup), 1.0)

def align(model, rows, s, loss, folder=None, watch=None):
    """Train what requires a gradient for s.steps steps; `folder` gets log.jsonl and checkpoints.
    A step is a pure function of (weights, optimizer state, s, step), so a resumed run is the undisturbed one,
    bit for bit on a CPU. loss as make_loss builds it; watch() is logged every s.watch steps."""
    params = lora.trainable(model)
    opt = torch.optim.AdamW([p for _, p in params], lr=s.lr, weight_decay=0.0, fused=True)
    state = folder / "state.safetensors" if folder else None
    start = lora.load_state(state, params, opt) if folder else 0
    need(len({*gather(start)}) == 1, f"{state} is not the same file for all processes")
    need(start <= s.steps, f"{state} has done {start} steps of {s.steps}")
    log = folder / "log.jsonl" if folder else None
    if log:  # lines of steps that will be taken again are dropped
        data.write_rows(log, [row for _, row in data.read_rows(log, growing=True)][:start])
    bar = data.progress(total=s.steps, initial=start, desc="align", disable=None if log and lead() else True)
    with bar, data.patience() as came:
        for step in range(start, s.steps):
            began = time.perf_counter()
            row = dict(step=step, lr=lr_at(step, s))
            opt.param_groups[0]["lr"] = row["lr"]
            picked = data.batch_at(len(rows), s.batch, s.seed, step)
            batch = [dict(rows[i], at=at) for at, i in enumerate(picked)]
            row |= backward(model, batch, s, loss, step, bool(came))
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in params], s.clip)
            row["grad_norm"] = float(model_gemma.whole(norm))
            finite = math.isfinite(row["loss"] + row["grad_norm"])
            need(finite, f"step {step}: the loss or its gradient is not finite; lower --lr (now {s.lr:g})")
            opt.step()
            opt.zero_grad(set_to_none=True)
            stop = row.pop("stop") > 0
            row["tokens_per_s"] = round(row["tokens"] / (time.perf_counter() - began))
            row |= watch() if watch and (step + 1) % s.watch == 0 else {}
            if log:
                data.append_rows(log, [row])
                bar.set_postfix(refresh=False, loss=f"{row['loss']:.3f}", tokens_per_s=row["tokens_per_s"])
                bar.update()
                if stop or (step + 1) % s.save_every == 0 or step + 1 == s.steps:
                    lora.save_state(state, params, opt, step + 1)
            if stop:  # some rank
                raise KeyboardInterrupt(*came[:1] or [signal.SIGTERM])

def backward(model, batch, s, loss, step, stop=False):
    """Add up a step's gradients over micro-batches and machines; what to log, whether to stop."""
    (rank, machines), logged = ranks(), {"loss": 0.0, "stop": float(stop)}
    mine = batch[rank::machines]
    for some in data.length_batches([len(r["chosen_tokens"][0]) for r in mine], s.micro):
        value, more = loss([mine[i] for i in sorted(some)], batch, step)
        value.backward()
        for key, x in {"loss": float(value.detach()), **more}.items():
            logged[key] = logged.get(key, 0.0) + x
    if machines > 1:
        for _, p in lora.trainable(model) if lora.adapters(model) else ():  # FSDP has added up full's
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            data.add_up(p.grad)
        sums = torch.tensor(list(logged.values()), dtype=torch.float64)
        data.add_up(sums)
        logged = dict(zip(logged, sums.tolist()))
    return logged | {"tokens": sum(sum(r["chosen_tokens"][1]) for r in batch)}

# ---- one run ----
def run(s):
    """One alignment, stage by stage; each leaves a file. Method `base` only measures."""
    with open_folder(s) as folder:
        if (folder / "results.json").exists():
            return
        sets = kept_sets(s)
        check_rows(s, sets)
        s.stop = data.stop_ids(sets.tok, s.template)
        cut = s.shard and ("trained" if s.method == "full" else "frozen")
        source = s.model, model_gemma.DTYPES[s.dtype], s.device, cut
        load = lambda: model_gemma.load_gemma(*source)
        model = keep("model", source, load)
        model.checkpointing, results = s.checkpointing, dict(method=s.method, lr=s.lr, seed=s.seed)
        try:
            if s.method != "base":
                start(s, model, sets, folder)
                count = sum(p.numel() for _, p in lora.trainable(model))
                say(f"training {count:,} parameters: {s.objective}, {s.steps} steps of {s.batch}, lr {s.lr}")
                reference = base_reference(model, load) if s.objective != "sft" or s.replay > 0 else None
                loss = make_loss(s, model, reference, judge_reward(sets.tok, s), sets.neutral)
                align(model, sets.train, s, loss, folder, watcher(s, model, sets))
                results |= dict(parameters=count, drift=save(s, model, sets, folder))
            elif s.sae == "fit":
                fit_saes(s, model, sets)
            results |= measure(s, model.requires_grad_(False), sets, folder)
            data.write_json(folder / "results.json", results)
        finally:
            lora.detach(model)
            if s.method == "full":
                _kept.pop("model")  # trained: no other run's base any more

_kept = {}

def keep(name, key, make):
    """make(), or its last value if the key is the same: what runs of a comparison share."""
    if _kept.get(name, (None,))[0] != key:
        _kept.pop(name, None)
        _kept[name] = key, make()
    return _kept[name][1]

def kept_sets(s):
    """load_sets, read once for all runs that read the same."""
    return keep("sets", (s.model, s.data, s.template, s.test, s.text), lambda: load_sets(s))

def choose_sources(s):
    """The model's config; settles what depends on it: SAEs, their layers, data, chat form."""
    config = model_gemma.load_config(s.model)
    known, reads = sae_module.published(s.model, config), set(s.method) & set(sails.READS_SAE)
    need(s.sae or known or not reads, "no published SAE is known for this model: give --sae DIR or --sae fit")
    need(s.data or s.dry_run or not Path(s.model).exists(), f"give --data FILE (or --data {HH}, on the hub)")
    repo, width, layers = known or (None, "16k", sorted({config.n_layers * q // 4 for q in (1, 2, 3)}))
    s.sae, s.width, s.layers, s.data = s.sae or repo, s.width or width, s.layers or layers, s.data or HH
    s.sae = s.sae if reads else None
    s.width = str(s.fit_width) if s.sae == "fit" else s.width
    shown = ",".join(map(str, s.layers))
    inside = all(0 <= i < config.n_layers for i in s.layers)
    need(inside, f"--layers {shown}: the model has layers 0..{config.n_layers - 1}")
    wide = s.sae != "fit" or s.k <= s.fit_width > s.fit_active
    need(wide, f"--fit-width {s.fit_width}: too few for --k {s.k}, --fit-active {s.fit_active}")
    need(s.r <= config.d_model, f"--r {s.r}: the model's residual stream has {config.d_model} dimensions")
    for i in s.layers if reads and s.sae != "fit" and not s.dry_run else ():
        sae_module.sae_file(s.sae, i, s.width)  # before anything is downloaded
    tok = None if s.dry_run else data.load_tokenizer(s.model, config.vocab_size)
    s.template = s.template or data.default_template(s.model, tok)
    saes = f"; SAEs: {s.sae}, width {s.width}, layers {shown}" if reads else ""
    say(f"{s.model}: template {s.template}, {s.dtype} on {s.device}; data: {s.data}{saes}")
    return config

@contextlib.contextmanager
def open_folder(s):
    """Lend the run's own folder with run.json in it; a run that is there goes on with --resume."""
    folder, own = Path(s.out), noted(s)
    with data.owned(folder, "run.json") if lead() else contextlib.nullcontext(True) as begun:
        if lead():
            need(s.resume or not begun, f"{folder} holds a run: add --resume, or choose another --out")
            data.same_settings(folder / "run.json", own)
        together()
        seen = (folder / "run.json").exists()
        need(seen, f"rank 0's {folder} is not here: --out must be on a disk that all machines share")
        data.same_settings(folder / "run.json", own)  # another machine may hold other files
        yield folder

def noted(s):
    """The settings that make a run what it is, for run.json."""
    left_out = ("resume", "dry_run", "out", "shared", "jobs", "device", "shard", "tiny", "stop")
    return {k: v for k, v in vars(s).items() if k not in left_out} | dict(sources=sources(s))

def sources(s):
    """Download all that the run will read; {what: commit sha, or hash of local files}."""
    out = dict(model=data.fingerprint(s.model, ["*.json", *model_gemma.weight_files(s.model)[1]]))
    out["data"] = data.fingerprint(s.data, list(data.data_files(s.data)[1].values()), "dataset")
    if s.method in sails.READS_SAE and s.sae != "fit":
        out["sae"] = [data.fingerprint(s.sae, [sae_module.sae_file(s.sae, i, s.width)]) for i in s.layers]
    of = dict.fromkeys(asked(s), data.PROMPTS) | {s.contrast_data: []}
    if s.text:
        of[s.text] = [name for name in data.listing(s.text, "dataset") if name.endswith(".txt")]
    own = lambda x: [Path(x).name] if Path(x).is_file() else of[x]
    return out | {str(x): data.fingerprint(x, own(x), "dataset") for x in of if x}

def asked(s):
    """--test, or on a GPU the look-alikes if --data has no prompts."""
    none = s.device.startswith("cuda") and "prompts" not in data.data_files(s.data)[1]
    return s.test or [LOOKALIKES] * none

def load_sets(s):
    """All that runs read, encoded once; parts that --data lacks are split off by prompt."""
    tok, (folder, names) = data.load_tokenizer(s.model), data.data_files(s.data)
    files = {part: folder / name for part, name in names.items()}
    examples, dropped = data.read_pairs(files["train"])
    lacking, rows, long = [p for p in ("validate", "test") if p not in files], {}, 0
    split = data.split_by_prompt(examples, (10 - len(lacking), *[1] * len(lacking)))
    parts = dict(zip(["train", *lacking], split))
    for part in ("train", "validate", "test"):
        some = parts[part] if part in parts else data.read_pairs(files[part])[0]
        some = some if part == "train" else explain.spread(some, 400)
        rows[part], n = data.encode(tok, some, s.template, s.max_tokens)
        long += n
    counts = ", ".join(f"{len(some):,} to {part}" for part, some in rows.items())
    say(f"examples: {counts}; left out: {dropped or 'none'}, {long} longer than {s.max_tokens} tokens")
    need(all(rows.values()), f"{s.data}: too few usable examples ({counts})")
    files_asked = asked(s) or [files[part] for part in files if part == "prompts"]
    prompts = data.read_prompts(files_asked) if files_asked else []
    need(all(p["set"] != "validation" for p in prompts), "--test: no set or file may be named validation")
    if not prompts:
        say(f"no reply is judged; for a safety rate add --test {LOOKALIKES}")
    if {r["label"] for r in rows["validate"]} >= {"harmful", "benign"}:  # they can choose a learning rate
        prompts = [dict(r, id=f"validation/{n}", set="validation", expected=r["chosen"])
                   for n, r in enumerate(rows["validate"]) if r["label"]] + prompts
    texts = data.read_texts(s.text or files["text"]) if s.text or "text" in files else []
    return SimpleNamespace(
        tok=tok, **rows, prompts=prompts,
        neutral=[[data.BOS] + data.encode_plain(tok, t)[:s.max_tokens] for t in texts],
        cloze=data.read_cloze(files["knowledge"], tok) if "knowledge" in files else [])

def check_rows(s, sets):
    """UserError if the run needs what the examples lack."""
    have = lambda rows, key: all(r[key] is not None for r in rows)
    key = dict(sft="chosen", dpo="rejected", rloo="label")[s.objective]
    need(have(sets.train, key), f"--objective {s.objective} needs {key} in every row of --data")
    need(have(sets.prompts, "label"), "--test needs a label, harmful or benign, in every row")
    need(s.replay == 0 or sets.neutral, "--replay needs neutral text: --text PATH, or text.txt beside --data")
    looks = [p for p in sets.prompts if p["set"] == "validation"]
    need(looks or not s.watch, "--watch needs labelled validation examples")

def start(s, model, sets, folder):
    """Make ready what is trained: every weight, or adapters that leave the model as it is."""
    if s.method == "full":
        model.requires_grad_(True)
        return
    bases = {} if s.method == "lora" else subspace(s, model, sets, folder)
    lora.attach(model, s.targets, s.r, s.alpha)
    lora.init_lora(model, s.seed)
    if bases:
        sides = ("read", "write") if s.sides == "both" else (s.sides,)
        lora.init_sails(model, bases, s.seed, s.freeze_basis, s.norm_aware, sides)
    adapters = [p.data for _, m in lora.adapters(model) for p in (m.A, m.B)]
    for p in adapters if ranks()[1] > 1 else ():
        dist.broadcast(p, 0)  # all begin as rank 0 does
    model_gemma.same_bits(adapters, folder)

def watcher(s, model, sets):
    """A look at validation's rates, for align; None without --watch."""
    some = [p for p in sets.prompts if p["set"] == "validation"]
    look = lambda: evaluation.glance(model, sets.tok, some, s.template, s.max_new, s.replies)
    return look if s.watch else None

def subspace(s, model, sets, folder):
    """Steps 1 to 4: {SAE layer: V (D, r_s)}, kept in the run's folder for --resume."""
    path = folder / "subspace.safetensors"
    if gather(path.exists())[0]:
        V, D = dict(model_gemma.read_tensors(path)), model.config.d_model
        bases = {i: V.get(f"V.{i}", torch.empty(0)) for i in s.layers}
        for i, x in bases.items():
            good = x.dim() == 2 and len(x) == D and x.shape[1] and x.dtype == torch.float32
            good = good and torch.allclose(x.T @ x, torch.eye(x.shape[1]), atol=1e-3)
            need(good, f"{path}: V.{i} is missing or not orthonormal, fp32 ({D}, r_s)")
        return bases
    saes, pairs, stats = dict.fromkeys(s.layers), [], {i: dict(D=model.config.d_model) for i in s.layers}
    reads = "model data text shared sae width layers contrast contrast_data contrast_pairs last show_texts"
    key = [s.method in sails.READS_SAE, *(vars(s)[k] for k in reads.split())]
    if s.method in sails.READS_SAE:
        saes = load_saes(s, model, sets)  # not kept: the 9B's take 2.4 GB
    if s.method in sails.READS_DATA:
        rows = sets.train if not s.contrast_data else data.encode(
            sets.tok, data.read_pairs(s.contrast_data)[0], s.template, s.max_tokens)[0]
        pairs = sails.contrast_pairs(rows, s.contrast, s.last)[:s.contrast_pairs]
        stats = keep("stats", key, lambda: sails.contrast_means(model, saes, pairs, s.micro))
    with data.expecting("no subspace (--drop leaves features out)", ValueError):
        bases, chosen = sails.subspaces(
            s.method, stats, saes, k=s.k, tau=s.tau, rule=s.score, center=s.center, r=s.r, drop=s.drop,
            pool=s.subspace == "global", standardise=s.standardise, seed=s.seed)
    for i, V in bases.items():
        of = f"{len(pairs):,} pairs, {len(chosen.get(i, ()))} features"
        say(f"layer {i}: {of} -> {V.shape[1]} directions for rank {s.r}")
    if chosen:
        key = [*key, *(f.tolist() for f in chosen.values())]
        explain.write_features(s, folder, keep("features", key, lambda: explain.describe_all(
            s, model, sets, saes, stats, chosen, pairs[:200])))
    kept = {f"V.{i}": V for i, V in bases.items()} | {f"features.{i}": f for i, f in chosen.items()}
    kept |= {f"rows.{i}": saes[i].W_dec[f.to(s.device)] for i, f in chosen.items()}
    model_gemma.save_tensors(path, kept)
    return bases

def fit_saes(s, model, sets):
    """The folder of SAEs trained on the model's own residuals over the dialogues and --text."""
    home = Path(s.shared) / "sae"
    if not gather(all(any(home.glob(f"layer_{i}/*/*/params.npz")) for i in s.layers))[0]:
        rows = [r[side][0] for r in sets.train for side in ("chosen_tokens", "rejected_tokens") if r[side]]
        shuffled = lambda x: [x[i] for i in np.random.default_rng(s.seed).permutation(len(x))]
        both = shuffled(rows), shuffled(sets.neutral)
        mixed = [x[i] for i in range(max(map(len, both))) for x in both if i < len(x)]
        acts = sae_module.collect_residuals(model, mixed, s.layers, s.fit_tokens, s.micro)
        say(f"SAEs are fitted to {len(acts[s.layers[0]]):,} tokens")
        rank, n = ranks()
        for i in s.layers[rank::n]:  # each rank trains some, with all tokens
            x = acts.pop(i).to(s.device)
            sae = sae_module.train_sae(x, s.fit_width, s.fit_active, s.fit_steps, seed=s.seed, show=lead())
            sae_module.save_sae(sae, home, i, sae_module.sae_quality(sae, x)["l0"])
    together()
    return home

def load_saes(s, model, sets):
    """{layer: SAE}, with a line on how well each explains some of the texts it will read."""
    home = fit_saes(s, model, sets) if s.sae == "fit" else s.sae
    texts = [r["chosen_tokens"][0] for r in sets.train[:8]]
    saes = {i: sae_module.load_sae(home, i, s.width, device=s.device) for i in s.layers}
    for i, sae in saes.items():
        sae_module.check_fit(sae, model, i)
        x = sae_module.collect_residuals(model, texts, [i], 1000)[i]
        q = sae_module.sae_quality(sae, x.to(s.device))
        warning = "" if q["fve"] >= .1 else "   warning: it explains next to nothing; whose is it?"
        say(f"layer {i}: {sae.name}, FVE {q['fve']:.2f} (standardised {q['fve_standardised']:.2f}), "
            f"L0 {q['l0']:.0f}{warning}")
    return saes

def save(s, model, sets, folder):
    """Write what was trained and learned; {side: how far it drifted from its start} of adapters."""
    drift = lora.mean_drift(lora.drift(model))
    if s.method == "full":
        model_gemma.save_gemma(model, folder)
        data.write_text(folder / "tokenizer.json", sets.tok.to_str(pretty=True))
    else:
        keys = "method sae layers k tau score contrast sides freeze_basis norm_aware".split()
        how = dict(holds_basis="A of q,k,v,gate,up; B of o,down", drift=drift) | {k: vars(s)[k] for k in keys}
        lora.save_adapter(model, folder, s.model, how)
        together()  # all explain what rank 0 has written
        if s.method in sails.READS_SAE:
            source = f"{s.shared}/sae" if s.sae == "fit" else s.sae, s.layers, s.width
            with lora.adapter_off(model):
                data.write_json(folder / "explain.json", explain.explain_adapter(
                    folder, model, sets.tok, source, folder / "features.json", explain.ends(sets)))
    for side, m in drift.items():
        inside = "" if m["energy"] is None else f", share of the update inside it {m['energy']:.3f}"
        say(f"{side} side: overlap with the starting subspace {m['overlap']:.3f}{inside}")
    return drift

def measure(s, model, sets, folder):
    """All measures of the model: {measure: interval}, sets {set: measures}, validation."""
    score = lambda part: evaluation.held_out(model, vars(sets)[part], path=folder / f"heldout-{part}.jsonl")
    out, judged, path = score("test"), {}, folder / "responses.jsonl"
    out |= evaluation.knowledge(model, sets.cloze) if sets.cloze else {}
    if sets.prompts:
        rows = evaluation.respond(model, sets.tok, sets.prompts, path, s.template, s.max_new, s.replies)
        verdicts = evaluation.judge_all(rows, sets.prompts, ["refusal"], None, folder / "verdicts.jsonl")
        judged = evaluation.tabulate(rows, verdicts)["refusal"]
    nll = score("validate")[evaluation.NLL]["value"][0]
    out = {name: x["value"] for name, x in out.items()}
    return out | dict(validation=judged.pop("validation", {}) | dict(NLL=nll), sets=judged)

# ---- several runs ----
def combinations(s, folder):
    """The settings of every run, seed x method x rate, a folder each; a seed's base is first."""
    out = []
    for seed in s.seed:
        shared = folder / ("base" if len(s.seed) == 1 else f"base-seed{seed}")
        runs = [("base", 0.0, shared)]
        for m in s.method:
            rates = s.full_lr if m == "full" and s.full_lr else s.lr
            runs += [(m, lr, folder / f"{m}-lr{lr:g}-seed{seed}") for lr in rates]
        for m, lr, home in runs:
            own = dict(method=m, lr=lr, seed=seed, out=str(home), shared=str(shared), resume=True)
            own["shard"] = s.shard or m == "full" and ranks()[1] > 1
            out.append(SimpleNamespace(**vars(s) | own | dict(data=s.data.replace("{seed}", str(seed)))))
    return out

def each(jobs, do, runs):
    """Do the runs, `jobs` at a time in processes of one thread; yields after each."""
    if jobs == 1:
        yield from map(do, runs)
        return
    _kept.clear()  # each reads the data
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker)
    try:  # what pool.map cancels breaks the pool of Python 3.11
        for one in [pool.submit(do, r) for r in runs]:
            yield one.result()
    except BrokenProcessPool:
        raise UserError("a run's process was killed; out of memory? Try a lower --jobs") from None
    finally:
        for worker in active_children():  # each saves what it has
            worker.terminate()
        pool.shutdown(cancel_futures=True)

def begin_worker():
    """Set a process up for runs of one thread each."""
    torch.set_num_threads(1)
    data.on_signals(lambda number, frame: os._exit(1))
    data.follow_parent()

def quiet_run(s):
    """run() without its words, which stand in its files, but for warnings."""
    words = io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        try:
            run(s)
        except KeyboardInterrupt:
            if parent_process():
                os._exit(1)  # not the next run
            raise
    for line in words.getvalue().splitlines():
        if "warning:" in line:
            data.note(f"{s.out}: {line}")

def main():
    s = settings()
    refuse_unread(s)
    if s.tiny and os.environ.get("RANK", "0") == "0":
        tiny_world.make_world(WORLD, 0, s.seed)
    if "RANK" in os.environ:  # torchrun: the ranks share every run
        s.jobs, s.device = 1, data.join(s.device)
        n, s.shard = ranks()[1], s.shard or s.method == ["full"]
        fits = s.batch % n == 0 or s.batch > n and not (s.shard or "full" in s.method)
        need(fits, f"--batch {s.batch}: {n} processes need an example each, as many each if one is sharded")
    config = choose_sources(s)
    name = "tiny" if s.tiny else data.model_name(s.model)
    rates = s.full_lr if s.method == ["full"] and s.full_lr else s.lr
    one = len(s.method) * len(s.seed) * len(rates) == 1
    folder = Path(s.out or (f"runs/{name}-{s.method[0]}-{s.seed[0]}" if one else f"runs/{name}"))
    runs = combinations(s, folder)
    for r in runs if one else ():
        r.shared, r.out = str(folder), str(folder / "base" if r.method == "base" else folder)
        r.resume = s.resume or r.method == "base"
    plan.settle(s, runs, config, None if s.dry_run else kept_sets(runs[0]))
    if s.dry_run:
        return
    if one:
        for r in reversed(runs):  # the base last: a refused run leaves nothing behind
            run(r)
        return pages.report(folder, runs)
    with data.owned(folder, "runs.json") if lead() else contextlib.nullcontext() as begun:
        if begun:
            data.read_json(folder / "runs.json", runs=list)
        need(len({r.out for r in runs}) == len(runs), "--lr: two rates look alike")
        for r in runs:  # before anything is added
            if (Path(r.out) / "run.json").exists():
                data.same_settings(Path(r.out) / "run.json", noted(r))
        data.write_json(folder / "runs.json", dict(runs=[r.out for r in runs]))
        bar = data.progress(total=len(runs), desc="runs", disable=None if lead() else True)
        for first in (True, False):  # the bases measure and fit what other runs share
            for _ in each(s.jobs, quiet_run, [r for r in runs if (r.method == "base") == first]):
                bar.update()
        pages.report(folder, runs)

if __name__ == "__main__":
    data.run_main(main)
