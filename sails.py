"""sails.py - from SAE features to a safety subspace, and the theorem behind it as running code.

The method, in the paper's order (arXiv 2512.23260; l a layer, i a feature):
    1. a_l(x) = f_enc(h_l(x))                 features of the residual stream   sae.JumpReLUSAE.encode
    2. E_aligned[a_l,i], E_unaligned[a_l,i]   mean activation over each set     contrast_means
    3. Delta_l,i = |E_aligned - E_unaligned|  and the k largest                 score, top_features
    4. V_l = QR(PCA_tau(decoder rows))        orthonormal basis                 basis
    5. A = V^T or B = V, other factor 0       then fine-tune                    lora.init_sails, train.align

The theorem, as proved here (the full text was not at hand; its constants may differ):
    Model      h = sum_i a_i d_i, unit d_i; polysemantic: more d_i than dimensions    superposition
               The sets differ on r features S, |Delta_i| >= gamma. Target: span D_S, D_S = [d_i : i in S]
    ASSUMED    monosemanticity: each i in S has an SAE feature with its Delta_i and a decoder row within eps
               of d_i, other features have Delta = 0; dead, split, absorbed, co-varying features break this
    Error      e(U, V) = |P_U - P_V|, Frobenius norm, P the projector on a span       projector_distance
    Claims  1. "arbitrarily small recovery error": e <= sqrt(2 r) eps / sigma_min(D_S)  sae_bound
            2. n samples find S with P >= 1 - 2 m exp(-n gamma^2 / 4 B^2)    selection_probability
            3. "an irreducible error floor": one direct direction has e >= sqrt(r - 1)  direct_floor
            4. r_s directions in place of r: e >= sqrt|r - r_s|, the price of tau < 1   truncation_floor
    "Direct identification" is estimation from h alone. Claim 3 counts directions: it holds with orthogonal
    neurons too, and PCA, which returns r of them, is not under it. "Semantic entanglement" as the reason why
    LoRA "underperforms" has no counterpart: below is what it does to PCA.
Letters: B batch, D d_model, N SAE width, k chosen features, r target's dimension, n samples, m true features.
Run it (`python sails.py`) to check the claims, exit code 1 if one fails; --explain: what a LoRA learned.
"""
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import model_gemma
import sae as sae_module
from data import need

LOOKALIKES = Path(__file__).parent / "benchmarks" / "lookalikes.jsonl"

# ---- 2. mean activations of two sets ----
def contrast_pairs(rows, contrast="replies", last=3):
    """The two sets as pairs of texts (ids, mask), aligned first; masks mark what is averaged.
    replies  chosen against rejected replies, over the reply: the paper's likely reading. It finds whatever
             tells them apart, words and tone among it
    prompts  harmful (in the aligned place: there a safe model acts, it refuses) against benign prompts, over
             the last tokens, where the reply is decided: no reply word can be picked"""
    if contrast == "replies":
        pairs = [(r["chosen_tokens"], r["rejected_tokens"]) for r in rows if r["rejected_tokens"]]
    else:
        mark = lambda ids: (ids, [int(0 < i >= len(ids) - last) for i in range(len(ids))])
        prompts = lambda label: [mark(r["prompt_ids"]) for r in rows if r["label"] == label]
        pairs = list(zip(prompts("harmful"), prompts("benign")))
    wanted = "rejected replies" if contrast == "replies" else 'labels "harmful" and "benign" in the examples'
    need(pairs, f"--contrast {contrast} needs {wanted}")
    return pairs

@torch.no_grad()
def contrast_means(model, saes, pairs, batch=8):
    """Means of activations and residuals over both sets, streamed: {layer: dict}.
    A text counts once, BOS never. saes {layer: JumpReLUSAE, or None for residuals alone}. Float64 tensors:
      mu_aligned, mu_unaligned (N,)  E_aligned[a], E_unaligned[a]; t (N,) Delta over its standard error
      h_aligned, h_unaligned (D,)    mean residual, var (D,) its variance
      second (D, D)                  mean of d d^T, d a pair's difference of residuals"""
    sums, n = {i: defaultdict(float) for i in saes}, len(pairs)
    for at in data.progress(range(0, n, batch), desc="features", disable=None if n > 10 * batch else True):
        aligned, unaligned = (_text_means(model, saes, side) for side in zip(*pairs[at:at + batch]))
        for i, total in sums.items():
            (h, hh, a), (g, gg, u) = aligned[i], unaligned[i]  # (b, D), (b, D), (b, N)
            means = dict(h_aligned=h, h_unaligned=g, var=(hh + gg) / 2, mu_aligned=a, mu_unaligned=u)
            for key, x in (means | dict(t=(a - u) ** 2)).items():
                total[key] += x.sum(0) / n
            total["second"] += (h - g).T @ (h - g) / n
    for s in sums.values():
        s["var"] = (s["var"] - ((s["h_aligned"] + s["h_unaligned"]) / 2) ** 2).clamp(min=1e-12)
        diff = s["mu_aligned"] - s["mu_unaligned"]
        s["t"] = diff / ((s["t"] - diff ** 2).clamp(min=1e-30) / max(1, n - 1)).sqrt()
    return sums

