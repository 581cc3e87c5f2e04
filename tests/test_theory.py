"""The theorem's bounds and floors and where they are reached, raw PCA's limit, and the commands."""
import functools
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import sails
from benchmarks import theory
from conftest import go

pytestmark = pytest.mark.filterwarnings("error")
f64 = torch.float64

randn = lambda *shape, seed=0: torch.randn(shape, generator=theory.stream(seed, 99), dtype=f64)

def error(U, V):
    """|P_U - P_V| from the definition: a mistake in projector_distance cannot hide itself."""
    P, Q = (X @ torch.linalg.pinv(X) for X in (U, V))
    return float(torch.linalg.matrix_norm(P - Q))

sigma = lambda rows: float(torch.linalg.svdvals(rows)[-1])
target = lambda world: world.W[world.safety].T

def draw(seed):
    """A world of random size, every fifth with r = 1, every third of nearly dependent rows; eps; pairs."""
    gen = theory.stream(seed, 98)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=gen))]
    d, r = pick(6, 12, 40), 1 if seed % 5 == 0 else pick(2, 3, 4, 6)
    coherence = .9999 if seed % 3 == 0 else pick(0., .5, .9)
    size, nuisances, strength = pick(d + 4, 2 * d, 5 * d), pick(0, 3), pick(0., 1., 5.)
    world = theory.superposition(seed, d, size, r, coherence, nuisances, strength)
    pairs = theory.superposition_pairs(world, pick(20, 200, 1500), seed, pick(0., .5, 1.), pick(0., .05, .3))
    return world, pick(1e-9, 1e-4, .01, .1, .5, 1., 10.), pairs

def test_bounds_and_floors_hold_on_300_random_draws_at_any_sample_size():
    chosen_right, moved, cut = 0, 0, 0
    for seed in range(300):
        world, eps, (a, h) = draw(seed)
        W_dec, codes = theory.planted_sae(world, eps, seed=seed)
        assert torch.allclose((W_dec - world.W).norm(dim=1), torch.tensor(eps, dtype=f64), rtol=1e-6)
        S, r = target(world), len(world.safety)
        _, features = theory.sae_estimate(codes(a), W_dec, r)
        chosen_right += set(features.tolist()) == set(world.safety.tolist())
        V = sails.basis(W_dec, world.safety)           # the bound's premise: the right features, whatever n
        e, bound = error(V, S), sails.sae_bound(eps, r, sigma(S))
        assert e <= bound * (1 + 1e-9) + 1e-8, (seed, e, bound)
        assert sails.projector_distance(V, S) == pytest.approx(e, abs=1e-7)
        moved += e > .05 * min(bound, 1)               # not with r = d or errors along the rows themselves
        u, q = (h[0] - h[1]).mean(0)[:, None], 1 + seed % 6
        assert error(u, S) >= sails.direct_floor(r) - 1e-9
        assert error(S @ randn(r, 1), S) == pytest.approx(sails.direct_floor(r), abs=1e-5)
        assert error(randn(len(S), q, seed=seed), S) >= sails.truncation_floor(r, q) - 1e-7
        for tau in (.3, .7, .9, 1.):
            V = sails.basis(world.W, world.safety, tau)            # true rows: equality
            assert error(V, S) == pytest.approx(sails.truncation_floor(r, V.shape[1]), abs=1e-5)
            cut += V.shape[1] < r
    assert chosen_right > 150
    assert moved > 250
    assert cut > 200

@pytest.mark.parametrize("r, s", [(2, .9), (3, .1), (6, .01), (8, 1e-3)])
def test_sae_bound_is_reached_by_nearly_dependent_rows_that_all_err_one_way(r, s):
    c = (s ** 2 - 1) / (r - 1)                         # of cosine c, so that the plain sum is the weakest, s
    low = torch.linalg.cholesky(torch.eye(r, dtype=f64) * (1 - c) + c)
    signs = torch.tensor([1, -1] * r, dtype=f64)[:r, None]         # half of the rows turned round
    rows, bound = signs * torch.nn.functional.pad(low, (0, 2)), sails.sae_bound(1e-3 * s, r, s)
    found = theory.one_way_rows(rows, 1e-3 * s, theory.stream(0))
    assert sigma(rows) == pytest.approx(s)
    assert .99 * bound < error(found.T, rows.T) <= bound * (1 + 1e-6)

