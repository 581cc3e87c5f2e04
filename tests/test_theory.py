"""The theorem's bounds on random draws, its floors and where they are reached, and what raw PCA converges to.

Projectors are formed here the slow way, D x D, so that a mistake in sails.projector_distance cannot hide itself.
"""
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import sails

pytestmark = pytest.mark.filterwarnings("error")
f64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=data.stream(seed, 99), dtype=f64)


def error(U, V):
    """|P_U - P_V| from the definition."""
    P, Q = (X @ torch.linalg.pinv(X) for X in (U, V))
    return float(torch.linalg.matrix_norm(P - Q))


def sigma(rows):
    return float(torch.linalg.svdvals(rows)[-1])


def draw(seed):
    """A world of random size; every fifth has r = 1, every third nearly dependent rows; (world, eps, n)."""
    gen = data.stream(seed, 98)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=gen))]
    d, r = pick(6, 12, 40), 1 if seed % 5 == 0 else pick(2, 3, 4, 6)
    world = data.superposition(seed, d, pick(d + 4, 2 * d, 5 * d), r, coherence=.9999 if seed % 3 == 0 else pick(0., .5, .9),
                               noise=pick(0., .05, .3), nuisances=pick(0, 3), strength=pick(0., 1., 5.), shared=pick(0., .5, 1.))
    return world, pick(1e-9, 1e-4, .01, .1, .5, 1., 10.), pick(20, 200, 1500)


# --------------------------------------------------------------------------------------------------------- the SAE side
def test_sae_bound_holds_on_300_random_draws_and_selection_by_samples():
    chosen_right = 0
    for seed in range(300):
        world, eps, n = draw(seed)
        rows, r = world.W[world.safety], len(world.safety)
        W_dec, codes = data.planted_sae(world, eps, seed=seed)
        assert torch.allclose((W_dec - world.W).norm(dim=1), torch.tensor(eps, dtype=f64), rtol=1e-6)
        a, _ = data.superposition_pairs(world, n, seed)
        V, features = sails.sae_estimate(codes(a), W_dec, r)
        if set(features.tolist()) == set(world.safety.tolist()):
            chosen_right += 1
        V = sails.basis(W_dec, world.safety)                   # the bound's premise: the right features, whatever n
        e, bound = error(V, rows.T), sails.sae_bound(eps, r, sigma(rows))
        assert e <= bound * (1 + 1e-9) + 1e-8, (seed, e, bound)
        assert sails.projector_distance(V, rows.T) == pytest.approx(e, abs=1e-7)
    assert chosen_right > 150


@pytest.mark.parametrize("d, r, eps", [(4, 1, 1e-3), (12, 4, 1e-3), (40, 8, .05), (20, 10, .1)])
def test_sae_bound_is_reached_when_orthogonal_rows_err_in_orthogonal_directions(d, r, eps):
    Q = torch.linalg.qr(randn(d, d))[0].T
    rows, found = Q[:r], Q[:r] + eps * Q[r:2 * r]
    e, bound = error(found.T, rows.T), sails.sae_bound(eps, r, 1.)
    assert .99 * bound < e <= bound * (1 + 1e-9)
    assert r == 1 or e > r ** .5 * eps * 1.3                   # so sqrt(r) in place of sqrt(2r) would be no bound


@pytest.mark.parametrize("r, s", [(2, .9), (3, .1), (6, .01), (8, 1e-3)])
def test_sae_bound_is_reached_by_nearly_dependent_rows_that_all_err_one_way(r, s):
    """Rows of equal negative cosine: their weakest combination is their plain sum, so errors that add up hit it in full."""
    c = (s ** 2 - 1) / (r - 1)                                 # smallest singular value s
    low = torch.linalg.cholesky(torch.eye(r, dtype=f64) * (1 - c) + c)
    signs = torch.tensor([1, -1] * r, dtype=f64)[:r, None]     # half of the rows turned round: so must their errors be
    rows = signs * torch.cat([low, torch.zeros(r, 2, dtype=f64)], 1)                 # (r, d = r + 2)
    eps = 1e-3 * s
    for found in (rows + eps * signs * torch.eye(r + 2, dtype=f64)[r], sails.one_way_rows(rows, eps, data.stream(0))):
        e, bound = error(found.T, rows.T), sails.sae_bound(eps, r, s)
        assert sigma(rows) == pytest.approx(s) and .99 * bound < e <= bound * (1 + 1e-6)


