"""explain.py - features.json, features.md, explain.json: what features do, what an adapter learned.

    python sails.py --explain ADAPTER --model M --sae S --layers L [--width W] [--features RUN/features.json]

prints the latter for any LoRA in PEFT's form. The measures: effects, what a feature does to the next token;
learned, how much of an adapter lies along each feature. Letters as in sae.py, r an adapter's rank.
"""
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lora
import model_gemma
import sae as sae_module
from data import need

LOOKALIKES = Path(__file__).parent / "lookalikes.jsonl"

def spread(items, n):
    """At most n of the items, evenly spread."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)

def ends(sets):
    """Eight prompts of training examples, at whose ends effects are measured."""
    return [r["prompt_ids"] for r in spread(sets.train, 8)]

# ---- features ----
def neuronpedia_url(sae_spec, layer, width, feature):
    """The address of a Gemma Scope feature's examples, None where nobody shows them."""
    size = re.search("gemma-scope-(2b|9b)-pt-res", str(sae_spec))
    page = f"https://www.neuronpedia.org/gemma-2-{size and size[1]}/{layer}-gemmascope-res-{width}/{feature}"
    return page if size else None

def feature_lines(listed, n=8):
    """A line each for the n features of features.json with the largest differences."""
    plain = lambda words: " ".join(repr(w)[1:-1].replace(" ", "_") for w in words)
    for f in sorted(listed, key=lambda f: -abs(f["delta"]))[:n]:
        line = f"layer {f['layer']:2d} feature {f['feature']:5d}  Delta {f['delta']:+8.3f}  t {f['t']:+6.1f}"
        fires, raises = (plain(w for w, _ in f[key][:4]) for key in ("fires_on", "raises"))
        yield f"{line}  fires on {fires}   raises {raises}  {f['link'] or ''}".rstrip()

def describe_all(s, model, sets, saes, stats, chosen, pairs):
    """describe() of a run's chosen features in its pairs of texts, with links."""
    texts = [[side[0] for side in some] for some in zip(*pairs)]  # aligned, unaligned
    shown = sum(texts, []) if s.show_texts else [t[:128] for t in spread(sets.neutral, 128)]
    listed = describe(model, sets.tok, saes, stats, chosen, texts, shown, ends(sets), s.micro)
    return [f | dict(link=neuronpedia_url(s.sae, f["layer"], s.width, f["feature"])) for f in listed]

def token_text(tok, i):
    """A token as a person reads it."""
    return tok.decode([i]) or tok.id_to_token(i) or f"<{i}>"

@torch.no_grad()
def promoted_tokens(model, tok, directions, n=8):
    """The n tokens that each direction (k, D) raises most through final gain and tied head."""
    read = directions.float().to(model.device) * (1 + model.norm.weight.float())  # (k, D)
    scores = read.to(model.dtype) @ model.embed_tokens.weight.T  # (k, V)
    return [[token_text(tok, i) for i in row] for row in scores.topk(n).indices.tolist()]

def write_features(s, folder, listed):
    """The chosen features for programs (features.json) and for people (features.md)."""
    sides = "chosen less rejected replies" if s.contrast == "replies" else "harmful less benign prompts"
    lines = [f"# Features chosen by {s.method}, score {s.score}", "",
             f"Delta: mean activation in {sides}; t: over its standard error.", "", "```",
             *feature_lines(listed, len(listed)), "```"]
    data.write_json(folder / "features.json", listed)
    data.write_text(folder / "features.md", "\n".join(lines) + "\n")
    data.say(*feature_lines(listed))

@torch.no_grad()
def effects(model, tok, layer, steps, prompts, n=8, likely=1000):
    """What adding steps (k, D) after `layer` does to the next token: [raises, lowers] of each.
    A step is added to the residual at the last token of every prompt (lists of ids) and the blocks above run
    again. Both are n [token, nats], the largest mean changes of log-probability, among the `likely` tokens
    most probable before or after: the rarest change most and mean nothing."""
    ids, keep = (t.to(model.device) for t in data.pad(prompts, "left"))
    seen, out = model_gemma.KVCache(), []
    h, taps = model.hidden(ids, keep, seen, [layer])
    before = model.logits(h[:, -1]).log_softmax(-1)  # (B, V)
    seen["keep"][:, -1] = False  # the last token comes again
    for step in steps.to(model.device, model.dtype):
        again = taps[layer][:, -1:] + step
        h, _ = model.hidden(embeds=again, cache=model_gemma.KVCache(seen), first=layer + 1)
        after = model.logits(h[:, 0]).log_softmax(-1)
        logp = torch.stack([before, after]).mean(1)  # (2, V)
        some = logp.amax(0).topk(min(likely, logp.shape[1])).indices
        change = (logp[1] - logp[0])[some]
        best = [change.topk(n, largest=up) for up in (True, False)]
        out.append([[[token_text(tok, some[t]), float(v)] for v, t in zip(*b)] for b in best])
    return out

