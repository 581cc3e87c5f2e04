"""The comparison's statistics on data whose truth is known, and a cell of it: reproducible, never tuned on what it is scored on."""
import copy
import math

import numpy as np
import pytest
import torch

import data
import model_gemma
import sae as sae_module
import train
from conftest import random_sae

TEST_FIELDS = ("id_test", "ood", "lookalike", "facts", "commentary", "path")

# ----------------------------------------------------------------------------------------------------------- intervals
def simulate(bases, seeds, between, draws=2000, within=1., fixed=False):
    """Groups (draws, bases, seeds) around the truth 3: a shift per base (the same in every draw if fixed) plus noise per seed."""
    rng = np.random.default_rng([bases, seeds, int(10 * between)])
    shift = between * (rng.standard_normal((1, bases, 1)) if fixed else rng.standard_normal((draws, bases, 1)))
    return 3 + shift + within * rng.standard_normal((draws, bases, seeds)), 3 + float(shift.mean()) * fixed

def coverage(groups, truth):
    hits = [abs(mean - truth) <= half for mean, half in (train.t_interval(list(g)) for g in groups)]
    return np.mean(hits)

@pytest.mark.parametrize("bases, seeds, between", ((8, 8, 1.), (8, 3, .3), (3, 8, 1.), (3, 8, .3), (8, 8, 0.)))
def test_the_interval_over_bases_covers_the_truth_95_times_in_100(bases, seeds, between):
    groups, truth = simulate(bases, seeds, between)
    assert .93 < coverage(groups, truth) < .97

@pytest.mark.parametrize("bases, seeds", ((1, 3), (1, 8), (2, 8)))
def test_with_fewer_than_three_bases_the_interval_is_about_these_bases_only(bases, seeds):
    groups, truth = simulate(bases, seeds, 2., fixed=True)             # bases far apart, and none of that is error
    assert .93 < coverage(groups, truth) < .97

def test_seeds_of_few_bases_are_not_taken_for_independent_bases():
    groups, truth = simulate(3, 8, 1.)
    pooled = [(g.mean(), 2.069 * g.std(ddof=1) / 24 ** .5) for g in groups]
    assert np.mean([abs(m - truth) <= h for m, h in pooled]) < .75     # what counting 24 seeds would have claimed as 95 %

def test_intervals_equal_the_textbook_and_one_value_has_none():
    assert train.t_interval([[1., 2., 3.]]) == pytest.approx((2., 4.303 / 3 ** .5))
    mean, half = train.t_interval([[1., 3.], [2., 2.], [6., 10.]])
    assert (mean, half) == pytest.approx((4., 4.303 * 12 ** .5 / 3 ** .5))
    # two bases: squares 2 and 8 within them, 2 degrees of freedom, not 3
    assert train.t_interval([[1., 3.], [5., 9.]]) == pytest.approx((4.5, 4.303 * (10 / 2 / 4) ** .5))
    mean, half = train.t_interval([[5.]])
    assert mean == 5. and math.isnan(half)
    assert train.t_interval([[2., 2.]]) == (2., 0.)

def test_students_quantiles_hold_95_percent_of_their_distribution():
    for df, q in enumerate(train.STUDENT_975, 1):
        x = np.linspace(-q, q, 20001)
        pdf = math.gamma((df + 1) / 2) / math.gamma(df / 2) / (df * math.pi) ** .5 * (1 + x * x / df) ** (-(df + 1) / 2)
        assert abs(float(((pdf[1:] + pdf[:-1]) / 2 * np.diff(x)).sum()) - .95) < 2e-4, df

def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counted_half():
    rng = np.random.default_rng(0)
    for n, levels in ((40, 5), (60, 1000), (20, 1)):
        scores, positive = rng.integers(0, levels, n).astype(float), rng.random(n) < .4
        pairs = [(a > b) + .5 * (a == b) for a in scores[positive] for b in scores[~positive]]
        assert train.auc(scores, positive) == pytest.approx(np.mean(pairs))