def test_sae_bound_survives_chosen_rows_that_span_less_than_r_dimensions():
    rows = torch.eye(8, dtype=f64)[:3]
    merged = (rows[0] + rows[1]) / 2                           # one row stands for two features: eps is sqrt(1/2) for both
    e = error(torch.stack([merged, rows[2]]).T, rows.T)
    assert e == pytest.approx(1) and e <= sails.sae_bound(.5 ** .5, 3, 1.)


def test_useless_eps_gives_a_loose_bound_and_not_an_error():
    assert sails.sae_bound(50., 3, .5) == pytest.approx(6 ** .5 * 100) and sails.sae_bound(0, 3, .5) == 0


# ---------------------------------------------------------------------------------------------------------- the floors
def test_one_direction_never_beats_the_floor_on_300_draws_at_any_sample_size():
    closest = 9.
    for seed in range(300):
        world, _, n = draw(seed)
        _, h = data.superposition_pairs(world, n, seed)
        r, u = len(world.safety), (h[0] - h[1]).mean(0)[:, None]
        e, floor = error(u, world.W[world.safety].T), sails.direct_floor(r)
        assert e >= floor - 1e-9
        assert e ** 2 == pytest.approx(r + 1 - 2 * r * sails.captured(u, world.W[world.safety].T), abs=1e-6)
        closest = min(closest, e / floor) if r > 1 else closest
    assert closest < 1.001


@pytest.mark.parametrize("d, r", [(5, 1), (9, 2), (30, 6), (6, 6)])
def test_the_floor_is_reached_exactly_when_the_direction_lies_in_the_target(d, r):
    target = randn(d, r)
    inside, outside = target @ randn(r, 1, seed=1), torch.linalg.qr(torch.cat([target, randn(d, 1, seed=2)], 1))[0][:, r:]
    assert sails.projector_distance(inside, target) == pytest.approx(sails.direct_floor(r), abs=1e-12)
    if r < d:
        tilted = [sails.projector_distance(inside / inside.norm() + t * outside, target) for t in (.1, .3, 1.)]
        assert sails.direct_floor(r) + .003 < tilted[0] < tilted[1] < tilted[2]
        assert tilted[2] ** 2 == pytest.approx(r + 1 - 1)      # at 45 degrees |P_S u|^2 is 1/2


def test_the_exact_mean_difference_attains_the_floor_so_the_floor_counts_directions():
    for coherence in (0., .9):
        world = data.superposition(3, coherence=coherence)
        assert error((world.delta @ world.W)[:, None], world.W[world.safety].T) == pytest.approx(5 ** .5, abs=1e-9)


def test_any_number_of_directions_has_its_truncation_floor():
    reached = 0
    for seed in range(300):
        world, _, _ = draw(seed)
        rows, r, q = world.W[world.safety], len(world.safety), 1 + seed % 6
        assert error(randn(rows.shape[1], q, seed=seed), rows.T) >= sails.truncation_floor(r, q) - 1e-7
        for tau in (.3, .7, .9, 1.):
            V = sails.basis(rows, range(r), tau)
            assert error(V, rows.T) == pytest.approx(sails.truncation_floor(r, V.shape[1]), abs=1e-5)    # true rows: equality
            reached += V.shape[1] < r
    assert reached > 200
    assert sails.truncation_floor(6, 6) == 0 and sails.truncation_floor(3, 7) == 2 and sails.truncation_floor(7, 3) == 2


# ----------------------------------------------------------------------------------------------------------- selection
def test_selection_probability_is_hoeffdings_over_all_features():
    want = 1 - 2 * 100 * torch.exp(torch.tensor(-5000 * .3 ** 2 / (4 * 2. ** 2), dtype=f64))
    assert sails.selection_probability(5000, .3, 2., 100) == pytest.approx(float(want), abs=1e-14)
    assert sails.selection_probability(10, .1, 1., 100) == 0


