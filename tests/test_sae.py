"""sae.py: the published form exactly, both containers and spellings, refusals, training, measures."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import sae as sae_module
from conftest import random_sae
from data import UserError
from sae import JumpReLUSAE, find_sae, load_sae, sae_quality, train_sae

ROWS = [[2, 7, 8, 9, 10, 11], [2, 13, 14], [2, 20, 21, 7, 7]]
FILES = dict(npz="layer_3/width_40/average_l0_20/params.npz",
             safetensors="resid_post/layer_3_width_40_l0_medium/params.safetensors")

same = lambda a, b: all(map(torch.equal, a.buffers(), b.buffers()))

def test_encode_and_decode_follow_the_published_formula_and_a_threshold_is_strict():
    sae, x = random_sae(), torch.randn(30, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    pre = x.float() @ sae.W_enc + sae.b_enc            # no b_dec subtracted first, no scaling, all in fp32
    a = pre.relu() * (pre > sae.threshold)
    assert .1 < (a > 0).float().mean() < .9
    assert torch.equal(sae.encode(x.view(5, 6, 24)), a.view(5, 6, 40))
    torch.testing.assert_close(sae.decode(a), a @ sae.W_dec + sae.b_dec)
    sae = JumpReLUSAE(torch.eye(4), torch.eye(4), torch.zeros(4), torch.zeros(4), torch.tensor([1, 1, 1, -2]))
    assert sae.encode(torch.tensor([1., 1.25, .5, -1.])).tolist() == [0., 1.25, 0., 0.]

def test_folding_is_exact_same_firing_same_reconstruction():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    std, W_dec = torch.logspace(-2, 2, 24, dtype=torch.float64), F.normalize(rand(40, 24), dim=1)
    mean, p = rand(24) * std, dict(W_enc=rand(24, 40) * .3, W_dec=W_dec, b_enc=rand(40) * .3, b_dec=rand(24))
    x = rand(200, 24) * std + mean
    pre = ((x - mean) / std - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    want = (torch.where(pre > .7, pre, 0.) @ W_dec + p["b_dec"]) * std + mean
    folded = sae_module.fold(p, .7, mean, std)
    codes, clear = folded.encode(x), (pre - .7).abs() > 1e-4       # fp32 rounds near the threshold
    assert torch.equal((codes > 0)[clear], (pre > .7)[clear]) and clear.double().mean() > .999
    assert ((folded.decode(codes) - want) / std).abs().max() < 1e-4
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(40))

@pytest.mark.parametrize("form, there, pick", [
    *(("layer_{}/width_{}/average_l0_{}/params.npz", *x) for x in (
        ((20, 38, 71, 139, 310), 71), ((36, 64, 136, 257), 136), ((57, 113, 221), 113), ((9, 17, 34), 34),
        ((90, 110), 110), ((110, 90), 110), ((99, 101, 100), 100), ((512, 201), 201))),
    ("resid_post/layer_{}_width_{}_l0_{}/params.safetensors", ("small", "medium", "big"), "medium"),
    ("layer_{}_width_{}_l0_{}/params.safetensors", ("big", "medium"), "medium")])
def test_without_l0_the_nearest_to_100_or_medium_is_picked_and_the_upper_of_a_tie(form, there, pick):
    names = [form.format(*where, n) for n in there for where in ((2, "16k"), (20, "16k"), (20, "65k"))]
    assert find_sae(names, 20) == form.format(20, "16k", pick)
    assert find_sae(names, 20, "65k", there[0]) == names[2]

def test_an_l0_that_is_not_there_is_answered_with_those_that_are():
    names = [f"layer_5/width_16k/average_l0_{n}" for n in (40, 90, 120)]
    with pytest.raises(UserError, match=r"\['40', '90'\]"):
        find_sae([f"{names[0]}/params.npz", f"{names[1]}/params.npz", f"{names[2]}/notes.txt"], 5, "16k", 70)

@pytest.mark.parametrize("container", FILES)
def test_what_we_save_and_both_spellings_with_a_scaling_factor_of_one_are_read(tmp_path, container):
    sae = random_sae()
    tensors = dict(sae.named_buffers(), w_enc=sae.W_enc, w_dec=sae.W_dec, scaling_factor=torch.ones(40))
    lower = {k: t for k, t in tensors.items() if k[0] != "W"}
    assert sae_module.save_sae(sae, tmp_path / "own", 3, 19.6) == FILES["npz"]
    for name, given in (("upper", dict(sae.named_buffers())), ("lower", lower)):
        path = tmp_path / name / FILES[container]
        path.parent.mkdir(parents=True)
        if container == "npz":
            np.savez(path, **given)
        else:
            save_file({k: t.contiguous() for k, t in given.items()}, path)
    for name in ("own", "upper", "lower"):
        assert same(load_sae(str(tmp_path / name), 3, "40"), sae)

def test_an_sae_for_a_layer_below_the_first_is_refused(model):
    with pytest.raises(UserError, match="0..1"):
        sae_module.check_fit(random_sae(), model, -1)

def sparse_states(n, seed, outlier=1):
    """Sums of 3 of 40 unit directions on average on a large mean; `outlier` stretches dimension 5."""
    gen = torch.Generator().manual_seed(seed)
    W = F.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(77)), dim=1)
    W[:, 5] *= outlier
    return (torch.rand(n, 40, generator=gen) * (torch.rand(n, 40, generator=gen) < 3 / 40)) @ W + 10

@pytest.mark.parametrize("outlier", [1, 100])
def test_the_trained_sae_explains_unseen_data_also_with_an_outlier_and_is_reproducible(outlier):
    x, state = sparse_states(8000, 0, outlier), torch.get_rng_state()
    fit = sae_quality(train_sae(x, 64, 4, 500, 256, 4e-3), sparse_states(2000, 1, outlier))
    assert min(fit["fve"], fit["fve_standardised"]) > .85
    assert 3 < fit["l0"] < 5 and fit["dead"] < .03      # as many features a token as asked for
    a, again, other = (train_sae(x, 64, 4, 20, 256, seed=seed) for seed in (1, 1, 2))
    assert same(a, again) and not same(a, other)
    assert torch.equal(torch.get_rng_state(), state)

def test_the_quality_equals_a_computation_by_hand():
    sae, x = random_sae(), torch.randn(90, 24, generator=torch.Generator().manual_seed(3)).double() + 5
    a = sae.encode(x)
    lost, centred = (sae.decode(a) - x).square(), (x - x.mean(0)).square()
    want = dict(fve=1 - lost.sum() / centred.sum(), fve_standardised=1 - (lost / x.var(0)).sum() / (24 * 89),
                l0=(a > 0).sum() / 90, dead=(a.max(0).values == 0).double().mean())
    fit = sae_quality(sae, x.float(), chunk=89)        # the last chunk is one row
    assert fit == pytest.approx({k: v.item() for k, v in want.items()}, abs=1e-4)

@pytest.mark.parametrize("batch", [1, 2, 16])
def test_residuals_are_collected_in_fp32_without_bos_and_padding_whatever_the_batch(model, batch):
    got = sae_module.collect_residuals(model, ROWS, [0, 1], 1000, batch)
    alone = lambda i: torch.cat([model.residuals(torch.tensor([row]), [i])[i][0, 1:] for row in ROWS])
    torch.testing.assert_close(got, {i: alone(i) for i in (0, 1)}, atol=1e-5, rtol=0)
    assert torch.equal(sae_module.collect_residuals(model, ROWS, [1], 6, batch)[1], got[1][:6])
    assert sae_module.collect_residuals(model.bfloat16(), ROWS, [1], 6, batch)[1].dtype == torch.float32
