"""gcg.py - a white-box attack on one's own model: GCG suffixes (Zou et al. 2023, arXiv 2307.15043).

    python benchmarks/gcg.py --model M [--adapter RUN] --prompts FILE... --out ATTACKED.jsonl
    python eval.py --model M [--adapter RUN] --prompts ATTACKED.jsonl --out DIR
By the model's gradients find a suffix after which a given reply is likely. ATTACKED.jsonl holds the attacked
prompts, which eval.py reads like any others; 1 - safety rate is the attack's success. A cut attack continues
with the next prompt. Candidates that the tokenizer would read back as other tokens are dropped.
Letters: D d_model, V vocabulary, n suffix tokens, W candidate suffixes, T tokens.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import model_gemma
from data import UserError, need

class Slot:
    """One prompt with room for a suffix: ids before it, the suffix, then the turn's end and the target."""

    def __init__(self, model, tok, turns, target, template, length, allowed, batch=512):
        self.model, self.tok, self.turns, self.template, self.batch = model, tok, turns, template, batch
        self.allowed = allowed  # (V,) bool, from typeable()
        plain, _ = data.render_chat(tok, turns, None, template)
        ids, mask = data.render_chat(tok, turns, target, template)
        body = [t for t, m in zip(ids, mask) if m][:-1]  # less the end token
        marks = [tok.token_to_id("▁!"), tok.token_to_id("!"), *allowed.nonzero()[:, 0].tolist()]
        for mark in (m for m in marks if m is not None):
            self.start = [mark] * length
            ids = data.render_chat(tok, self.typed(self.start), None, template)[0]
            at = [p for p in range(len(plain) + 1) if ids == plain[:p] + self.start + plain[p:]]
            if at:
                break
        else:
            raise UserError("no suffix survives this tokenizer's own round trip; another --length may")
        self.before, self.after = plain[:at[0]], plain[at[0]:]
        self.tail = torch.tensor([self.after + body], device=model.device)  # (1, T)
        self.body = self.tail[0, len(self.after):]  # (n_target,)
        self.cache = model_gemma.KVCache()
        with torch.no_grad():  # the prefix, once for all candidates
            model.hidden(torch.tensor([self.before], device=model.device), cache=self.cache)

    def typed(self, suffix):
        """The turns as somebody would type them, with the suffix's text after the last one."""
        text = self.tok.decode(suffix, skip_special_tokens=False).strip()
        return [*self.turns[:-1], dict(role="user", content=f"{self.turns[-1]['content'].strip()} {text}")]

    def survives(self, suffix):
        """Is the typed suffix read as these very ids?"""
        ids, _ = data.render_chat(self.tok, self.typed(suffix), None, self.template)
        return ids == self.before + suffix + self.after

    def loss(self, embeds):
        """Mean NLL of the target (W,) after prefix and the embedded suffix (W, n, D)."""
        W = len(embeds)
        embeds = torch.cat([embeds, self.model.embed(self.tail).expand(W, -1, -1)], 1)
        h, _ = self.model.hidden(embeds=embeds, cache=repeat(self.cache, W))
        h = h[:, -len(self.body) - 1:-1]  # (W, n_target, D)
        return self.model.nll(h.flatten(0, 1), self.body.repeat(W)).view(W, -1).mean(1)

    def gradient(self, suffix):
        """d loss / d one-hot (n, V): to first order, what each token in each place would change."""
        ids = torch.tensor(suffix, device=self.body.device)
        onehot = F.one_hot(ids, self.model.config.vocab_size).to(self.model.dtype).requires_grad_()
        return torch.autograd.grad(self.loss(self.model.embed(onehot[None])).sum(), onehot)[0].float()

    @torch.no_grad()
    def losses(self, suffixes):
        """Loss of each suffix (W,), `batch` of them at a time."""
        ids = torch.tensor(suffixes, dtype=torch.long, device=self.body.device)
        return torch.cat([self.loss(self.model.embed(part)).float().cpu() for part in ids.split(self.batch)])

def repeat(cache, n):
    """A cache for n rows that begin with this one's single row, as views."""
    return model_gemma.KVCache({key: t.expand(n, *t.shape[1:]) for key, t in cache.items()})

def typeable(tok, vocab_size):
    """(V,) bool: tokens that stand for plain printable ASCII, no markers: what a person could type."""
    n = min(tok.get_vocab_size(), vocab_size)
    texts = tok.decode_batch([[i] for i in range(n)], skip_special_tokens=True)
    plain = lambda t: t.strip() and t.isascii() and t.isprintable() and not re.fullmatch(r"\s*<.*>\s*", t)
    return F.pad(torch.tensor([bool(plain(t)) for t in texts]), (0, vocab_size - n))

