"""sails.py - from SAE features to a safety subspace, and the theorem behind it as running code.

The method, in the paper's order (arXiv 2512.23260; l a layer, i a feature):
    1. a_l(x) = f_enc(h_l(x))                 features of the residual stream   sae.JumpReLUSAE.encode
    2. E_aligned[a_l,i], E_unaligned[a_l,i]   mean activation over each set     contrast_means
    3. Delta_l,i = |E_aligned - E_unaligned|  and the k largest                 top_features, strongest
    4. V_l = QR(PCA_tau(decoder rows))        orthonormal basis                 basis
    5. A = V^T or B = V, other factor 0       then fine-tune                    lora.init_sails, train.align

The theorem, as proved here (the full text was not at hand; its constants may differ):
    Model      h = sum_i a_i d_i, unit d_i; polysemantic: more d_i than dimensions    superposition
               The sets differ on r features S, |Delta_i| >= gamma. Target: span D_S, D_S = [d_i : i in S]
    ASSUMED    monosemanticity: each i in S has an SAE feature with its Delta_i and a decoder row within eps
               of d_i, other features have Delta = 0; dead, split, absorbed, co-varying features break this
    Error      e(U, V) = |P_U - P_V|, Frobenius norm, P the projector on a span       projector_distance
    Claims  1. "arbitrarily small recovery error": e <= sqrt(2 r) eps / sigma_min(D_S)  sae_bound
            2. n samples a set find S with P >= 1 - 2 m exp(-n gamma^2 / 4 B^2)  selection_probability
            3. "an irreducible error floor": one direct direction has e >= sqrt(r - 1)  direct_floor
            4. r_s directions in place of r: e >= sqrt|r - r_s|, the price of tau < 1   truncation_floor
            5. ours: as 2, by |t|: |Delta_i| / rms in place of |Delta_i|  t_probability
    "Direct identification" is estimation from h alone. Claim 3 counts directions: it holds with orthogonal
    neurons too, and PCA, which returns r of them, is not under it. What "semantic entanglement" does to PCA
    is in results/theory.txt.
Letters: B batch, D d_model, N SAE width, k chosen features, r target's dimension, n samples, m true features.
Run it (`python sails.py`) to check the claims; exit code 1 if one fails.
"""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

import data
from data import need

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
    for some, counts in data.share([pairs[at:at + batch] for at in range(0, n, batch)], "features"):
        aligned, unaligned = (_text_means(model, saes, side) for side in zip(*some))
        for i, total in sums.items():
            (h, hh, a), (g, gg, u) = aligned[i], unaligned[i]  # (b, D), (b, D), (b, N)
            means = dict(h_aligned=h, h_unaligned=g, var=(hh + gg) / 2, mu_aligned=a, mu_unaligned=u)
            for key, x in (means | dict(t=(a - u) ** 2)).items():
                total[key] += x.sum(0) / n * counts
            total["second"] += (h - g).T @ (h - g) / n * counts
    for i, s in sums.items():
        data.add_up(*s.values())
        need(s["second"].sum().isfinite(), f"layer {i}: residuals hold NaN or inf")
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
    return strongest(_score(mu_aligned, mu_unaligned, score), k)

def strongest(values, k):
    """Indices (k,) of the largest of values (N,), largest first, of equal ones the lower.
    By |t|, Delta over its standard error, is beyond the paper: |Delta| ranks by scale, so that a strong
    unrelated feature, hardly tilted, comes before a weak one of safety."""
    if not 1 <= k <= len(values) or bool(values.isnan().any()):
        raise ValueError(f"k = {k}: wanted 1 to {len(values)} features, and no NaN")
    return values.sort(descending=True, stable=True).indices[:k]