@pytest.mark.parametrize("f, args, value", [
    (sails.sae_bound, (50., 3, .5), 6 ** .5 * 100), (sails.sae_bound, (0, 3, .5), 0),
    (sails.truncation_floor, (3, 7), 2),
    (sails.selection_probability, (5000, .3, 2, 100), 1 - 2 * 100 * math.exp(-5000 * .3 ** 2 / (4 * 2 ** 2))),
    (sails.selection_probability, (10, .1, 1., 100), 0), (sails.t_probability, (9, .5, 2, 3), 0),
    (sails.t_probability, (9000, .5, 2, 3), 1 - 12 * math.exp(-9000 * .25 / (38 * 4)))])
def test_bounds_have_the_values_of_their_formulas(f, args, value):
    assert f(*args) == pytest.approx(value, abs=1e-14)

def test_selection_fails_no_more_often_than_its_bound_and_more_often_than_without_the_four():
    checks = dict(selection=[])
    theory.measure_selection(checks, trials=1500)
    assert all(rate <= bound for rate, bound in checks["selection"])
    assert 4 * math.exp(-6) < 1.3 * checks["selection"][0][0]      # r = 1 of m = 2 coins at n gamma^2 = 6

def test_by_t_no_scale_of_an_unrelated_feature_hides_safety_and_by_delta_a_large_one_does():
    d, gen = torch.zeros(2, 500, 40, dtype=f64), theory.stream(3)
    d[0] = (torch.rand(500, 40, generator=gen) < .5).double() - .5
    d[0, :, :3] += .4                                  # 0..2 differ; 39, a hundred times as large, hardly
    d[0, :, 39] = 100 * (d[0, :, 39] + .05)
    chosen = lambda *rule: set(theory.sae_estimate(d, torch.eye(40, dtype=f64), 3, *rule)[1].tolist())
    assert chosen(theory.t_of) == {0, 1, 2}
    assert 39 in chosen()

@pytest.mark.parametrize("shared, noise, strength", [(.7, .2, .5), (1., 0., 3.)])
def test_closed_form_moments_are_those_of_the_samples_and_raw_pca_tends_to_its_limit(shared, noise, strength):
    world, n, size = theory.superposition(4, 10, 20, 3, strength=strength, tilt=.2), 200000, 1 + strength
    a, h = theory.superposition_pairs(world, n, 4, shared, noise)
    d, pooled = h[0] - h[1], h.flatten(0, 1) - h.mean((0, 1))
    for got, want in ((d.T @ d / n, theory.difference_moment(world, shared, noise)),
                      (pooled.T @ pooled / (2 * n), theory.pooled_covariance(world, noise))):
        assert float((got - want).norm() / want.norm()) < .01
    assert torch.allclose(a.mean(1), world.mean, atol=.005 * size)
    assert torch.allclose(a.var(1), world.var, atol=.01 * size ** 2)
    limit = sails.top_eigenspace(theory.difference_moment(world, shared, noise), 3)
    far, near = (error(theory.raw_estimates(h[:, :k], 3, 0)[theory.PCA], limit) for k in (2000, n))
    assert near < .3 * far                             # 1/10 to first order

@pytest.mark.parametrize("strength, shared, low, high", [(0., 0., .5, .7 * 5 ** .5), (0., 1., 0, 1e-6),
                                                         (4., 0., 2.3, 2.6), (4., 1., 2.3, 2.6)])
def test_raw_pca_tends_to_the_target_for_perfect_pairs_only_not_when_entangled(strength, shared, low, high):
    for seed in range(10):
        world = theory.superposition(seed, strength=strength)
        limit = sails.top_eigenspace(theory.difference_moment(world, shared), 6)
        assert low <= error(limit, target(world)) < high