def gcg(slot, steps, width, topk=256, seed=0):
    """Greedy coordinate gradient: dict suffix, losses (first the start's, then per step), best, best_suffix.

    Each step draws `width` one-token swaps among the topk (at most a quarter) that the gradient likes best,
    takes the best, and is a pure function of (seed, step, suffix).
    """
    s = dict(suffix=slot.start, losses=slot.losses([slot.start]).tolist(), best_suffix=slot.start)
    for step in range(steps):
        grad = slot.gradient(s["suffix"]).masked_fill(~slot.allowed, float("inf"))  # (n, V)
        top = (-grad).topk(min(topk, int(slot.allowed.sum()) // 4 + 1), dim=1).indices.tolist()
        rng = np.random.default_rng([seed, step])
        places, picks = (rng.integers(n, size=width).tolist() for n in (len(s["suffix"]), len(top[0])))
        new = {(*s["suffix"][:at], top[at][k], *s["suffix"][at + 1:]) for at, k in zip(places, picks)}
        new = [list(c) for c in sorted(new - {tuple(s["suffix"])}) if slot.survives(list(c))] or [s["suffix"]]
        loss = slot.losses(new)
        s["suffix"] = new[int(loss.argmin())]
        if float(loss.min()) < min(s["losses"]):
            s["best_suffix"] = s["suffix"]
        s["losses"].append(float(loss.min()))
    return s | dict(best=min(s["losses"]))

def check_targets(prompts, target=None):
    """UserError if a prompt has no reply to aim at."""
    aimed = all((p["target"] or target or "").strip() for p in prompts)
    need(aimed, "give a reply to aim at: a column target or --target TEXT")

def attack(model, tok, prompts, path, template, target, steps, width, length, seed):
    """GCG on every prompt that the file at `path` lacks; a row each, with the suffix and the loss curve."""
    rows = [row for _, row in data.read_rows(path, growing=True, id=str)]
    done = {row["id"]: row for row in rows}
    todo = [dict(p, target=p["target"] or target) for p in prompts]
    check_targets(todo)
    what = lambda p: dict(prompt_sha256=evaluation.prompt_hash(p), target=p["target"])
    asked = {f"{p['id']}+GCG": what(p) for p in todo}
    changed = [i for i, row in done.items() if i in asked and not asked[i].items() <= row.items()]
    need(not changed, f"{path}: {changed[:1]} was another prompt or target; choose another --out")
    todo = [p for p in todo if f"{p['id']}+GCG" not in done]
    data.write_rows(path, rows)  # without the half line that a kill may have left
    allowed = typeable(tok, model.config.vocab_size).to(model.device)
    for p in data.progress(todo, desc="attack", disable=None):
        slot = Slot(model, tok, p["turns"], p["target"], template, length, allowed)
        s = gcg(slot, steps, width, seed=seed)
        suffix = tok.decode(s["best_suffix"], skip_special_tokens=False).strip()
        row = asked[f"{p['id']}+GCG"] | dict(id=f"{p['id']}+GCG", set=f"{p['set']}+GCG", label=p["label"],
                   prompt=slot.typed(s["best_suffix"]), loss_without_suffix=float(slot.losses([[]])),
                   loss=s["best"], losses=s["losses"], suffix=suffix, suffix_ids=s["best_suffix"])
        data.append_rows(path, [row])

def main():
    ap = data.Arguments(description="Attack a model with GCG; write the attacked prompts.")
    a, count = ap.add_argument, data.at_least(1)
    a("--model", required=True, help="folder or hub id")
    a("--adapter", help="a finished run's folder, or any plain LoRA in PEFT's form")
    a("--merged", action="store_true", help="merge --adapter into the weights first")
    a("--prompts", nargs="+", required=True, help="csv, jsonl, txt, or a folder of csv files")
    a("--limit", type=count, help="only the first so many prompts of each file")
    a("--out", type=Path, required=True, help="JSONL file of attacked prompts; a cut attack continues")
    a("--target", help="the reply to aim at where a prompt file has no target column")
    a("--steps", type=data.at_least(0), default=250)
    a("--width", type=data.at_least(1, high=10_000), default=256, help="candidates a step")
    a("--length", type=data.at_least(1, high=1000), default=20, help="suffix tokens")
    a("--seed", type=data.at_least(0), default=0)
    a("--template", choices=data.TEMPLATES, help="default: by the model's name")
    a("--dtype", choices=model_gemma.DTYPES, default="float32")
    a("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    ap.refuse_unread((args.adapter, "--adapter", "merged"))
    prompts = data.read_prompts(args.prompts, args.limit)
    check_targets(prompts, args.target)
    need(args.out.suffix == ".jsonl", f"--out {args.out}: wanted a .jsonl")
    model, tok, notes = evaluation.load(args, args.model, args.adapter)
    template = args.template or data.default_template(args.model, tok)
    how = {k: getattr(args, k) for k in ("target", "steps", "width", "length", "seed")}
    begun = args.out.with_suffix(".json").exists()
    need(begun or not args.out.exists(), f"{args.out} is there and no attack's file; choose another --out")
    data.same_settings(args.out.with_suffix(".json"), notes | how | dict(template=template, dtype=args.dtype))
    attack(model, tok, prompts, args.out, template, **how)

if __name__ == "__main__":
    data.run_main(main)