# -------------------------------------------------------------------------------------------- picking and its tables
class Blind(dict):
    """A result whose test-set fields must not be looked at."""

    def __getitem__(self, key):
        assert key not in TEST_FIELDS, f"looked at {key}"
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def values(self):
        raise AssertionError("looked at everything")

    items = values

def results(kind=dict):
    """Two methods x two bases x two seeds x three rates; validation prefers the middle one, tests the highest."""
    rows = []
    for method, shift in (("sails", .05), ("lora", 0.)):
        for base in (0, 1):
            for seed in (0, 1):
                for lr, loss, safe in ((1e-3, .9, .1), (3e-3, .2, .5), (1e-2, .4, 1.)):
                    part = dict(safe=safe, over=.1, help=.5, balance=safe / 2 + .4 + shift + .01 * base)
                    rows.append(kind(method=method, base=base, seed=seed, lr=lr, validation_loss=loss, trained=7, train_seconds=1., facts=.5, commentary=.5,
                                     ood=part, id_test=part, lookalike=part, path={0: 0., 10: safe}))
    return rows

def test_the_learning_rate_is_picked_by_validation_loss_and_no_test_field_is_read():
    tuned = train.pick(results(Blind), "tuned")
    assert set(tuned) == {(m, b, s) for m in ("sails", "lora") for b in (0, 1) for s in (0, 1)}
    assert all(row["lr"] == 3e-3 for row in tuned.values())
    assert all(row["lr"] == 1e-3 for row in train.pick(results(Blind), "gentle").values())
    assert all(train.pick(results(Blind)[::-1], b) == train.pick(results(Blind), b) for b in ("tuned", "gentle"))

def test_paired_differences_are_of_the_same_base_and_seed_in_points():
    picked = train.pick(results(), "tuned")
    picked["sails", 1, 0] = dict(picked["sails", 1, 0], ood=dict(balance=1.))
    groups = train.paired(picked, "sails", "lora", train.balance)
    assert groups == [pytest.approx([5., 5.]), pytest.approx([34., 5.])]
    assert train.grouped(picked, "lora", train.balance) == [pytest.approx([.65, .65]), pytest.approx([.66, .66])]

def test_the_table_marks_a_rate_at_the_grids_edge():
    edge = [dict(r, validation_loss=r["lr"]) if r["method"] == "lora" else r for r in results()]
    lines = train.tables(edge, ["sails", "lora"])
    row = {m: next(line for line in lines if line.startswith(f"| {m} |")) for m in ("sails", "lora")}
    assert "(edge)" in row["lora"] and "(edge)" not in row["sails"]

def test_the_verdict_says_ahead_or_behind_only_where_the_interval_excludes_zero():
    rows = results()
    for r in rows:                                     # gentle: a mean that is well above zero, and seeds that disagree
        noise = {1e-3: (.4, -.3)[r["seed"]] * (r["method"] == "sails"), 3e-3: .001 * r["seed"]}.get(r["lr"], 0.)
        r["ood"] = dict(r["ood"], balance=r["ood"]["balance"] + noise)
    mean, half = train.t_interval(train.paired(train.pick(rows, "gentle"), "sails", "lora", train.balance))
    assert 5 < mean < half
    said = train.tables(rows, ["sails", "lora"])[-1]
    assert "ahead of lora" in said.split("At the lowest")[0] and "no different from lora" in said.split("At the lowest")[1]
    swapped = [dict(r, method=dict(sails="lora", lora="sails")[r["method"]]) for r in rows]
    assert "behind lora" in train.tables(swapped, ["sails", "lora"])[-1].split("At the lowest")[0]