@torch.no_grad()
def describe(model, tok, saes, stats, chosen, sets, shown, prompts, batch=8):
    """Where features {layer: (k,)} fire and what they do: dicts as in features.json.
    stats as sails.contrast_means gives them. sets are (aligned, unaligned) texts, lists of ids: only tokens
    of them are told, contexts are of `shown` texts. Effects are measured at the ends of prompts."""
    (m, u), texts, out = map(len, sets), [*sets[0], *sets[1], *shown], []
    every = [(t, p, x) for t, ids in enumerate(texts) for p, x in enumerate(ids) if x != data.BOS]
    where, token = torch.tensor(every).tensor_split([2], 1)  # each token's text and place (n, 2), id (n, 1)
    residuals = sae_module.collect_residuals(model, texts, list(chosen), len(every), batch)
    n = int((where[:, 0] < m + u).sum())
    for i, features in chosen.items():
        sae, parts = saes[i], residuals[i].split(1024)  # all at once it were n * 16,384 activations
        at = features.to(sae.W_dec.device)
        rows, a = sae.W_dec[at], torch.cat([sae.encode(x.to(at.device))[:, at].cpu() for x in parts])
        a, b = a.tensor_split([n])  # (n, k), and of the shown texts
        typical = a.sum(0) / (a > 0).sum(0).clamp(min=1)  # (k,)
        mass = torch.zeros(model.config.vocab_size, len(rows)).index_add(0, token[:n, 0], a)
        share, best = (mass / a.sum(0).clamp(min=1e-30)).topk(6, 0)  # (6, k)
        changes = effects(model, tok, i, rows * typical[:, None].to(rows.device), prompts)
        for j, (f, promotes) in enumerate(zip(features.tolist(), promoted_tokens(model, tok, rows))):
            on, top = a[:, j] > 0, float(a[:, j].max())
            fires = where[:n][on, 0].unique()
            mu, nu, t = (float(stats[i][key][f]) for key in ("mu_aligned", "mu_unaligned", "t"))
            out.append(dict(
                layer=i, feature=f, mu_aligned=mu, mu_unaligned=nu, delta=mu - nu, t=t, promotes=promotes,
                raises=changes[j][0], lowers=changes[j][1],
                fires_on=[[token_text(tok, t), float(x)] for t, x in zip(best[:, j], share[:, j]) if x > 0],
                fires_aligned=int((fires < m).sum()) / m, fires_unaligned=int((fires >= m).sum()) / u,
                typical=float(typical[j]), maximum=top, contexts=_contexts(tok, texts, where[n:], b[:, j]),
                histogram=torch.histc(a[on, j], 20, 0, top or 1).int().tolist()))
    return out

def _contexts(tok, texts, where, a, n=3, before=10, after=5):
    """The n strongest contexts by activations a (tokens,), no four tokens twice."""
    out = {}
    for x, p in zip(*a.topk(min(64, len(a)))):
        t, at = where[p].tolist()
        key, start = tuple(texts[t][max(0, at - 3):at + 1]), max(0, at - before)
        if x > 0 and len(out) < n and key not in out:
            tokens = [token_text(tok, i) for i in texts[t][start:at + after + 1]]
            out[key] = dict(tokens=tokens, at=at - start, activation=float(x))
    return list(out.values())

def fires():
    """Print which features fire on a prompt: `python sae.py`."""
    ap = data.Arguments(description="Show which SAE features fire on a prompt.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--sae", required=True, help="folder or hub id, laid out like Gemma Scope")
    ap.add_argument("--layer", type=data.at_least(0), required=True)
    ap.add_argument("--width", default="16k")
    ap.add_argument("--prompt", required=True)
    ap.add_argument("--top", type=data.at_least(1), default=10)
    args = ap.parse_args()
    model = model_gemma.load_gemma(args.model)
    tok = data.load_tokenizer(args.model, model.config.vocab_size)
    sae = sae_module.load_sae(args.sae, args.layer, args.width)
    sae_module.check_fit(sae, model, args.layer)
    ids = [data.BOS] + data.encode_plain(tok, args.prompt)
    with torch.no_grad():
        x = model.residuals(torch.tensor([ids]), [args.layer])[args.layer][0, 1:].float()  # (T-1, D)
    a, q = sae.encode(x), sae_module.sae_quality(sae, x)
    explained = f", {q['fve']:.2f} of the variance explained" if len(x) > 1 else ""
    print(f"{sae.name}: {q['l0']:.0f} features a token{explained}")
    best, at = a.max(0)
    for i in best.argsort(descending=True)[:args.top].tolist():
        words = " ".join(map(repr, promoted_tokens(model, tok, sae.W_dec[i:i + 1], 6)[0]))
        token = token_text(tok, ids[1 + int(at[i])])
        print(f"feature {i:6d}  {best[i]:8.2f} at {token!r:14} promotes {words}")