def test_selection_fails_no_more_often_than_its_bound_allows():
    checks = defaultdict(list)
    sails.measure_selection(checks, trials=1500)
    assert all(rate <= bound for rate, bound in checks["selection"]) and max(checks["selection"])[0] > .005
    # r = 1 of m = 2 coins at n gamma^2 = 6: an exponent four times too large (no 4 in its denominator) would be violated
    rate = checks["selection"][0][0]
    assert 4 * torch.exp(torch.tensor(-6.)) < 1.3 * rate


def test_selection_bound_holds_on_200_random_draws_of_coin_activations():
    informative = 0
    for seed in range(200):
        gen = data.stream(seed, 97)
        pick = lambda *options: options[int(torch.randint(len(options), (), generator=gen))]
        m, n, B, rate = pick(4, 10, 30), pick(30, 100, 400, 1000), pick(.1, 1., 7.), pick(.1, .3, .5)
        r, gap = pick(1, 2, 3), pick(.2, .5, .9) * (1 - rate)
        p = torch.full((100, 2, m), rate, dtype=f64)
        p[:, seed % 2, :r] += gap                              # on more often in aligned or, just as well, in unaligned states
        mu = B * torch.binomial(torch.full_like(p, n), p, generator=gen) / n
        wrong = sum(set(sails.top_features(*row, r).tolist()) != set(range(r)) for row in mu) / 100
        fails = 1 - sails.selection_probability(n, B * gap, B, m)
        assert wrong <= fails + 3 * (fails / 100) ** .5, (seed, wrong, fails)
        informative += fails < .5
    assert informative > 50


def test_selection_is_exact_wherever_the_bound_is_sure_of_it_even_with_entanglement_and_shared_pairs():
    for seed, strength, shared in ((0, 0., 0.), (1, 2., .5), (2, 0., 1.)):
        world = data.superposition(seed, 24, 48, 4, strength=strength, shared=shared)
        B = float(world.top.max())
        assert sails.selection_probability(40000, world.gamma, B, 48) > .99
        a, _ = data.superposition_pairs(world, 40000, seed)
        assert set(sails.top_features(*a.mean(1), 4).tolist()) == set(world.safety.tolist())


def test_the_signed_score_would_miss_every_feature_of_harm():
    world = data.superposition(0)
    a, _ = data.superposition_pairs(world, 20000, 0)
    signed = set(sails.top_features(*a.mean(1), 6, score="relative").tolist()) & set(world.safety.tolist())
    assert signed == set(world.safety[::2].tolist())


# ----------------------------------------------------------------------------------------------------- what PCA finds
@pytest.mark.parametrize("shared, noise, strength", [(0., 0., 0.), (.7, .2, 3.), (1., 0., 1.)])
def test_closed_form_moments_are_those_of_the_samples(shared, noise, strength):
    world = data.superposition(4, 10, 20, 3, noise=noise, strength=strength, tilt=.2, shared=shared)
    n = 200000
    a, h = data.superposition_pairs(world, n, 4)
    delta, pooled = h[0] - h[1], h.flatten(0, 1) - h.mean((0, 1))
    for got, want in ((delta.T @ delta / n, sails.difference_moment(world)),
                      (pooled.T @ pooled / (2 * n), sails.pooled_covariance(world))):
        assert float((got - want).norm() / want.norm()) < .01
    size = 1 + strength
    assert torch.allclose(a.mean(1), world.mean, atol=.005 * size) and torch.allclose(a.var(1), world.var, atol=.01 * size ** 2)


