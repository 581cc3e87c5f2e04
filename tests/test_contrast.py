"""Stage 1 of sails.py: the streamed statistics equal a computation by hand on stored activations; then each method's basis."""
import pytest
import torch

import data
import sails
from conftest import random_gemma, random_sae
from data import UserError

KEYS = dict(mu_aligned=(40,), mu_unaligned=(40,), h_aligned=(24,), h_unaligned=(24,), t=(40,), null=(20, 40), halves=(2, 40), second=(24, 24), var=(24,))


@pytest.fixture(scope="module")
def setup(world, split):
    """A model, an SAE for both layers, and for each contrast set an odd number of pairs, texts of several lengths."""
    examples = [dict(ex, chosen=ex["chosen"] + " then" * (j % 3)) for j, ex in enumerate(split["train"][:7] + split["train"][-7:])]
    pairs = {c: sails.contrast_rows(world.tok, examples, "tiny", c)[:7] for c in ("replies", "prompts")}
    return random_gemma(), {0: random_sae(0), 1: random_sae(1)}, pairs


def by_hand(model, sae, layer, pairs):
    """Per text, alone and unpadded: mean codes, mean residual, mean squared residual over its masked tokens -> (n, 2, .) each."""
    codes, mean, square = [], [], []
    for pair in pairs:
        h = [model.residuals(torch.tensor([ids]), [layer])[layer][0][torch.tensor(mask).bool()] for ids, mask in pair]
        codes.append(torch.stack([sae.encode(x).mean(0) for x in h]).double())
        mean.append(torch.stack([x.mean(0) for x in h]).double())
        square.append(torch.stack([(x ** 2).mean(0) for x in h]).double())
    return torch.stack(codes), torch.stack(mean), torch.stack(square)


@pytest.mark.parametrize("contrast", ("replies", "prompts"))
def test_streamed_statistics_equal_a_computation_on_stored_activations(setup, contrast):
    model, saes, pairs = setup[0], setup[1], setup[2][contrast]
    stats = sails.contrast_means(model, saes, pairs, batch=3)
    for layer, sae in saes.items():
        s, (a, h, square) = stats[layer], by_hand(model, sae, layer, pairs)
        d, n = a[:, 0] - a[:, 1], len(pairs)
        dh = h[:, 0] - h[:, 1]
        close = lambda x, y, tol=1e-5: torch.testing.assert_close(x, y, atol=tol, rtol=1e-3)
        close(s["mu_aligned"], a[:, 0].mean(0)), close(s["mu_unaligned"], a[:, 1].mean(0))
        close(s["h_aligned"], h[:, 0].mean(0)), close(s["h_unaligned"], h[:, 1].mean(0))
        close(s["halves"], torch.stack([d[0::2].mean(0), d[1::2].mean(0)]))
        close(s["second"], sum(torch.outer(x, x) for x in dh) / n, 1e-4)
        close(s["var"], square.mean((0, 1)) - h.mean((0, 1)) ** 2, 1e-4)
        spread = d.std(0)
        live = spread > 1e-3
        assert int(live.sum()) > 10
        close(s["t"][live], (d.mean(0) / (spread / n ** .5))[live], 1e-2)
        assert not s["t"][(d == 0).all(0)].any()
        assert {k: tuple(v.shape) for k, v in s.items()} == KEYS and all(v.dtype == torch.float64 for v in s.values())


def test_the_null_is_the_mean_difference_under_random_swaps_within_pairs(setup):
    model, saes, pairs = setup[0], setup[1], setup[2]["replies"]
    a = by_hand(model, saes[0], 0, pairs)[0]
    d = a[:, 0] - a[:, 1]
    null = sails.contrast_means(model, saes, pairs, nulls=300)[0]["null"]
    # of 2 ** 7 possible swaps each row is one
    every = torch.tensor([[1. if c >> j & 1 else -1. for j in range(7)] for c in range(128)], dtype=torch.float64) @ d / 7
    which = torch.cdist(null, every).min(1)
    assert float(which.values.max()) < 1e-4 and len(set(which.indices.tolist())) > 100
    assert not torch.equal(null, sails.contrast_means(model, saes, pairs, nulls=300, seed=1)[0]["null"])