def _text_means(model, saes, texts):
    """{layer: means over masked tokens of h (b, D), h^2 (b, D), a (b, N), N = 0 without an SAE}."""
    ids, keep = (t.to(model.device) for t in data.pad([ids for ids, _ in texts]))
    mask = data.pad([m for _, m in texts])[0].to(model.device) * (ids != data.BOS)  # (b, T)
    weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).float()
    mean = lambda x: torch.einsum("bt,bt...->b...", weight, x).double().cpu()
    out = {}
    for i, h in model.residuals(ids, list(saes), keep).items():
        h, sae = h.float(), saes[i]  # encoded text by text: at once it were b * T * 16,384 numbers
        a = torch.stack([w @ sae.encode(x) if sae else w[:0] for w, x in zip(weight, h)])
        out[i] = mean(h), mean(h ** 2), a.double().cpu()
    return out

# ---- 3. the score, and the k best ----
def score(mu_aligned, mu_unaligned, rule="absolute", eps=1e-6):
    """How strongly each feature tells the sets apart: (N,), (N,) -> scores (N,) float64.
    absolute  Delta_i = |mu_aligned - mu_unaligned|                   the paper's v2
    relative  (mu_aligned - mu_unaligned) / max(|mu_unaligned|, eps)  v1: signed, features of HARM come last
    The paper's eps is not known; a small one favours features that rarely fire."""
    a, u = (torch.as_tensor(mu, dtype=torch.float64) for mu in (mu_aligned, mu_unaligned))
    if a.dim() != 1 or a.shape != u.shape or not bool(torch.isfinite(a + u).all()):
        raise ValueError(f"wanted two finite vectors of one length, got {tuple(a.shape)}, {tuple(u.shape)}")
    if rule not in ("absolute", "relative"):
        raise ValueError(f"score {rule!r}: must be 'absolute' or 'relative'")
    return (a - u).abs() if rule == "absolute" else (a - u) / u.abs().clamp(min=eps)

_score = score  # top_features has an argument of that name

def top_features(mu_aligned, mu_unaligned, k, score="absolute"):
    """Indices (k,) of the highest scores, best first; of equal ones the lower index comes first."""
    s = _score(mu_aligned, mu_unaligned, score)
    if not 1 <= k <= len(s):
        raise ValueError(f"k = {k}: there are {len(s)} features to choose from")
    return s.sort(descending=True, stable=True).indices[:k]

# ---- 4. decoder rows -> PCA -> QR -> V ----
def basis(W_dec, features, tau=1.0, center=False):
    """Rows `features` of W_dec (N, D) -> orthonormal V (D, r_s), in W_dec's dtype: PCA, then QR.
    Of their principal directions the fewest that hold a share >= tau of the sum of squares are kept, largest
    first, each pointing to the side where its rows are; tau = 1 keeps the whole span. center subtracts the
    rows' mean, which deletes the direction that they share: not the default, the paper is silent."""
    idx = torch.as_tensor(features, dtype=torch.long).flatten().to(W_dec.device)
    if not 0 < tau <= 1 or len(idx) == 0 or int(idx.min()) < 0 or int(idx.max()) >= len(W_dec):
        raise ValueError(f"wanted 0 < tau <= 1, features in 0..{len(W_dec) - 1}: {tau}, {idx.tolist()[:8]}")
    rows = W_dec[idx].double()  # (k, D)
    unit = F.normalize(rows, dim=1)
    if not bool(torch.isfinite(rows).all()) or bool((torch.triu(unit @ unit.T, 1).abs() > 1 - 1e-12).any()):
        raise ValueError("the chosen decoder rows have NaN in them, or two have the same direction")
    x = rows - rows.mean(0) if center else rows
    s, Vt = torch.linalg.svd(x, full_matrices=False)[1:]  # (k,), (k, D)
    if float(s[0]) <= 1e-12 * max(1e-300, float(rows.norm())):
        raise ValueError("the chosen rows have no variance: no direction to keep")
    held, rank = (s ** 2).cumsum(0) / (s ** 2).sum(), int((s > 1e-10 * s[0]).sum())
    keep = rank if tau == 1 else min(rank, int((held < tau - 1e-12).sum()) + 1)
    V = torch.linalg.qr(Vt[:keep].T)[0]
    V = V * torch.where((rows @ V).sum(0) < 0, -1.0, 1.0)
    return V.to(W_dec.dtype if W_dec.dtype in (torch.float32, torch.float64) else torch.float32)