# ---- 4. decoder rows -> PCA -> QR -> V ----
def basis(W_dec, features, tau=1.0, center=False):
    """Rows `features` of W_dec (N, D), PCA, QR -> orthonormal V (D, r_s), float64 if W_dec is.
    Of their principal directions the fewest that hold a share >= tau of the sum of squares are kept, largest
    first, each pointing to the side where its rows are; tau = 1 keeps the whole span. center subtracts the
    rows' mean, which deletes the direction that they share: not the default, the paper is silent."""
    idx = torch.as_tensor(features, dtype=torch.long).flatten().to(W_dec.device)
    if not 0 < tau <= 1 or len(idx) == 0 or int(idx.min()) < 0 or int(idx.max()) >= len(W_dec):
        raise ValueError(f"wanted 0 < tau <= 1, features in 0..{len(W_dec) - 1}: {tau}, {idx.tolist()[:8]}")
    rows = W_dec[idx].double()  # (k, D)
    unit = F.normalize(rows, dim=1)
    if not bool(torch.isfinite(rows).all()) or bool((torch.triu(unit @ unit.T, 1).abs() > 1 - 1e-12).any()):
        raise ValueError("the chosen decoder rows have NaN in them, or two are the same line")
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
    raw-pca          up to r principal directions of pairs' differences of residuals; standardise: of
                     dimensions divided by their standard deviations, as SAEs see them
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
    for i, V in out.items():
        need(V.square().sum() > .5, f"layer {i}: the two sets have the same residuals")  # V is empty or 0
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
    if rule == "t":
        return fired[strongest(s["t"][fired].abs(), k)]
    return fired[top_features(s["mu_aligned"][fired], s["mu_unaligned"][fired], k, rule)]

def top_eigenspace(C, r):
    """A positive matrix's leading eigenvectors (D, r), largest last; fewer if its rank is less."""
    values, vectors = torch.linalg.eigh(C)
    return vectors[:, values > 1e-10 * values[-1]][:, -r:]

# ---- the theorem: error ----
def projector_distance(U, V):
    """|P_U - P_V| of the column spans of U (D, r_u) and V (D, r_v): 0 to sqrt(r_u + r_v).
    |P_U - P_V|^2 = r_u + r_v - 2 |U^T V|^2 = |(I - P_V) U|^2 + |(I - P_U) V|^2 for orthonormal columns; the
    middle form subtracts large things, which leaves 1e-8 for equal spans."""
    U, V = _spans(U, V)
    return float(torch.sqrt(((U - V @ (V.T @ U)) ** 2).sum() + ((V - U @ (U.T @ V)) ** 2).sum()))

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
    _positive(r=r, sigma=sigma, eps=eps or 1)
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
    need(gamma <= B, f"gamma = {gamma} is above B = {B}: no difference is")
    return max(0., 1 - 2 * m * math.exp(-n * gamma ** 2 / (4 * B ** 2)))

def t_probability(n, gap, K, m):
    """Claim 5: top r by |t| of n pairs is S with P >= 1 - 4 m exp(-n gap^2 / 38 K^2).
    d_i is a pair's difference of activation i, R_i^2 = E d_i^2; mu_i = |Delta_i| / R_i <= 1 has no scale.
    Assumes |d_i| <= K R_i, mu_i at least gap larger on S than off S, independent pairs. Proof. |t_i| grows
    with |mean z_i| / sqrt(mean z_i^2), z_i = d_i / R_i. By Bernstein mean z_i is off by a = gap / 4 with
    probability <= 2 exp(-n a^2 / 2 (1 + 2 K a / 3)), mean z_i^2, of variance <= K^2 and range K^2, off 1 by
    a with <= 2 exp(-n a^2 / 2 K^2 (1 + a / 3)); as K >= 1 >= gap both are <= 2 exp(-n gap^2 / 38 K^2). Else,
    mu the least on S, the ratio is >= (mu - a) / sqrt(1 + a) on S, <= (mu - gap + a) / sqrt(1 - a) off S. As
    sqrt(1 - a) >= 1 - a and sqrt(1 + a) <= 1 + a / 2, (mu - a) sqrt(1 - a) >= mu - gap / 2 >
    (mu - gap + a) sqrt(1 + a). It cannot tell an unrelated concept's true difference from safety's."""
    _positive(n=n, gap=gap, K=K, m=m)
    need(gap <= 1 <= K, f"gap = {gap}, K = {K}: wanted gap <= 1 <= K")
    return max(0., 1 - 4 * m * math.exp(-n * gap ** 2 / (38 * K ** 2)))

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

def main():
    from benchmarks import explain, theory
    ap = explain.parser()
    args = ap.parse_args()
    ap.refuse_unread((args.explain, "--explain", "model sae layers width features"))
    return explain.show(args) if args.explain else theory.check()

if __name__ == "__main__":
    data.run_main(main)