def test_raw_pca_converges_to_its_limit_as_davis_kahan_says_and_the_limit_is_not_the_target():
    for seed in range(20):
        world = data.superposition(seed, 16, 32, 3, strength=2., noise=.05)
        C = sails.difference_moment(world)
        values, limit = torch.linalg.eigvalsh(C), sails.top_eigenspace(C, 3)
        away = []
        for n in (300, 30000):
            _, h = data.superposition_pairs(world, n, seed)
            delta = h[0] - h[1]
            S = delta.T @ delta / n
            away.append(error(sails.top_eigenspace(S, 3), limit))
            gap = float(values[-3] - values[-4])
            assert away[-1] <= 2 * 2 ** .5 * float((S - C).norm()) / gap + 1e-9          # Yu, Wang & Samworth 2015
            assert error(sails.raw_estimates(h, 3, 0)["PCA of differences"], sails.top_eigenspace(S, 3)) < 1e-6
        assert away[1] < .4 * away[0]                                                # 1/10 to first order
        assert error(limit, world.W[world.safety].T) > 1


def test_without_entanglement_raw_pca_beats_the_floor_and_misses_the_target_unless_pairs_are_perfect():
    for seed in range(10):
        world = data.superposition(seed)
        target, floor = world.W[world.safety].T, sails.direct_floor(6)
        assert .5 < error(sails.top_eigenspace(sails.difference_moment(world), 6), target) < .7 * floor
        assert .5 < error(sails.top_eigenspace(sails.pooled_covariance(world), 6), target) < .7 * floor
        assert error(sails.top_eigenspace(sails.difference_moment(world, shared=1.), 6), target) < 1e-6
    world = data.superposition(0, shared=1.)
    _, h = data.superposition_pairs(world, 500, 0)
    assert error(sails.raw_estimates(h, 6, 0)["PCA of differences"], world.W[world.safety].T) < 1e-6


def test_with_entanglement_raw_pca_loses_half_of_the_target_and_perfect_pairs_do_not_help():
    for seed in range(10):
        world = data.superposition(seed, strength=4.)
        for shared in (0., 1.):
            limit = sails.top_eigenspace(sails.difference_moment(world, shared), 6)
            assert 2.3 < error(limit, world.W[world.safety].T) < 2.6 and .4 < sails.captured(limit, world.W[world.safety].T) < .6
        assert world.gamma > .05                               # while selection still has its gap


def test_an_unrelated_concept_that_differs_more_than_safety_fools_even_the_true_dictionary():
    world = data.superposition(0, strength=40.)
    a, _ = data.superposition_pairs(world, 20000, 0)
    W_dec, codes = data.planted_sae(world)
    assert world.gamma < 0 and error(sails.sae_estimate(codes(a), W_dec, 6)[0], world.W[world.safety].T) > 2


# ------------------------------------------------------------------------------------------------------ the data itself
def test_superposition_is_what_it_says():
    world = data.superposition(1, 20, 50, 5, strength=3., tilt=.1)
    a, h = data.superposition_pairs(world, 4000, 1)
    assert {x.dtype for x in (world.W, world.p, a, h)} == {f64} and (a.shape, h.shape) == ((2, 4000, 50), (2, 4000, 20))
    assert torch.allclose(world.W.norm(dim=1), torch.ones(50, dtype=f64)) and torch.allclose(a @ world.W, h)
    assert bool((a >= 0).all()) and bool((a <= world.top).all()) and .03 < float((a > 0).double().mean()) < .1
    assert sorted(world.delta.nonzero()[:, 0].tolist()) == sorted(world.safety.tolist() + world.nuisance.tolist())
    assert world.delta[world.safety].sign().tolist() == [1, -1, 1, -1, 1]
    assert world.delta[world.nuisance].tolist() == pytest.approx([-.3] * 3)
    assert world.gamma == pytest.approx(.11 - .3)
    for x, y in zip(data.superposition_pairs(world, 4000, 1), (a, h)):
        assert torch.equal(x, y)
    assert not torch.equal(data.superposition_pairs(world, 4000, 2)[0], a)


def test_coherence_is_the_mean_cosine_and_shared_pairs_share_their_background():
    for coherence in (0., .5, .99):
        G = data.superposition(0, 64, 128, coherence=coherence).W
        assert float((G @ G.T - torch.eye(128)).sum() / (128 * 127)) == pytest.approx(coherence, abs=.03)
    for shared in (0., .5, 1.):
        world = data.superposition(0, shared=shared)
        a, _ = data.superposition_pairs(world, 3000, 0)
        same = (a[0] == a[1])[(a[0] > 0) & (world.p[0] == world.p[1])]
        assert float(same.double().mean()) == pytest.approx(shared, abs=.02)