READS_SAE = ("sails", "random-features")  # methods whose directions are decoder rows
READS_DATA = (*READS_SAE, "mean-diff", "raw-pca")  # ... or depend on the two sets at all
METHODS = (*READS_DATA, "random")  # beside them `lora` and `full`, which have no subspace

def subspaces(method, stats, saes, k=32, tau=0.8, rule="absolute", center=False, r=16, pool=False,
              standardise=False, drop=(), seed=0):
    """SAILS's subspaces, or a sceptic's: ({layer: V (D, r_s)}, {layer: features (k,)}).
    sails            the k best features' decoder rows
    random-features  k random ones among those that fire: is it the choice, or being an SAE direction?
    random           r random orthonormal directions: is it any direction at all? Reads only stats' "D"
    mean-diff        the difference of mean residuals: one direction, filled up at random when LoRA starts
    raw-pca          r principal directions of paired differences of residuals; standardise: of dimensions
                     divided by their standard deviations, as SAEs see them
    pool  one basis for all layers, from all their features      drop  features never to choose"""
    rng, out, chosen, rows = torch.Generator().manual_seed(seed), {}, {}, {}
    for i, s in stats.items():
        if method in READS_SAE:
            W = saes[i].W_dec.detach().cpu().double()
            chosen[i] = _choose(method, s, k, rule, drop, rng, i)
            rows[i] = W[chosen[i]]
            out[i] = basis(W, chosen[i], tau, center)
        elif method == "random":
            out[i] = torch.linalg.qr(torch.randn(s["D"], r, generator=rng, dtype=torch.float64))[0]
        elif method == "mean-diff":
            out[i] = F.normalize(s["h_aligned"] - s["h_unaligned"], dim=0)[:, None]
        else:
            std = s["var"].sqrt() if standardise else torch.ones_like(s["var"])
            top = top_eigenspace(s["second"] / torch.outer(std, std), r).flip(1)  # largest first
            out[i] = torch.linalg.qr(top * std[:, None])[0]
    if pool and rows:
        every = torch.cat(list(rows.values()))
        out = dict.fromkeys(rows, basis(every, range(len(every)), tau, center))
    return {i: V.float().contiguous() for i, V in out.items()}, chosen

def _choose(method, s, k, rule, drop, rng, layer):
    """Features (k,) of one layer, best or random, among those that fire and are not dropped."""
    fires = s["mu_aligned"] + s["mu_unaligned"] > 0  # (N,)
    need(all(0 <= f < len(fires) for f in drop), f"--drop: layer {layer} has features 0..{len(fires) - 1}")
    fires[list(drop)] = False
    fired = fires.nonzero()[:, 0]
    need(len(fired) >= k, f"layer {layer}: only {len(fired)} features fire on the two sets, --k asks for {k}")
    if method == "random-features":
        return fired[torch.randperm(len(fired), generator=rng)[:k]]
    return fired[top_features(s["mu_aligned"][fired], s["mu_unaligned"][fired], k, rule)]