def test_superposition_is_what_it_says():
    world = theory.superposition(1, 20, 50, 5, strength=3., tilt=.1)
    a, h = theory.superposition_pairs(world, 4000, 1)
    assert torch.equal(theory.superposition_pairs(world, 4000, 1)[1], h)
    assert torch.allclose(world.W.norm(dim=1), torch.ones(50, dtype=f64))
    assert torch.allclose(a @ world.W, h)
    assert torch.equal(a.clamp(torch.zeros(50, dtype=f64), world.top), a)
    assert .03 < float((a > 0).double().mean()) < .1
    assert set(world.delta.nonzero()[:, 0].tolist()) == {*world.safety.tolist(), *world.nuisance.tolist()}
    assert world.delta[world.safety].sign().tolist() == [1, -1, 1, -1, 1]
    assert world.delta[world.nuisance].tolist() == pytest.approx([-.3] * 3)
    assert world.gamma == pytest.approx(.11 - .3)
    W = theory.superposition(0, 64, 128, coherence=.5).W
    assert float((W @ W.T - torch.eye(128)).sum() / (128 * 127)) == pytest.approx(.5, abs=.03)

@pytest.mark.parametrize("fault, least", [("dead", [0, 1.2, 1.7, 2.1]), ("split", [0, 1.2, 1.3, 1.7]),
                                          ("absorbed", [0, .8, 1.2, 1.5])])
def test_error_grows_with_dead_split_and_absorbed_features(fault, least):
    world = theory.superposition(2)
    a, _ = theory.superposition_pairs(world, 5000, 2)
    planted = [theory.planted_sae(world, **{fault: count}) for count in range(4)]
    errors = [error(theory.sae_estimate(codes(a), W_dec, 6)[0], target(world)) for W_dec, codes in planted]
    assert errors[0] < 1e-9
    assert all(low <= e <= high for low, e, high in zip(least, errors, errors[1:] + [9.]))

def test_split_halves_keep_the_mean_and_absorbed_activity_moves_to_its_host():
    world = theory.superposition(2)
    a, _ = theory.superposition_pairs(world, 20000, 2)
    before, weakest, strongest = a.clone(), int(world.safety[0]), int(world.safety[-1])
    codes = theory.planted_sae(world, split=1)[1](a)
    assert torch.allclose(codes[..., strongest] + codes[..., -1], a[..., strongest])
    assert not bool((codes[..., strongest] * codes[..., -1]).any())
    assert float(codes[..., -1].sum() / a[..., strongest].sum()) == pytest.approx(.5, abs=.02)
    W_dec, encode = theory.planted_sae(world, absorbed=1)
    host, codes = int((W_dec - world.W).norm(dim=1).argmax()), encode(a)           # the row that turned
    assert float(W_dec[host] @ world.W[host]) == pytest.approx(float(W_dec[host] @ world.W[weakest]))
    assert torch.allclose(codes[..., host], a[..., host] + a[..., weakest])
    assert not bool(codes[..., weakest].any())
    assert torch.equal(a, before)

@pytest.mark.slow
def test_an_sae_trained_on_the_samples_is_within_the_bound_of_its_own_eps_over_five_seeds():
    for seed in range(20, 25):
        world = theory.superposition(seed)
        _, h = theory.superposition_pairs(world, 2000, seed)
        V, eps, best, _ = theory.trained_estimate(world, h, seed)
        assert error(V, target(world)) <= min(.35, sails.sae_bound(eps, 6, sigma(target(world))))
        assert eps == best                             # all of S was chosen
    _, eps, best, _ = theory.trained_estimate(world, h[:, :60], seed)
    assert eps > best                                  # too few pairs: other features come up
    _, _, best, _ = theory.trained_estimate(world, h, seed, steps=1)
    assert best > .8                                   # it is the training that finds them

