"""train.py - the command: build the safety subspace, start LoRA in it, align, measure; a run or a comparison.

    python train.py                              the whole story on a tiny made-up world, 1.5 minutes
    python train.py --model google/gemma-2-9b    the paper's run: Gemma Scope, HH-RLHF, r = 16 on q,k,v,o
    python train.py --model DIR --sae DIR|fit --data FILE      the same from local folders
    ... --method sails,lora --lr 1e-4,3e-4 --seed 0,1,2        a comparison: a run each, one table
Order: settings - objectives - training loop - one run and its stages - table.
Letters: B batch, n tokens or rows, D d_model; a subspace's basis V is (D, r_s), r the LoRA rank.
"""
import contextlib
import copy
import math
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
from benchmarks.tiny_world import make_world
from data import UserError, need

# ---- settings ----
HH, LOOKALIKES = "Anthropic/hh-rlhf", sails.LOOKALIKES
METHODS = (*sails.METHODS, "lora", "full")
WORLD = Path("runs/world-0")
# What the tiny world asks for, as if it had been typed; without --model the lists too
TINY = (f"--sae {WORLD}/sae --layers 2 --width 256 --data {WORLD}/data-{{seed}} --r 4 --k 4 --tau 1 "
        "--contrast prompts --steps 80 --batch 16 --micro 64 --warmup 10 --lr 3e-3 --max-new 12").split()
LISTS = ("--method sails,random,lora,full --lr 1e-3,3e-3,1e-2 --full-lr 1e-4,3e-4,1e-3 --seed 0,1,2 "
         "--jobs 2").split()