# ---- what an adapter learned, by name ----
def explain(tensors, config, model, saes, chosen, n=5, alarm=1e-3):
    """What a LoRA reads and writes, feature by feature, beside random ones: explain.json's dict.
    A feature's share is ||dW u||^2 / ||dW||^2 in q,k,v,gate,up, ||u^T dW||^2 / ||dW||^2 in o,down. u is its
    decoder row as the projection meets it: times the gain 1 + w of the norm between it and the stream, scaled
    to norm 1. The SAE is that of the nearest layer. chosen {layer: features}: the share along each and in
    their span. others: the n strongest in the rest, each after those before it are taken out, as far as they
    are above what no feature of any adapter reaches by chance: of random adapters one in 1 / alarm does."""
    form = r".*\b(layers\.(\d+)\.\w+\.(\w+)_proj)\.lora_([AB])\b.*"
    found = {(m[1], m[4]): (t, m) for name, t in tensors.items() if (m := re.fullmatch(form, name))}
    whole = found and len(found) == len(tensors) and all((p, x) in found for p, _ in found for x in "AB")
    odd = [key for key in ("use_dora", "alpha_pattern", "fan_in_fan_out") if config.get(key)]
    need(whole and not odd, f"the adapter is no plain LoRA on a Gemma, in PEFT's form {odd or ''}".strip())
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
    done = [_explained(entry, parts, saes[entry["sae_layer"]].W_dec, chosen.get(entry["sae_layer"], []), n,
                       alarm / len(groups)) for entry, parts in groups.values()]
    return dict(alarm=alarm, sums=[e for e in done if e["layer"] is None],
                adapters=[e for e in done if e["layer"] is not None])

def _explained(entry, parts, W, chosen, n, alarm):
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
    inside, chance = (1 - energy() / total, len(chosen) / W.shape[1]) if chosen else (None, None)
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
    """explain() of a folder in PEFT's form; `others` get words: the tokens that they raise.
    source: the SAEs' (folder or hub id, layers, width). prompts: lists of ids, as effects takes them."""
    (spec, layers, width), path = source, Path(folder) / "adapter_model.safetensors"
    saes = {i: sae_module.load_sae(spec, i, width, device=model.device) for i in layers}
    rows = data.read_json(features) if features else []
    chosen = {i: [f["feature"] for f in rows if f["layer"] == i] for i in layers}
    known = all(f["layer"] in saes and f["feature"] < len(saes[f["layer"]].W_dec) for f in rows)
    need(known, f"{features}: chosen from other SAEs; give all of its layers, and its width")
    model_gemma.tensor_shapes(path)
    out = explain(load_file(path), data.read_json(path.with_name("adapter_config.json")), model, saes, chosen)
    for e in [e for e in out["sums"] if e["others"]]:
        i, best = e["sae_layer"], [o["feature"] for o in e["others"]]
        steps = 2 * saes[i].threshold[best, None] * saes[i].W_dec[best]  # about as active as where it fires
        for o, (raises, _) in zip(e["others"], sae_module.effects(model, tok, i, steps, prompts)):
            o["words"] = [word for word, _ in raises[:4]]
    return out

# ---- the theorem: error ----
def projector_distance(U, V):
    """|P_U - P_V| of the column spans of U (D, r_u) and V (D, r_v): 0 to sqrt(r_u + r_v).
    |P_U - P_V|^2 = r_u + r_v - 2 |U^T V|^2 = |(I - P_V) U|^2 + |(I - P_U) V|^2 for orthonormal columns; the
    middle form subtracts large things, which leaves 1e-8 for equal spans."""
    U, V = _spans(U, V)
    return float(torch.sqrt(((U - V @ (V.T @ U)) ** 2).sum() + ((V - U @ (U.T @ V)) ** 2).sum()))

def captured(U, V):
    """The share of the target V (D, r) that lies in the estimate U: |P_U V|^2 / r, 0..1."""
    U, V = _spans(U, V)
    return float((U.T @ V).square().sum() / V.shape[1])

def _spans(*bases):
    """An orthonormal basis (D, r) float64 of each one's columns."""
    out = []
    for U in bases:
        U = torch.as_tensor(U, dtype=torch.float64)
        good = U.dim() == 2 and 1 <= U.shape[1] <= len(U) == len(bases[0]) and bool(torch.isfinite(U).all())
        Q, R = torch.linalg.qr(U) if good else (U, torch.zeros(1, 1))
        s = torch.linalg.svdvals(R)
        if float(s[-1]) <= 1e-12 * float(s[0]):
            raise ValueError("wanted finite, independent columns (D, r), 1 <= r <= D, of one D; got shapes "
                             f"{[tuple(x.shape) for x in bases]}")
        out.append(Q)
    return out

