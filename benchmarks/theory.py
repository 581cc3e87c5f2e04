"""theory.py - more of the theorem's check: sample size, other estimators, faulty SAEs, tau, random draws.

    python benchmarks/theory.py --out results

prints the tables of `python sails.py`, the second with more rows, three more and a verdict per bound; exit
code 1 if one is violated. --out writes this to theory.txt and draws theory.svg. Half a minute on one core.
"""
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import sails
from sails import (LIMIT, PCA, RANK, TRAINED, TRUE, basis, difference_moment, projector_distance, sae_bound,
                   sae_estimate, stream, superposition, superposition_pairs, top_eigenspace, truncation_floor)

SIZES, TAUS = (100, 1000, 10000, 30000), (1., .9, .8, .6, .4)
TITLES = {"pairs": "Error against the number of pairs, no entanglement; all estimators see the same pairs",
          "faulty": "Error against faults of the SAE, so many safety features dead, split or absorbed",
          "tau": "Error against tau, true rows and fewer directions than r"}
MEAN, POOLED, NEURONS, RANDOM = "mean difference", "PCA of pooled states", "neurons, top r", "random basis"

def planted_sae(world, eps=0., dead=0, split=0, absorbed=0, seed=0):
    """An SAE that knows the truth, rows eps off: decoder rows (N, D), function activations -> codes. Faults:

    dead      so many safety features (weakest first) never fire
    split     so many (strongest first) have two rows, .3 to either side of the truth, each half as active
    absorbed  so many (weakest first) are silent; a background row, turned half towards them, fires instead
    """
    gen, m = stream(seed, 3), len(world.W)
    noise = lambda n: F.normalize(torch.randn(n, world.W.shape[1], generator=gen, dtype=torch.float64), dim=1)
    rows, hosts = world.W + eps * noise(m), (world.p[0] == world.p[1]).nonzero()[:absorbed, 0]
    lost, hidden, halved = world.safety[:dead], world.safety[:absorbed], world.safety.flip(0)[:split]
    rows[hosts] = F.normalize(rows[hosts] + rows[hidden], dim=1)
    side = .3 * noise(split)
    rows = torch.cat([rows, rows[halved] - side])                                      # (N = m + split, D)
    rows[halved] += side

    def codes(a):                                                                      # (..., m) -> (..., N)
        a = torch.cat([a, torch.zeros_like(a[..., halved])], -1)
        a[..., hosts] += a[..., hidden]
        a[..., torch.cat([lost, hidden])] = 0
        upper = a[..., halved] > world.top[halved] * .5 ** .5      # half of a uniform's mean lies above this
        a[..., m:] = a[..., halved] * ~upper
        a[..., halved] *= upper
        return a
    return rows, codes

def raw_estimates(h, r, seed):
    """Estimators without an SAE, from hidden states h (2, n, D), aligned first: {name: basis (D, 1 or r)}."""
    d, D = h[0] - h[1], h.shape[-1]
    return {MEAN: d.mean(0)[:, None], PCA: top_eigenspace(d.T @ d / len(d), r),
            POOLED: top_eigenspace(torch.cov(h.flatten(0, 1).T), r),
            NEURONS: torch.eye(D, dtype=torch.float64)[:, sails.top_features(*h.mean(1), r)],
            RANDOM: torch.randn(D, r, generator=stream(seed, 4), dtype=torch.float64)}

def pooled_covariance(world, noise=0.):
    """Covariance (D, D) of h over both sets: their mean covariance, and what the means' distance adds."""
    u = world.delta @ world.W / 2
    return (world.W.T * world.var.mean(0)) @ world.W + torch.outer(u, u) + noise ** 2 * torch.eye(len(u))

# ---------------------------------- the measurements: cells[table, row, column] holds a number per seed
def measure_pairs(seed, cells, checks):
    """Every estimator over the number of pairs, without entanglement, and what the trained SAE is worth."""
    world = superposition(seed)
    target, limit = world.W[world.safety].T, top_eigenspace(difference_moment(world), RANK)    # (D, r)
    sigma = torch.linalg.svdvals(target)[-1].item()
    for n in SIZES:
        a, h = superposition_pairs(world, n, seed)
        raw, (V, eps, best) = raw_estimates(h, RANK, seed), sails.trained_estimate(world, h, seed)
        found = {MEAN: raw[MEAN], PCA: raw[PCA], LIMIT: limit, **raw, TRUE: sae_estimate(a, world.W, RANK)[0]}
        rows = {name: projector_distance(U, target) for name, U in found.items()}
        rows |= {TRAINED: projector_distance(V, target), "  eps of its best rows": best,
                 "  eps of its chosen rows": eps, "  bound from that eps": sae_bound(eps, RANK, sigma),
                 "PCA of differences to its limit": projector_distance(raw[PCA], limit),
                 "top r is right, by Hoeffding": sails.selection_probability(n, world.gamma, 1, len(world.W))}
        checks["trained"].append((rows[TRAINED], rows["  bound from that eps"]))
        for name, value in rows.items():
            cells["pairs", name, n].append(value)

def measure_further(seed, cells):
    """Further rows of sails.py's table over the strength of an entangled concept, on the same pairs."""
    for strength in sails.STRENGTHS:
        world = superposition(seed, strength=strength)
        (_, h), target = superposition_pairs(world, sails.PAIRS, seed), world.W[world.safety].T
        raw, limit = raw_estimates(h, RANK, seed), top_eigenspace(difference_moment(world), RANK)
        further = {POOLED: raw[POOLED], "  its limit": top_eigenspace(pooled_covariance(world), RANK)}
        for name, U in (further | {NEURONS: raw[NEURONS], RANDOM: raw[RANDOM]}).items():
            cells["strength", name, strength].append(projector_distance(U, target))
        cells["strength", "share of S in PCA's limit", strength].append(sails.captured(limit, target))