def test_statistics_do_not_depend_on_the_batch_size(setup):
    model, saes, pairs = setup[0], setup[1], setup[2]["replies"]
    state = torch.get_rng_state()
    one, many = (sails.contrast_means(model, saes, pairs, batch) for batch in (1, 100))
    assert all(torch.allclose(one[i][k], many[i][k], atol=1e-4, rtol=1e-3) for i in saes for k in one[i])
    assert torch.equal(torch.get_rng_state(), state)


def test_bos_is_never_counted_even_where_a_mask_asks_for_it(setup):
    model, saes, pairs = setup[0], setup[1], setup[2]["replies"]
    greedy = [tuple((ids, [1] + mask[1:]) for ids, mask in pair) for pair in pairs]
    one, other = (sails.contrast_means(model, saes, p)[1] for p in (pairs, greedy))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_reply_pairs_mark_replies_and_prompt_pairs_the_last_prompt_tokens(world, split):
    words = lambda pair: [" ".join(world.tok.id_to_token(t) for t, m in zip(*side) if m) for side in pair]
    example = split["train"][0]
    [pair] = sails.contrast_rows(world.tok, [example, dict(example, rejected=None)], "tiny", "replies")
    assert words(pair) == [example["chosen"] + " <end>", example["rejected"] + " <end>"]
    pairs = sails.contrast_rows(world.tok, split["train"], "tiny", "prompts", last=3)
    things = {label: [f"{ex['turns'][0]['content'].split()[3]} ? <model>" for ex in split["train"] if ex["label"] == label] for label in ("harmful", "benign")}
    assert [words(p) for p in pairs] == [list(t) for t in zip(things["harmful"], things["benign"])]       # harmful stands first
    short = sails.contrast_rows(world.tok, split["train"], "tiny", "prompts", last=99)[0][0]
    assert short[1] == [0] + [1] * (len(short[0]) - 1)


def test_contrast_sets_that_cannot_be_made_are_refused(world, split):
    with pytest.raises(UserError, match="no example has a rejected one"):
        sails.contrast_rows(world.tok, [dict(ex, rejected=None) for ex in split["train"]], "tiny", "replies")
    with pytest.raises(UserError, match='"label": "harmful"'):
        sails.contrast_rows(world.tok, [ex for ex in split["train"] if ex["label"] == "harmful"], "tiny", "prompts")


# ----------------------------------------------------------------------------------------------------- one basis each
@pytest.fixture(scope="module")
def stats(setup):
    """Real statistics, but feature 11 and all from 30 on silent in both sets, as most features of a wide SAE are."""
    stats = sails.contrast_means(setup[0], setup[1], setup[2]["replies"])
    for s in stats.values():
        for key in ("mu_aligned", "mu_unaligned"):
            s[key][11], s[key][30:] = 0, 0
    return stats


def span(V):
    Q = torch.linalg.qr(V.double())[0]
    return Q @ Q.T


@pytest.mark.parametrize("method", sails.METHODS)
def test_every_method_gives_an_orthonormal_float32_basis_per_layer(setup, stats, method):
    bases, chosen = sails.build_bases(method, stats, setup[1], k=5, tau=1., r=4)
    assert set(bases) == {0, 1} and set(chosen) == ({0, 1} if "features" in method or method == "sails" else set())
    width = {"mean-diff": 1, "random": 4, "raw-pca": 4}.get(method, 5)
    for V in bases.values():
        assert V.shape == (24, width) and V.dtype == torch.float32
        assert float((V.T @ V - torch.eye(width)).abs().max()) < 1e-5
    again = sails.build_bases(method, stats, setup[1], k=5, tau=1., r=4)[0]
    other = sails.build_bases(method, stats, setup[1], k=5, tau=1., r=4, seed=1)[0]
    assert all(torch.equal(bases[i], again[i]) for i in bases)
    assert all(torch.equal(bases[i], other[i]) for i in bases) == (not method.startswith("random"))
    if method.startswith("random"):
        assert not torch.allclose(bases[0], bases[1], atol=.1)         # a draw of its own per layer