# ---- the theorem: claims ----
def sae_bound(eps, r, sigma):
    """Claim 1: r chosen rows d^_i with |d^_i - d_i| <= eps have e <= sqrt(2 r) eps / sigma.
    Proof (a sin-theta theorem, as Wedin's). D^ = [d^_i] lies in its own span, so (I - P^) D_S =
    (I - P^)(D_S - D^), whose norm is at most |D_S - D^| <= sqrt(r) eps. Write D_S = Q R, Q an orthonormal
    basis of the target; R's smallest singular value is sigma, so |(I - P^) Q| <= sqrt(r) eps / sigma. With
    r^ <= r the rank of D^, e^2 = r^ + r - 2 |P^ Q|^2 <= 2 (r - |P^ Q|^2) = 2 |(I - P^) Q|^2, for every eps
    and without an eigengap: D^ has no (r+1)-th direction. Reached to first order where all errors point one
    way out of the target, signed like D_S's weakest combination, if that weighs the d_i equally. From
    eps = sigma on it says nothing: e <= sqrt(2 r) always."""
    _positive(r=r, sigma=sigma, eps=eps + 1)
    return (2 * r) ** .5 * eps / sigma

def selection_probability(n, gamma, B, m):
    """Claim 2: top r by |Delta| of n samples is S with P >= 1 - 2 m exp(-n gamma^2 / 4 B^2).
    Assumes activations in [0, B], |Delta_i| at least gamma larger on S than off S (monosemanticity: 0 off S),
    independent samples. Proof. An estimated Delta_i is a sum of 2 n independent terms of range B / n; by
    Hoeffding it is off by gamma / 2 or more with probability <= 2 exp(-2 (gamma/2)^2 / (2 n (B/n)^2)) =
    2 exp(-n gamma^2 / 4 B^2). If none of the m is, all of S ranks above all the rest. A pair that shares an
    activation outright only helps (the terms cancel); pairs dependent in any other way need 8 in place of 4
    (n terms of range 2 B / n)."""
    _positive(n=n, gamma=gamma, B=B, m=m)
    return max(0., 1 - 2 * m * math.exp(-n * gamma ** 2 / (4 * B ** 2)))

def direct_floor(r):
    """Claim 3: one vector u, as the mean difference of hidden states is, has e >= sqrt(r - 1).
    Proof. For unit u, e^2 = r + 1 - 2 |P_S u|^2 >= r - 1, equal iff u lies in the target; any sample size,
    any dimension. The exact mean difference is D_S Delta_S, inside the target: it ATTAINS the floor."""
    return truncation_floor(r, 1)

def truncation_floor(r, r_s):
    """Claim 4: r_s directions have e >= sqrt(|r - r_s|), equal iff one span holds the other.
    Proof. e^2 = r + r_s - 2 |P_U V|^2, and |P_U V|^2 <= min(r, r_s) as U and V have orthonormal columns."""
    _positive(r=r, r_s=r_s)
    return abs(r - r_s) ** .5

def _positive(**values):
    for name, v in values.items():
        if not 0 < v < float("inf") or (name in ("r", "r_s", "n", "m") and v != int(v)):
            raise ValueError(f"{name} = {v}: must be positive and finite, and a count must be whole")

# ---- the theorem: model ----
def superposition(seed, d=64, m=128, r=6, coherence=0., nuisances=3, strength=0., tilt=.01):
    """Draw a dictionary and two distributions over its features (Elhage et al. 2022), float64:
    W (m, d)      unit rows d_i, of mean cosine about `coherence`
    safety (r,)   S: every second feature is on more often in aligned states, as a refusal is, the others in
                  unaligned ones, as harm is
    nuisance      features of an unrelated concept, common and `strength` times as large as others, that fire
                  2 * tilt more often in unaligned states: entangled with harm, no part of it
    p, mean, var  (2, m), aligned first: an activation is uniform on [0, top_i] with probability p_i, else 0,
                  all independent; delta (m,) is mean[0] - mean[1]
    gamma         smallest |delta| on S minus the largest off S: the gap that selection lives on"""
    if not (1 <= r <= d and r + nuisances <= m and 0 <= coherence < 1 and 0 <= tilt <= .3):
        raise ValueError(f"no such model: {d=} {m=} {r=} {nuisances=} {coherence=} {tilt=}")
    gen = stream(seed, 1)
    z = F.normalize(torch.randn(m + 1, d, generator=gen, dtype=torch.float64), dim=-1)
    w = SimpleNamespace(W=F.normalize((1 - coherence) ** .5 * z[:m] + coherence ** .5 * z[m], dim=-1))
    order = torch.randperm(m, generator=gen)
    w.safety, w.nuisance, others = order[:r], order[r:r + nuisances], order[r:]
    w.p = torch.full((2, m), .03, dtype=torch.float64)  # with S, 5 of 128 features are on at a time
    w.p[torch.arange(r) % 2, w.safety] = torch.linspace(.25, .65, r, dtype=torch.float64)
    w.p[:, w.nuisance] = torch.tensor([[.3 - tilt], [.3 + tilt]], dtype=torch.float64)
    w.top = torch.ones(m, dtype=torch.float64).index_fill(0, w.nuisance, strength)
    w.mean = w.p * w.top / 2
    w.var = w.p * w.top ** 2 / 3 - w.mean ** 2
    w.delta = w.mean[0] - w.mean[1]
    w.gamma = float(w.delta[w.safety].abs().min()) - max(w.delta[others].abs().tolist(), default=0.)
    return w