# ---- adapters: what one learned, by name ----
def learned(tensors, config, model, saes, chosen, n=5, alarm=1e-3):
    """What a LoRA reads and writes, feature by feature, beside random ones: explain.json's dict.
    A feature's share is ||dW u||^2 / ||dW||^2 in q,k,v,gate,up, ||u^T dW||^2 / ||dW||^2 in o,down. u is its
    decoder row as the projection meets it: times the gain 1 + w of the norm between it and the stream, scaled
    to norm 1. The SAE is that of the nearest layer. chosen {layer: features}: the share along each and in
    their span. others: the n strongest in the rest, each after those before it are taken out, as far as they
    are above what no feature of any adapter reaches by chance: of random adapters one in 1 / alarm does."""
    form = r".*\b(layers\.(\d{1,4})\.\w+\.(\w+)_proj)\.lora_([AB])\b.*"
    found = {(m[1], m[4]): (t, m) for name, t in tensors.items() if (m := re.fullmatch(form, name))}
    whole = found and len(found) == len(tensors) and all((p, x) in found for p, _ in found for x in "AB")
    need(whole, "the adapter is no plain LoRA on a Gemma, in PEFT's form")
    groups = {}
    for path, A, m in [(path, *value) for (path, x), value in found.items() if x == "A"]:
        layer, norm = int(m[2]), model_gemma.NORMS[m[3]]
        near, side = min(saes, key=lambda i: (abs(i - layer), i)), "write" if "post" in norm else "read"
        W, scale = saes[near].W_dec, config["lora_alpha"] / len(A) ** (.5 if config.get("use_rslora") else 1)
        A, B = A.to(W), found[path, "B"][0].to(W) * scale
        faces, other = (A, B) if side == "read" else (B.T, A.T)  # (r, D), (., r)
        fits = layer < model.config.n_layers and faces.shape[1] == W.shape[1] == model.config.d_model
        need(fits, f"{path}: this adapter, SAE and model do not belong together")
        R = torch.linalg.qr(other)[1] @ faces  # (r, D): ||R u|| = ||dW u||, and dW's singular values
        gain = 1 + getattr(model.layers[layer], norm).weight.to(W)  # (D,)
        one = dict(name=path, layer=layer, place=m[3], side=side, sae_layer=near)
        for entry in (one | dict(name=f"{side}, SAE layer {near}", layer=None, place=None), one):
            groups.setdefault(entry["name"], (entry, []))[1].append((R, gain))
    done = [_entry(entry, parts, saes[entry["sae_layer"]].W_dec, chosen.get(entry["sae_layer"], []), n,
                       alarm / len(groups)) for entry, parts in groups.values()]
    return dict(alarm=alarm, sums=[e for e in done if e["layer"] is None],
                adapters=[e for e in done if e["layer"] is not None])

def _entry(entry, parts, W, chosen, n, alarm):
    """An entry of explain.json: adapters (R, gain) taken together, W (N, D)."""
    energy = lambda: sum(float(R.square().sum()) for R, _ in parts)
    total, others = max(1e-30, energy()), []
    size = lambda R, g: ((R * g) @ W.T).square().sum(0) / (W.square() @ g.square())  # ||R u||^2 (N,)
    shares = lambda: sum(size(R, g) for R, g in parts) / total
    spectrum = torch.cat([torch.linalg.svdvals(R).square() for R, _ in parts]) / total
    along, baseline = shares(), random_share(spectrum, *W.shape, alarm)

    def without(some):
        bases = [torch.linalg.qr((W[some] * g).T)[0] for _, g in parts]  # (D, k)
        return [(R - R @ Q @ Q.T, g) for (R, g), Q in zip(parts, bases)]
    parts = without(chosen)
    known = chosen and total > 1e-30  # an adapter that has learned nothing has nothing inside
    inside, chance = (1 - energy() / total, min(1, len(chosen) / W.shape[1])) if known else (None, None)
    while len(others) < n and float((left := shares()).max()) > baseline:
        others.append(dict(feature=int(left.argmax()), share=float(left.max()), words=[]))
        parts = without([others[-1]["feature"]])
    return entry | dict(energy=total, inside=inside, chance=chance, baseline=baseline, others=others,
                        chosen=[dict(feature=f, share=float(along[f])) for f in chosen])

