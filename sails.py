"""sails.py - from SAE features to an orthonormal safety subspace, and the theorem behind it as running code.

Letters: D d_model, N SAE width (features), r dimension of the target, r_s of an estimate, n samples, m true features.
Run it (`python sails.py`) to see the theorem checked numerically: four tables and a verdict per bound; exit code 1 if
one is violated. `--plot FILE.png` draws the same as one figure.
"""
import argparse
import importlib.util
import math
import textwrap
from collections import defaultdict

import torch

import data
from data import UserError
from sae import train_sae


# ===== stage 1: which features tell safe from unsafe?
def contrast_rows(tok, examples, style, contrast="replies", last=3):
    """The two sets to compare, as pairs of (ids, mask): mask is 1 on the tokens whose activations are averaged.

    replies  aligned: a prompt with its chosen reply; unaligned: the same prompt with its rejected one; the reply's tokens.
             The paper's likely reading. It finds whatever tells the two replies apart: words and tone among it.
    prompts  harmful prompts against benign ones, by the examples' labels, over the last `last` prompt tokens, where the
             reply is decided: what the model knows before it answers. No reply is read, so no reply word can be picked.
             Harmful stands in the place of aligned: there a safe model does something, namely refuse.
    Pairs are what PCA of differences needs; for prompts the i-th harmful one goes with the i-th benign one.
    """
    if contrast == "replies":
        rows = [ex for ex in examples if ex["rejected"] is not None]
        if not rows:
            raise UserError("--contrast replies compares chosen with rejected replies, and no example has a rejected one")
        return [tuple(data.render_chat(tok, ex["turns"], ex[side], style) for side in ("chosen", "rejected")) for ex in rows]
    prompts = {label: [data.render_chat(tok, ex["turns"], None, style)[0] for ex in examples if ex["label"] == label]
               for label in ("harmful", "benign")}
    if not prompts["harmful"] or not prompts["benign"]:
        raise UserError('--contrast prompts needs examples with "label": "harmful" and others with "benign"')
    masked = lambda ids: (ids, [int(0 < i >= len(ids) - last) for i in range(len(ids))])
    return [(masked(a), masked(u)) for a, u in zip(prompts["harmful"], prompts["benign"])]


