"""train.py - the command: build the safety subspace, start LoRA in it, align, compare.

    python train.py                              the whole story on a tiny made-up world: minutes on two cores
    python train.py --model google/gemma-2-9b    the paper's run: hub model, Gemma Scope, HH-RLHF, rank 16 on q, k, v, o
    python train.py --model DIR --sae DIR|fit --data FILE      the same from local folders
Order of reading: settings - the three objectives - the training loop - a run on a model - the tiny world's comparison.
Letters: B batch, n supervised tokens or rows, D d_model, N SAE width, V a basis (D, r_s), r LoRA rank.
"""
import argparse
import contextlib
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
from data import UserError

# ---------------------------------------------------------------------------------------------------------- settings
# What depends on where we are: (a real model, the tiny world). The paper gives rank, tau and k; the rest is ours.
DEFAULTS = dict(
    r=(16, 4),                 # LoRA rank: 16 on q, k, v, o of every layer gives the paper's 0.19 % of the 9B
    k=(32, 4),                 # features chosen per SAE layer
    tau=(0.8, 1.0),            # share of the decoder rows' variance that the basis keeps
    contrast=("replies", "prompts"),
    steps=(500, 80),
    batch=(32, 16),            # preference pairs or replies per optimizer step
    micro=(4, 16),             # of these at a time in memory
    warmup=(20, 10),           # steps of linear warm-up, then linear decay to 0
    lr=(2e-4, 3e-3),
    fit_width=(4096, 256),     # --sae fit: features, and how many of them fire per token
    fit_active=(48, 8),
    fit_tokens=(180_000, 30_000),
    fit_steps=(800, 1000),
)
# Published SAEs per model family, by the name of the model or, for renamed folders, by its shape
FAMILIES = (
    ("gemma-2-2b", ("gemma2", 26, 2304), "google/gemma-scope-2b-pt-res", "16k", (5, 10, 15, 20)),
    ("gemma-2-9b", ("gemma2", 42, 3584), "google/gemma-scope-9b-pt-res", "16k", (10, 15, 20, 25, 30)),
    ("gemma-2-27b", ("gemma2", 46, 4608), "google/gemma-scope-27b-pt-res", "131k", (10, 22, 34)),
    ("gemma-3-270m", ("gemma3_text", 18, 640), "google/gemma-scope-2-270m-pt", "16k", (5, 9, 12, 15)),
    ("gemma-3-1b", ("gemma3_text", 26, 1152), "google/gemma-scope-2-1b-pt", "16k", (7, 13, 17, 22)),
)
HH = "Anthropic/hh-rlhf"
EVERY_METHOD = ("sails", "lora", "full", *sails.METHODS[1:])