def test_planted_errors_are_not_drawn_from_the_numbers_the_dictionary_was_drawn_from():
    world = data.superposition(5)
    W_dec, _ = data.planted_sae(world, .5, seed=5)
    along = ((W_dec - world.W) * world.W).sum(1) / .5          # a shared seed once made every error lie along its own row
    assert float(along.abs().mean()) < .2
    random = sails.raw_estimates(data.superposition_pairs(world, 10, 5)[1], 6, 5)["random basis"]
    assert float((random.T @ world.W.T).abs().max() / 8) < .7


@pytest.mark.parametrize("fault, grows", [("dead", [0, 1.2, 1.7, 2.1]), ("split", [0, 1.2, 1.3, 1.7]),
                                          ("absorbed", [0, .8, 1.2, 1.5])])
def test_error_grows_with_dead_split_and_absorbed_features(fault, grows):
    world = data.superposition(2)
    a, _ = data.superposition_pairs(world, 5000, 2)
    before, errors = a.clone(), []
    for count in range(4):
        W_dec, codes = data.planted_sae(world, **{fault: count})
        assert codes(a).shape[-1] == len(W_dec) and torch.equal(a, before)
        errors.append(error(sails.sae_estimate(codes(a), W_dec, 6)[0], world.W[world.safety].T))
    assert errors == sorted(errors) and all(e >= floor for e, floor in zip(errors, grows)) and errors[0] < 1e-9


def test_split_halves_keep_the_mean_and_absorbed_activity_moves_to_its_host():
    world = data.superposition(2)
    a, _ = data.superposition_pairs(world, 20000, 2)
    strongest, weakest = int(world.safety[-1]), int(world.safety[0])
    codes = data.planted_sae(world, split=1)[1](a)
    assert torch.allclose(codes[..., strongest] + codes[..., -1], a[..., strongest])
    assert not bool((codes[..., strongest] * codes[..., -1]).any())
    assert float(codes[..., -1].sum() / a[..., strongest].sum()) == pytest.approx(.5, abs=.02)
    W_dec, encode = data.planted_sae(world, absorbed=1)
    codes = encode(a)
    host = int((W_dec - world.W).norm(dim=1).argmax())         # the one row that moved: half of it is the silent feature's
    own, taken = (float(W_dec[host] @ world.W[i]) for i in (host, weakest))
    assert own == pytest.approx(taken) and own > .5
    assert torch.allclose(codes[..., host], a[..., host] + a[..., weakest])
    assert not bool(codes[..., weakest].any()) and torch.allclose(codes.sum(-1), a.sum(-1))


# ---------------------------------------------------------------------------------------------------- the trained SAE
@pytest.mark.slow
def test_sae_trained_on_the_samples_finds_the_subspace_within_the_bound_of_its_own_eps_over_five_seeds():
    for seed in range(20, 25):
        world = data.superposition(seed)
        a, h = data.superposition_pairs(world, 2000, seed)
        target = world.W[world.safety].T
        V, worth = sails.trained_estimate(world, h, seed)
        e, eps = error(V, target), worth["eps of its chosen rows"]
        assert worth["chose all of S"] == 1 and e < .35 and V.dtype == f64
        assert e <= sails.sae_bound(eps, 6, sigma(target.T)) and eps == worth["eps of its best rows"]
        assert e < .5 * min(error(U, target) for U in sails.raw_estimates(h, 6, seed).values())
    _, worth = sails.trained_estimate(world, h[:, :60], seed)                        # too few pairs: other features come up
    assert worth["chose all of S"] == 0 and worth["eps of its chosen rows"] > worth["eps of its best rows"]
    V, worth = sails.trained_estimate(world, h, seed, steps=1)                       # and it is the training that does it
    assert error(V, target) > 2 and worth["eps of its best rows"] > .8