def measure_faults(seed, cells):
    """An SAE that knows the truth but for so many dead, split or absorbed safety features."""
    world = superposition(seed)
    a, _ = superposition_pairs(world, sails.PAIRS, seed)
    for fault in ("dead", "split", "absorbed"):
        for count in range(4):
            W_dec, codes = planted_sae(world, seed=seed, **{fault: count})
            e = projector_distance(sae_estimate(codes(a), W_dec, RANK)[0], world.W[world.safety].T)
            cells["faulty", fault, count].append(e)

def measure_tau(seed, cells, checks):
    """The true rows cut by tau, in a generic and in a coherent dictionary."""
    for coherence in (0., .5):
        world = superposition(seed, coherence=coherence)
        for tau in TAUS:
            V = basis(world.W, world.safety, tau)
            e, floor = projector_distance(V, world.W[world.safety].T), truncation_floor(RANK, V.shape[1])
            for name, value in (("r_s", V.shape[1]), ("error", e), ("floor", floor)):
                cells["tau", f"{name}, mean cosine {coherence:g}", tau].append(value)
            checks["truncation"].append((e, floor))

def measure_draws(draws, checks):
    """Every bound on draws of D, r, n, coherence (up to nearly dependent rows) and eps (up to useless)."""
    for seed in range(draws):
        gen = stream(seed, 6)
        pick = lambda *options: options[int(torch.randint(len(options), (), generator=gen))]
        D, r, coherence = pick(8, 16, 48), pick(1, 2, 3, 5, 8), pick(0., .5, .99, .9999)
        world = superposition(seed, D, pick(D, 2 * D, 4 * D), r, coherence, nuisances=0)
        rows, eps = world.W[world.safety], pick(1e-6, 1e-3, .03, .3, 3.)
        for plant in (sails.random_rows, sails.one_way_rows)[:1 + (r < D)]:            # r = D has no way out
            e = projector_distance(basis(plant(rows, eps, gen), range(r)), rows.T)
            checks["sae"].append((e, sae_bound(eps, r, torch.linalg.svdvals(rows)[-1].item())))
        _, h = superposition_pairs(world, pick(10, 100, 1000), seed, noise=pick(0., .1))
        u, some = (h[0] - h[1]).mean(0), torch.randn(D, pick(1, 2, 4), generator=gen, dtype=torch.float64)
        checks["direct"].append((projector_distance(u[:, None], rows.T), sails.direct_floor(r)))
        for V in (some, basis(rows, range(r), pick(.3, .6, .9))):
            checks["truncation"].append((projector_distance(V, rows.T), truncation_floor(r, V.shape[1])))

# ------------------------------------------------------------------------------------------ the figure
PANELS = {"eps": "Decoder rows eps off", "faulty": "So many of S dead, split or absorbed",
          "tau": "True rows, cut by tau", "pairs": "No entanglement", "strength": "Entanglement"}
FLOOR = "floor of one direction"
ESTIMATORS = (MEAN, PCA, LIMIT, TRAINED, TRUE, NEURONS, RANDOM, FLOOR)                   # of the last two

def figure(cells):
    """The tables as one SVG, a panel each: the error, means over worlds with 95 % t-intervals."""
    cells = cells | {(t, FLOOR, c): [sails.direct_floor(RANK)] for t, row, c in cells if row == MEAN}
    return evaluation.svg_sheet([_panel(cells, table) for table in PANELS])

def _panel(cells, table):
    cols, rows = (list(dict.fromkeys(key[i] for key in cells if key[0] == table)) for i in (2, 1))
    rows = ESTIMATORS if MEAN in rows else [row for row in rows if not row.startswith("r_s")]
    computed = [row for row in rows if row.startswith(("bound", "floor", LIMIT))]
    curves = {}
    for row in rows:
        means = [(c, *data.t_interval(cells[table, row, c])) for c in cols]
        curves[row] = [(c, y) if row in computed else (c, y, y - half, y + half) for c, y, half in means]
    ticks, log = ([.01, .1, 1, 10], True) if table == "eps" else ([.5 * i for i in range(8)], False)
    xlabel = f"{table} (means of {len(sails.SEEDS)} worlds, 95 % t-intervals)"
    return evaluation.svg_lines(curves, f"{PANELS[table]}: error", xlabel, cols, ticks, log, computed)

def main():
    ap = data.Arguments(description="Check the theorem more widely; exit code 1 if a bound is violated.")
    ap.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/theory.txt and DIR/theory.svg")
    args = ap.parse_args()
    torch.set_num_threads(1)
    cells, checks = defaultdict(list), defaultdict(list)
    for seed in data.progress(sails.SEEDS, desc="worlds"):
        for measure in (sails.measure_eps, sails.measure_entanglement, measure_pairs, measure_tau):
            measure(seed, cells, checks)
        measure_further(seed, cells)
        measure_faults(seed, cells)
    measure_draws(200, checks)
    sails.measure_selection(checks)
    sails.TITLES.update(TITLES)                        # print_table looks there
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for table in sails.TITLES:
            sails.print_table(cells, table)
        sails.plain_words(cells)
        good = sails.verdicts(checks)
    print(printed.getvalue(), end="")
    if args.out:
        data.write_text(args.out / "theory.txt", printed.getvalue())
        data.write_text(args.out / "theory.svg", figure(cells))
    return 0 if good else 1

if __name__ == "__main__":
    data.run_main(main)