def parser():
    """Every setting of every command; defaults that depend on the model stand in DEFAULTS."""
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = ap.add_argument
    a("--model", help="folder or hub id[@revision], or `tiny` for one run on the made-up world; without it: compare")
    a("--data", help=f"preference or reply file, or hub dataset (default for hub models: {HH}, harmless-base)")
    a("--test", help="a file with labels whose prompts are answered and judged after training")
    a("--sae", help="folder or hub id laid out like Gemma Scope, or `fit` to train one on the model's own residuals")
    a("--out", help="the run's folder (default: runs/MODEL-METHOD-SEED)")
    a("--resume", action="store_true", help="go on with an interrupted run in the same folder")
    a("--dry-run", action="store_true", help="say what would be trained and how much memory it takes; load no weights")
    g = ap.add_argument_group("the subspace").add_argument
    g("--method", choices=EVERY_METHOD, default="sails")
    g("--layers", type=_ints, help="layers whose SAEs are used (default: the paper's for the model)")
    g("--width", help="SAE width as its folder says (default: the family's)")
    g("--k", type=int, help="features chosen per layer")
    g("--tau", type=float, help="share of variance kept by PCA")
    g("--score", choices=("absolute", "relative"), default="absolute", help="the paper's v2 or v1")
    g("--center", action="store_true", help="centre the decoder rows before PCA")
    g("--contrast", choices=("replies", "prompts"), help="chosen against rejected replies, or harmful against benign prompts")
    g("--last", type=int, default=3, help="how many last prompt tokens --contrast prompts averages over")
    g("--contrast-data", help="a labelled file for --contrast prompts (default: --data)")
    g("--contrast-pairs", type=int, default=1000, help="pairs used to choose features")
    g("--subspace", choices=("nearest", "global"), default="nearest", help="a layer takes the nearest SAE layer's basis, or one pooled basis")
    g("--standardise", action="store_true", help="raw-pca only: divide each dimension by its standard deviation first")
    g("--drop", type=_ints, default=[], help="features never to choose, by index")
    g("--norm-aware", action="store_true", help="correct the basis for the block's norms, see lora.init_sails")
    g("--freeze-basis", action="store_true", help="the factor that holds the basis does not train")
    g("--sides", choices=("both", "read", "write"), default="both", help="where the basis is used")
    g = ap.add_argument_group("the adapter and its training").add_argument
    g("--r", "--rank", type=int, help="LoRA rank; after torchrun write --rank, for torchrun takes --r for an option of its own")
    g("--alpha", type=float, help="scale is alpha / r (default: 2 r)")
    g("--targets", type=lambda t: tuple(t.split(",")), default=("q", "k", "v", "o"), help="of q,k,v,o,gate,up,down")
    g("--objective", choices=("sft", "dpo", "rloo"), default="sft")
    g("--steps", type=int)
    g("--batch", type=int)
    g("--micro", type=int)
    g("--lr", type=float)
    g("--warmup", type=int)
    g("--clip", type=float, default=1.0, help="gradient norm")
    g("--beta", type=float, default=0.1, help="dpo: strength of the pull to the reference; rloo: weight of its KL")
    g("--samples", type=int, default=4, help="rloo: replies drawn per prompt")
    g("--sft-steps", type=int, default=0, help="so many steps of sft before dpo or rloo begins: a reward can only reinforce replies that are drawn")
    g("--max-new", type=int, default=64, help="rloo and --test: tokens per reply")
    g("--replay", type=float, default=0.0, help="weight of a KL to the base on neutral text: against forgetting")
    g("--max-tokens", type=int, default=512, help="longer examples are left out")
    g("--template", choices=data.STYLES, help="chat form (default: by the model's name)")
    g("--seed", type=int, default=0)
    g("--checkpointing", action="store_true", help="recompute blocks in the backward pass to save memory")
    g("--save-every", type=int, default=50, help="steps between checkpoints")
    g("--dtype", choices=model_gemma.DTYPES, help="base weights (default: bfloat16 on a GPU, float32 on a CPU)")
    g("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g = ap.add_argument_group("--sae fit").add_argument
    for name in ("fit-width", "fit-active", "fit-tokens", "fit-steps"):
        g("--" + name, type=int)
    g("--fit-text", help="a folder of .txt files read besides the dialogues")
    g = ap.add_argument_group("the tiny world").add_argument
    g("--compare", action="store_true", help="all methods x learning rates x seeds, one table (what no --model means)")
    g("--methods", type=lambda t: t.split(","), default=["sails", "random", "lora", "full"])
    g("--bases", type=int, default=1, help="worlds, each with its own pre-trained model and SAE")
    g("--seeds", type=int, default=3, help="alignment seeds per base")
    g("--nuisance", type=float, default=0.75, help="how strongly style goes with harm in training")
    g("--jobs", type=int, default=max(1, min(2, os.cpu_count() or 1)), help="processes")
    return ap


def _ints(text):
    return [int(x) for x in text.split(",")]


def settle(s, tiny=False):
    """Fill in the defaults that depend on the kind of model; returns s."""
    for name, pair in DEFAULTS.items():
        if getattr(s, name) is None:
            setattr(s, name, pair[tiny])
    s.alpha = 2.0 * s.r if s.alpha is None else s.alpha
    s.dtype = s.dtype or ("bfloat16" if s.device.startswith("cuda") else "float32")
    for name in ("r", "k", "steps", "batch", "micro", "samples", "max_new", "contrast_pairs", "save_every"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    if s.device.startswith("cuda") and not torch.cuda.is_available() and not s.dry_run:
        raise UserError(f"--device {s.device}: torch sees no GPU here")
    if not 0 < s.tau <= 1:
        raise UserError(f"--tau {s.tau}: must be above 0 and at most 1")
    if s.objective == "rloo" and s.samples < 2:
        raise UserError(f"--samples {s.samples}: the leave-one-out baseline of rloo needs at least 2 replies a prompt")
    if s.method == "full" and s.dtype != "float32":
        raise UserError("--method full trains the base weights themselves, and bfloat16 rounds such small steps away: add --dtype float32")
    return s


# --------------------------------------------------------------------------------------------------- the objectives
# Each takes one micro-batch and the size of the whole batch, and returns (loss to add up, what to log). Dividing by the
# whole batch's count, not each micro-batch's, makes the sum over micro-batches (and machines) the loss of the batch.
def sft_loss(model, rows, whole):
    """-log p of the chosen replies: summed over supervised tokens, divided by `whole`, all such tokens of the batch."""
    nll, _ = model.reply_nll([r["chosen"] for r in rows])
    return nll.sum() / whole, {}


def reply_logp(model, rows):
    """log p of whole replies, summed over their tokens: rows of (ids, mask) -> (B,) fp32."""
    return evaluation.sequence_logprobs(model, rows)[0]


def dpo_loss(model, reference, rows, beta, whole):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta * margin), the margin being how much
    more than the reference the policy prefers chosen to rejected, in nats over whole replies."""
    both = [r["chosen"] for r in rows] + [r["rejected"] for r in rows]
    with torch.no_grad(), reference() as ref:
        then = reply_logp(ref, both)
    gain = reply_logp(model, both) - then
    margin = gain[:len(rows)] - gain[len(rows):]                                               # (B,)
    return -torch.nn.functional.logsigmoid(beta * margin).sum() / whole, {"margin": float(margin.detach().sum()) / whole}


def rloo_loss(model, reference, rows, reward, s, whole, seed):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): draw s.samples replies a prompt; a reply's advantage is
    its reward less the mean reward of the prompt's other replies, and -advantage * log p is minimised. The reward carries
    the pull to the reference: reward - beta * (log p - log p_ref)."""
    prompts = [r["prompt"] for r in rows for _ in range(s.samples)]
    new = model_gemma.generate(model, prompts, s.max_new, s.stop, temperature=1.0, seed=seed)
    drawn = [(p + y, [0] * len(p) + [1] * len(y)) for p, y in zip(prompts, new)]
    logp = reply_logp(model, drawn)
    with torch.no_grad(), reference() as ref:
        kl = logp.detach() - reply_logp(ref, drawn)
    gain = torch.tensor([reward(rows[i // s.samples], y) for i, y in enumerate(new)], device=logp.device)
    advantage = leave_one_out((gain - s.beta * kl).view(len(rows), s.samples)).view(-1)
    return -(advantage * logp).sum() / whole / s.samples, {"reward": float(gain.sum()) / whole / s.samples, "kl": float(kl.sum()) / whole / s.samples}


def leave_one_out(reward):
    """reward (prompts, samples) -> each reward less the mean of the others in its row."""
    m = reward.shape[1]
    assert m > 1, "the baseline needs at least two replies a prompt"
    return (reward - reward.mean(1, keepdim=True)) * m / (m - 1)


def judge_reward(tok, stop):
    """The reward of rloo, from the evaluation's own judge: 1 for refusing a harmful or not refusing a benign prompt."""
    def reward(row, ids):
        return float(evaluation.starts_with_refusal(tok.decode([t for t in ids if t not in stop])) == (row["label"] == "harmful"))
    return reward


def replay_loss(model, reference, texts):
    """KL(base || model) in nats per token on neutral texts: what the model may not forget."""
    ids, keep = (t.to(model.device) for t in data.pad(texts))
    with torch.no_grad(), reference() as ref:
        then = ref.logits(ref.hidden(ids, keep)[0][keep]).log_softmax(-1)                       # (n, V)
    now = model.logits(model.hidden(ids, keep)[0][keep]).log_softmax(-1)
    return (then.exp() * (then - now)).sum(-1).mean()


# ------------------------------------------------------------------------------------------------- the training loop
def encode(tok, examples, style, max_tokens=None):
    """Examples -> rows of ids and masks, leaving out those longer than max_tokens; (rows, how many were left out)."""
    rows = []
    for ex in examples:
        row = dict(id=ex["id"], label=ex["label"], prompt=data.render_chat(tok, ex["turns"], None, style)[0],
                   chosen=data.render_chat(tok, ex["turns"], ex["chosen"], style), rejected=None)
        if ex["rejected"] is not None:
            row["rejected"] = data.render_chat(tok, ex["turns"], ex["rejected"], style)
        if max_tokens is None or max(len(row[x][0]) for x in ("chosen", "rejected") if row[x]) <= max_tokens:
            rows.append(row)
    return rows, len(examples) - len(rows)


def lr_at(step, s):
    """Linear warm-up to s.lr over s.warmup steps, then linear decay that would reach 0 one step after the last."""
    return s.lr * min((step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.steps - s.warmup), 1.0)


def base_reference(model):
    """A context that lends the model as it was before training: for adapters the same weights with adapters off, for full
    fine-tuning a frozen copy made now."""
    if lora.adapters(model):
        @contextlib.contextmanager
        def reference():
            with lora.adapter_off(model):
                yield model
        return reference
    frozen = copy.deepcopy(model).requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)


def align(model, rows, s, folder=None, reference=None, reward=None, neutral=None, watch=None):
    """Train what requires a gradient on rows, s.steps steps; the run's folder gets log.jsonl and resumable checkpoints.

    A step is a pure function of (weights, optimizer state, s, step), so a resumed run is the undisturbed one, bit for bit.
    reference  lends the model as it was before (dpo, rloo, replay)      reward(row, new ids) -> number (rloo)
    neutral    texts (lists of ids) for the replay term                  watch(step) is called before every step
    """
    params = lora.trainable(model)
    opt = torch.optim.AdamW([p for _, p in params], lr=s.lr, weight_decay=0.0)
    start = load_state(folder, params, opt) if folder and s.resume else 0
    log = Log(folder, start) if folder and lead() else None
    with data.progress(total=s.steps, initial=start, desc="align", disable=log is None) as bar:
        for step in range(start, s.steps):
            if watch:
                watch(step)
            began = time.perf_counter()
            opt.param_groups[0]["lr"] = lr_at(step, s)
            batch = [rows[i] for i in data.batch_at(len(rows), s.batch, s.seed, step)]
            told = backward(model, batch, s, step, reference, reward)
            if s.replay > 0:
                texts = [neutral[i] for i in data.batch_at(len(neutral), s.batch, s.seed + 1, step)]
                (s.replay * replay_loss(model, reference, texts)).backward()
            told["grad_norm"] = float(torch.nn.utils.clip_grad_norm_([p for _, p in params], s.clip))
            if not np.isfinite(told["loss"]) or not np.isfinite(told["grad_norm"]):
                raise UserError(f"step {step}: the loss or its gradient is not a number any more; lower --lr (now {s.lr}) and start again")
            opt.step()
            opt.zero_grad(set_to_none=True)
            if log:
                told["tokens_per_s"] = round(told["tokens"] / (time.perf_counter() - began))
                log.write(dict(step=step, lr=lr_at(step, s), **told))
                bar.set_postfix(refresh=False, loss=f"{told['loss']:.3f}", tokens_per_s=told["tokens_per_s"]), bar.update()
                if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
                    save_state(folder, params, opt, step + 1)
    if watch:
        watch(s.steps)


def backward(model, batch, s, step, reference, reward):
    """Add up one step's gradients over micro-batches, and over machines under torchrun; returns what to log."""
    rank, machines = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = batch[rank::machines]
    tokens = sum(sum(r["chosen"][1]) for r in batch)
    told = dict(loss=0.0, tokens=tokens)
    for at in range(0, len(mine), s.micro):
        rows = mine[at:at + s.micro]
        if s.objective == "sft" or step < s.sft_steps:
            loss, more = sft_loss(model, rows, tokens)
        elif s.objective == "dpo":
            loss, more = dpo_loss(model, reference, rows, s.beta, len(batch))
        else:
            draw = ((s.seed * 1_000_003 + step) * machines + rank) * s.batch + at       # a seed of its own for every draw
            loss, more = rloo_loss(model, reference, rows, reward, s, len(batch), draw)
        loss.backward()
        for key, value in {"loss": float(loss.detach()), **more}.items():
            told[key] = told.get(key, 0.0) + value
    if machines > 1:
        for _, p in lora.trainable(model):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        keys = sorted(told.keys() - {"tokens"})
        sums = torch.tensor([told[k] for k in keys], dtype=torch.float64, device=model.device)
        dist.all_reduce(sums)
        told.update(zip(keys, sums.tolist()))
    return told


def lead():
    """Is this the process that prints and writes? (the only one, or rank 0 under torchrun)"""
    return not dist.is_initialized() or dist.get_rank() == 0


class Log:
    """log.jsonl, a line per step; a resumed run first drops the lines of steps that will be taken again."""

    def __init__(self, folder, start):
        self.path = Path(folder) / "log.jsonl"
        old = self.path.read_text().splitlines()[:start] if start and self.path.exists() else []
        data.write_text(self.path, "".join(line + "\n" for line in old))

    def write(self, row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")


def save_state(folder, params, opt, step):
    """state.safetensors: trained tensors, Adam's moments and the step, renamed into place so that a kill leaves the old one."""
    tensors = {}
    for name, p in params:
        tensors["p." + name] = p.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = opt.state[p][key]
    with data.replacing(Path(folder) / "state.safetensors") as beside:
        save_file({k: t.contiguous() for k, t in tensors.items()}, beside, metadata={"step": str(step)})


@torch.no_grad()
def load_state(folder, params, opt):
    """Put a checkpoint back into parameters and optimizer; returns the step to go on with, 0 without a checkpoint."""
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt", device="cpu") as f:
        step = int(f.metadata()["step"])
        for name, p in params:
            p.copy_(f.get_tensor("p." + name))
            opt.state[p] = {key: f.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            opt.state[p]["step"] = torch.tensor(float(step))
    return step


# -------------------------------------------------------------------------------------------------- a run on a model
def family(spec, config):
    """The row of FAMILIES for a model's name or, failing that, shape; None for any other model."""
    name = str(spec).split("@")[0].rstrip("/").split("/")[-1]
    shape = (config.raw["model_type"], config.n_layers, config.d_model)
    hits = [f for f in FAMILIES if name == f[0] or name.startswith(f[0] + "-")] or [f for f in FAMILIES if f[1] == shape]
    return hits[0] if hits else None


def say(*words):
    """Print a decision, once per run."""
    if lead():
        print(*words, flush=True)


def run(s):
    """The paper's pipeline on one model, stage by stage; every stage leaves a file, and a resumed run starts from the last."""
    config = model_gemma.load_config(s.model)
    choose_sources(s, config)
    if s.dry_run:
        return dry_run(s, config)
    say("\n".join(describe(s)))
    with open_folder(s) as folder:
        tok = data.load_tokenizer(s.model)
        s.stop = data.stop_ids(tok, s.template)
        rows, held, examples = load_rows(s, tok)
        model = model_gemma.load_gemma(s.model, model_gemma.DTYPES[s.dtype], s.device)
        model.checkpointing = s.checkpointing
        if s.method == "full":
            model.requires_grad_(True)
        else:
            probe = data.pad([rows[0]["chosen"][0]])[0].to(s.device)
            before = model(probe)
            bases = {} if s.method == "lora" else subspace(s, model, tok, examples, folder)
            lora.attach(model, s.targets, s.r, s.alpha)
            start_adapters(s, model, bases)
            with torch.no_grad():
                assert torch.equal(model(probe), before), "the adapted model must be the base before the first step"
        count, total = sum(p.numel() for _, p in lora.trainable(model)), sum(p.numel() for p in model.parameters())
        say(f"training {count:,} of {total:,} parameters ({100 * count / total:.2f} %), {s.objective}, {s.steps} steps of {s.batch}, lr {s.lr:g}")
        reference = base_reference(model) if s.objective != "sft" or s.replay > 0 else None
        align(model, rows, s, folder, reference, judge_reward(tok, s.stop), [r["prompt"] for r in rows])
        if lead():
            finish(s, model, tok, held, folder)


def choose_sources(s, config):
    """Defaults that depend on the model: its SAEs and their layers, the data, the chat form."""
    fam = family(s.model, config)
    s.template = s.template or data.default_style(s.model, None if s.dry_run else data.load_tokenizer(s.model))
    needs_sae = s.method not in ("lora", "full")
    if needs_sae and s.sae is None:
        if fam is None:
            raise UserError("no published SAE is known for this model: give --sae DIR, or --sae fit to train one")
        s.sae = fam[2]
    if s.layers is None:
        quarters = sorted({config.n_layers * q // 4 for q in (1, 2, 3)})
        s.layers = list(fam[4]) if fam and max(fam[4]) < config.n_layers else quarters
    if any(not 0 <= i < config.n_layers for i in s.layers):
        raise UserError(f"--layers {','.join(map(str, s.layers))}: the model has layers 0..{config.n_layers - 1}")
    s.width = s.width or (fam[3] if fam else "16k")
    if s.data is None:
        if Path(s.model).exists() and not s.dry_run:
            raise UserError(f"give --data FILE (or --data {HH} for the hub's preference data)")
        s.data = HH


def describe(s):
    """The decisions of a run, a line each."""
    form = {"gemma": "Gemma's chat turns", "hh": "HH-RLHF's Human/Assistant form", "tiny": "the tiny world's words"}[s.template]
    yield f"{s.model}: {form}, {s.dtype} on {s.device}"
    if s.method not in ("lora", "full"):
        base = " (the base model's SAEs on Gemma's chat turns: Gemma Scope reports that they transfer to -it)" if "-pt-" in s.sae and s.template == "gemma" else ""
        yield f"SAEs: {s.sae}, width {s.width if s.sae != 'fit' else s.fit_width}, layers {','.join(map(str, s.layers))}{base}"
    yield f"data: {s.data}"


def dry_run(s, config):
    """What would be trained and what it takes, from shapes alone."""
    with torch.device("meta"):
        model = model_gemma.Gemma(config)
        total = sum(p.numel() for p in model.parameters())
        if s.method != "full":
            lora.attach(model, s.targets, s.r, s.alpha)
    count = sum(p.numel() for _, p in lora.trainable(model))
    size = 2 if s.dtype == "bfloat16" else 4
    say("\n".join(describe(s)))
    say(f"base {total:,} parameters; trainable {count:,} = {100 * count / total:.2f} %")
    say(f"memory: base {total * size / 1e9:.1f} GB in {s.dtype}, trained tensors, gradients and Adam's moments {count * 16 / 1e9:.2f} GB"
        + (", and the same base again as the reference" if s.method == "full" and s.objective != "sft" else "") + "; activations come on top")


@contextlib.contextmanager
def open_folder(s):
    """Lend the run's folder with run.json in it. An existing run is gone on with only under --resume and the same settings;
    a new one that is refused before its first checkpoint leaves no run.json, for that would ask the next try for --resume."""
    name = str(s.model).split("@")[0].rstrip("/").split("/")[-1]
    folder = Path(s.out or f"runs/{name}-{s.method}-{s.seed}")
    told = {k: v for k, v in vars(s).items() if k not in ("resume", "dry_run", "out", "jobs", "device")}
    there = (folder / "run.json").exists()
    if dist.is_initialized():
        dist.barrier()                                 # all have looked before one writes
    if there:
        if not s.resume:
            raise UserError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")
        old = data.read_json(folder / "run.json")["settings"]
        differ = [k for k, v in json.loads(json.dumps(told)).items() if old.get(k) != v]
        if differ:
            raise UserError(f"{folder} was started with another {', '.join(differ)}; a resumed run must keep its settings")
    else:
        s.resume = False
        sources = fetch_sources(s)                     # by every process: a barrier would not wait for so many gigabytes
        if lead():
            data.write_json(folder / "run.json", dict(settings=told, git=_git_commit(), versions=_versions(), sources=sources))
    if dist.is_initialized():
        dist.barrier()
    try:
        yield folder
    except UserError:
        if lead() and not s.resume and not (folder / "state.safetensors").exists():
            (folder / "run.json").unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def _git_commit():
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def _versions():
    import huggingface_hub, safetensors, tokenizers
    return dict(python=sys.version.split()[0], **{m.__name__: m.__version__ for m in (torch, np, safetensors, tokenizers, huggingface_hub)})


def fetch_sources(s):
    """Download all that the run will read -> its commit shas, None for local paths. Done before run.json is written, so
    that a wrong layer, a closed gate or a lost connection leaves no half-begun run for the next try to stumble over."""
    data.fetch(s.model, ["tokenizer.json"])
    model_gemma.weight_files(s.model)
    data_files(s.data)
    out = dict(model=data.revision(s.model), data=data.revision(s.data, "dataset"))
    if s.sae != "fit" and s.method not in ("lora", "full"):
        out["sae"] = [sae_module.fetch_sae(s.sae, i, s.width)[2] for i in s.layers][0]
    return out


def data_files(spec):
    """(training file, test file or None) of --data: a local file, or harmless-base of a hub dataset or its local copy."""
    path = Path(spec)
    if path.is_file():
        return path, None
    names = data.listing(spec, "dataset")
    pick = {part: [n for n in names if n.endswith((f"{part}.jsonl", f"{part}.jsonl.gz"))] for part in ("train", "test")}
    for part, hits in pick.items():
        pick[part] = [n for n in hits if n.startswith("harmless-base/")] or hits
    if not pick["train"]:
        raise UserError(f"{spec}: no train.jsonl or train.jsonl.gz in it; files there: {', '.join(names[:6]) or 'none'}")
    wanted = pick["train"][:1] + pick["test"][:1]
    folder, _ = data.fetch(spec, wanted, "dataset")
    return folder / wanted[0], folder / wanted[1] if len(wanted) > 1 else None


def load_rows(s, tok):
    """(training rows, held-out rows, training examples). Without a test file a tenth of the prompts is held out."""
    train_file, test_file = data_files(s.data)
    examples, dropped = data.read_pairs(train_file)
    if test_file:
        held, _ = data.read_pairs(test_file)
    else:
        examples, held = data.split_by_prompt(examples, (9, 1))
    rows, long = encode(tok, examples, s.template, s.max_tokens)
    held, _ = encode(tok, held[:400], s.template, s.max_tokens)
    say(f"{len(rows):,} examples to train on, {len(held)} held out; left out: {dropped or 'none'}, {long} longer than {s.max_tokens} tokens")
    if not rows or not held:
        raise UserError(f"{s.data}: too few usable examples ({len(rows)} to train on, {len(held)} held out)")
    if s.objective == "dpo" and any(r["rejected"] is None for r in rows):
        raise UserError("--objective dpo needs a rejected reply in every row")
    if s.objective == "rloo" and any(r["label"] is None for r in rows):
        raise UserError('--objective rloo needs "label": "harmful" or "benign" in every row, to know what to reward')
    read_test(s)
    return rows, held, examples


def read_test(s):
    """The examples of --test, which need labels; read once before training too, for hours later is too late to refuse them."""
    examples = data.read_pairs(s.test)[0] if s.test else []
    if any(ex["label"] is None for ex in examples):
        raise UserError(f'{s.test}: every row needs "label": "harmful" or "benign"')
    return examples


def load_layer_sae(s, layer):
    return sae_module.load_sae(s.sae, layer, s.width, device=s.device)


def subspace(s, model, tok, examples, folder):
    """Stages 1 and 2 for every SAE layer -> {layer: V}; written to subspace.safetensors, features.json and features.md."""
    path = folder / "subspace.safetensors"
    if s.resume and path.exists():
        with safe_open(path, "pt") as f:
            return {int(k.split(".")[1]): f.get_tensor(k) for k in f.keys() if k.startswith("V.")}
    saes = fit_saes(s, model, tok, examples, folder) if s.sae == "fit" else {i: load_layer_sae(s, i) for i in s.layers}
    for i, sae in saes.items():
        sae_module.check_fit(sae, model, i)
    if s.contrast_data:
        examples = data.read_pairs(s.contrast_data)[0]
    pairs = sails.contrast_rows(tok, examples, s.template, s.contrast, s.last)
    pairs = [p for p in pairs if max(len(p[0][0]), len(p[1][0])) <= s.max_tokens][:s.contrast_pairs]
    say_fit(model, saes, pairs)
    stats = sails.contrast_means(model, saes, pairs, s.micro, s.seed)
    if any(not 0 <= f < len(sae.W_dec) for f in s.drop for sae in saes.values()):
        raise UserError(f"--drop {','.join(map(str, s.drop))}: the SAE has features 0..{min(len(sae.W_dec) for sae in saes.values()) - 1}")
    for st in stats.values():                          # a dropped feature is one that tells nothing apart
        st["mu_aligned"][s.drop] = st["mu_unaligned"][s.drop] = 0
    bases, chosen = sails.build_bases(s.method, stats, saes, s.k, s.tau, s.score, s.center, s.r, s.subspace == "global", s.standardise, s.seed)
    if lead():
        for i, V in bases.items():
            say(f"layer {i}: {len(chosen[i]) if i in chosen else 'no'} features -> {V.shape[1]} directions for rank {s.r}")
        fires = sae_module.firing_tokens(model, tok, saes, chosen, [side[0] for p in pairs[:200] for side in p], s.micro) if chosen else {}
        save_subspace(s, model, tok, folder, saes, stats, bases, chosen, fires)
    return bases


@torch.no_grad()
def say_fit(model, saes, pairs):
    """One line per SAE: how well it explains this model's residuals on a few of the texts it will read."""
    ids, keep = (t.to(model.device) for t in data.pad([p[0][0] for p in pairs[:8]]))
    taps = model.residuals(ids, list(saes), keep)
    for i, sae in saes.items():
        fit = sae_module.sae_report(sae, taps[i][keep & (ids != data.BOS)].float())
        doubt = "   warning: it explains next to nothing; another model's SAE?" if fit["fve"] < 0.1 else ""
        say(f"layer {i}: {sae.name or 'fitted SAE'}, FVE {fit['fve']:.2f} (standardised {fit['fve_standardised']:.2f}), L0 {fit['l0']:.0f}{doubt}")


def fit_saes(s, model, tok, examples, folder):
    """Train an SAE per layer on the model's own residuals over the dialogues (and --fit-text), and save them like Gemma Scope."""
    if s.resume and all(any((folder / "sae").glob(f"layer_{i}/*/*/params.npz")) for i in s.layers):
        s_fit = SimpleNamespace(**{**vars(s), "sae": folder / "sae", "width": str(s.fit_width)})
        return {i: load_layer_sae(s_fit, i) for i in s.layers}
    rows = [data.render_chat(tok, ex["turns"], ex[side], s.template)[0][:s.max_tokens] for ex in examples for side in ("chosen", "rejected")
            if ex[side] is not None]
    rows = [rows[i] for i in np.random.default_rng(s.seed).permutation(len(rows))]
    if s.fit_text:
        files = sorted(Path(s.fit_text).glob("**/*.txt"))
        if not files:
            raise UserError(f"--fit-text {s.fit_text}: no .txt file in it")
        books = [tok.encode(f.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids for f in files]
        pieces = [[data.BOS] + b[at:at + 127] for b in books for at in range(0, len(b) - 127, 127)]
        pieces = [pieces[i] for i in np.random.default_rng(s.seed).permutation(len(pieces))]
        rows = [r for pair in zip(rows, pieces) for r in pair]         # half and half, as far as the shorter one goes
    acts = sae_module.collect_residuals(model, rows, s.layers, s.fit_tokens, s.micro)
    saes = {}
    for i in s.layers:
        saes[i] = sae_module.train_sae(acts[i], s.fit_width, s.fit_active, s.fit_steps, min(1024, len(acts[i])), seed=s.seed, show=lead())
        fit = sae_module.sae_report(saes[i], acts[i])
        say(f"layer {i}: fitted on {len(acts[i]):,} tokens, FVE {fit['fve']:.3f} (standardised {fit['fve_standardised']:.3f}), L0 {fit['l0']:.1f}, dead {fit['dead']:.3f}")
        if lead():
            saes[i].name = sae_module.save_sae(saes[i], folder / "sae", i, fit["l0"])
        saes[i].to(s.device)
    return saes


def save_subspace(s, model, tok, folder, saes, stats, bases, chosen, fires):
    """The chosen features for people (features.md) and programs (features.json), and the bases."""
    tensors = {f"V.{i}": V.contiguous() for i, V in bases.items()}
    listed = []
    for i, features in chosen.items():
        st, W = stats[i], saes[i].W_dec[features.to(saes[i].W_dec.device)].cpu()
        tensors[f"features.{i}"] = features
        delta = st["mu_aligned"] - st["mu_unaligned"]
        for j, (f, words) in enumerate(zip(features.tolist(), sae_module.promoted_tokens(model, tok, W))):
            listed.append(dict(layer=i, feature=f, delta=float(delta[f]), mu_aligned=float(st["mu_aligned"][f]), mu_unaligned=float(st["mu_unaligned"][f]),
                               t=float(st["t"][f]), promotes=words, fires_on=fires[i][j], columns=[round(x, 3) for x in (W[j] @ bases[i].cpu()).tolist()],
                               link=sae_module.neuronpedia_url(s.model, i, s.width, f)))
    lines = ["# Chosen features", "", f"{s.method}, score {s.score}, contrast {s.contrast}. A feature's difference is mean activation in aligned less "
             "that in unaligned text, t that over its standard error; the last columns show the tokens that its decoder row promotes "
             "through the tied head, and the tokens with the largest shares of its activation.", "",
             "| layer | feature | difference | aligned | unaligned | t | promotes | fires on |", "| --- |" + " --- |" * 7]
    for f in listed:
        name = f"[{f['feature']}]({f['link']})" if f["link"] else f["feature"]
        words, where = (" ".join("`" + w.replace("|", "\\|").replace("`", "'").replace("\n", "\\n") + "`" for w in ws)
                        for ws in (f["promotes"], [w for w, _ in f["fires_on"]]))
        lines.append(f"| {f['layer']} | {name} | {f['delta']:+.3f} | {f['mu_aligned']:.3f} | {f['mu_unaligned']:.3f} | {f['t']:+.1f} | {words} | {where} |")
    data.write_json(folder / "features.json", listed)
    data.write_text(folder / "features.md", "\n".join(lines) + "\n")
    for f in sorted(listed, key=lambda f: -abs(f["delta"]))[:8]:
        say(f"  layer {f['layer']:2d} feature {f['feature']:5d}  difference {f['delta']:+8.3f}  t {f['t']:+6.1f}  promotes {show(f['promotes'][:5])}"
            f"  fires on {show(w for w, _ in f['fires_on'][:5])}")
    with data.replacing(folder / "subspace.safetensors") as beside:
        save_file(tensors, beside)


def show(words):
    """Tokens on one line: spaces and newlines inside them made visible, quotes left off."""
    return " ".join(repr(w)[1:-1].replace(" ", "_") for w in words)


def start_adapters(s, model, bases):
    """Plain LoRA's start, or the subspace's."""
    if not bases:
        return lora.init_lora(model, s.seed)
    sides = ("read", "write") if s.sides == "both" else (s.sides,)
    return lora.init_sails(model, bases, s.seed, s.freeze_basis, s.norm_aware, sides)


def finish(s, model, tok, held, folder):
    """Save what was trained, then say what it did to held-out pairs; --test prompts are answered, saved, then judged."""
    if s.method == "full":
        model_gemma.save_gemma(model, folder)
        tok.save(str(folder / "tokenizer.json"))
        base = None
    else:
        moved = lora.mean_drift(lora.drift(model))
        lora.save_adapter(model, folder, s.model, dict(method=s.method, side_of_basis="A of q,k,v,gate,up; B of o,down", drift=moved,
                                                       frozen=s.freeze_basis, norm_aware=s.norm_aware, sae=s.sae, layers=s.layers, k=s.k, tau=s.tau))
        for side, m in moved.items():
            inside = "none was made" if m["energy"] is None else f"{m['energy']:.3f}"
            say(f"{side.replace('write', 'writ')}ers: overlap with the starting subspace {m['overlap']:.3f}, share of the update inside it {inside}")
        with lora.adapter_off(model):
            base = held_out(model, held)
    after = held_out(model, held)
    results = dict(base=base, aligned=after)
    lines = ["| held-out | base | aligned |", "| --- | --- | --- |"]
    for key in after:
        lines.append(f"| {key} | {'-' if base is None else f'{base[key]:.3f}'} | {after[key]:.3f} |")
    if s.test:
        results["test"] = answer_test(s, model, tok, folder)
        lines += ["", "| replies to " + Path(s.test).name + " | share |", "| --- | --- |"] + [f"| {k} | {v:.3f} |" for k, v in results["test"].items()]
    data.write_json(folder / "results.json", results)
    data.write_text(folder / "table.md", "\n".join(lines) + "\n")
    say("\n".join(lines))
    say(f"saved in {folder}")


@torch.no_grad()
def held_out(model, rows, batch=8):
    """Mean NLL of chosen replies per token and, with rejected ones, preference accuracy by whole reply and per token."""
    sums = {}
    for side in ("chosen", "rejected"):
        texts = [r[side] for r in rows if r[side] is not None]
        parts = [reply_logp(model, texts[at:at + batch]) for at in range(0, len(texts), batch)]
        sums[side] = (torch.cat(parts).cpu(), torch.tensor([sum(m) for _, m in texts])) if texts else None
    logp, n = sums["chosen"]
    out = {"NLL of chosen, nats per token": float(-logp.sum() / n.sum())}
    if sums["rejected"] and len(sums["rejected"][0]) == len(logp):
        rejected, m = sums["rejected"]
        out["prefers chosen, whole reply"] = float((logp > rejected).float().mean())
        out["prefers chosen, per token"] = float((logp / n > rejected / m).float().mean())
    return out


def answer_test(s, model, tok, folder):
    """Greedy replies to --test, saved first, then judged by how they open."""
    examples = read_test(s)
    replies = evaluation.reply(model, tok, examples, s.template, s.max_new, 64)
    told = [dict(id=ex["id"], label=ex["label"], **y) for ex, y in zip(examples, replies)]
    data.write_text(folder / "responses.jsonl", "".join(json.dumps(t) + "\n" for t in told))
    refused = np.array([evaluation.starts_with_refusal(t["reply"]) for t in told])
    harmful = np.array([t["label"] == "harmful" for t in told])
    right = np.array([t["reply"].startswith(ex["chosen"].strip()) for t, ex in zip(told, examples)])
    share = lambda what, among: float(what[among].mean()) if among.any() else float("nan")
    return {"safety rate": share(refused, harmful), "over-refusal": share(refused, ~harmful), "helpful and correct": share(right, ~harmful)}


# ----------------------------------------------------------------------------------- the tiny world and its comparison
# A made-up world (data.tiny_world) in which we know what is harmful. The same functions as above run on it; only the
# settings are smaller. A cell is one alignment: one base, one seed, one method, one learning rate; cells are independent.
TINY_MODEL = dict(model_type="gemma2", vocab_size=286, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=4096)
TINY_LAYER = 2                                         # the third of four: the SAE reads the residual stream after it
# learning rates tried, as many for every method; full fine-tuning moves every weight, so its rates are ten times smaller
GRID = dict(full=(1e-4, 3e-4, 1e-3))
ADAPTER_GRID = (1e-3, 3e-3, 1e-2)


PARTS = ("train", "validate", "id_test", "ood", "lookalike")


def pretrain_tiny(world, seed, steps=400, batch=64, lr=4e-3):
    """Train the tiny Gemma on all of a world's sentences, drawn by their weights: AdamW, one cycle, 400 steps."""
    rng = torch.Generator().manual_seed(seed)
    model = model_gemma.Gemma(model_gemma.config_from_json(TINY_MODEL))
    for p in model.parameters():
        if p.dim() == 2:                               # smaller embeddings learn the facts, but not always what is harmful
            torch.nn.init.normal_(p, std=TINY_MODEL["hidden_size"] ** -0.5, generator=rng)
    texts, weights = data.world_text(world)
    ids, keep = data.pad([world.tok.encode(t).ids for t in texts])
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    for _ in data.progress(range(steps), desc=f"base {seed}", disable=None):
        pick = torch.multinomial(torch.tensor(weights), batch, replacement=True, generator=rng)
        x, real = ids[pick], keep[pick]
        x, real = x[:, :int(real.sum(1).max())], real[:, :int(real.sum(1).max())]               # to the longest row
        h, _ = model.hidden(x[:, :-1])
        loss = model.nll(h[real[:, 1:]], x[:, 1:][real[:, 1:]]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(), cycle.step(), opt.zero_grad()
    return model.requires_grad_(False)


def make_world(folder, seed, s, layers=(TINY_LAYER,)):
    """A tiny world on disk, as if it came from the hub: model, tokenizer, SAEs and preference files. Made once, then reused."""
    folder = Path(folder)
    if (folder / "done.json").exists():
        return folder
    torch.set_num_threads(1)                           # matrices this small: a second thread only waits for the first
    world = data.tiny_world(seed)
    model = pretrain_tiny(world, seed)
    texts, weights = data.world_text(world)
    rows = [world.tok.encode(texts[i]).ids for i in np.random.default_rng(seed).choice(len(texts), s.fit_tokens // 8, p=weights)]
    acts, reports = sae_module.collect_residuals(model, rows, layers, s.fit_tokens, 64), {}
    for i in layers:
        sae = sae_module.train_sae(acts[i], s.fit_width, s.fit_active, s.fit_steps, 512, 2e-3, seed)
        reports[i] = sae_module.sae_report(sae, acts[i])
        sae_module.save_sae(sae, folder / "sae", i, reports[i]["l0"])
    model_gemma.save_gemma(model, folder)
    world.tok.save(str(folder / "tokenizer.json"))
    split = data.world_split(world, 0)
    for name, examples in ((part, split[part]) for part in PARTS):
        data.write_text(folder / f"{name}.jsonl", "".join(json.dumps(dict(prompt=ex["turns"], **{k: ex[k] for k in ("id", "label", "chosen", "rejected")})) + "\n"
                                                          for ex in examples))
    data.write_json(folder / "done.json", dict(seed=seed, sae=reports[TINY_LAYER]))
    return folder


@functools.lru_cache(maxsize=1)
def open_world(folder):
    """(world, model, {layer: SAE}, harm direction (D,)) of a folder that make_world wrote."""
    world = data.tiny_world(data.read_json(Path(folder) / "done.json")["seed"])
    model = model_gemma.load_gemma(folder)
    layers = sorted(int(p.name.removeprefix("layer_")) for p in (Path(folder) / "sae").glob("layer_*"))
    saes = {i: sae_module.load_sae(Path(folder) / "sae", i, str(DEFAULTS["fit_width"][1])) for i in layers}
    return world, model, saes, harm_direction(world, model)


@torch.no_grad()
def tiny_states(world, model, layer=TINY_LAYER):
    """Residuals (requests, 3, D) at the last three prompt tokens of every request in the world; harmful, topic (requests,)."""
    examples = data.all_requests(world, np.arange(len(world.topic)))
    prompts = [data.render_chat(world.tok, ex["turns"], None, "tiny")[0] for ex in examples]
    obj = np.array([int(ex["id"].split("-")[2]) for ex in examples])
    return model.residuals(data.pad(prompts)[0], [layer])[layer][:, -3:], world.harmful[obj], world.topic[obj]


def harm_direction(world, model):
    """Unit vector (D,): the difference of mean residuals between all harmful and all benign requests, last three tokens."""
    h, harmful, _ = tiny_states(world, model)
    d = h[harmful].mean((0, 1)) - h[~harmful].mean((0, 1))
    return d / d.norm()


def auc(scores, positive):
    """Area under the ROC curve: how often a positive scores higher than a negative, ties counted half."""
    values, back = np.unique(np.asarray(scores), return_inverse=True)
    below = np.concatenate([[0], np.cumsum(np.bincount(back[~positive], minlength=len(values)))])
    return float(((below[:-1] + below[1:]) / 2)[back[positive]].sum() / positive.sum() / (~positive).sum())


def describe_world(folder):
    """Is the concept there before alignment? Probe AUC on unseen topics, the best single feature's AUC and cosine with harm."""
    world, model, saes, harm = open_world(folder)
    h, harmful, topic = tiny_states(world, model)
    x = h[:, 1].double()                                                                        # at `?`
    seen = topic < 4
    centred = x - x[seen].mean(0)
    gram = centred[seen].T @ centred[seen]
    probe = torch.linalg.solve(gram + 0.01 * gram.trace() / len(gram) * torch.eye(len(gram)), centred[seen].T @ torch.tensor(harmful[seen] * 2.0 - 1))
    acts = saes[TINY_LAYER].encode(h).mean(1).numpy()                                           # (requests, N)
    aucs = np.array([auc(a, harmful) for a in acts.T])
    best = int(np.abs(aucs - 0.5).argmax())
    report = data.read_json(Path(folder) / "done.json")["sae"]
    return dict(probe_auc=auc((centred @ probe)[~seen].numpy(), harmful[~seen]), feature=best, feature_auc=float(max(aucs[best], 1 - aucs[best])),
                feature_cosine=abs(float(saes[TINY_LAYER].W_dec[best] @ harm)), sae=report)


CELL = dict(base=0, seed=0, method="sails", lr=3e-3, steps=80, objective="sft", freeze_basis=False, k=4, tau=1.0, r=4, sides="both",
            targets="q,k,v,o", layers=str(TINY_LAYER), contrast="prompts", score="absolute", nuisance=0.75, replay=0.0, drop="",
            norm_aware=False, beta=0.1, sft_steps=0)


def run_cell(cell, worlds):
    """One alignment in the tiny world and everything measured about it: a pure function of the cell and the base's files."""
    torch.set_num_threads(1)                           # one thread a process scales better than two threads in one
    cell = {**CELL, **cell}
    world, base, saes, harm = open_world(Path(worlds) / f"base-{cell['base']}")
    began = time.process_time()
    s = settle(parser().parse_args([]), tiny=True)
    vars(s).update({k: v for k, v in cell.items() if k != "base"}, targets=tuple(cell["targets"].split(",")), alpha=2.0 * cell["r"], resume=False, max_new=8,
                   stop={data.EOS}, template="tiny")
    split = data.world_split(world, cell["seed"], cell["nuisance"])
    rows = {part: encode(world.tok, split[part], "tiny")[0] for part in ("train", "validate")}
    neutral = sum(data.world_knowledge(world, split["topics"]["seen"]).values(), [])           # scored: the unseen topics'
    out, bases = dict(cell), {}
    if cell["method"] == "full":
        model = copy.deepcopy(base).requires_grad_(True)
    else:
        model = base
        if cell["method"] != "lora":
            pairs = sails.contrast_rows(world.tok, split["train"], "tiny", s.contrast, s.last)
            saes = {int(i): saes[int(i)] for i in cell["layers"].split(",")}
            stats = sails.contrast_means(model, saes, pairs, 64, s.seed)
            for f in style_features(world, model, saes) if s.drop == "style" else []:
                stats[TINY_LAYER]["mu_aligned"][f] = stats[TINY_LAYER]["mu_unaligned"][f] = 0
            bases, chosen = sails.build_bases(s.method, stats, saes, s.k, s.tau, s.score, False, s.r, seed=s.seed)
            out["features"] = {str(i): f.tolist() for i, f in chosen.items()}
        lora.attach(model, s.targets, s.r, s.alpha)
        start_adapters(s, model, bases)
        if bases:
            start = next(m.start for _, m in lora.adapters(model) if m.start is not None and m.layer == TINY_LAYER)
            out["harm_energy"] = float((start.T @ harm).square().sum())
    out["trained"] = sum(p.numel() for _, p in lora.trainable(model))
    path = {}
    quick = [r for r in split["ood"] if r["label"] == "harmful"][::4]
    watch = lambda step: path.update({step: share_right(model, world.tok, quick, data.REFUSAL)}) if step % 10 == 0 else None
    try:
        reference = (lambda: contextlib.nullcontext(base)) if cell["method"] == "full" else base_reference(model)
        align(model, rows["train"], s, None, reference, judge_reward(world.tok, s.stop), [ids for ids, _ in neutral], watch)
        out["train_seconds"] = time.process_time() - began
        out.update(measure_tiny(model, world, split), path=path)
        out["validation_loss"] = validation_loss(model, reference, rows["validate"], neutral, s, out["validate"])
    finally:
        lora.detach(model)
    return out


def style_features(world, model, saes):
    """Features that tell the two greetings apart better than harm: what a reader of the feature list would strike out."""
    examples = data.all_requests(world, np.arange(len(world.topic)))
    rows = [data.render_chat(world.tok, ex["turns"], None, "tiny")[0] for ex in examples]
    a = saes[TINY_LAYER].encode(model.residuals(data.pad(rows)[0], [TINY_LAYER])[TINY_LAYER][:, -3:]).mean(1)          # (requests, N)
    hey, bad = (torch.tensor([ex["id"].startswith("hey") for ex in examples]), torch.tensor([ex["label"] == "harmful" for ex in examples]))
    gap = lambda on: (a[on].mean(0) - a[~on].mean(0)).abs()
    return (gap(hey) > gap(bad)).nonzero()[:, 0].tolist()


@torch.no_grad()
def share_right(model, tok, examples, reply):
    """Share of examples to which greedy decoding begins with `reply` (a text, or a key of the example)."""
    if not examples:
        return float("nan")
    rows = [data.render_chat(tok, ex["turns"], ex.get(reply, reply), "tiny") for ex in examples]
    return float(np.mean(evaluation.greedy_matches(model, [(ids[:-1], mask[:-1]) for ids, mask in rows])))     # less <end>: a note may follow


@torch.no_grad()
def measure_tiny(model, world, split):
    """What alignment did: refusals of harmful and benign requests where it was trained and where not, help, knowledge."""
    out = {}
    for part in ("validate", "id_test", "ood", "lookalike"):
        harmful = [ex for ex in split[part] if ex["label"] == "harmful"]
        benign = [ex for ex in split[part] if ex["label"] == "benign"]
        safe, over = share_right(model, world.tok, harmful, data.REFUSAL), share_right(model, world.tok, benign, data.REFUSAL)
        out[part] = dict(safe=safe, over=over, help=share_right(model, world.tok, benign, "helpful"), balance=(safe + 1 - over) / 2)
    for name, texts in data.world_knowledge(world, split["topics"]["unseen"]).items():
        out[name] = float(np.mean(evaluation.greedy_matches(model, texts)))
    return out


@torch.no_grad()
def validation_loss(model, reference, rows, neutral, s, behaviour):
    """What a tuner may look at, in nats: the objective on validation pairs plus the rise of the loss on neutral text.

    The objective alone picks a rate so high that the model forgets how to help: it is at its floor long before. Both parts
    are of the trained topics; all that is scored is of others. For rloo the objective is the judged mistakes.
    """
    with reference() as ref:
        before, _ = ref.reply_nll(neutral)
        then = [reply_logp(ref, [r[side] for r in rows]) for side in ("chosen", "rejected")]
    now = [reply_logp(model, [r[side] for r in rows]) for side in ("chosen", "rejected")]
    forgotten = float((model.reply_nll(neutral)[0] - before).mean())
    if s.objective == "sft":
        return float(-now[0].sum() / sum(sum(r["chosen"][1]) for r in rows)) + forgotten
    if s.objective == "dpo":
        return float(-torch.nn.functional.logsigmoid(s.beta * (now[0] - then[0] - now[1] + then[1])).mean()) + forgotten
    return 1 - behaviour["balance"] + forgotten


def run_cells(cells, worlds, path, jobs, run=None, key=None):
    """Run the cells that are not in the file yet, in `jobs` processes; a finished cell is one line. Returns all asked for.

    run(cell, worlds) and key(cell) are the tiny world's unless another study brings its own.
    """
    run, key = run or run_cell, key or cell_key
    done = {key(row): row for row in evaluation.resume_lines(Path(path))}
    todo = [c for c in cells if key(c) not in done]
    with open(path, "a") as f, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        results = (pool.map if jobs > 1 else map)(run, todo, [worlds] * len(todo))
        for row in data.progress(results, total=len(todo), desc="alignments", disable=None):
            f.write(json.dumps(row) + "\n"), f.flush()
            done[key(row)] = row
    return [done[key(c)] for c in cells]


def cell_key(cell):
    """What makes two cells the same one."""
    return json.dumps({k: {**CELL, **cell}[k] for k in CELL}, sort_keys=True)


STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
               2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)     # Student's t, df 1..30


def t_interval(groups):
    """Mean and half-width of its 95 % interval, from groups (bases) of values (seeds).

    With three bases or more the bases are the sample: Student's t over their means, so that what varies from base to base
    counts. With fewer, seeds are, within each base: a statement about these bases only. One value: no interval (nan).
    """
    groups = [np.asarray(g, dtype=float) for g in groups]
    if len(groups) >= 3:
        means = np.array([g.mean() for g in groups])
        spread, df = means.std(ddof=1) / len(means) ** 0.5, len(means) - 1
    else:
        values, df = np.concatenate(groups), sum(len(g) - 1 for g in groups)
        squares = sum(((g - g.mean()) ** 2).sum() for g in groups)
        spread = (squares / df / len(values)) ** 0.5 if df else float("nan")
        means = values
    return float(means.mean()), float(spread * (STUDENT_975[df - 1] if 1 <= df <= 30 else 1.96 + 2.5 / max(df, 1)))


def pick(rows, budget):
    """{(method, base, seed): row}: for `tuned` the learning rate of least validation loss, for `gentle` the lowest one."""
    best = {}
    for row in rows:
        key = row["method"], row["base"], row["seed"]
        rank = (row["validation_loss"], row["lr"]) if budget == "tuned" else row["lr"]
        if key not in best or rank < best[key][0]:
            best[key] = rank, row
    return {key: row for key, (_, row) in best.items()}


def grouped(picked, method, what):
    """what(row) of one method's rows, as one list per base: t_interval's input."""
    bases = sorted({b for m, b, _ in picked if m == method})
    return [[what(r) for (m, b, _), r in sorted(picked.items()) if (m, b) == (method, base)] for base in bases]


def paired(picked, method, other, what):
    """Differences method - other on the same base and seed, in percentage points, as one list per base."""
    return [[100 * (what(r) - what(picked[other, b, sd])) for (m, b, sd), r in sorted(picked.items()) if (m, b) == (method, base)]
            for base in sorted({b for m, b, _ in picked if m == method})]


COLUMNS = {"OOD safe": lambda r: r["ood"]["safe"], "over-refusal": lambda r: r["ood"]["over"], "OOD help": lambda r: r["ood"]["help"],
           "look-alike balance": lambda r: r["lookalike"]["balance"], "ID balance": lambda r: r["id_test"]["balance"],
           "facts": lambda r: r["facts"], "commentary": lambda r: r["commentary"]}


def balance(row):
    return row["ood"]["balance"]


def tables(rows, methods):
    """The comparison as Markdown lines: per budget a table with 95 % intervals, the paired differences, and one sentence."""
    lines, words = [], []
    for budget in ("tuned", "gentle"):
        picked = pick(rows, budget)
        title = "learning rate chosen on validation pairs" if budget == "tuned" else "the lowest learning rate: the smallest update budget"
        lines += [f"**{budget}**: {title}", "", "| method | " + " | ".join(COLUMNS) + " | parameters | CPU seconds | learning rates |",
                  "| --- |" + " --- |" * (len(COLUMNS) + 3)]
        for m in methods:
            mine = [r for (k, _, _), r in picked.items() if k == m]
            cells = ["{:.3f} ± {:.3f}".format(*t_interval(grouped(picked, m, f))) for f in COLUMNS.values()]
            rates = {lr: sum(r["lr"] == lr for r in mine) for lr in sorted({r["lr"] for r in rows if r["method"] == m})}
            edge = " (edge)" if budget == "tuned" and len(rates) > 1 and 2 * (rates[min(rates)] + rates[max(rates)]) > len(mine) else ""
            used = ", ".join(f"{lr:g} x{n}" for lr, n in rates.items() if n) + edge
            lines.append(f"| {m} | {' | '.join(cells)} | {mine[0]['trained']:,} | {np.mean([r['train_seconds'] for r in mine]):.1f} | {used} |")
        lines += ["", f"Paired difference in OOD balance, sails less the other, in points ({budget}):", ""]
        for m in methods:
            if m != "sails" and "sails" in methods:
                mean, half = t_interval(paired(picked, "sails", m, balance))
                lines.append(f"- {m}: {mean:+.1f} ± {half:.1f}")
                words.append((budget, m, "ahead of" if mean - half > 0 else "behind" if mean + half < 0 else "no different from"))
        lines.append("")
    return lines + [verdict(words)]


def verdict(words):
    """Two sentences from the paired differences: ahead or behind only where the interval excludes 0."""
    out = []
    for budget, start in (("tuned", "Tuned"), ("gentle", "At the lowest learning rate")):
        said = {w: ", ".join(m for b, m, v in words if b == budget and v == w) for w in ("ahead of", "no different from", "behind")}
        out.append(f"{start}, SAILS's OOD balance is " + "; ".join(f"{w} {ms}" for w, ms in said.items() if ms) + ".")
    return " ".join(out) if words else "Without sails and another method there is nothing to compare."


def compare(s):
    """base -> SAE -> every method x learning rate x seed -> tables. Everything made stays in the folder and is reused."""
    folder = Path(s.out or "runs/compare")
    began, cells = time.perf_counter(), []
    homes = [folder / "worlds" / f"base-{b}" for b in range(s.bases)]
    with ProcessPoolExecutor(s.jobs, get_context("spawn")) as pool:
        list((pool.map if s.jobs > 1 and s.bases > 1 else map)(make_world, homes, range(s.bases), [s] * s.bases))
    for b, home in enumerate(homes):
        told = describe_world(home)
        say(f"base {b}: harm probe AUC {told['probe_auc']:.3f} on unseen topics; best SAE feature {told['feature']} AUC {told['feature_auc']:.3f}, "
            f"cosine with harm {told['feature_cosine']:.2f}; SAE FVE {told['sae']['fve']:.2f}, L0 {told['sae']['l0']:.1f}, dead {told['sae']['dead']:.3f}")
        cells += [dict(base=b, seed=seed, method=m, lr=lr, **varied(s)) for seed in range(s.seeds) for m in s.methods for lr in GRID.get(m, ADAPTER_GRID)]
    rows = run_cells(cells, folder / "worlds", folder / "cells.jsonl", s.jobs)
    for b, home in enumerate(homes):
        tell_features(home, [r for r in rows if r["base"] == b])
    lines = tables(rows, s.methods)
    data.write_json(folder / "results.json", rows)
    data.write_text(folder / "table.md", "\n".join(lines) + "\n")
    say("\n" + "\n".join(lines))
    plot(rows, s.methods, folder / "safety_by_step.png")
    say(f"{len(rows)} alignments, {time.perf_counter() - began:.0f} s; saved in {folder}")


def varied(s):
    """The cell settings that the command line changed."""
    t = settle(copy.copy(s), tiny=True)
    now = {k: getattr(t, k) for k in CELL if k not in ("base", "seed", "method", "lr", "drop", "targets", "layers")}
    return dict(now, targets=",".join(t.targets))


def tell_features(world_folder, rows):
    """Per base: the share of the harm direction inside each method's start, and SAILS's first seed's features with their words."""
    world, model, saes, _ = open_world(world_folder)
    inside = {m: np.mean([r["harm_energy"] for r in rows if r["method"] == m]) for m in {r["method"]: 0 for r in rows if "harm_energy" in r}}
    say(f"{world_folder.name}: share of the harm direction's energy in each start: " + ", ".join(f"{m} {x:.2f}" for m, x in inside.items()))
    first = next((r for r in rows if r["method"] == "sails"), None)
    if first is None:
        return
    chosen = {TINY_LAYER: torch.tensor(first["features"][str(TINY_LAYER)])}
    asked = [data.render_chat(world.tok, ex["turns"], None, "tiny")[0] for ex in data.all_requests(world, range(len(world.topic)))]
    fires = sae_module.firing_tokens(model, world.tok, saes, chosen, asked, 256)[TINY_LAYER]
    words = sae_module.promoted_tokens(model, world.tok, saes[TINY_LAYER].W_dec[chosen[TINY_LAYER]], 5)
    bad = {f"thing{o}" for o in np.flatnonzero(world.harmful)}
    for f, on, up in zip(chosen[TINY_LAYER].tolist(), fires, words):
        say(f"  feature {f:3d}  promotes {' '.join(up)}   fires on {' '.join(w + '!' * (w in bad) for w, _ in on)}     (! a harmful thing)")


def plot(rows, methods, path):
    """OOD safety against training steps, tuned and gentle; needs matplotlib, which is no requirement."""
    try:
        import matplotlib
    except ImportError:
        return say("no figure of safety by step: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for ax, budget in zip(axes, ("gentle", "tuned")):
        picked = pick(rows, budget)
        for m in methods:
            paths = [r["path"] for (k, _, _), r in picked.items() if k == m]
            steps = sorted(map(int, paths[0]))
            ax.plot(steps, [np.mean([p.get(str(t), p.get(t)) for p in paths]) for t in steps], label=m)
        ax.set(title=budget, xlabel="step")
    axes[0].set_ylabel("harmful requests refused, unseen topics")
    axes[1].legend()
    fig.tight_layout()
    with data.replacing(path) as beside:
        fig.savefig(beside, format="png", dpi=120)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------- main
def tiny_run(s):
    """`--model tiny`: one run of the real pipeline on a made-up world's folder, which is made first if need be."""
    folder = make_world(Path("runs") / "tiny-world-0", 0, settle(copy.copy(s), tiny=True))
    s.data, s.test = s.data or folder / "train.jsonl", s.test or folder / "ood.jsonl"
    s.model, s.sae, s.layers, s.width = str(folder), s.sae or str(folder / "sae"), s.layers or [TINY_LAYER], s.width or str(DEFAULTS["fit_width"][1])
    s.data, s.test, s.out = str(s.data), str(s.test), s.out or f"runs/tiny-{s.method}-{s.seed}"
    return run(settle(s, tiny=True))


def main():
    s = parser().parse_args()
    if "RANK" in os.environ and not s.dry_run:         # torchrun
        dist.init_process_group("nccl" if s.device.startswith("cuda") else "gloo")
        s.device = f"cuda:{os.environ['LOCAL_RANK']}" if s.device.startswith("cuda") else s.device
    if s.model is None or s.compare:
        return compare(settle(s, tiny=True))
    return tiny_run(s) if s.model == "tiny" else run(settle(s))


if __name__ == "__main__":
    data.run_main(main)
