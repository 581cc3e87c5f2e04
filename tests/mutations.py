"""mutations.py - do the tests notice mistakes? Makes one at a time and runs the tests that could see it.

    python tests/mutations.py [--only WORD] [--jobs 2]

A mistake is a file, a text that occurs in it exactly once, its replacement and why it matters. Each runs in a
copy of the tree; it is caught if a test fails. Survivors are printed, exit code 1 if there are any but those
in EQUIVALENT. A text that no longer occurs once is an error: the list stays green with the code.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

TOP = Path(__file__).resolve().parent.parent
TESTS = {
    "data.py": "tokens eval tiny_world table train", "model_gemma.py": "gemma parity",
    "lora.py": "lora walk train",
    "sae.py": "sae walk explain", "sails.py": "subspace contrast theory walk explain",
    "eval.py": "eval judges",
    "train.py": "objectives table train", "benchmarks/tiny_world.py": "tiny_world",
    "benchmarks/study.py": "studies", "benchmarks/gcg.py": "attack"}
SLOW = ("batch[rank::machines]",)  # needs the tests marked slow

# file: (old, new, reason)
MISTAKES = {"train.py": [
    ('opt.param_groups[0]["lr"] = row["lr"]', "pass", "the schedule is logged and never given to Adam"),
    ("_norm_([p for _, p in params], s.clip)", "_norm_([p for _, p in params], 1e9)", "--clip has no effect"),
    ("value = value + s.replay * kl.sum()", "value = value + kl.sum()", "--replay's weight ignored"),
    ("/ sum(map(len, texts))", "/ len(texts)", "replay per text, not per token"),
    ("len(rows), s.batch, s.seed, step)", "len(rows), s.batch, 0, step)", "order independent of --seed"),
    ("weight_decay=0.0", "weight_decay=0.01", "weight decay"),
    ("for step in range(start, s.steps):", "for step in range(s.steps, s.steps):", "no step is taken"),
    ("            opt.zero_grad(set_to_none=True)\n", "", "gradients pile up over steps"),
    ("range(0, len(mine), s.micro)", "range(0, len(mine) - s.micro + 1, s.micro)", "a batch's rest is lost"),
    ("batch[rank::machines]", "batch[rank:]", "processes share examples"),
    ("s.lr * min((step + 1) /", "s.lr * min(step /", "the first step has rate 0"),
    ("(s.steps - step) /", "(s.steps - step - 1) /", "the last step has rate 0"),
    ('* s.batch + r["at"]', "* s.batch", "all prompts of a batch draw alike"),
    ('return nll.sum() / sum(sum(r["chosen_tokens"][1]) for r in batch), {}', "return nll.mean(), {}",
     "the loss depends on the micro-batch"),
    ("-F.logsigmoid(beta * margin)", "-F.logsigmoid(-beta * margin)", "DPO's sign"),
    ("gain[:len(rows)] - gain[len(rows):]", "gain[:len(rows)] + gain[len(rows):]", "DPO likes both replies"),
    ("margin).sum() / len(batch)\n", "margin).sum() / len(rows)\n", "DPO divided by the wrong count"),
    ("return -(advantage * logp).sum() / count", "return (advantage * logp).sum() / count", "RLOO's sign"),
    ("(gain - s.beta * kl)", "(gain + s.beta * kl)", "RLOO pushed away from the reference"),
    ("rows[i // s.samples]", "rows[i % len(rows)]", "a reply gets another prompt's reward"),
    ("* m / (m - 1)", "", "the baseline holds the reply itself"),
    ('== (row["label"] == "harmful"))', '!= (row["label"] == "harmful"))', "refusing harmless is rewarded"),
    ("step < s.sft_steps", "step <= s.sft_steps", "one step too many by sft"),
    ("copy.deepcopy(model).requires_grad_(False)", "model", "full's reference moves with it"),
    ("need(finite, f", "need(True, f", "training goes on with NaN"),
    ("growing=True)][:start])", "growing=True)])", "a resumed run logs steps twice"),
    ('dict(zip(["train", *lacking], split))', 'dict.fromkeys(["train", *lacking], examples)',
     "held-out pairs are trained on"),
    ("        rows = sets.train\n", "        rows = sets.train + sets.test\n", "features see held-out pairs"),
    ('-r["validation"]["NLL"]))', "-r[evaluation.NLL][0]))", "the rate is picked on test pairs"),
    ('[r for r in results if (r["method"], r["lr"]) == (m, lr)]  # one a seed', "results", "methods mixed"),
    ('score("test"), {}', 'score("validate"), {}', "validation pairs reported as held out"),
    ('nll = score("validate")', 'nll = score("test")', "the rate is picked on held-out pairs"),
    ('judged.pop("validation", {})', 'dict(judged.get("unseen", {}))', "the rate is picked on unseen topics"),
    ("rule=s.score", 'rule="absolute"', "--score ignored"), ("tau=s.tau", "tau=1.0", "--tau ignored"),
    ("center=s.center", "center=False", "--center ignored"), ("drop=s.drop", "drop=()", "--drop ignored"),
    ('pool=s.subspace == "global"', "pool=False", "--subspace ignored"),
    ("standardise=s.standardise", "standardise=False", "--standardise ignored"),
    ("s.contrast, s.last)", "s.contrast, 3)", "--last ignored"),
    ("[:s.contrast_pairs]", "", "--contrast-pairs ignored"),
    ("        if s.contrast_data:\n", "        if False:\n", "--contrast-data ignored"),
    ("s.seed, s.freeze_basis, s.norm_aware", "s.seed, False, s.norm_aware", "--freeze-basis ignored"),
    ("s.freeze_basis, s.norm_aware, sides", "s.freeze_basis, False, sides", "--norm-aware ignored"),
    ('if s.sides == "both" else (s.sides,)', "", "--sides ignored"),
    ("model.checkpointing, results = s.checkpointing,", "model.checkpointing, results = False,",
     "--checkpointing ignored"),
    ("s.r, s.alpha)\n    lora.init_lora", "s.r, 2 * s.r)\n    lora.init_lora", "--alpha ignored"),
    ('rates = s.full_lr if m == "full" and s.full_lr else s.lr', "rates = s.lr", "--full-lr ignored"),
    ("max(rates, key=lambda lr", "min(rates, key=lambda lr", "the worst rate is picked"),
    ("else (evaluation.NLL, -1)", "else (evaluation.NLL, 1)", "a higher NLL wins"),
    ('"is ahead of" if gap > half', '"is ahead of" if gap > 0', "ahead within its interval"),
    ("lowest = {m: min(", "lowest = {m: max(", "the highest rate reported as the lowest"),
    ('next(iter(r["sets"].values()), {})', '[*r["sets"].values(), {}][-2]', "look-alikes reported as unseen"),
    ("lora.save_adapter(model, folder, s.model, how)",
     "lora.init_lora(model)\n        lora.save_adapter(model, folder, s.model, how)", "an untrained adapter"),
], "data.py": [
    ('groups.setdefault(ex["turns"][0]["content"], [])', "groups.setdefault(len(groups), [])", "by row"),
    ("trained, after = content(reply) + marks(t[\"end\"]), marks(t[\"after\"])",
     'trained, after = content(reply), marks(t["end"] + t["after"])', "a model never learns to stop"),
    ("tok.encode_special_tokens = plain", "tok.encode_special_tokens = False", "a text forges a marker"),
    ("slice(width - len(seq), width)", "slice(0, len(seq))", "left padding is right padding"),
    ("default_rng([seed, e])", "default_rng([seed, 0])", "all epochs have one order"),
    ("2.776", "1.96", "a normal quantile for Student's"), ("v.std(ddof=1)", "v.std()", "ddof of an interval"),
    ('row["type"].startswith("contrast_")', 'not row["type"].startswith("contrast_")', "XSTest's halves"),
    ('    return {EOS, tok.token_to_id(TEMPLATES[template]["end"])} - {None}', "    return {EOS}",
     "chat turns never end"),
    ("[0] * len(text) + [1] * len(answer)", "[1] * len(text) + [1] * len(answer)", "the question is scored"),
    ("(turns, chosen), (other, rejected) = split_hh(chosen), split_hh(rejected)",
     "(turns, rejected), (other, chosen) = split_hh(chosen), split_hh(rejected)", "chosen for rejected"),
], "eval.py": [
    ("(safety[0] + 1 - over[0]) / 2", "(safety[0] + over[0]) / 2", "balance rewards over-refusal"),
    ("help_rate(benign)", "help_rate(rows)", "help measured on harmful requests"),
    ('verdict["score"] <= 2', 'verdict["score"] <= 3', "half-complying replies are safe"),
    ('v["score"] == 5', 'v["score"] >= 4', "high risk counts fours"),
    ('for r in rows if r["label"] != "benign"]', 'for r in rows if r["label"] == "benign"]', "swapped"),
    ('benign = [r for r in rows if r["label"] == "benign"]', 'benign = [r for r in rows if r["label"]]',
     "over-refusal counts harmful prompts"),
    ('r["finish"] == "length"', 'r["finish"] == "stop"', "cut-off replies"),
    ("interval(-a / n, n)", "interval(-a / n)", "NLL weighted by reply and called per token"),
    ("a / n > b / m", "a / n > b / n", "one length for both replies"),
    ("value=interval(a > b)", "value=interval(a < b)", "preference's sign"),
    ("minlength=len(part)) == 0)", "minlength=len(part)) <= 1)", "knowledge forgives a wrong token"),
    ("(p.exp() * (p - q))", "(q.exp() * (q - p))", "the KL's direction"),
    ("(.025, .975)", "(.05, .95)", "a 90 % interval called 95 %"),
    ("text[tags[-1].end():]", "text[tags[0].end():]", "the first score tag is read"),
    ("([1-5])", "([0-9])", "a judge that leaves the scale"),
    ("messages=messages, temperature=0", "messages=messages, temperature=1", "the judge is asked at random"),
    ("e.code not in (408, 429) and e.code < 500", "e.code < 500", "a rate limit ends the run"),
    ("(not COMPLY.match(s) for n, s", "(True for n, s", "compliance counts as refusal"),
    ("len(reply.split()) >= 40", "len(reply.split()) >= 4", "short answers are evasions"),
    ('done[p["id"]]["prompt_sha256"] == prompt_hash(p)', "True", "a reply to another prompt is kept"),
    ("lambda reply, request: starts_with_refusal(reply)", "lambda a, b: refusal_or_evasion(a, b)",
     "another judge under the same name"),
    ("reply.startswith(want.strip())", "want.strip().startswith(reply)", "an empty reply helps"),
    ("return None  # urllib would", "return super().redirect_request(*args)  # urllib would",
     "the key is sent on to another host"),
], "sae.py": [
    ("pre > self.threshold", "pre >= self.threshold", "JumpReLU's threshold is strict"),
    ('((x - p["b_dec"]) @ p["W_enc"]', '(x @ p["W_enc"]', "trained without b_dec, folded with it"),
    ("threshold=cut * length", "threshold=torch.full_like(length, cut)", "a threshold in other units"),
    ("(abs(int(k) - 100), -int(k))", "(abs(int(k) - 100), int(k))", "the lower of a tie"),
    ("(abs(int(k) - 100)", "(abs(int(k) - 64)", "not the canonical SAE"),
    ("counted = keep & (ids != data.BOS)\n        m", "counted = keep\n        m", "BOS among the residuals"),
    ("total = ((x - mean) ** 2).sum(0)", "total = (x ** 2).sum(0)", "the mean counts as explained"),
    ("need(torch.allclose(norms", "need(True or torch.allclose(norms", "decoder rows of any norm"),
    ("(1 + model.norm.weight.float())", "1", "promoted tokens without the final gain"),
    ('(mean / std + p["b_dec"]) @', '(mean / std) @', "b_dec is not folded into b_enc"),
    ("    seen.keep[:, -1] = False  # the last token comes again\n", "", "the last token is seen twice"),
    ("first=layer + 1)", "first=layer)", "a block is run twice"),
    ("where[n:], b[:, j])", "where[:n], a[:, j])", "contexts of harmful texts are shown"),
    ("(fires >= m).sum()) / u", "(fires < m).sum()) / u", "one set's share for the other's"),
], "sails.py": [
    ("(2 * r) ** .5 * eps / sigma", "r ** .5 * eps / sigma", "sqrt(r) for sqrt(2r)"),
    ("((U - V @ (V.T @ U)) ** 2)", "((U + V @ (V.T @ U)) ** 2)", "a wrong projector sign"),
    ('(a - u).abs() if rule == "absolute"', '(a - u) if rule == "absolute"', "v2 without its absolute value"),
    ("u.abs().clamp(min=eps)", "a.abs().clamp(min=eps)", "v1 divided by the wrong mean"),
    ("int((held < tau - 1e-12).sum()) + 1", "int((held < tau - 1e-12).sum())", "a direction too few"),
    ("rows - rows.mean(0) if center", "rows - rows.mean(0) if not center", "centred by default"),
    ("truncation_floor(r, 1)", "truncation_floor(r, 2)", "sqrt(r - 2)"),
    ("(4 * B ** 2)", "(8 * B ** 2)", "Hoeffding's constant"),
    (" * (ids != data.BOS)  # (b, T)", "", "BOS counted in the means"),
    ('zip(prompts("harmful"), prompts("benign"))', 'zip(prompts("benign"), prompts("harmful"))', "sets"),
    ("max(1, n - 1)", "max(1, n)", "the standard error of t"),
    ('(s["h_aligned"] - s["h_unaligned"], dim=0)', '(s["h_aligned"] + s["h_unaligned"], dim=0)',
     "the mean for the mean difference"),
    ("s.sort(descending=True, stable=True)", "s.sort(stable=True)", "the lowest scores are picked"),
    ("    fires[list(drop)] = False\n", "", "dropped features are chosen"),
    ("r).flip(1)  # largest first", "r)  # largest first", "raw PCA's weakest direction first"),
    ("return abs(r - r_s) ** .5", "return abs(r - r_s)", "the floor squared"),
    ("else (a - u) / u", "else (u - a) / u", "v1's sign"),
    ("gain = 1 + getattr(", "gain = 1 + 0 * getattr(", "norms are ignored"),
    ("parts = without([others[-1]", "parts = without([chosen[-1]", "an update's part counts twice"),
    ('(A, B) if side == "read" else (B.T, A.T)', "(A, B)", "writers are taken for readers"),
    ("x = math.log(N / alarm)", "x = 0.", "the baseline is the mean of chance"),
], "lora.py": [
    ('(m.A, m.B) if m.side == "read" else (m.B, m.A)', '(m.A, m.B) if m.side == "write" else (m.B, m.A)',
     "the factors swapped"),
    ("layer, r, alpha / r", "layer, r, alpha / r ** .5", "LoRA's scale"),
    ("V / gain[:, None], 0.)", "V * gain[:, None], 0.)", "norm-aware the wrong way round"),
    ("m.kept = m.linear.weight.detach().clone()", "m.kept = m.linear.weight.detach()", "nothing is kept"),
    ("(abs(i - layer), i)", "(abs(i - layer), -i)", "the upper of a tie"),
    ("fill - V.double() @ (V.double().T @ fill)", "fill", "the filling overlaps V"),
    ("init_lora_weights=True)", 'init_lora_weights="pissa")', "loaders change the base"),
    ("(A @ Q @ Q.T @ A.T)", "(A @ A.T)", "all energy lies inside"),
    ('if c.get("use_rslora") else 1', 'if not c.get("use_rslora") else 1', "rsLoRA's scale"),
    ('(("m.", "exp_avg"), ("v.", "exp_avg_sq"))', '(("v.", "exp_avg"), ("m.", "exp_avg_sq"))', "moments"),
    ("        holds.requires_grad_(not freeze)\n", "", "a frozen basis trains"),
    ("V = V * (m.r ** .5 / V.norm())", "V = V * 1", "norm-aware changes the step size"),
    ('WRITERS = ("o", "down")', 'WRITERS = ("o",)', "down reads"),
    ("uniform_(-bound, bound", "uniform_(0, bound",
     "LoRA's start is one-sided"),
], "model_gemma.py": [
    ("softcap(F.linear(h, self.embed_tokens.weight), self.config.final_cap)",
     "F.linear(h, self.embed_tokens.weight)", "no final cap"),
    ("softcap(F.linear(h, self.embed_tokens.weight), self.config.final_cap)",
     "F.linear(softcap(h, self.config.final_cap), self.embed_tokens.weight)", "the cap on hidden states"),
    ("scores = softcap(scores, c.attn_cap)", "scores = scores", "no attention cap"),
    ("(i + 1) % (2 if g2 else every)", "i % (2 if g2 else every)", "local and global layers swapped"),
    ("(back < window)", "(back <= window)", "a window off by one"),
    ("(back < window)", "(back < 10 ** 9)", "no window"),
    ("c.query_scalar ** -0.5", "c.head_dim ** -0.5", "head_dim for the query scalar"),
    ("a, b = x.chunk(2, -1)\n    return x * cos + torch.cat([-b, a], -1) * sin",
     "a, b = x[..., ::2], x[..., 1::2]\n    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin",
     "interleaved RoPE"),
    ('approximate="tanh"', 'approximate="none"', "exact gelu"),
    ("k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)", "k.repeat(1, group, 1, 1), "
     "v.repeat(1, group, 1, 1)", "key/value heads tiled"),
    ("return h * torch.tensor(self.config.d_model ** 0.5, dtype=table.dtype)", "return h", "no scale"),
    ("(y * inv).mul_(1.0 + weight.float())", "(y * inv).mul_(weight.float())", "no unit offset"),
    ("+ self.post_attention_layernorm(branch)", "+ branch", "no post norm"),
    ("value=-cap ** -2", "value=cap ** -2", "the cap's slope"),
    ("rope[c.theta[c.local[i]]]", "rope[c.theta[not c.local[i]]]", "local and global thetas swapped"),
    ("- 1 + seen)", "- 1)", "a cache restarts positions"),
    ("last=max(layers))[1]", "last=min(layers))[1]", "deep taps are missing"),
    ("ids[:, 1:][want]), want.nonzero()", "ids[:, :-1][want]), want.nonzero()",
     "the present token is scored"),
    ("seeds or []]", "range(len(seeds or []))]", "a reply depends on its place"),
    ("done[row] = token in stop", "done[row] = False", "generation runs on"),
], "benchmarks/tiny_world.py": [
    ('world_knowledge(world, split["topics"]["unseen"])', 'world_knowledge(world, split["topics"]["seen"])',
     "facts scored on trained topics"),
    ('for r in world_knowledge(world, split["topics"]["seen"])', 'for r in world_knowledge(world, '
     'split["topics"]["unseen"])', "replay reads the facts that are scored"),
    ("for o in objects[part] for v in VERBS]", 'for o in objects["train"] for v in VERBS]', "a leak"),
    ("nuisance if bad else 1 - nuisance", "nuisance", "no style nuisance"),
    ("np.isin(world.topic, topics[4:])", "np.isin(world.topic, topics[2:])", "unseen topics are trained on"),
    ("(world.harmful != bad)", "(world.harmful == bad)", "look-alikes look like training"),
], "benchmarks/study.py": [
    ("if len(groups) >= 3:", "if len(groups) >= 30:", "seeds counted as bases"),
    ('100 * (r[column] - theirs[key][column])', '100 * (theirs[key][column] - r[column])', "a paired sign"),
    ("(below[:-1] + below[1:]) / 2", "below[1:]", "ties count as wins"),
], "benchmarks/gcg.py": [
    ("t.isascii() and ", "", "the attack types what nobody can"),
    ("int(loss.argmin())", "int(loss.argmax())", "the worst candidate is kept"),
    ("if slot.survives(list(c))]", "]", "candidates are read as other tokens"),
]}
EQUIVALENT = {}  # old text: why no test can see it

def attempt(name, mistake, folders):
    """True if a test fails on the mistake; one copy of the tree is taken from `folders` and given back."""
    old, new, _ = mistake
    text, folder = (TOP / name).read_text(encoding="utf-8"), folders.get()
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    tests = [f"tests/test_{t}.py" for t in TESTS[name].split()]
    chosen = ["-m", "slow"] if old in SLOW else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen, *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    (folder / name).write_text(text, encoding="utf-8")
    folders.put(folder)
    return done.returncode in (1, 2)

def main():
    ap = argparse.ArgumentParser(description="Make mistakes one at a time; print those that no test notices.")
    ap.add_argument("--only", default="", help="mistakes whose file or reason holds this word")
    ap.add_argument("--jobs", type=int, default=2)
    args = ap.parse_args()
    todo = [(name, m) for name, some in MISTAKES.items() for m in some if args.only in name + m[2]]
    stale = [(name, m[0]) for name, m in todo if (TOP / name).read_text(encoding="utf-8").count(m[0]) != 1]
    if stale:
        sys.exit("\n".join(f"not exactly once in {name}: {old!r}" for name, old in stale))
    with tempfile.TemporaryDirectory() as tmp:
        folders = SimpleQueue()
        for i in range(args.jobs):
            ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
            folders.put(Path(shutil.copytree(TOP, f"{tmp}/{i}", ignore=ignore)))
        with ThreadPoolExecutor(args.jobs) as pool:
            found = pool.map(lambda job: attempt(*job, folders), todo)
            missed = []
            for (name, m), caught in zip(todo, found):
                print(f"{'caught  ' if caught else 'SURVIVED'} {name:26s} {m[2]}", flush=True)
                missed += [] if caught else [m[0]]
    print(f"{len(todo)} mistakes, {len(missed)} survivors; equivalent: {len(set(missed) & set(EQUIVALENT))}")
    return 1 if set(missed) - set(EQUIVALENT) else 0

if __name__ == "__main__":
    sys.exit(main())