def stream(*key):
    """A generator seeded by a tuple. One plain seed would make errors repeat what they perturb."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def superposition_pairs(world, n, seed, shared=0., noise=0.):
    """Draw n pairs: activations (2, n, m) and hidden states (2, n, d), index 0 aligned.
    shared: the probability that a feature with equal rates has one activation in both states of a pair; 1 is
    the perfect pair, which differs in S and the nuisance only. noise: standard deviation added to h."""
    gen = stream(seed, 2)
    rand = lambda: torch.rand(n, len(world.top), generator=gen, dtype=torch.float64)
    # one draw does for both: u < p happens with probability p, and given that, u / p is uniform
    a = torch.stack([torch.where(u < p, u / p, 0) * world.top for u, p in zip((rand(), rand()), world.p)])
    a[1] = torch.where((rand() < shared) & (world.p[0] == world.p[1]), a[0], a[1])
    h = a @ world.W
    return a, h + noise * torch.randn(h.shape, generator=gen, dtype=torch.float64)

def difference_moment(world, shared=0., noise=0.):
    """E[d d^T] (D, D), d a pair's difference of h: the matrix that PCA of pairs converges to."""
    var, u = world.var.sum(0) * (1 - shared * (world.p[0] == world.p[1])), world.delta @ world.W  # (m,), (D,)
    noises = 2 * noise ** 2 * torch.eye(len(u), dtype=torch.float64)
    return (world.W.T * var) @ world.W + torch.outer(u, u) + noises

def top_eigenspace(C, r):
    """The r leading eigenvectors (D, r) of a symmetric matrix, largest last."""
    return torch.linalg.eigh(C)[1][:, -r:]

# ---- the check: cells[table, row, column] holds a number per seed ----
SEEDS, RANK = range(10, 15), 6  # the trained SAE's settings were chosen on seeds 0-2
EPS, STRENGTHS, PAIRS = (.01, .03, .1, .3, 1.), (0., .5, 1., 4., 16.), 10000
BOUNDS = {"sae": "eps-close rows: e <= sqrt(2r) eps / sigma", "trained": "the same, a trained SAE's own eps",
          "selection": "selection fails: p <= 2m exp(-n gamma^2/4B^2)",
          "direct": "one direction: e >= sqrt(r-1)", "truncation": "r_s directions: e >= sqrt|r-r_s|"}
FLOORS = ("direct", "truncation")  # the error is above these, below the others
TITLES = {"eps": "SAE side: error against eps, the distance of the chosen decoder rows from the truth",
          "strength": "Error against entanglement: an unrelated concept, this much as strong, tilted to harm"}
PCA, LIMIT, PERFECT = "PCA of differences", "  its limit, ever more pairs", "  its limit, perfect pairs"
TRUE, TRAINED, NUISANCE = "true rows, top r", "SAE trained on them", "nuisance |Delta| / least on S"

def measure_eps(seed, cells, checks):
    """Check claim 1 on rows planted eps off, at random and all one way; claim 4 on true rows."""
    world, gen = superposition(seed), stream(seed, 5)
    rows = world.W[world.safety]
    plants = {"errors in random directions": random_rows, "errors all one way out": one_way_rows}
    for eps in EPS:
        bound = sae_bound(eps, RANK, _sigma(rows))
        for name, plant in plants.items():
            e = projector_distance(basis(plant(rows, eps, gen), range(RANK)), rows.T)
            cells["eps", name, eps].append(e)
            checks["sae"].append((e, bound))
        cells["eps", "bound sqrt(2r) eps / sigma", eps].append(bound)
        V = basis(rows, range(RANK), 1 - eps / 2)
        checks["truncation"].append((projector_distance(V, rows.T), truncation_floor(RANK, V.shape[1])))

