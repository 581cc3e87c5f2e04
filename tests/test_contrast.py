"""The streamed statistics equal a computation by hand on stored activations; then each method's subspace."""
import pytest
import torch

import data
import sails
from conftest import random_gemma, random_sae

close, gap = torch.testing.assert_close, sails.projector_distance

@pytest.fixture(scope="module")
def setup(world, split):
    """A model, SAEs for both layers, and 7 pairs of each contrast, texts of several lengths."""
    examples = split["train"][:7] + split["train"][-7:]
    examples = [dict(ex, chosen=ex["chosen"] + " then" * (j % 3)) for j, ex in enumerate(examples)]
    rows, _ = data.encode(world.tok, examples, "tiny")
    pairs = {contrast: sails.contrast_pairs(rows, contrast)[:7] for contrast in ("replies", "prompts")}
    return random_gemma(), {0: random_sae(0), 1: random_sae(1)}, pairs

@pytest.mark.parametrize("contrast, batch", [("replies", 3), ("replies", 100), ("prompts", 1)])
def test_streamed_statistics_equal_a_computation_on_stored_activations_also_if_masks_hold_bos(
        setup, contrast, batch):
    model, saes, pairs = setup[0], setup[1], setup[2][contrast]
    greedy = [tuple((ids, [1] + mask[1:]) for ids, mask in pair) for pair in pairs]
    stats = sails.contrast_means(model, saes, greedy, batch)
    bare = sails.contrast_means(model, {1: None}, pairs)[1]        # residuals alone, of one layer
    for layer, sae in saes.items():
        residuals = lambda ids: model.residuals(torch.tensor([ids]), [layer])[layer][0]
        each = [[residuals(ids)[torch.tensor(mask).bool()] for ids, mask in pair] for pair in pairs]
        mean = lambda f: torch.stack([torch.stack([f(x).mean(0) for x in pair]) for pair in each]).double()
        a, h, square = mean(sae.encode), mean(lambda x: x), mean(torch.square)         # (7, 2, .) each
        d, dh = a[:, 0] - a[:, 1], h[:, 0] - h[:, 1]
        live = d.std(0) > 1e-3                         # else t divides rounding by rounding
        assert int(live.sum()) > 10
        residual = dict(h_aligned=h[:, 0].mean(0), h_unaligned=h[:, 1].mean(0), second=dh.T @ dh / 7,
                        var=square.mean((0, 1)) - h.mean((0, 1)) ** 2)
        want = dict(residual, mu_aligned=a[:, 0].mean(0), mu_unaligned=a[:, 1].mean(0),
                    t=d.mean(0) / (d.std(0) / 7 ** .5))
        assert set(stats[layer]) == set(want)
        assert not stats[layer]["t"][(d == 0).all(0)].any()
        for key, x in stats[layer].items():
            where, far = (live, 1e-2) if key == "t" else (slice(None), 1e-4)
            close(x[where], want[key][where], atol=far, rtol=1e-3)
    close({key: bare[key] for key in residual}, residual, atol=1e-4, rtol=1e-3)        # of layer 1

def test_reply_pairs_mark_replies_and_prompt_pairs_the_last_prompt_tokens(world, split):
    words = lambda side: " ".join(world.tok.id_to_token(t).strip("▁") for t, m in zip(*side) if m)
    rows, _ = data.encode(world.tok, [split["train"][0], dict(split["train"][1], rejected=None)], "tiny")
    [pair] = sails.contrast_pairs(rows, "replies")
    assert list(map(words, pair)) == [rows[0]["chosen"] + " <end>", rows[0]["rejected"] + " <end>"]
    rows, _ = data.encode(world.tok, split["train"], "tiny")
    things = [[r["turns"][0]["content"].split()[3] + " ? <model>" for r in rows if r["label"] == label]
              for label in ("harmful", "benign")]
    assert [tuple(map(words, p)) for p in sails.contrast_pairs(rows, "prompts", last=3)] == list(zip(*things))

@pytest.fixture(scope="module")
def stats(setup):
    """Real statistics, but feature 11 and all from 30 on silent in both sets, as most of a wide SAE are."""
    stats = sails.contrast_means(setup[0], setup[1], setup[2]["replies"])
    for s in stats.values():
        for key in ("mu_aligned", "mu_unaligned"):
            s[key][[11, *range(30, 40)]] = 0
    return stats