@pytest.fixture
def small(monkeypatch):
    """Both commands on two small samples, SAEs hardly trained: the bounds hold for any SAE."""
    quick = dict(SIZES=(100, 300), SEEDS=range(10, 12), PAIRS=300, STRENGTHS=(0., 4.),
                 trained_estimate=functools.partial(theory.trained_estimate, steps=5),
                 measure_selection=functools.partial(theory.measure_selection, trials=300),
                 measure_t=functools.partial(theory.measure_t, trials=300), TITLES=dict(theory.TITLES))
    for name, value in quick.items():
        monkeypatch.setattr(theory, name, value)

@pytest.mark.parametrize("name, wrong", [
    ("sae_bound", lambda eps, r, sigma: r ** .5 * eps / sigma), ("direct_floor", lambda r: r ** .5),
    ("sae_bound", lambda eps, r, sigma: (2 * r) ** .5 * eps), ("selection_probability", lambda *_: 1 - 1e-4),
    ("truncation_floor", lambda r, r_s: (r + r_s) ** .5), ("t_probability", lambda *_: 1 - 1e-4),
    ("t_probability", lambda n, gap, K, m: 1 - 4 * m * math.exp(-n * gap ** 2 / K ** 2)),
    ("trained_estimate", lambda world, h, seed: (world.W[:6].T, 1e-3, 1e-3, world.W[:6].T))])
def test_a_wrong_bound_is_called_violated_and_the_exit_code_is_one(small, name, wrong, monkeypatch):
    monkeypatch.setattr(theory, name, wrong)
    code, said, _ = go([], sails.main)
    assert code == 1 and "VIOLATED" in said

@pytest.mark.slow
def test_both_commands_hold_and_the_long_one_writes_tables_and_a_figure(small, monkeypatch, tmp_path):
    code, out, _ = go([], sails.main)
    assert code == 0 and out.count(" holds ") == len(theory.BOUNDS)
    code, out, _ = go(["--out", tmp_path / "new"], theory.main)
    assert code == 0 and (tmp_path / "new" / "theory.txt").read_text() == out
    assert all(title in out for title in theory.TITLES.values()) and "nan" not in out
    svg = ElementTree.parse(tmp_path / "new" / "theory.svg").getroot()
    lines = [e.get("d") for e in svg.findall(".//{*}path") if "L" in e.get("d")]
    assert len(lines) == 3 + 3 + 4 + 2 * len(theory.ESTIMATORS)
    points = [tuple(map(float, p.split())) for line in lines for p in line[1:].split("L")]
    assert all(20 < x < 360 and 32 <= y <= 190 for x, y in points)
    titles = {f"{title}: error" for title in theory.PANELS.values()}
    assert {*theory.ESTIMATORS} | titles <= {e.text for e in svg.findall(".//{*}text")}
    monkeypatch.setattr(theory, "truncation_floor", lambda r, r_s: r ** .5)
    assert go(["--out", tmp_path / "new"], theory.main)[0] == 1

@pytest.mark.parametrize("f, args", [
    (sails.sae_bound, (.1, 2.5, 1.)), (sails.sae_bound, (.1, 2, 0.)), (sails.sae_bound, (math.nan, 2, 1.)),
    (sails.sae_bound, (-.5, 3, 1.)), *((sails.t_probability, x) for x in ((9, .1, .5, 3), (9, 2, 3, 3))),
    (sails.direct_floor, (0,)), (sails.truncation_floor, (3, 0)), (sails.truncation_floor, (0, 3)),
    *((sails.selection_probability, x) for x in (
        (0, .1, 1, 5), (9, 0., 1, 5), (9, .1, float("inf"), 5), (9, .1, 1, 0), (9, 2., 1, 5))),
    *((theory.superposition, (0, *x)) for x in ((64, 128, 0), (4, 128, 5), (64, 7), (64, 128, 6, 1.)))])
def test_degenerate_arguments_are_clear_value_errors(f, args):
    with pytest.raises(ValueError, match=" = |no such model"):
        f(*args)