def random_rows(rows, eps, gen):
    """Rows (r, D), each moved exactly eps in a random direction."""
    return rows + eps * F.normalize(torch.randn(rows.shape, generator=gen, dtype=torch.float64), dim=1)

def one_way_rows(rows, eps, gen):
    """Rows (r, D) moved eps along one line out of their span: the worst case of claim 1."""
    U, _, Vt = torch.linalg.svd(rows, full_matrices=False)
    w = torch.randn(rows.shape[1], generator=gen, dtype=torch.float64)
    return rows + eps * U[:, -1:].sign() * F.normalize(w - Vt.T @ (Vt @ w), dim=0)

def measure_entanglement(seed, cells, checks):
    """Measure every estimator on the same pairs, over the strength of an entangled concept."""
    for strength in STRENGTHS:
        world = superposition(seed, strength=strength)
        (a, h), target = superposition_pairs(world, PAIRS, seed), world.W[world.safety].T  # target (D, r)
        d = h[0] - h[1]
        V, eps, _ = trained_estimate(world, h, seed)
        found = {"mean difference": d.mean(0)[:, None], PCA: top_eigenspace(d.T @ d / len(d), RANK),
                 LIMIT: top_eigenspace(difference_moment(world), RANK),
                 PERFECT: top_eigenspace(difference_moment(world, 1.), RANK),
                 TRUE: sae_estimate(a, world.W, RANK)[0], TRAINED: V}
        errors = {name: projector_distance(U, target) for name, U in found.items()}
        checks["direct"].append((errors["mean difference"], direct_floor(RANK)))
        checks["trained"].append((errors[TRAINED], sae_bound(eps, RANK, _sigma(target))))
        ratio = float(world.delta[world.nuisance].abs().max() / world.delta[world.safety].abs().min())
        for name, value in (errors | {NUISANCE: ratio}).items():
            cells["strength", name, strength].append(value)

def sae_estimate(codes, W_dec, r):
    """SAILS: codes (2, n, N) and decoder rows (N, D) -> basis (D, r), chosen features (r,)."""
    features = top_features(*codes.mean(1), r)
    return basis(W_dec, features), features

def trained_estimate(world, h, seed, steps=400):
    """SAILS with an SAE trained on h: basis (D, r), eps of its chosen rows, of its best rows.
    eps is how far the worst d_i of S is from the nearest row; where the two differ selection failed. The SAE
    is given the number of features, and about how many fire at a time."""
    sae = sae_module.train_sae(h.flatten(0, 1).float(), len(world.W), 6, steps, batch=128, lr=1e-2, seed=seed)
    W_dec, target = sae.W_dec.double(), world.W[world.safety]
    V, features = sae_estimate(sae.encode(h).double(), W_dec, len(target))
    away = (target[:, None] - W_dec).norm(dim=-1)  # (r, N)
    return V, float(away[:, features].min(1).values.max()), float(away.min(1).values.max())

def measure_selection(checks, trials=4000):
    """Claim 2 where activations are coins, 0 or 1, the widest spread there is."""
    gen = stream(0, 7)
    cases = (1, 2, 150, .2), (1, 2, 400, .2), (2, 8, 300, .2), (3, 40, 80, .5), (3, 200, 2000, .15)
    for r, m, n, gamma in cases:
        p = torch.full((trials, 2, m), .5, dtype=torch.float64)
        p[:, :, :r] += torch.tensor([[gamma / 2], [-gamma / 2]])
        mu = torch.binomial(torch.full_like(p, n), p, generator=gen) / n  # (trials, 2, m)
        wrong = sum(set(top_features(*row, r).tolist()) != set(range(r)) for row in mu)
        checks["selection"].append((wrong / trials, 1 - selection_probability(n, gamma, 1, m)))

def _sigma(A):
    return float(torch.linalg.svdvals(A)[-1])