def random_share(spectrum, N, D, alarm):
    """A share that with P >= 1 - alarm none of N directions has in adapters turned at random.
    spectrum: squared singular values w, of sum 1. Proof. A direction's share is sum w_i x_i^2, x a part of a
    random unit vector in D dimensions. For g Gaussian x = g / |g| independently of |g|, whose square has mean
    D, so by Jensen E exp(s D share) <= E exp(s sum w_i g_i^2); from there on Laurent and Massart (2000, lemma
    1): P(D share >= 1 + 2 |w| sqrt(x) + 2 max(w) x) <= exp(-x). Take exp(-x) = alarm / N and add up."""
    x = math.log(N / alarm)
    return float(1 + 2 * spectrum.norm() * x ** .5 + 2 * spectrum.max() * x) / D

def explain_adapter(folder, model, tok, source, features, prompts):
    """learned() of a folder in PEFT's form; `others` get words: the tokens that they raise.
    source: the SAEs' (folder or hub id, layers, width). prompts: lists of ids, as effects takes them."""
    (spec, layers, width), (config, tensors) = source, lora.read_adapter(folder)
    saes = {i: sae_module.load_sae(spec, i, width, device=model.device) for i in layers}
    for i, sae in saes.items():
        sae_module.check_fit(sae, model, i)
    rows = data.read_json(features) if features else []
    need(isinstance(rows, list), f"{features}: wanted a list, as a run's features.json is")
    for f in rows:
        data.check(f, features, layer=int, feature=range(2**31), raises=list)
        good = all(isinstance(x, list) and x and isinstance(x[0], str) for x in f["raises"])
        need(good, f"{features}: raises holds no [token, nats]")
        known = f["layer"] in saes and f["feature"] < len(saes[f["layer"]].W_dec)
        need(known, f"{features}: chosen from other SAEs; give all of its layers, and its width")
    chosen = {i: list(dict.fromkeys(f["feature"] for f in rows if f["layer"] == i)) for i in layers}
    raises = {(f["layer"], f["feature"]): [word for word, *_ in f["raises"][:4]] for f in rows}
    out = learned(tensors, config, model, saes, chosen)
    for e in out["sums"]:
        for c in e["chosen"]:
            c["words"] = raises[e["sae_layer"], c["feature"]]
    for e in [e for e in out["sums"] if e["others"]]:
        i, best = e["sae_layer"], [o["feature"] for o in e["others"]]
        steps = 2 * saes[i].threshold[best, None] * saes[i].W_dec[best]  # about as active as where it fires
        for o, (raises, _) in zip(e["others"], effects(model, tok, i, steps, prompts)):
            o["words"] = [word for word, _ in raises[:4]]
    return out

def parser():
    """Every setting of `python sails.py`."""
    ap = data.Arguments(description="Check the theorem; exit code 1 if a bound is violated. Or --explain.")
    ap.add_argument("--explain", metavar="ADAPTER", help="a LoRA in PEFT's form: what did it learn?")
    ap.add_argument("--model", help="--explain: folder or hub id of the base")
    ap.add_argument("--sae", help="--explain: folder or hub id laid out like Gemma Scope")
    ap.add_argument("--layers", type=data.list_of(int), help="--explain: layers whose SAEs are used")
    ap.add_argument("--width", default="16k", help="--explain: SAE width as its folder says")
    ap.add_argument("--features", help="--explain: a run's features.json; without it all features are ranked")
    return ap

def show(args):
    """Print what an adapter learned: a line a side of the stream, strongest features under it."""
    need(args.model and args.sae and args.layers, "--explain needs --model, --sae and --layers")
    model = model_gemma.load_gemma(args.model)
    tok = data.load_tokenizer(args.model, model.config.vocab_size)
    lora.load_adapter(model, args.explain)  # does it belong to this model?
    lora.detach(model)
    template, turns = data.default_template(args.model, tok), data.read_prompts([LOOKALIKES], 8)
    prompts = [data.render_chat(tok, r["turns"], None, template)[0] for r in turns]
    source = args.sae, args.layers, args.width
    for e in explain_adapter(args.explain, model, tok, source, args.features, prompts)["sums"]:
        known = e["inside"] is not None
        span = f"; the chosen span {e['inside']:.3f}, by chance {e['chance']:.3f}" if known else ""
        print(f"{e['name']}: shares of the update, random adapters' end at {e['baseline']:.4f}{span}")
        chosen = sorted(e["chosen"], key=lambda o: -o["share"])[:5]
        for o in chosen + e["others"]:
            kind, words = "chosen, " if o in chosen else "", " ".join(map(repr, o["words"]))
            print(f"  feature {o['feature']:6d}  {o['share']:.4f}  {kind}raises {words}")