def parser():
    """Every setting. The paper gives r, tau and k; other defaults are ours."""
    ap = data.Arguments(description=__doc__.splitlines()[0])
    a, count, rate, some = ap.add_argument, data.at_least(1), data.at_least(0, float), data.list_of
    a("--model", help="folder or hub id[@revision], or `tiny`; without it: a comparison on the tiny world")
    a("--data", help=f"file, folder or hub dataset ({HH}); {{seed}} is replaced")
    a("--test", nargs="+", help="labelled prompts to judge (--data's, else look-alikes on a GPU)")
    a("--text", help="plain text for --replay and --sae fit (--data's)")
    a("--sae", help="folder or hub id laid out like Gemma Scope, or `fit` to train them")
    a("--out", help="folder of the run (runs/MODEL-METHOD-SEED), of a comparison (runs/MODEL)")
    a("--resume", action="store_true", help="continue a run; a comparison always does")
    a("--dry-run", action="store_true", help="print what would be trained; load no weights")
    a("--jobs", type=count, default=1, help="runs of a comparison at a time")
    a = ap.add_argument_group("the subspace").add_argument
    a("--method", type=some(str, METHODS), default=["sails"], help=f"a list of {','.join(METHODS)}")
    a("--layers", type=some(int), help="layers whose SAEs are used (the family's)")
    a("--width", help="SAE width as its folder says (the family's)")
    a("--k", type=count, default=32, help="features chosen per layer")
    a("--tau", type=data.at_least(0, float, 1), default=.8, help="share of the rows' variance that PCA keeps")
    a("--score", choices=("absolute", "relative"), default="absolute", help="the paper's v2 or v1")
    a("--center", action="store_true", help="centre the decoder rows before PCA")
    a("--contrast", choices=("replies", "prompts"), default="replies", help="see sails.contrast_pairs")
    a("--last", type=count, default=3, help="prompt tokens that --contrast prompts averages")
    a("--contrast-data", help="a labelled file for --contrast prompts (--data)")
    a("--contrast-pairs", type=count, default=1000, help="pairs used to choose features")
    a("--subspace", choices=("nearest", "global"), default="nearest", help="by SAE layer, or one for all")
    a("--standardise", action="store_true", help="raw-pca: divide dimensions by their standard deviations")
    a("--drop", type=some(int), default=[], help="features never to choose, by index")
    a("--norm-aware", action="store_true", help="undo the norms, see lora.init_sails")
    a("--freeze-basis", action="store_true", help="the factor that holds the basis does not train")
    a("--show-texts", action="store_true", help="features are shown in the contrast's texts, not in --text")
    a("--sides", choices=("both", "read", "write"), default="both", help="where the basis is used")
    a = ap.add_argument_group("the adapter and its training").add_argument
    a("--r", "--rank", type=count, default=16, help="LoRA rank (under torchrun: --rank)")
    a("--alpha", type=rate, help="scale is alpha / r (2 r)")
    a("--targets", type=some(str, lora.PLACES), default=list("qkvo"), help=f"of {','.join(lora.PLACES)}")
    a("--objective", choices=("sft", "dpo", "rloo"), default="sft", help="sft reads chosen replies alone")
    a("--steps", type=count, default=500)
    a("--batch", type=count, default=32, help="pairs or replies per step")
    a("--micro", type=count, default=4, help="of these at a time in memory")
    a("--lr", type=some(rate), default=[2e-4], help="a list: the best by validation is reported")
    a("--full-lr", type=some(rate), help="the same for full, which moves every weight (--lr)")
    a("--warmup", type=data.at_least(0), default=20, help="steps of linear warm-up, then linear decay to 0")
    a("--clip", type=rate, default=1.0, help="gradient norm")
    a("--beta", type=rate, default=.1, help="dpo, rloo: pull to the reference")
    a("--samples", type=data.at_least(2), default=4, help="rloo: replies drawn per prompt")
    a("--sft-steps", type=data.at_least(0), default=0, help="first steps by sft: rloo reinforces draws")
    a("--max-new", type=count, default=64, help="rloo and --test: tokens per reply")
    a("--replay", type=rate, default=0., help="weight of a KL to the base on --text")
    a("--max-tokens", type=count, default=512, help="longer examples are left out")
    a("--template", choices=data.TEMPLATES, help="chat form (by the model's name)")
    a("--seed", type=some(data.at_least(0)), default=[0], help="a list: data order and random starts")
    a("--checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    a("--save-every", type=count, default=50, help="steps between checkpoints")
    a("--dtype", choices=model_gemma.DTYPES, help="base weights (bfloat16 on a GPU, float32 on a CPU)")
    a("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.add_argument_group("--sae fit").add_argument
    a("--fit-width", type=count, default=4096, help="features")
    a("--fit-active", type=count, default=48, help="features per token")
    a("--fit-tokens", type=count, default=180_000)
    a("--fit-steps", type=count, default=800)
    return ap

def settings(argv=None):
    """The command line, settled; method, lr and seed stay lists."""
    typed = sys.argv[1:] if argv is None else argv
    s = parser().parse_args(typed)
    s.tiny = s.model in (None, "tiny")
    if s.tiny:
        s = parser().parse_args([*TINY, *([] if s.model else LISTS), *typed])
        s.tiny, s.model = True, str(WORLD)
    s.alpha = 2.0 * s.r if s.alpha is None else s.alpha
    s.dtype = s.dtype or ("bfloat16" if s.device.startswith("cuda") else "float32")
    fine = "full" not in s.method or s.dtype == "float32"
    need(fine, "--method full takes steps that bfloat16 rounds away: add --dtype float32")
    return s

# ---- objectives ----
# Each takes the rows of a micro-batch and of the whole batch: (loss to add up, numbers to log). Divided by
# the whole batch's count, the losses of micro-batches, and machines, add up to the batch's.
def sft_loss(model, rows, batch):
    """-log p of chosen replies, nats, over all supervised tokens of the batch."""
    nll, _ = model.reply_nll([r["chosen_tokens"] for r in rows])
    return nll.sum() / sum(sum(r["chosen_tokens"][1]) for r in batch), {}

def dpo_loss(model, reference, rows, batch, beta):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta * margin).
    The margin is how much more than the reference the policy prefers chosen to rejected, nats over replies.
    """
    both = [r["chosen_tokens"] for r in rows] + [r["rejected_tokens"] for r in rows]
    with torch.no_grad(), reference() as ref:
        before, _ = evaluation.sequence_logprobs(ref, both)
    gain = evaluation.sequence_logprobs(model, both)[0] - before
    margin = gain[:len(rows)] - gain[len(rows):]  # (B,)
    loss = -F.logsigmoid(beta * margin).sum() / len(batch)
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

def judge_reward(tok, stop):
    """The reward of rloo by eval's judge: 1 for refusing harmful, or not refusing benign."""
    def reward(row, ids):
        reply = tok.decode([t for t in ids if t not in stop])
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
            value, logged = dpo_loss(model, reference, rows, batch, s.beta)
        else:
            seeds = [(s.seed * 1_000_003 + step) * s.batch + r["at"] for r in rows]
            value, logged = rloo_loss(model, reference, rows, batch, reward, s, seeds)
        if s.replay > 0:
            texts = [neutral[i] for i in data.batch_at(len(neutral), s.batch, s.seed + 1, step)]
            kl, _ = evaluation.kl_sums(model, reference, [texts[r["at"]] for r in rows])
            value = value + s.replay * kl.sum() / sum(map(len, texts))
        return value, logged
    return loss

def base_reference(model):
    """A context that lends the model as it is now: adapters off, or for `full` a frozen copy."""
    if lora.adapters(model):
        return lambda: lora.adapter_off(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)

# ---- training loop ----
def lr_at(step, s):
    """Linear warm-up to s.lr, then linear decay that would reach 0 one step after the last."""
    return s.lr * min((step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.steps - s.warmup), 1.0)

def align(model, rows, s, loss, folder=None):
    """Train what requires a gradient for s.steps steps; `folder` gets log.jsonl and checkpoints.
    A step is a pure function of (weights, optimizer state, s, step), so a resumed run is the undisturbed one,
    bit for bit. loss as make_loss builds it."""
    params = lora.trainable(model)
    opt = torch.optim.AdamW([p for _, p in params], lr=s.lr, weight_decay=0.0)
    state = folder / "state.safetensors" if folder else None
    start = lora.load_state(state, params, opt) if folder and s.resume else 0
    log = folder / "log.jsonl" if folder and lead() else None
    if log:  # lines of steps that will be taken again are dropped
        data.write_rows(log, [row for _, row in data.read_rows(log, growing=True)][:start])
    with data.progress(total=s.steps, initial=start, desc="align", disable=None if log else True) as bar:
        for step in range(start, s.steps):
            began = time.perf_counter()
            row = dict(step=step, lr=lr_at(step, s))
            opt.param_groups[0]["lr"] = row["lr"]
            picked = data.batch_at(len(rows), s.batch, s.seed, step)
            row |= backward(model, [dict(rows[i], at=at) for at, i in enumerate(picked)], s, loss, step)
            row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_([p for _, p in params], s.clip))
            finite = math.isfinite(row["loss"] + row["grad_norm"])
            need(finite, f"step {step}: the loss or its gradient is not finite; lower --lr (now {s.lr:g})")
            opt.step()
            opt.zero_grad(set_to_none=True)
            if log:
                row["tokens_per_s"] = round(row["tokens"] / (time.perf_counter() - began))
                data.append_rows(log, [row])
                bar.set_postfix(refresh=False, loss=f"{row['loss']:.3f}", tokens_per_s=row["tokens_per_s"])
                bar.update()
                if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
                    lora.save_state(state, params, opt, step + 1)