# --------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def small(monkeypatch):
    for name, value in dict(SEEDS=range(10, 12), SIZES=(100, 1000), PAIRS=1000, STRENGTHS=(0., 4.)).items():
        monkeypatch.setattr(sails, name, value)
    draws, selection = sails.measure_draws, sails.measure_selection
    monkeypatch.setattr(sails, "measure_draws", lambda n, checks: draws(40, checks))
    monkeypatch.setattr(sails, "measure_selection", lambda checks: selection(checks, trials=300))
    monkeypatch.setattr(sys, "argv", ["sails.py"])


@pytest.mark.slow
def test_command_prints_four_tables_and_every_verdict_and_draws_them(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["sails.py", "--plot", str(tmp_path / "a" / "theory.png")])
    assert sails.main() == 0
    out = capsys.readouterr().out
    assert all(title in out for title in sails.TITLES.values()) and "In plain words" in out and "nan" not in out
    assert sum(line.endswith("cases") and " holds " in line for line in out.splitlines()) == 5 and "VIOLATED" not in out
    assert (tmp_path / "a" / "theory.png").read_bytes()[:4] == b"\x89PNG" and len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("name, wrong", [("sae_bound", lambda eps, r, sigma: r ** .5 * eps / sigma), ("direct_floor", lambda r: r ** .5),
                                         ("truncation_floor", lambda r, r_s: (r - r_s + 1.) ** .5 if r > r_s else 0.),
                                         ("selection_probability", lambda n, gamma, B, m: 1 - 1e-4)])
def test_a_wrong_bound_is_called_violated_and_the_exit_code_is_one(small, name, wrong, monkeypatch, capsys):
    def quick(seed, cells, checks):                            # the trained SAE's two tables have their own test
        checks["trained"].append((.1, .2))
    monkeypatch.setattr(sails, "measure_pairs", quick)
    monkeypatch.setattr(sails, "plain_words", lambda cells: None)
    assert sails.main() == 0
    monkeypatch.setattr(sails, name, wrong)
    assert sails.main() == 1
    assert capsys.readouterr().out.count("VIOLATED") >= 1


def test_figure_needs_matplotlib_and_a_png_and_says_so_before_measuring(small, monkeypatch):
    monkeypatch.setattr(sails, "measure_eps", lambda *a: pytest.fail("measured first"))
    monkeypatch.setattr(sys, "argv", ["sails.py", "--plot", "theory.jpg"])
    with pytest.raises(data.UserError, match="must end in .png"):
        sails.main()
    monkeypatch.setattr(sys, "argv", ["sails.py", "--plot", "theory.png"])
    monkeypatch.setattr(sails.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.UserError, match="pip install matplotlib"):
        sails.main()


def test_wrong_command_line_is_one_line_and_exit_code_two():
    done = subprocess.run([sys.executable, ROOT / "sails.py", "--plot", "x.pdf"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("f, args", [
    (sails.sae_bound, (.1, 0, 1.)), (sails.sae_bound, (.1, 2, 0.)), (sails.sae_bound, (-.1, 2, 1.)), (sails.sae_bound, (.1, 2.5, 1.)),
    (sails.sae_bound, (float("nan"), 2, 1.)), (sails.sae_bound, (.1, 2, float("nan"))), (sails.direct_floor, (0,)),
    (sails.direct_floor, (-1,)), (sails.truncation_floor, (3, 0)), (sails.truncation_floor, (0, 3)),
    (sails.selection_probability, (0, .1, 1, 5)), (sails.selection_probability, (9, 0., 1, 5)),
    (sails.selection_probability, (9, .1, float("inf"), 5)), (sails.selection_probability, (9, .1, 1, 0)),
    (data.superposition, (0, 64, 128, 0)), (data.superposition, (0, 4, 128, 5)), (data.superposition, (0, 64, 7)),
    (data.superposition, (0, 64, 128, 6, 1.)), (data.superposition, (0, 64, 128, 6, 0., 0., 3, 0., .01, 1.5))])
def test_degenerate_arguments_are_clear_value_errors(f, args):
    with pytest.raises(ValueError, match=" = |no such model"):
        f(*args)