def test_sails_spans_the_decoder_rows_of_the_features_with_the_largest_difference(setup, stats):
    bases, chosen = sails.build_bases("sails", stats, setup[1], k=5, tau=1.)
    for i, s in stats.items():
        gap = (s["mu_aligned"] - s["mu_unaligned"]).abs()
        assert chosen[i].tolist() == gap.argsort(descending=True)[:5].tolist()
        torch.testing.assert_close(span(bases[i]), span(setup[1][i].W_dec[chosen[i]].T), atol=1e-5, rtol=0)
    assert sails.build_bases("sails", stats, setup[1], k=5, tau=.5)[0][0].shape[1] < 5
    relative = sails.build_bases("sails", stats, setup[1], k=5, tau=1., rule="relative")[1][0]
    assert relative.tolist() != chosen[0].tolist()
    assert bool((stats[0]["mu_aligned"] >= stats[0]["mu_unaligned"])[relative].all())


def test_random_features_are_drawn_among_those_that_fire(setup, stats):
    seen = set()
    for seed in range(40):
        chosen = sails.build_bases("random-features", stats, setup[1], k=5, tau=1., seed=seed)[1]
        seen |= set(chosen[0].tolist())
        assert len(set(chosen[0].tolist())) == 5
    fired = (stats[0]["mu_aligned"] + stats[0]["mu_unaligned"] > 0).nonzero()[:, 0].tolist()
    assert seen == set(fired) and 11 not in seen
    with pytest.raises(UserError, match="--k asks for 35"):
        sails.build_bases("random-features", stats, setup[1], k=35)
    with pytest.raises(UserError, match="--k asks for 35"):
        sails.build_bases("sails", stats, setup[1], k=35)


def test_mean_diff_is_the_normalised_difference_of_mean_residuals(setup, stats):
    V = sails.build_bases("mean-diff", stats, setup[1])[0][1][:, 0]
    u = stats[1]["h_aligned"] - stats[1]["h_unaligned"]
    torch.testing.assert_close(V, (u / u.norm()).float())
    level = {1: dict(stats[1], h_unaligned=stats[1]["h_aligned"])}
    with pytest.raises(UserError, match="one and the same mean residual"):
        sails.build_bases("mean-diff", level, setup[1])


def differences(n=4000, seed=0):
    """Paired differences that are large along two known directions, then dimension 0 measured in units 100 times finer."""
    gen = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(24, 2, generator=gen, dtype=torch.float64))[0]
    d = torch.randn(n, 2, generator=gen, dtype=torch.float64) * torch.tensor([3., 2.]) @ Q.T + .1 * torch.randn(n, 24, generator=gen, dtype=torch.float64)
    unit = torch.ones(24, dtype=torch.float64)
    unit[0] = 100.
    return d, Q, unit


def test_raw_pca_finds_the_principal_directions_and_standardising_undoes_units(setup):
    d, Q, unit = differences()
    plain = {0: dict(second=d.T @ d / len(d), var=torch.ones(24, dtype=torch.float64))}
    fine = {0: dict(second=(d * unit).T @ (d * unit) / len(d), var=unit ** 2)}
    V = sails.build_bases("raw-pca", plain, setup[1], r=2)[0][0]
    torch.testing.assert_close(span(V), span(Q), atol=.01, rtol=0)
    assert abs(float(V[:, 0].double() @ Q[:, 0])) > .99                # largest first
    raw = sails.build_bases("raw-pca", fine, setup[1], r=2)[0][0]
    assert abs(float(raw[0, 0])) > .99                 # the fine unit rules
    both = sails.build_bases("raw-pca", fine, setup[1], r=2, standardise=True)[0][0]
    torch.testing.assert_close(span(both), span(Q * unit[:, None]), atol=.01, rtol=0)        # the same two directions, in those units


def test_a_pooled_basis_is_one_for_all_layers_and_spans_all_their_features(setup, stats):
    for method in ("sails", "random-features"):
        bases, chosen = sails.build_bases(method, stats, setup[1], k=4, tau=1., pool=True)
        assert torch.equal(bases[0], bases[1])
        rows = torch.cat([setup[1][i].W_dec[chosen[i]] for i in (0, 1)])
        torch.testing.assert_close(span(bases[0]), span(rows.T), atol=1e-4, rtol=0)
    kept = sails.build_bases("mean-diff", stats, setup[1], pool=True)[0]
    assert not torch.equal(kept[0], kept[1])


def test_an_unknown_method_is_refused(setup, stats):
    with pytest.raises(UserError, match="choose from sails"):
        sails.build_bases("pissa", stats, setup[1])