def print_table(cells, table):
    """Print one table: mean and half-width of the 95 % interval over seeds."""
    rows, cols = (list(dict.fromkeys(key[i] for key in cells if key[0] == table)) for i in (1, 2))
    print(f"\n{TITLES[table]}\n{table:32s}" + "".join(f"{c:>8g}       " for c in cols).rstrip())
    for row in rows:
        pairs = (data.t_interval(cells[table, row, c]) for c in cols)
        shown = (f"{mean:8.3f}" + (f" ±{half:.3f}" if half >= 5e-4 else " " * 7) for mean, half in pairs)
        print((f"{row:32s}" + "".join(shown)).rstrip())

def plain_words(cells):
    """Print what the entanglement table says, in sentences that only report its means."""
    print(f"\nIn plain words ({len(SEEDS)} worlds, {PAIRS} pairs, ±: 95 % t-interval)")
    for s in STRENGTHS:
        at = lambda row: f"{np.mean(cells['strength', row, s]):.2f}"
        print(f"- Entanglement of strength {s:g}. Raw PCA: {at(PCA)}, its limit {at(LIMIT)}, perfect pairs "
              f"{at(PERFECT)};")
        print(f"  trained SAE: {at(TRAINED)}; true rows: {at(TRUE)}; one vector: {direct_floor(RANK):.2f}.")
    print(f"  There |Delta| of the unrelated concept is {at(NUISANCE)} times the least on S: above 1 the")
    print("  assumption fails, and selection with it, for an SAE as for the true dictionary.")

def verdicts(checks):
    """Print a verdict per bound with its worst ratio; True if all hold, up to rounding of 1e-9."""
    print(f"\n{'verdict':59s}{'measured':>10s}{'bound':>10s}{'ratio':>8s}  worst of")
    good = True
    for key, name in BOUNDS.items():
        sign = -1 if key in FLOORS else 1
        holds = all(sign * (e - b) <= 1e-9 * (1 + b) for e, b in checks[key])
        e, b = max((c for c in checks[key] if c[1] > 0), key=lambda c: sign * c[0] / c[1])
        word = "holds" if holds else "VIOLATED"
        print(f"{name:49s}{word:10s}{e:10.3g}{b:10.3g}{e / b:8.3f}  {len(checks[key])} cases")
        good = good and holds
    return good

def explain_main(args):
    """Print what an adapter learned: a line a side of the stream, strongest features under it."""
    need(args.model and args.sae and args.layers, "--explain needs --model, --sae and --layers")
    model, tok = model_gemma.load_gemma(args.model), data.load_tokenizer(args.model)
    template, turns = data.default_template(args.model, tok), data.read_prompts([LOOKALIKES], 8)
    prompts = [data.render_chat(tok, r["turns"], None, template)[0] for r in turns]
    source = args.sae, args.layers, args.width
    for e in explain_adapter(args.explain, model, tok, source, args.features, prompts)["sums"]:
        span = f"; the chosen span {e['inside']:.3f}, by chance {e['chance']:.3f}" if e["chosen"] else ""
        print(f"{e['name']}: shares of the update, random adapters' end at {e['baseline']:.4f}{span}")
        for o in sorted(e["chosen"], key=lambda o: -o["share"])[:5] + e["others"]:
            words = "raises " + " ".join(map(repr, o["words"])) if "words" in o else "chosen"
            print(f"  feature {o['feature']:6d}  {o['share']:.4f}  {words}")

def main():
    ap = data.Arguments(description="Check the theorem; exit code 1 if a bound is violated. Or --explain.")
    ap.add_argument("--explain", metavar="ADAPTER", help="a LoRA in PEFT's form: what did it learn?")
    ap.add_argument("--model", help="--explain: folder or hub id of the base")
    ap.add_argument("--sae", help="--explain: folder or hub id laid out like Gemma Scope")
    ap.add_argument("--layers", type=data.list_of(int), help="--explain: layers whose SAEs are used")
    ap.add_argument("--width", default="16k", help="--explain: SAE width as its folder says")
    ap.add_argument("--features", help="--explain: a run's features.json; without it all features are ranked")
    args = ap.parse_args()
    if args.explain:
        return explain_main(args)
    torch.set_num_threads(1)  # tiny steps: a second thread only waits
    cells, checks = defaultdict(list), defaultdict(list)
    for seed in data.progress(SEEDS, desc="worlds"):
        measure_eps(seed, cells, checks)
        measure_entanglement(seed, cells, checks)
    measure_selection(checks)
    for table in TITLES:
        print_table(cells, table)
    plain_words(cells)
    return 0 if verdicts(checks) else 1

if __name__ == "__main__":
    data.run_main(main)