# --------------------------------------------------------------------------------------------------------- one cell
@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A world's folder as make_world leaves it, but with a model and an SAE that nobody trained: made in no time."""
    home = tmp_path_factory.mktemp("worlds")
    model = model_gemma.Gemma(model_gemma.config_from_json(train.TINY_MODEL))
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=gen) / 8)
    model_gemma.save_gemma(model, home / "base-0")
    sae_module.save_sae(random_sae(D=64, N=256), home / "base-0" / "sae", train.TINY_LAYER, 20)
    data.write_json(home / "base-0" / "done.json", dict(seed=0, sae={}))
    train.open_world.cache_clear()
    yield home
    train.open_world.cache_clear()

@pytest.fixture
def small(monkeypatch):
    """Few unseen requests, so that a cell takes a fraction of a second."""
    split = data.world_split

    def shrink(*args):
        out = split(*args)
        return dict(out, ood=out["ood"][::16], lookalike=out["lookalike"][::8])
    monkeypatch.setattr(data, "world_split", shrink)
    return shrink

def untimed(row):
    return {k: v for k, v in row.items() if not k.endswith("seconds")}

@pytest.mark.parametrize("method, objective", (("sails", "sft"), ("lora", "rloo"), ("full", "dpo")))
def test_a_second_run_of_a_cell_reproduces_it_exactly_and_leaves_the_base_alone(worlds, small, method, objective):
    base = train.open_world(worlds / "base-0")[1]
    before = copy.deepcopy(base.state_dict())
    cell = dict(method=method, objective=objective, steps=2, lr=1e-2, replay=.1)
    first = train.run_cell(cell, worlds)
    torch.manual_seed(99)                              # nothing hangs on the global random state
    assert untimed(train.run_cell(cell, worlds)) == untimed(first)
    if method == "sails":
        assert untimed(train.run_cell(dict(cell, seed=1), worlds)) != untimed(first)
    assert base.state_dict().keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in base.state_dict().items())
    assert math.isfinite(first["validation_loss"]) and all(k in first for k in TEST_FIELDS)

def test_no_test_example_enters_training_or_tuning(worlds, small, monkeypatch):
    """Test parts are swapped for others: features and the number that tunes must not change. Validation is swapped: scores must not."""
    first = train.run_cell(dict(steps=2, lr=1e-2), worlds)

    def other_tests(world, seed, nuisance):
        out = small(world, seed, nuisance)
        return dict(out, **{part: out[part][::3] for part in ("id_test", "ood", "lookalike")})
    monkeypatch.setattr(data, "world_split", other_tests)
    then = train.run_cell(dict(steps=2, lr=1e-2), worlds)
    assert then["validation_loss"] == first["validation_loss"] and then["features"] == first["features"]

    def other_validation(world, seed, nuisance):
        out = small(world, seed, nuisance)
        return dict(out, validate=out["validate"][::-2])
    monkeypatch.setattr(data, "world_split", other_validation)
    last = train.run_cell(dict(steps=2, lr=1e-2), worlds)
    assert last["validation_loss"] != first["validation_loss"]         # the number does read validation
    assert all(last[k] == first[k] for k in TEST_FIELDS)               # and training does not

def test_finished_cells_are_not_run_again_and_come_back_in_the_order_asked(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(train, "run_cell", lambda cell, worlds: ran.append(cell) or dict(train.CELL, **cell, answer=cell["seed"]))
    cells = [dict(seed=s, lr=lr) for s in (0, 1) for lr in (1e-3, 1e-2)]
    path = tmp_path / "cells.jsonl"
    train.run_cells(cells[1:3], tmp_path, path, 1)
    rows = train.run_cells(cells, tmp_path, path, 1)
    assert len(ran) == 4 and [(r["seed"], r["lr"]) for r in rows] == [(c["seed"], c["lr"]) for c in cells]
    path.write_text(path.read_text()[:-20])            # killed while it wrote its last line
    assert [r["answer"] for r in train.run_cells(cells, tmp_path, path, 1)] == [0, 0, 1, 1] and len(ran) == 5