@torch.no_grad()
def contrast_means(model, saes, pairs, batch=8, seed=0, nulls=20):
    """Stream both sets through the model and the SAEs; keep sums only, never activations. BOS is never counted.

    saes {layer: JumpReLUSAE}, pairs as contrast_rows gives them. A text counts once: the mean over its masked tokens.
    Returns {layer: dict} of float64 tensors on the CPU:
      mu_aligned, mu_unaligned (N,)  mean activation of each feature      h_aligned, h_unaligned (D,)  mean residual
      t (N,)       mean paired difference over its standard error
      null (nulls, N)  the mean difference when each pair's labels are swapped at random: what chance alone gives
      halves (2, N)    the mean difference on even and on odd pairs: how stable the choice is
      second (D, D)    mean of delta delta^T, delta the paired difference of residuals      var (D,)  residual variance
    """
    sums, n = {i: {} for i in saes}, len(pairs)
    # drawn in one piece, so that the batch size changes nothing
    swaps = torch.randint(0, 2, (nulls, n), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    for start in data.progress(range(0, n, batch), desc="features", disable=None if n > 10 * batch else True):
        part = pairs[start:start + batch]
        even = (torch.arange(start, start + len(part)) % 2 == 0).double()
        seen = [_text_means(model, saes, [p[side] for p in part]) for side in (0, 1)]
        for i in saes:
            (a, ha, va), (u, hu, vu) = seen[0][i], seen[1][i]                                   # (b, N), (b, D), (b, D)
            d, dh, s = a - u, ha - hu, sums[i]
            new = dict(mu_aligned=a.sum(0), mu_unaligned=u.sum(0), h_aligned=ha.sum(0), h_unaligned=hu.sum(0), null=swaps[:, start:start + batch] @ d,
                       squares=(d ** 2).sum(0), halves=torch.stack([even @ d, (1 - even) @ d]), second=dh.T @ dh,
                       h_squares=(va + vu).sum(0) / 2)
            for key, value in new.items():
                s[key] = s[key] + value if key in s else value
    for s in sums.values():
        s["halves"] /= torch.tensor([[max(1, (n + 1) // 2)], [max(1, n // 2)]])
        for key in s.keys() - {"halves"}:
            s[key] /= n
        d = s["mu_aligned"] - s["mu_unaligned"]
        s["t"] = d / ((s.pop("squares") - d ** 2).clamp(min=1e-30) / max(1, n - 1)).sqrt()
        s["var"] = (s.pop("h_squares") - ((s["h_aligned"] + s["h_unaligned"]) / 2) ** 2).clamp(min=1e-12)
    return sums


def _text_means(model, saes, rows):
    """{layer: (feature means (b, N), residual means (b, D), means of squared residuals (b, D))} over each text's masked tokens."""
    ids, keep = (t.to(model.device) for t in data.pad([ids for ids, _ in rows]))
    mask = data.pad([m for _, m in rows])[0].to(model.device) * (ids != data.BOS)               # (b, T)
    weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).float()
    out, taps = {}, model.residuals(ids, list(saes), keep)
    mean = lambda x: torch.einsum("bt,bt...->b...", weight, x).double().cpu()
    for i, sae in saes.items():
        h = taps[i].float()
        # encoded text by text: all at once would be b * T * 16,384 numbers
        a = torch.stack([weight[r] @ sae.encode(h[r]) for r in range(len(h))]).double().cpu()
        out[i] = a, mean(h), mean(h ** 2)
    return out


METHODS = ("sails", "random", "random-features", "mean-diff", "raw-pca")       # beside them `lora` and `full`: no basis


def build_bases(method, stats, saes, k=32, tau=0.8, rule="absolute", center=False, r=16, pool=False, standardise=False, seed=0):
    """Stage 2 for SAILS and for what a sceptic would put in its place -> ({layer: V (D, r_s)}, {layer: features (k,)}).

    sails            span of the k best features' decoder rows
    random-features  the same with k random features among those that fired: is it the choice, or being an SAE direction?
    random           r random orthonormal directions: is it any direction at all?
    mean-diff        the normalised difference of mean residuals: one direction, filled up at random when LoRA starts
    raw-pca          the r largest principal directions of the paired differences of residuals; standardise: after dividing
                     each dimension by its standard deviation, as SAEs are trained, so that outlier dimensions do not rule
    pool: one basis for all layers, from all layers' features together (only for sails and random-features).
    """
    rng, bases, chosen, rows = torch.Generator().manual_seed(seed), {}, {}, {}
    for i, s in stats.items():
        W, D = saes[i].W_dec.detach().cpu().double(), len(s["var"])
        if method in ("sails", "random-features"):
            fired = (s["mu_aligned"] + s["mu_unaligned"] > 0).nonzero()[:, 0]
            if len(fired) < k:
                raise UserError(f"layer {i}: only {len(fired)} features fire on the contrast sets, --k asks for {k}")
            pick = fired[torch.randperm(len(fired), generator=rng)[:k]]
            chosen[i] = top_features(s["mu_aligned"], s["mu_unaligned"], k, rule) if method == "sails" else pick
            rows[i] = W[chosen[i]]
            bases[i] = basis(W, chosen[i], tau, center)
        elif method == "random":
            bases[i] = torch.linalg.qr(torch.randn(D, r, generator=rng, dtype=torch.float64))[0]
        elif method == "mean-diff":
            u = s["h_aligned"] - s["h_unaligned"]
            if float(u.norm()) == 0:
                raise UserError(f"layer {i}: the two sets have one and the same mean residual")
            bases[i] = (u / u.norm())[:, None]
        elif method == "raw-pca":
            std = s["var"].sqrt() if standardise else torch.ones(D, dtype=torch.float64)
            top = torch.linalg.eigh(s["second"] / torch.outer(std, std))[1].flip(1)[:, :r]      # largest first
            bases[i] = torch.linalg.qr(top * std[:, None])[0]
        else:
            raise UserError(f"method {method!r}: choose from {', '.join(METHODS)}")
    if pool and rows:
        every = torch.cat(list(rows.values()))
        bases = dict.fromkeys(rows, basis(every, range(len(every)), tau, center))
    return {i: V.float() for i, V in bases.items()}, chosen


# ===== stage 2: the subspace
def score(mu_aligned, mu_unaligned, rule="absolute", eps=1e-6):
    """How strongly each feature tells the two sets apart: mean activations (N,), (N,) -> scores (N,) float64.

    absolute  Delta_i = |mu_aligned - mu_unaligned|                       (the paper's v2, the default)
    relative  (mu_aligned - mu_unaligned) / max(|mu_unaligned|, eps)      (v1): signed, so a feature of HARM, on in
              unaligned text, comes last. The paper's eps is not known; a small one favours features that hardly ever fire
    """
    a, u = (torch.as_tensor(mu, dtype=torch.float64) for mu in (mu_aligned, mu_unaligned))
    if a.dim() != 1 or a.shape != u.shape:
        raise ValueError(f"wanted two vectors of one length, got shapes {tuple(a.shape)} and {tuple(u.shape)}")
    _finite(mu_aligned=a, mu_unaligned=u)
    if rule == "absolute":
        return (a - u).abs()
    if rule == "relative":
        return (a - u) / u.abs().clamp(min=eps)
    raise ValueError(f"score {rule!r}: must be 'absolute' or 'relative'")


_scores = score                                        # top_features has an argument of that name


def top_features(mu_aligned, mu_unaligned, k, score="absolute"):
    """Indices (k,) of the k highest-scoring features, best first; of equal scores the lower index comes first."""
    s = _scores(mu_aligned, mu_unaligned, score)
    if not 1 <= k <= len(s):
        raise ValueError(f"k = {k}: there are {len(s)} features to choose from")
    return s.sort(descending=True, stable=True).indices[:k]


def basis(W_dec, features, tau=1.0, center=False):
    """Decoder rows of the chosen features -> orthonormal V (D, r_s): PCA, then QR (the paper's step 4).

    W_dec (N, D), features: k distinct indices. Of the rows' principal directions the fewest that hold a share >= tau of
    their sum of squares are kept, largest first; tau = 1 keeps their whole span. Each points to the side where its rows
    are, so a basis does not depend on the signs a linear-algebra library happens to return.
    center subtracts the rows' mean first. That deletes the direction all safety features share, so the default is not to;
    the paper is silent. Computed in float64, returned in W_dec's dtype (float32 for half precision).
    """
    idx = torch.as_tensor(features, dtype=torch.long).flatten().to(W_dec.device)
    if not 0 < tau <= 1:
        raise ValueError(f"tau = {tau}: must be above 0 and at most 1")
    if len(idx) == 0 or int(idx.min()) < 0 or int(idx.max()) >= len(W_dec):
        raise ValueError(f"wanted feature indices in 0..{len(W_dec) - 1}, got {idx.tolist()[:8]}")
    rows = W_dec[idx].double()                                                                   # (k, D)
    _finite(W_dec=rows)
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    if bool((torch.triu(unit @ unit.T, 1).abs() > 1 - 1e-12).any()):
        raise ValueError("two of the chosen features have one and the same decoder direction")
    x = rows - rows.mean(0) if center else rows
    s, Vt = torch.linalg.svd(x, full_matrices=False)[1:]                                         # (k,), (k, D)
    if float(s[0]) <= 1e-12 * max(1e-300, float(rows.norm())):
        raise ValueError("the chosen rows have no variance: no direction to keep")
    held = (s ** 2).cumsum(0) / (s ** 2).sum()
    rank = int((s > 1e-10 * s[0]).sum())
    keep = rank if tau == 1 else min(rank, int((held < tau - 1e-12).sum()) + 1)
    V = torch.linalg.qr(Vt[:keep].T)[0]
    V = V * torch.where((rows @ V).sum(0) < 0, -1.0, 1.0)
    return V.to(W_dec.dtype if W_dec.dtype in (torch.float32, torch.float64) else torch.float32)


def _finite(**values):
    for name, v in values.items():
        if not bool(torch.isfinite(torch.as_tensor(v, dtype=torch.float64)).all()):
            raise ValueError(f"{name} has NaN or infinity in it")


# ===== the theorem: how far is an estimated subspace from the true one?
# From here on all is our derivation from the abstract's claims; the constants may differ from the paper's.
# Model: h = sum_i a_i d_i + noise, unit d_i, possibly more of them than dimensions (data.superposition). The mean
# activations of the two sets differ on a set S of r features; the target is span{d_i : i in S}, and sigma > 0 is the
# smallest singular value of D_S = [d_i : i in S]. P_U projects on the span of U's columns; an estimate's error is
# e(U, V) = |P_U - P_V|, Frobenius norm throughout.
def projector_distance(U, V):
    """|P_U - P_V| of the column spans of U (D, r_u) and V (D, r_v): 0 if they are one, at most sqrt(r_u + r_v).

    |P_U - P_V|^2 = r_u + r_v - 2 |U^T V|^2 = |(I - P_V) U|^2 + |(I - P_U) V|^2 for orthonormal columns. The last form adds
    small things; the middle one subtracts large ones, which would leave 1e-8 for equal spans.
    """
    U, V = _spans(U, V)
    return float(torch.sqrt(((U - V @ (V.T @ U)) ** 2).sum() + ((V - U @ (U.T @ V)) ** 2).sum()))


def principal_angles(U, V):
    """Angles in radians between two column spans, smallest first, min(r_u, r_v) of them.

    Cosines are the singular values of U^T V, sines those of (I - P_U) V; small angles are told by their sines, large ones
    by their cosines (Bjorck & Golub 1973). For r_u = r_v: projector_distance = sqrt(2) |sines|.
    """
    U, V = sorted(_spans(U, V), key=lambda X: -X.shape[1])
    return torch.atan2(torch.linalg.svdvals(V - U @ (U.T @ V)).flip(0), torch.linalg.svdvals(U.T @ V))


def captured(U, V):
    """The share of the target V (D, r) that lies in the estimate U: |P_U V|^2 / r, the mean squared cosine, 0..1."""
    U, V = _spans(U, V)
    return float((U.T @ V).square().sum() / V.shape[1])


def _spans(*bases):
    """An orthonormal basis (D, r) float64 of each one's columns, which must be independent, in one space."""
    out = []
    for U in bases:
        U = torch.as_tensor(U, dtype=torch.float64)
        if U.dim() != 2 or not 1 <= U.shape[1] <= U.shape[0] or len(U) != len(bases[0]):
            shapes = [tuple(x.shape) for x in bases]
            raise ValueError(f"wanted columns (D, r) with 1 <= r <= D, of one D, got shapes {shapes}")
        _finite(basis=U)
        Q, R = torch.linalg.qr(U)
        s = torch.linalg.svdvals(R)
        if float(s[-1]) <= 1e-12 * float(s[0]):
            raise ValueError("columns are repeated or dependent: they span less than their number")
        out.append(Q)
    return out


def sae_bound(eps, r, sigma):
    """The SAE side. If the r chosen rows d^_i have |d^_i - d_i| <= eps, then e <= sqrt(2 r) eps / sigma, for every eps.

    Proof (a sin-theta theorem, as Wedin's). D^ = [d^_i] lies in its own span, so (I - P^) D_S = (I - P^)(D_S - D^), whose
    norm is at most |D_S - D^| <= sqrt(r) eps. Write D_S = Q R, Q an orthonormal basis of the target; R's smallest
    singular value is sigma, so |(I - P^) Q| <= sqrt(r) eps / sigma. With r^ <= r the rank of D^,
    e^2 = r^ + r - 2 |P^ Q|^2 <= 2 (r - |P^ Q|^2) = 2 |(I - P^) Q|^2.   No eigengap enters: D^ has no (r+1)-th direction.
    Reached to first order where all errors point one way out of the target, signed like D_S's weakest combination, if
    that weighs the d_i equally. Two r-dimensional spans are at most sqrt(2 r) apart: from eps = sigma on it says nothing.
    """
    _positive(r=r, sigma=sigma)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps = {eps}: must be a distance, 0 or more")
    return (2 * r) ** .5 * eps / sigma


def truncation_floor(r, r_s):
    """Any r_s directions miss an r-dimensional target by e >= sqrt(|r - r_s|), equal iff one span holds the other.

    Proof. e^2 = r + r_s - 2 |P_U V|^2, and |P_U V|^2 <= min(r, r_s) as U and V have orthonormal columns.
    This is what tau < 1 costs: each principal direction left out is a dimension of the target lost.
    """
    _positive(r=r, r_s=r_s)
    return abs(r - r_s) ** .5


def direct_floor(r):
    """Direct identification by one vector u, as the mean difference of hidden states does: e >= sqrt(r - 1), always.

    Proof. For unit u, e^2 = r + 1 - 2 |P_S u|^2 >= r - 1, equal iff u lies in the target; any sample size, any dimension.
    The exact mean difference is D_S Delta_S, inside the target: it ATTAINS the floor. So this floor counts directions. It
    would stand with orthogonal features too, and says nothing of estimators that return r directions, such as raw PCA.
    """
    return truncation_floor(r, 1)


def selection_probability(n, gamma, B, m):
    """Top r by |Delta| over n samples per set picks exactly S with probability >= 1 - 2 m exp(-n gamma^2 / (4 B^2)).

    Assumes activations in [0, B], |Delta_i| at least gamma larger on S than off S (monosemanticity: 0 off S), independent
    samples. Proof. An estimated Delta_i is a sum of 2 n independent terms of range B / n; by Hoeffding it is off by
    gamma / 2 or more with probability <= 2 exp(-2 (gamma/2)^2 / (2 n (B/n)^2)) = 2 exp(-n gamma^2 / (4 B^2)). If none of
    the m is, all of S ranks above all the rest. A pair that shares an activation outright only helps (the terms cancel);
    pairs dependent in any other way need 8 in place of 4 (n terms of range 2 B / n).
    """
    _positive(n=n, gamma=gamma, B=B, m=m)
    return max(0., 1 - 2 * m * math.exp(-n * gamma ** 2 / (4 * B ** 2)))


def _positive(**values):
    for name, v in values.items():
        if not 0 < v < float("inf") or (name in ("r", "r_s", "n", "m") and v != int(v)):
            raise ValueError(f"{name} = {v}: must be positive and finite, and a count must be whole")


# ===== what raw PCA converges to: a property of the covariance, in closed form, beside the proven floor
# PCA of n samples tends to the leading eigenvectors of the expected matrix, at 1/sqrt(n) over the gap between eigenvalues
# r and r+1 (Davis-Kahan). Those are directions of large variance; that they are the target's is not implied.
def difference_moment(world, shared=None):
    """E[delta delta^T] (D, D) of paired differences delta = h_aligned - h_unaligned in data.superposition's model.

    Activations are independent, so the features' own moment is diagonal + Delta Delta^T; an activation that a pair shares
    drops out of the difference. shared: as if the pairs were matched so well (default: as in the world).
    """
    twin = (world.shared if shared is None else shared) * (world.p[0] == world.p[1])             # (m,)
    return _to_hidden(world, world.var.sum(0) * (1 - twin), world.delta, 2)


def pooled_covariance(world):
    """Covariance (D, D) of both sets poured together: their mean covariance, and what the distance of their means adds."""
    return _to_hidden(world, world.var.mean(0), world.delta / 2, 1)


def _to_hidden(world, var, mean, noises):
    u, eye = mean @ world.W, torch.eye(world.W.shape[1], dtype=torch.float64)
    return (world.W.T * var) @ world.W + torch.outer(u, u) + noises * world.noise ** 2 * eye


def top_eigenspace(C, r):
    """The r leading eigenvectors (D, r) of a symmetric matrix."""
    return torch.linalg.eigh(C)[1][:, -r:]


# ===== estimators, all given the same samples, all told r
def raw_estimates(h, r, seed):
    """Those that see hidden states h (2, n, D) only (0 aligned, 1 unaligned) -> {name: basis (D, 1 or r)}."""
    delta, dim = h[0] - h[1], h.shape[-1]
    pooled = h.flatten(0, 1) - h.mean((0, 1))
    return {"mean difference": delta.mean(0)[:, None],
            "neurons, top r": torch.eye(dim, dtype=torch.float64)[:, top_features(*h.mean(1), r)],
            "PCA of differences": top_eigenspace(delta.T @ delta / len(delta), r),
            "PCA of pooled states": top_eigenspace(pooled.T @ pooled / len(pooled), r),
            "random basis": torch.randn(dim, r, generator=data.stream(seed, 4), dtype=torch.float64)}


def sae_estimate(codes, W_dec, r):
    """SAILS: codes (2, n, N) and decoder rows (N, D) -> basis (D, r), chosen features (r,)."""
    features = top_features(*codes.mean(1), r)
    return basis(W_dec, features), features


def trained_estimate(world, h, seed, steps=400):
    """SAILS with an SAE trained on these very samples -> basis (D, r), and what that SAE is worth.

    The SAE is told how many features there are and about how many fire at a time. The bound takes eps of the CHOSEN rows:
    how far the worst of S is from the nearest of them. The best rows, nearest among all, tell how good the dictionary is;
    where the two eps differ, selection failed, not the SAE. Now and then a row is a mixture of two safety features, such
    as .9 d_i - .6 d_j: eps counts that, the span does not, and the bound is loose.
    """
    sae = train_sae(h.flatten(0, 1).float(), len(world.W), active=6, steps=steps, batch=128, lr=1e-2, seed=seed)
    W_dec, target = sae.W_dec.double(), world.W[world.safety]
    V, features = sae_estimate(sae.encode(h).double(), W_dec, len(target))
    away = (target[:, None] - W_dec).norm(dim=-1)                                                # (r, N)
    right = set(features.tolist()) == set(away.argmin(1).tolist())
    return V, {"chose all of S": float(right), "eps of its best rows": float(away.min(1).values.max()),
               "eps of its chosen rows": float(away[:, features].min(1).values.max())}


def random_rows(rows, eps, gen):
    """Rows (r, D), each moved exactly eps in a random direction."""
    z = torch.randn(rows.shape, generator=gen, dtype=torch.float64)
    return rows + eps * z / z.norm(dim=1, keepdim=True)


def one_way_rows(rows, eps, gen):
    """Rows (r, D), all moved eps along one line out of their span, signed like their weakest combination: see sae_bound."""
    U, _, Vt = torch.linalg.svd(rows, full_matrices=False)
    w = torch.randn(rows.shape[1], generator=gen, dtype=torch.float64)
    w = w - Vt.T @ (Vt @ w)
    return rows + eps * U[:, -1:].sign() * w / w.norm()


# ===== the measurements: cells[table, row, column] gathers one number per seed, checks[bound] pairs (measured, bound)
SEEDS, DIM, FEATURES, RANK = range(10, 15), 64, 128, 6   # the trained SAE's settings were chosen on seeds 0-2
EPS, SIZES, STRENGTHS = (.01, .03, .1, .3, 1.), (100, 1000, 10000, 30000), (0., .5, 1., 4., 16.)
PAIRS, TAUS, FAULTS = 10000, (1., .9, .8, .6, .4), ("dead", "split", "absorbed")
BELOW = {"eps-close rows: e <= sqrt(2r) eps / sigma": "sae", "the same, a trained SAE's own eps": "trained",
         "selection fails: p <= 2m exp(-n gamma^2/4B^2)": "selection"}
ABOVE = {"one direction: e >= sqrt(r-1)": "direct", "r_s directions: e >= sqrt|r-r_s|": "truncation"}
PCA, LIMIT, PERFECT = "PCA of differences", "limit of PCA of differences", "  limit with perfect pairs"
SHARE, NUISANCE, TRAINED = "  share of the target it holds", "nuisance |Delta| / least on S", "SAE trained on them"
LEFT_OUT = {2: (PERFECT, SHARE, NUISANCE, "limit of PCA of pooled states"),          # tables stay short
            3: ("  eps of its best rows", "  bound from that eps", "  PCA of differences to it",
                "top r is right, by Hoeffding")}


def measure_eps(seed, cells, checks):
    """Table 1: rows planted at distance eps, in random directions and all in one, against sae_bound."""
    world, gen = data.superposition(seed, DIM, FEATURES, RANK), data.stream(seed, 5)
    rows = world.W[world.safety]
    for eps in EPS:
        bound = sae_bound(eps, RANK, _sigma(rows))
        for name, plant in (("errors in random directions", random_rows), ("errors all one way out", one_way_rows)):
            e = projector_distance(basis(plant(rows, eps, gen), range(RANK)), rows.T)
            cells[1, name, eps].append(e)
            checks["sae"].append((e, bound))
        cells[1, "bound sqrt(2r) eps / sigma", eps].append(bound)


def measure_pairs(seed, cells, checks):
    """Tables 2 and 3: every estimator on the same pairs, over their number and over the strength of the entanglement."""
    for n, strength in [(n, 0.) for n in SIZES] + [(PAIRS, s) for s in STRENGTHS if s]:
        world = data.superposition(seed, DIM, FEATURES, RANK, strength=strength)
        for row, value in compare(world, n, seed, checks).items():
            if strength == 0 and row not in LEFT_OUT[2]:
                cells[2, row, n].append(value)
            if n == PAIRS and row not in LEFT_OUT[3]:          # without entanglement it is a column of both
                cells[3, row, strength].append(value)


def compare(world, n, seed, checks):
    """{row of a table: number} for n pairs: errors of all estimators, the trained SAE's worth, the limits of raw PCA."""
    (a, h), target = data.superposition_pairs(world, n, seed), world.W[world.safety].T           # target (D, r)
    found = raw_estimates(h, RANK, seed)
    for name, eps in (("true rows, top r", 0.), ("true rows .1 off, top r", .1)):
        W_dec, codes = data.planted_sae(world, eps, seed=seed)
        found[name] = sae_estimate(codes(a), W_dec, RANK)[0]
    found[TRAINED], worth = trained_estimate(world, h, seed)
    out = {name: projector_distance(V, target) for name, V in found.items()} | {"  " + k: v for k, v in worth.items()}
    out["  bound from that eps"] = sae_bound(worth["eps of its chosen rows"], RANK, _sigma(target))
    checks["direct"].append((out["mean difference"], direct_floor(RANK)))
    checks["trained"].append((out[TRAINED], out["  bound from that eps"]))
    limit = top_eigenspace(difference_moment(world), RANK)
    out[LIMIT], out["  PCA of differences to it"] = (projector_distance(limit, V) for V in (target, found[PCA]))
    out[SHARE] = captured(limit, target)
    out[PERFECT] = projector_distance(top_eigenspace(difference_moment(world, 1.), RANK), target)
    out["limit of PCA of pooled states"] = projector_distance(top_eigenspace(pooled_covariance(world), RANK), target)
    out[NUISANCE] = float(world.delta[world.nuisance].abs().max() / world.delta[world.safety].abs().min())
    out["top r is right, by Hoeffding"] = 0. if world.gamma <= 0 else selection_probability(
        n, world.gamma, float(world.top.max()), FEATURES)
    return out


def measure_faults(seed, cells):
    """Table 3, lower half: an SAE that knows the truth but for so many dead, split or absorbed safety features."""
    world = data.superposition(seed, DIM, FEATURES, RANK)
    a, _ = data.superposition_pairs(world, PAIRS, seed)
    for count in range(4):
        for fault in FAULTS:
            W_dec, codes = data.planted_sae(world, seed=seed, **{fault: count})
            V, _ = sae_estimate(codes(a), W_dec, RANK)
            cells["3b", fault, count].append(projector_distance(V, world.W[world.safety].T))


def measure_tau(seed, cells, checks):
    """Table 4: the true rows, cut by tau, in a generic and in a coherent dictionary."""
    for coherence in (0., .5):
        world = data.superposition(seed, DIM, FEATURES, RANK, coherence=coherence)
        for tau in TAUS:
            V = basis(world.W, world.safety, tau)
            e, floor = projector_distance(V, world.W[world.safety].T), truncation_floor(RANK, V.shape[1])
            for name, value in (("r_s", V.shape[1]), ("error", e), ("floor", floor)):
                cells[4, f"{name}, mean cosine {coherence:g}", tau].append(value)
            checks["truncation"].append((e, floor))


def measure_draws(draws, checks):
    """Every bound on random draws of dimension, r, coherence (up to nearly dependent rows), eps (up to useless) and n."""
    for seed in range(draws):
        gen = data.stream(seed, 6)
        pick = lambda *options: options[int(torch.randint(len(options), (), generator=gen))]
        d, r = pick(8, 16, 48), pick(1, 2, 3, 5, 8)
        world = data.superposition(seed, d, pick(d, 2 * d, 4 * d), r, nuisances=0, coherence=pick(0., .5, .99, .9999),
                                   noise=pick(0., .1))
        rows, eps = world.W[world.safety], pick(1e-6, 1e-3, .03, .3, 3.)
        for plant in (random_rows, one_way_rows)[:1 + (r < d)]:
            e = projector_distance(basis(plant(rows, eps, gen), range(r)), rows.T)
            checks["sae"].append((e, sae_bound(eps, r, _sigma(rows))))
        _, h = data.superposition_pairs(world, pick(10, 100, 1000), seed)
        checks["direct"].append((projector_distance((h[0] - h[1]).mean(0)[:, None], rows.T), direct_floor(r)))
        some = torch.randn(d, pick(1, 2, 4), generator=gen, dtype=torch.float64)
        for V in (some, basis(rows, range(r), pick(.3, .6, .9))):
            checks["truncation"].append((projector_distance(V, rows.T), truncation_floor(r, V.shape[1])))


def measure_selection(checks, trials=4000):
    """How often top r is wrong where activations are coins, 0 or 1, the widest spread there is: failure rate and bound."""
    gen = data.stream(0, 7)
    for r, m, n, gamma in ((1, 2, 150, .2), (1, 2, 400, .2), (2, 8, 300, .2), (3, 40, 80, .5), (3, 200, 2000, .15)):
        p = torch.full((trials, 2, m), .5, dtype=torch.float64)
        p[:, 0, :r] += gamma / 2
        p[:, 1, :r] -= gamma / 2
        mu = torch.binomial(torch.full_like(p, n), p, generator=gen) / n                         # (trials, 2, m)
        wrong = sum(set(top_features(*row, r).tolist()) != set(range(r)) for row in mu)
        checks["selection"].append((wrong / trials, 1 - selection_probability(n, gamma, 1, m)))


def _sigma(A):
    return float(torch.linalg.svdvals(A)[-1])


# ===== showing them
TITLES = {1: "1. SAE side: error against eps, the distance of the chosen decoder rows from the truth",
          2: "2. Error against the number of pairs, no entanglement; every estimator sees the same pairs and is told r",
          3: "3. Error against entanglement: an unrelated concept, so many times as strong, tilted a little towards harm",
          "3b": "   ... and against broken monosemanticity: so many safety features dead, split or absorbed",
          4: "4. What tau < 1 costs: true rows, fewer directions"}
CORNERS = {1: "eps", 2: "pairs", 3: "strength", "3b": "how many of S", 4: "tau"}


def interval(values):
    """Mean, and half width of its 95 % t-interval (2.776 for 5 seeds: 4 degrees of freedom)."""
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), 2.776 * float(v.std()) / len(v) ** .5


def show(cells, table):
    """Print one table in the order it was measured: mean and ± half width, or what all seeds agree on."""
    rows, cols = (list(dict.fromkeys(key[i] for key in cells if key[0] == table)) for i in (1, 2))
    print(f"\n{TITLES[table]}\n{CORNERS[table]:32s}" + "".join(f"{c:>8g}       " for c in cols).rstrip())
    for row in rows:
        pairs = (interval(cells[table, row, c]) for c in cols)
        shown = (f"{mean:8.3f}" + (f" ±{half:.3f}" if half >= 5e-4 else " " * 7) for mean, half in pairs)
        print((f"{row:32s}" + "".join(shown)).rstrip())


def plain_words(cells):
    """What was found for raw PCA, in sentences that only report the tables' means."""
    at = lambda row, strength: f"{interval(cells[3, row, strength])[0]:.2f}"
    print(f"\nIn plain words ({len(SEEDS)} worlds of {FEATURES} features in {DIM} dimensions, {PAIRS} pairs; ± is a 95 % "
          "t-interval's half width)")
    print(f"- No entanglement. Raw PCA of differences: {at(PCA, 0.)}; the best one direction can do: {direct_floor(RANK):.2f}; "
          f"trained SAE: {at(TRAINED, 0.)}.\n  PCA's limit with ever more pairs: {at(LIMIT, 0.)}; "
          f"with pairs that match in all but the safety features: {at(PERFECT, 0.)}.")
    for s in STRENGTHS[1:]:
        print(f"- Entangled, strength {s:g}. PCA: {at(PCA, s)}; its limit: {at(LIMIT, s)}, with perfect pairs {at(PERFECT, s)}; "
              f"trained SAE: {at(TRAINED, s)}; true rows: {at('true rows, top r', s)}.")
    print(f"  There the nuisance's own |Delta| is {at(NUISANCE, s)} times the least safety feature's. Above 1 selection has lost "
          "its\n  assumption, with an SAE as with the truth.")
    print(f"- The error charges wrong directions like missing ones: PCA's limit at strength {s:g} still holds {at(SHARE, s)} of "
          f"the target,\n  one direction at most {1 / RANK:.2f}.")


def verdicts(checks):
    """Print holds / VIOLATED per bound with its worst ratio; returns whether all hold. Rounding is forgiven 1e-9."""
    print(f"\n{'verdict':59s}{'measured':>10s}{'bound':>10s}{'ratio':>8s}  worst of")
    good = True
    for name, key in (BELOW | ABOVE).items():
        sign = 1 if name in BELOW else -1              # an error below its bound, or above its floor
        ok = all(sign * (m - b) <= 1e-9 * (1 + b) for m, b in checks[key])
        m, b = max((c for c in checks[key] if c[1] > 0), key=lambda c: sign * c[0] / c[1])
        print(f"{name:49s}{'holds' if ok else 'VIOLATED':10s}{m:10.3g}{b:10.3g}{m / b:8.3f}  {len(checks[key])} cases")
        good = good and ok
    return good


def plot(cells, path):
    """Draw the tables as one figure (PNG, written whole or not at all); 2 and 3 share the legend at the lower right."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(17, 10))
    for ax, (table, title) in zip(axes.flat, TITLES.items()):
        rows, cols = (list(dict.fromkeys(key[i] for key in cells if key[0] == table)) for i in (1, 2))
        for row in (r for r in rows if not r.startswith((" ", "r_s", "nuisance", "top r", "limit of PCA of pooled"))):
            mean, half = zip(*(interval(cells[table, row, c]) for c in cols))
            computed = row[:5] in ("bound", "limit", "floor")
            line, half = ("--", None) if computed else ("o-", half)
            ax.errorbar(range(len(cols)), mean, half, fmt=line, capsize=2, label=row)
        if table in (2, 3):
            ax.axhline(direct_floor(RANK), color="k", ls=":", label="floor of one direction, sqrt(r-1)")
        else:
            ax.legend(fontsize=9)
        ax.set_xticks(range(len(cols)), [f"{c:g}" for c in cols])
        ax.set_title("\n".join(textwrap.wrap(title.strip(), 60)), fontsize=10)
        ax.set(xlabel=CORNERS[table], ylabel="error |P_U - P_V|", yscale="log" if table == 1 else "linear")
    handles, labels = axes.flat[2].get_legend_handles_labels()
    axes.flat[5].legend(handles, labels, loc="center", fontsize=11)
    axes.flat[5].axis("off")
    fig.tight_layout()
    with data.replacing(path) as beside:
        fig.savefig(beside, format="png", dpi=80)
    plt.close(fig)


def main():
    ap = argparse.ArgumentParser(description="Check the theorem numerically; exit code 1 if a bound is violated.")
    ap.add_argument("--plot", metavar="FILE.png", help="draw the tables as one figure (needs matplotlib)")
    args = ap.parse_args()
    if args.plot and not args.plot.endswith(".png"):
        raise UserError(f"--plot {args.plot}: writes a PNG, so the name must end in .png")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib (pip install matplotlib); everything else runs without it")
    torch.set_num_threads(1)                           # tiny steps: on a busy machine two threads took 20 times as long
    cells, checks = defaultdict(list), defaultdict(list)
    for seed in data.progress(SEEDS, desc="worlds"):
        measure_eps(seed, cells, checks)
        measure_pairs(seed, cells, checks)
        measure_faults(seed, cells)
        measure_tau(seed, cells, checks)
    measure_draws(200, checks)
    measure_selection(checks)
    for table in TITLES:
        show(cells, table)
    plain_words(cells)
    good = verdicts(checks)
    if args.plot:
        plot(cells, args.plot)
    return 0 if good else 1


if __name__ == "__main__":
    data.run_main(main)