@pytest.mark.parametrize("method", sails.METHODS)
def test_every_method_gives_an_orthonormal_float32_basis_per_layer(setup, stats, method):
    given = {i: {"D": 24} for i in stats} if method == "random" else stats
    bases, again, other = (sails.subspaces(method, given, setup[1], 5, 1., r=4, seed=j)[0] for j in (0, 0, 1))
    for i, V in bases.items():
        assert V.dtype == torch.float32
        assert V.shape == (24, {"mean-diff": 1, "random": 4, "raw-pca": 4}.get(method, 5))
        close(V.T @ V, torch.eye(V.shape[1]), atol=1e-5, rtol=0)
        assert torch.equal(V, again[i])
        assert torch.equal(V, other[i]) == (not method.startswith("random"))
    assert not torch.allclose(bases[0], bases[1], atol=.1)         # each layer has its own

@pytest.mark.parametrize("rule, drop", (("absolute", []), ("relative", []), ("t", []), ("absolute", [3, 5])))
def test_sails_spans_the_rows_of_the_firing_features_that_score_best_pooled_or_not(setup, stats, rule, drop):
    bases, chosen = sails.subspaces("sails", stats, setup[1], k=20, tau=1., rule=rule, drop=drop)
    for i, s in stats.items():
        scores = s["t"].abs() if rule == "t" else sails.score(s["mu_aligned"], s["mu_unaligned"], rule)
        fired = [f for f in (s["mu_aligned"] + s["mu_unaligned"]).nonzero()[:, 0].tolist() if f not in drop]
        assert chosen[i].tolist() == sorted(fired, key=lambda f: -scores[f])[:20]
        assert gap(bases[i], setup[1][i].W_dec[chosen[i]].T) < 1e-5
    cut = sails.subspaces("sails", stats, setup[1], 20, .5, rule, True, drop=drop)[0][1]
    close(cut, sails.basis(setup[1][1].W_dec, chosen[1], .5, True))
    pooled, chosen = sails.subspaces("sails", stats, setup[1], 4, 1., rule, pool=True, drop=drop)
    assert torch.equal(pooled[0], pooled[1])
    assert gap(pooled[0], torch.cat([setup[1][i].W_dec[chosen[i]] for i in (0, 1)]).T) < 1e-5

def test_features_are_drawn_among_those_that_fire_and_are_not_dropped_and_too_many_are_refused(setup, stats):
    draw = lambda seed: sails.subspaces("random-features", stats, setup[1], 5, drop=[3], seed=seed)[1][0]
    fired = (stats[0]["mu_aligned"] + stats[0]["mu_unaligned"]).nonzero()[:, 0].tolist()
    assert set(torch.cat([draw(seed) for seed in range(40)]).tolist()) == set(fired) - {3}
    for more, words in ((dict(k=35), "--k"), (dict(drop=[40]), "--drop"), (dict(drop=[-1]), "--drop")):
        with pytest.raises(data.UserError, match=words):
            sails.subspaces("sails", stats, setup[1], **more)

def test_mean_diff_is_the_normalised_difference_of_mean_residuals_that_are_numbers_and_differ(setup, stats):
    u = stats[1]["h_aligned"] - stats[1]["h_unaligned"]
    close(sails.subspaces("mean-diff", stats, setup[1])[0][1][:, 0], (u / u.norm()).float())
    with pytest.raises(data.UserError, match="layer 1: the two sets have the same"):
        sails.subspaces("mean-diff", {1: stats[1] | dict(h_aligned=stats[1]["h_unaligned"])}, {})
    broken = random_gemma()
    broken.layers[0].mlp.down_proj.weight[0] = float("nan")        # a ReLU would call it silence
    with pytest.raises(data.UserError, match="layer 1: residuals hold NaN"):
        sails.contrast_means(broken, {1: setup[1][1]}, setup[2]["replies"])

def test_raw_pca_finds_the_principal_directions_and_standardising_undoes_units():
    Q = torch.randn(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(Q.index_fill(0, torch.tensor([0]), 0.))[0]                      # dimension 0 is noise
    second = Q * torch.tensor([9., 4.]) @ Q.T + .01 * torch.eye(24)
    unit = torch.tensor([100., 3.] + [1.] * 22, dtype=torch.float64)                    # in a fine unit
    stats = {0: dict(second=second, var=torch.ones(24)),
             1: dict(second=second * unit * unit[:, None], var=unit ** 2)}
    raw, even = (sails.subspaces("raw-pca", stats, {}, r=2, standardise=b)[0] for b in (False, True))
    close((raw[0] * Q.float()).sum(0).abs(), torch.ones(2))                             # largest first
    assert abs(float(raw[1][0, 0])) > .99
    assert gap(even[1], Q * unit[:, None]) < 1e-5
    stats[0]["second"] = Q @ Q.T                       # of two pairs, say: further directions are rounding
    assert sails.subspaces("raw-pca", stats, {}, r=4)[0][0].shape == (24, 2)