def backward(model, batch, s, loss, step):
    """Add up a step's gradients over micro-batches and machines; what to log."""
    rank, machines = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, logged = batch[rank::machines], {"loss": 0.0}
    for at in range(0, len(mine), s.micro):
        value, more = loss(mine[at:at + s.micro], batch, step)
        value.backward()
        for key, x in {"loss": float(value.detach()), **more}.items():
            logged[key] = logged.get(key, 0.0) + x
    if machines > 1:
        for _, p in lora.trainable(model):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        sums = torch.tensor(list(logged.values()), dtype=torch.float64, device=model.device)
        dist.all_reduce(sums)
        logged = dict(zip(logged, sums.tolist()))
    return logged | {"tokens": sum(sum(r["chosen_tokens"][1]) for r in batch)}

def lead():
    """True in the process that prints and writes: the only one, or rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0

def together():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()

def say(*lines):
    """Print lines, once for all processes."""
    if lead():
        print(*lines, sep="\n", flush=True)

# ---- one run ----
def run(s):
    """One alignment, stage by stage; each leaves a file. Method `base` only measures."""
    with open_folder(s) as folder:
        if (folder / "results.json").exists():
            return
        sets = keep("sets", (s.model, s.data, s.template, s.test, s.text), lambda: load_sets(s))
        check_rows(s, sets)
        s.stop = data.stop_ids(sets.tok, s.template)
        source = s.model, model_gemma.DTYPES[s.dtype], s.device
        model = keep("model", source, lambda: model_gemma.load_gemma(*source))
        model.checkpointing, results = s.checkpointing, dict(method=s.method, lr=s.lr, seed=s.seed)
        try:
            if s.method != "base":
                start(s, model, sets, folder)
                count = sum(p.numel() for _, p in lora.trainable(model))
                say(f"training {count:,} parameters: {s.objective}, {s.steps} steps of {s.batch}, lr {s.lr}")
                reference = base_reference(model) if s.objective != "sft" or s.replay > 0 else None
                loss = make_loss(s, model, reference, judge_reward(sets.tok, s.stop), sets.neutral)
                align(model, sets.train, s, loss, folder)
                results |= dict(parameters=count, drift=save(s, model, sets, folder))
            elif s.sae == "fit":
                fit_saes(s, model, sets)
            results |= measure(s, model.requires_grad_(False), sets, folder)
            if lead():
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

def choose_sources(s):
    """The model's config; settles what depends on it: SAEs, their layers, data, chat form."""
    config = model_gemma.load_config(s.model)
    known, reads = sae_module.published(s.model, config), set(s.method) & set(sails.READS_SAE)
    need(s.sae or known or not reads, "no published SAE is known for this model: give --sae DIR or --sae fit")
    need(s.data or s.dry_run or not Path(s.model).exists(), f"give --data FILE (or --data {HH}, on the hub)")
    repo, width, layers = known or (None, "16k", sorted({config.n_layers * q // 4 for q in (1, 2, 3)}))
    s.sae, s.width, s.layers, s.data = s.sae or repo, s.width or width, s.layers or layers, s.data or HH
    s.width = str(s.fit_width) if s.sae == "fit" else s.width
    shown = ",".join(map(str, s.layers))
    inside = all(0 <= i < config.n_layers for i in s.layers)
    need(inside, f"--layers {shown}: the model has layers 0..{config.n_layers - 1}")
    tok = None if s.dry_run else data.load_tokenizer(s.model)
    s.template = s.template or data.default_template(s.model, tok)
    saes = f"; SAEs: {s.sae}, width {s.width}, layers {shown}" if reads else ""
    say(f"{s.model}: template {s.template}, {s.dtype} on {s.device}; data: {s.data}{saes}")
    return config

def dry_run(s, config):
    """Print what would be trained and what it takes, from shapes alone."""
    with torch.device("meta"):
        model = model_gemma.Gemma(config)
        total, size = sum(p.numel() for p in model.parameters()), model_gemma.DTYPES[s.dtype].itemsize
        if s.method != ["full"]:
            lora.attach(model, s.targets, s.r, s.alpha)
    count = sum(p.numel() for _, p in lora.trainable(model))
    reference = ", and again as the reference" if s.method == ["full"] and s.objective != "sft" else ""
    say(f"base {total:,} parameters, {total * size / 1e9:.1f} GB in {s.dtype}{reference}",
        f"trainable {count:,} = {count / total:.2%}, {count * 16 / 1e9:.2f} GB with gradients and moments",
        "activations come on top")

@contextlib.contextmanager
def open_folder(s):
    """Lend the run's folder with run.json in it; an existing run continues only with --resume.
    One refused before its first checkpoint leaves no run.json: the next try is not asked to resume it."""
    path, folder = Path(s.out) / "run.json", Path(s.out)
    begun, left_out = path.exists(), ("resume", "dry_run", "out", "shared", "jobs", "device", "tiny")
    own = {k: v for k, v in vars(s).items() if k not in left_out} | dict(sources=sources(s))
    together()  # all have looked before one writes
    need(s.resume or not begun, f"{folder} holds a run: add --resume to continue it, or choose another --out")
    if lead() or begun:
        data.same_settings(path, own)
    s.resume = begun
    together()
    try:
        yield folder
    except UserError:
        if lead() and not begun and not (folder / "state.safetensors").exists():
            path.unlink()
            with contextlib.suppress(OSError):  # other files are there
                folder.rmdir()
        raise

def sources(s):
    """Download all that the run will read; {what: commit sha, or hash of local files}."""
    out = dict(model=data.fingerprint(s.model, ["*.json", *model_gemma.weight_files(s.model)[1]]))
    out["data"] = data.fingerprint(s.data, list(data.data_files(s.data)[1].values()), "dataset")
    if s.method in sails.READS_SAE and s.sae != "fit":
        out["sae"] = [data.fingerprint(s.sae, [sae_module.fetch_sae(s.sae, i, s.width)[1]]) for i in s.layers]
    return out

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
        rows[part], n = data.encode(tok, some if part == "train" else some[:400], s.template, s.max_tokens)
        long += n
    counts = ", ".join(f"{len(some):,} to {part}" for part, some in rows.items())
    say(f"examples: {counts}; left out: {dropped or 'none'}, {long} longer than {s.max_tokens} tokens")
    need(all(rows.values()), f"{s.data}: too few usable examples ({counts})")
    default = [LOOKALIKES] if s.device.startswith("cuda") else []
    files_asked = s.test or [files[part] for part in files if part == "prompts"] or default
    prompts = data.read_prompts(files_asked) if files_asked else []
    if not prompts:
        say(f"no reply is judged; for a safety rate add --test {LOOKALIKES}")
    if {r["label"] for r in rows["validate"]} >= {"harmful", "benign"}:  # they can choose a learning rate
        prompts = [dict(r, id=f"validation/{n}", set="validation", expected=r["chosen"])
                   for n, r in enumerate(rows["validate"])] + prompts
    texts = data.read_texts(s.text or files["text"]) if s.text or "text" in files else []
    return SimpleNamespace(
        tok=tok, **rows, prompts=prompts,
        ends=[r["prompt_ids"] for r in data.spread(rows["train"], 8)],
        neutral=[[data.BOS] + data.encode_plain(tok, t)[:s.max_tokens] for t in texts],
        cloze=data.read_cloze(files["knowledge"], tok) if "knowledge" in files else [])

def check_rows(s, sets):
    """UserError if the run needs what the examples lack."""
    have = lambda rows, key: all(r[key] is not None for r in rows)
    key = dict(sft="chosen", dpo="rejected", rloo="label")[s.objective]
    need(have(sets.train, key), f"--objective {s.objective} needs {key} in every row of --data")
    need(have(sets.prompts, "label"), "--test needs a label, harmful or benign, in every row")
    need(s.replay == 0 or sets.neutral, "--replay needs neutral text: --text PATH, or text.txt beside --data")

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

def subspace(s, model, sets, folder):
    """Stages 1 and 2: {SAE layer: V (D, r_s)}, kept in the run's folder for --resume."""
    path = folder / "subspace.safetensors"
    if path.exists():
        with safe_open(path, "pt") as f:
            return {int(k[2:]): f.get_tensor(k) for k in f.keys() if k.startswith("V.")}
    saes, pairs, stats = dict.fromkeys(s.layers), [], {i: dict(D=model.config.d_model) for i in s.layers}
    reads = "model data shared sae width layers contrast contrast_data contrast_pairs last"
    key = [vars(s)[k] for k in reads.split()]
    if s.method in sails.READS_SAE:
        saes = keep("saes", key, lambda: load_saes(s, model, sets))
    if s.method in sails.READS_DATA:
        rows = sets.train
        if s.contrast_data:
            rows, _ = data.encode(sets.tok, data.read_pairs(s.contrast_data)[0], s.template)
        pairs = sails.contrast_pairs(rows, s.contrast, s.last)[:s.contrast_pairs]
        key = [*key, s.method in sails.READS_SAE]
        stats = keep("stats", key, lambda: sails.contrast_means(model, saes, pairs, s.micro))
    bases, chosen = sails.subspaces(
        s.method, stats, saes, k=s.k, tau=s.tau, rule=s.score, center=s.center, r=s.r, drop=s.drop,
        pool=s.subspace == "global", standardise=s.standardise, seed=s.seed)
    for i, V in bases.items():
        say(f"layer {i}: {len(chosen.get(i, ()))} features -> {V.shape[1]} directions for rank {s.r}")
    if lead():
        if chosen:
            write_features(s, model, sets, folder, saes, stats, chosen, pairs[:200])
        kept = {f"V.{i}": V for i, V in bases.items()} | {f"features.{i}": f for i, f in chosen.items()}
        model_gemma.save_tensors(path, kept)
    return bases

def fit_saes(s, model, sets):
    """The folder of SAEs trained on the model's own residuals over the dialogues and --text."""
    home = Path(s.shared) / "sae"
    if not all(any(home.glob(f"layer_{i}/*/*/params.npz")) for i in s.layers):
        rows = [r[side][0] for r in sets.train for side in ("chosen_tokens", "rejected_tokens") if r[side]]
        shuffled = lambda x: [x[i] for i in np.random.default_rng(s.seed).permutation(len(x))]
        mixed = [x for pair in zip(shuffled(rows), shuffled(sets.neutral)) for x in pair]  # of both as many
        acts = sae_module.collect_residuals(model, mixed or shuffled(rows), s.layers, s.fit_tokens, s.micro)
        for i, x in acts.items():
            sae = sae_module.train_sae(x, s.fit_width, s.fit_active, s.fit_steps, seed=s.seed, show=lead())
            if lead():
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
        warning = "   warning: it explains next to nothing; whose is it?" if q["fve"] < .1 else ""
        say(f"layer {i}: {sae.name}, FVE {q['fve']:.2f} (standardised {q['fve_standardised']:.2f}), "
            f"L0 {q['l0']:.0f}{warning}")
    return saes

def write_features(s, model, sets, folder, saes, stats, chosen, pairs):
    """The chosen features for programs (features.json) and for people (features.md)."""
    texts = [[side[0] for side in some] for some in zip(*pairs)]  # aligned, unaligned
    shown = sum(texts, []) if s.show_texts else [t[:128] for t in data.spread(sets.neutral, 128)]
    listed = sae_module.describe(model, sets.tok, saes, stats, chosen, texts, shown, sets.ends, s.micro)
    for row in listed:
        row["link"] = sae_module.neuronpedia_url(s.model, row["layer"], s.width, row["feature"])
    sides = "chosen less rejected replies" if s.contrast == "replies" else "harmful less benign prompts"
    lines = [f"# Features chosen by {s.method}, score {s.score}", "",
             f"Delta: mean activation in {sides}; t: over its standard error.", "", "```",
             *sae_module.feature_lines(listed, len(listed)), "```"]
    data.write_json(folder / "features.json", listed)
    data.write_text(folder / "features.md", "\n".join(lines) + "\n")
    say(*sae_module.feature_lines(listed))

def save(s, model, sets, folder):
    """Write what was trained and learned; {side: how far it drifted from its start} of adapters."""
    drift = lora.mean_drift(lora.drift(model))
    if lead() and s.method == "full":
        model_gemma.save_gemma(model, folder)
        sets.tok.save(str(folder / "tokenizer.json"))
    elif lead():
        keys = "method sae layers k tau score contrast sides freeze_basis norm_aware".split()
        how = dict(holds_basis="A of q,k,v,gate,up; B of o,down", drift=drift) | {k: vars(s)[k] for k in keys}
        lora.save_adapter(model, folder, s.model, how)
        if s.method in sails.READS_SAE:
            source = f"{s.shared}/sae" if s.sae == "fit" else s.sae, s.layers, s.width
            with lora.adapter_off(model):
                data.write_json(folder / "explain.json", sails.explain_adapter(
                    folder, model, sets.tok, source, folder / "features.json", sets.ends))
    for side, m in drift.items():
        inside = "" if m["energy"] is None else f", share of the update inside it {m['energy']:.3f}"
        say(f"{side} side: overlap with the starting subspace {m['overlap']:.3f}{inside}")
    return drift

def measure(s, model, sets, folder):
    """All measures of the model: {measure: interval}, sets {set: measures}, validation."""
    score = lambda part: evaluation.held_out(
        model, vars(sets)[part], path=folder / f"heldout-{part}.jsonl" if lead() else None)
    out, judged, path = score("test"), {}, folder / "responses.jsonl"
    out |= evaluation.knowledge(model, sets.cloze) if sets.cloze else {}
    if sets.prompts and lead():  # 8 times as many at a time as where something trains
        rows = evaluation.respond(model, sets.tok, sets.prompts, path, s.template, s.max_new, 8 * s.micro)
        verdicts = evaluation.judge_all(rows, sets.prompts, ["refusal"], None, folder / "verdicts.jsonl")
        judged = evaluation.tabulate(rows, verdicts)["refusal"]
    nll = score("validate")[evaluation.NLL]["value"][0]
    out = {name: x["value"] for name, x in out.items()}
    return out | dict(validation=judged.pop("validation", {}) | dict(NLL=nll), sets=judged)

# ---- table ----
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
            out.append(SimpleNamespace(**vars(s) | own | dict(data=s.data.replace("{seed}", str(seed)))))
    return out

def each(jobs, runs):
    """Do the runs, `jobs` at a time in processes of one thread; yields after each."""
    if jobs == 1:
        yield from map(quiet_run, runs)
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield from pool.map(quiet_run, runs)

def quiet_run(s):
    """run() without its words, which stand in the files it leaves."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        run(s)

def headline(r):
    """One run's columns: rates on its first set of prompts, else likelihood of held-out pairs."""
    rates = next(iter(r["sets"].values()), {})
    keys = ("safety rate", "over-refusal", "help", "balance", "knowledge") if rates else (
        evaluation.NLL, "prefers chosen, whole reply", "prefers chosen, per token")
    return {k: x for k in keys if (x := {**r, **rates}.get(k)) is not None}

def mean(x):
    """The mean of an interval, or a number as it is."""
    return x[0] if isinstance(x, (list, tuple)) else x

def best_rates(results):
    """{method: best rate}: by mean validation balance, if there is one, then validation NLL."""
    ranks = defaultdict(lambda: defaultdict(list))
    for r in results:
        ranks[r["method"]][r["lr"]].append((r["validation"].get("balance") or 0.0, -r["validation"]["NLL"]))
    return {m: max(rates, key=lambda lr: tuple(np.mean(rates[lr], 0).round(9))) for m, rates in ranks.items()}

def table(results):
    """Markdown lines: a row a method at its best rate, the rule, and a conclusion."""
    best, seeds, rows = best_rates(results), len({r["seed"] for r in results}), {}
    for m, lr in best.items():
        mine = [r for r in results if (r["method"], r["lr"]) == (m, lr)]  # one a seed
        over = lambda c: data.t_interval([mean(headline(r)[c]) for r in mine])
        row = headline(mine[0]) if seeds == 1 else {c: over(c) for c in headline(mine[0])}
        name = "base" if m == "base" else f"{m}, lr {lr:g}"
        rows[name] = row | dict(parameters=mine[0].get("parameters"))
    base, chosen_by = rows.pop("base") if len(best) > 2 else {}, "balance" in results[0]["validation"]
    lines = evaluation.markdown(f"scored on: {next(iter(results[0]['sets']), 'held-out pairs')}", rows)
    if len(results) > 2 * seeds:
        rule = "balance on validation prompts, then validation NLL" if chosen_by else "validation NLL"
        spread = f"± is a 95 % t-interval over {seeds} seeds" if seeds > 1 else "[ ]: 95 % over prompts"
        lines += ["", f"{spread}. Rate: the best mean {rule}."]
    if base:
        values = [f"{c} {mean(x):.3f}" for c, x in base.items() if x is not None]
        lines.append("Before alignment: " + ", ".join(values))
    if "sails" in best and len(best) > 2 and seeds > 1:
        lowest = {m: min(r["lr"] for r in results if r["method"] == m) for m in best}
        lines += [conclusion(results, "Tuned", best), conclusion(results, "At the lowest rate", lowest)]
    return lines

def conclusion(results, title, rates):
    """One sentence: SAILS against each method at these rates, paired by seed, 95 % intervals."""
    measure, sign = ("balance", 1) if "balance" in headline(results[0]) else (evaluation.NLL, -1)
    values = {m: np.array([mean(headline(r)[measure]) for r in results if (r["method"], r["lr"]) == (m, lr)])
              for m, lr in rates.items() if m != "base"}
    words = {"is ahead of": [], "cannot be told from": [], "is behind": []}
    for m in [m for m in values if m != "sails"]:
        gap, half = data.t_interval(sign * (values["sails"] - values[m]))
        word = "is ahead of" if gap > half else "is behind" if gap < -half else "cannot be told from"
        words[word].append(m)
    means = ", ".join(f"{m} {v.mean():.3f}" for m, v in values.items())
    verdict = ", ".join(f"{word} {', '.join(ms)}" for word, ms in words.items() if ms)
    return f"{title}, {measure}: {means}. SAILS {verdict}."

def report(folder, runs):
    """Write and print the table of runs, read from their folders."""
    lines = table([data.read_json(Path(r.out) / "results.json") for r in runs])
    data.write_text(folder / "table.md", "\n".join(lines) + "\n")
    chosen = [Path(r.out) / "features.json" for r in runs if r.method == "sails"]
    if chosen and len(runs) > 2:  # a single run has printed them
        shown = sae_module.feature_lines(data.read_json(chosen[0]))
        say(f"Features that SAILS chose ({chosen[0].with_suffix('.md')}):", *shown, "")
    say(*lines, f"Saved in {folder}: a folder a run, table.md")

def main():
    s = settings()
    if "RANK" in os.environ and not s.dry_run:  # torchrun
        dist.init_process_group("nccl" if s.device.startswith("cuda") else "gloo")
        s.device = f"cuda:{os.environ['LOCAL_RANK']}" if s.device.startswith("cuda") else s.device
        s.jobs = 1  # the ranks share every run
        need(s.batch >= dist.get_world_size(), "--batch must hold an example for every process")
    if s.tiny and lead():
        make_world(WORLD, 0, s.seed)
    together()
    config = choose_sources(s)
    if s.dry_run:
        return dry_run(s, config)
    name = "tiny" if s.tiny else data.model_name(s.model)
    rates = s.full_lr if s.method == ["full"] and s.full_lr else s.lr
    one = len(s.method) * len(s.seed) * len(rates) == 1
    folder = Path(s.out or (f"runs/{name}-{s.method[0]}-{s.seed[0]}" if one else f"runs/{name}"))
    runs = combinations(s, folder)
    if one:
        runs[1].out, runs[1].resume = str(folder), s.resume
        for r in reversed(runs):  # the base last: a refused run leaves nothing behind
            run(r)
    else:
        with data.progress(total=len(runs), desc="runs", disable=None if lead() else True) as bar:
            for first in (True, False):  # the bases measure and fit what other runs share
                for _ in each(s.jobs, [r for r in runs if (r.method == "base") == first]):
                    bar.update()
    if lead():
        report(folder, runs)

if __name__ == "__main__":
    data.run_main(main)
