"""sae.py: the published form exactly, both containers, the right file of many, refusals; the small trainer and its report."""
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import sae as sae_module
from conftest import random_gemma, random_sae
from data import UserError
from sae import JumpReLUSAE, check_fit, collect_residuals, find_sae, firing_tokens, fold, load_sae, promoted_tokens, sae_report, save_sae, train_sae


def states(n, D=24, seed=3, scale=2.):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * scale


def tensors_of(sae):
    return {k: getattr(sae, k) for k in sae_module.SHAPES}


# --------------------------------------------------------------------------------------------------- encode and decode
def test_a_feature_fires_strictly_above_its_threshold_and_never_below_zero():
    eye = torch.eye(4)
    sae = JumpReLUSAE(eye, eye, torch.zeros(4), torch.zeros(4), torch.tensor([1., 1., 1., -2.]))
    assert torch.equal(sae.encode(torch.tensor([1., 1.25, .5, -1.])), torch.tensor([0., 1.25, 0., 0.]))


def test_encode_and_decode_follow_the_published_formula():
    sae, x = random_sae(), states(30)
    pre = x @ sae.W_enc + sae.b_enc                    # no b_dec subtracted first, no scaling
    a = pre.relu() * (pre > sae.threshold)
    assert .1 < float((a > 0).float().mean()) < .9
    assert torch.equal(sae.encode(x), a)
    torch.testing.assert_close(sae.decode(a), a @ sae.W_dec + sae.b_dec)
    assert sae.encode(x.bfloat16()).dtype == torch.float32 and torch.equal(sae.encode(x.bfloat16()), sae.encode(x.bfloat16().float()))
    assert torch.equal(sae.encode(x.view(5, 6, 24)), a.view(5, 6, 40))


def test_folding_is_exact_same_firing_same_reconstruction():
    gen = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    std, cut = torch.logspace(-2, 2, 24, dtype=torch.float64), .7
    mean = rand(24) * 3 * std
    p = dict(W_enc=rand(24, 40) * .3, W_dec=torch.nn.functional.normalize(rand(40, 24), dim=1), b_enc=rand(40) * .3, b_dec=rand(24))
    x = rand(200, 24) * std + mean
    z = (x - mean) / std
    pre = ((z - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    a = torch.where(pre > cut, pre, 0.)
    want = (a @ p["W_dec"] + p["b_dec"]) * std + mean
    folded = fold(p, cut, mean, std)
    codes = folded.encode(x)
    clear = (pre - cut).abs() > 1e-4                   # fp32 may disagree within rounding of the threshold
    assert torch.equal((codes > 0)[clear], (a > 0)[clear]) and float(clear.double().mean()) > .999
    assert float(((folded.decode(codes) - want) / std).abs().max()) < 1e-4
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(40))


# ------------------------------------------------------------------------------------------------- finding and reading
@pytest.mark.parametrize("there, pick", (
    ((71, 20, 38, 139, 310), 71), ((36, 64, 136, 257), 136), ((90, 110), 110), ((99, 101, 100), 100), ((101, 99), 101), ((9, 17, 34), 34), ((512, 201), 201),
    ((18, 37, 68, 143, 309), 68), ((22, 41, 77, 164), 77), ((12, 29, 78, 156), 78), ((57, 113, 221), 113), ((32, 63, 131, 267), 131), ((31, 60, 114, 221), 114),
    ((120, 62, 240), 120)), ids=str)
def test_without_l0_the_nearest_to_100_is_picked_and_the_upper_of_a_tie(there, pick):
    names = [f"layer_{i}/width_{w}/average_l0_{n if (i, w) == (20, '16k') else n + 1}/params.npz" for n in there for i in (2, 20) for w in ("16k", "65k")]
    assert find_sae(names, 20) == (f"layer_20/width_16k/average_l0_{pick}/params.npz", str(pick))
    for n in there:
        assert find_sae(names, 20, l0=n)[0] == find_sae(names, 20, l0=str(n))[0] == f"layer_20/width_16k/average_l0_{n}/params.npz"


def test_gemma_scope_2_names_are_found_with_medium_as_default():
    names = [f"resid_post/layer_{i}_width_{w}_l0_{size}/params.safetensors" for i in (5, 12) for w in ("16k", "262k") for size in ("small", "medium", "big")]
    assert find_sae(names, 12, "262k") == ("resid_post/layer_12_width_262k_l0_medium/params.safetensors", "medium")
    assert find_sae(names, 5, "16k", "small")[1] == "small"
    assert find_sae([n.removeprefix("resid_post/") for n in names], 12)[0] == "layer_12_width_16k_l0_medium/params.safetensors"


def test_what_is_not_there_is_answered_with_what_is():
    names = [f"layer_{i}/width_16k/average_l0_{n}/params.npz" for i in (5, 10) for n in (40, 90)] + ["README.md", "layer_7/width_16k/average_l0_9/notes.txt"]
    for args, said in (((7,), r"no SAE for layer 7; layers here: \[5, 10\]"), ((5, "65k"), r"widths here: \['16k'\]"), ((5, "16k", 70), r"here: \['40', '90'\]")):
        with pytest.raises(UserError, match=said):
            find_sae(names, *args)
    with pytest.raises(UserError, match="wanted files like layer_20/width_16k"):
        find_sae(["README.md", "layer_5/width_16k/average_l0_40/params.npz/more"], 5)


def test_an_sae_survives_saving_and_loading(tmp_path):
    sae = random_sae()
    name = save_sae(sae, tmp_path, 3, 19.6)
    again = load_sae(str(tmp_path), 3, "40")
    assert name == again.name == "layer_3/width_40/average_l0_20/params.npz" and again.revision is None
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(sae).values(), tensors_of(again).values()))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["params.npz"]
    with np.load(tmp_path / name, allow_pickle=False) as f:    # nothing in it is pickled
        assert set(f.files) == set(sae_module.SHAPES) and all(f[k].dtype == np.float32 for k in f.files)


def put(folder, tensors, container):
    if container == "npz":
        path = folder / "layer_3/width_40/average_l0_20/params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{k: np.asarray(t) for k, t in tensors.items()})
    else:
        path = folder / "resid_post/layer_3_width_40_l0_medium/params.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("container", ("npz", "safetensors"))
@pytest.mark.parametrize("lower", (False, True))
def test_both_spellings_and_both_containers_are_read(tmp_path, container, lower):
    sae = random_sae()
    put(tmp_path, {k.lower() if lower else k: t for k, t in tensors_of(sae).items()}, container)
    again = load_sae(str(tmp_path), 3, "40")
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(sae).values(), tensors_of(again).values()))


def test_a_scaling_factor_of_ones_is_dropped_and_any_other_refused(tmp_path):
    put(tmp_path, dict(tensors_of(random_sae()), scaling_factor=torch.ones(40)), "npz")
    assert torch.equal(load_sae(str(tmp_path), 3, "40").W_enc, random_sae().W_enc)
    put(tmp_path, dict(tensors_of(random_sae()), scaling_factor=torch.full((40,), 1.5)), "npz")
    with pytest.raises(UserError, match="scaling_factor that is not 1"):
        load_sae(str(tmp_path), 3, "40")


@pytest.mark.parametrize("container", ("npz", "safetensors"))
@pytest.mark.parametrize("change, said", (
    (dict(b_enc=torch.zeros(41)), "b_enc has shape"), (dict(b_dec=torch.zeros(40)), "b_dec has shape"), (dict(threshold=torch.zeros(1)), "threshold has shape"),
    (dict(W_dec=torch.eye(24)), "W_dec has shape"), (dict(W_enc=torch.zeros(24)), "which does not fit W_enc"), (dict(W_dec=random_sae().W_dec * 1.2), "decoder rows have norms 1.200"),
    (dict(threshold=None), "a JumpReLU SAE has"), (dict(extra=torch.zeros(1)), "a JumpReLU SAE has")), ids=lambda c: c if isinstance(c, str) else "-".join(c))
def test_tensors_that_do_not_belong_together_are_refused(tmp_path, container, change, said):
    tensors = {k: t for k, t in {**tensors_of(random_sae()), **change}.items() if t is not None}
    put(tmp_path, tensors, container)
    with pytest.raises(UserError, match=said):
        load_sae(str(tmp_path), 3, "40")


@pytest.mark.parametrize("container", ("npz", "safetensors"))
@pytest.mark.parametrize("damage", ("truncated", "empty", "other"))
def test_a_damaged_file_is_refused_with_its_name(tmp_path, container, damage):
    path = put(tmp_path, tensors_of(random_sae()), container)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "other": b"<html>moved</html>"}[damage])
    with pytest.raises(UserError, match=r"params\.\w+: not a whole SAE file"):
        load_sae(str(tmp_path), 3, "40")


def test_a_member_damaged_inside_an_intact_archive_is_refused(tmp_path):
    path = put(tmp_path, tensors_of(random_sae()), "npz")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 255
    path.write_bytes(whole)
    with pytest.raises(UserError, match="not a whole SAE file"):
        load_sae(str(tmp_path), 3, "40")


def test_a_pickle_inside_an_npz_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('unpickled')",)
    path = put(tmp_path, tensors_of(random_sae()), "npz")
    np.savez(path, **{k: np.asarray(t) for k, t in tensors_of(random_sae()).items() if k != "b_dec"}, b_dec=np.array([Trap()], dtype=object))
    assert zipfile.is_zipfile(path)
    with pytest.raises(UserError, match="not a whole SAE file"):
        load_sae(str(tmp_path), 3, "40")


def test_an_sae_for_another_model_or_layer_is_refused(model):
    check_fit(random_sae(), model, 1)
    with pytest.raises(UserError, match="reads vectors of 23 numbers, but the model's residual stream has 24"):
        check_fit(random_sae(D=23), model, 1)
    with pytest.raises(UserError, match="layers 0..1"):
        check_fit(random_sae(), model, 2)


def test_only_known_models_get_a_link():
    assert sae_module.neuronpedia_url("google/gemma-2-9b@abc", 20, "16k", 7) == "https://www.neuronpedia.org/gemma-2-9b/20-gemmascope-res-16k/7"
    assert sae_module.neuronpedia_url("/somewhere/else", 20, "16k", 7) is None


# ----------------------------------------------------------------------------------------------------------- training
def sparse_states(n, seed, D=24, N=40, outlier=1):
    """Sums of 3 of 40 unit directions on average, uniform sizes, on a large mean; `outlier` stretches dimension 5."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(77)), dim=1)
    a = torch.rand(n, N, generator=gen) * (torch.rand(n, N, generator=gen) < 3 / N)
    x = a @ W
    x[:, 5] *= outlier
    return x + 10


def test_the_trained_sae_explains_sparse_data_it_has_not_seen_and_is_reproducible():
    x = sparse_states(8000, 0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sae = train_sae(x, 64, 4, steps=500, batch=256, lr=4e-3, seed=1)
    fit = sae_report(sae, sparse_states(2000, 1))
    assert fit["fve"] > .85 and fit["fve_standardised"] > .85 and fit["dead"] < .2
    assert 3 < fit["l0"] < 5                           # as many as asked for
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(torch.get_rng_state(), state)
    same, other = (train_sae(x, 64, 4, steps=40, batch=256, seed=s) for s in (1, 2))
    assert not torch.equal(same.W_enc, other.W_enc)
    assert torch.equal(same.W_enc, train_sae(x, 64, 4, steps=40, batch=256, seed=1).W_enc)


def test_an_outlier_dimension_does_not_rule_the_fit():
    x = sparse_states(8000, 0, outlier=100)
    sae = train_sae(x, 64, 4, steps=300, batch=256, lr=4e-3)
    fit = sae_report(sae, x[:2000])
    assert fit["fve_standardised"] > .75 and fit["fve"] > .75


def test_the_report_equals_a_computation_by_hand():
    sae, x = random_sae(), states(90) + 5
    a = sae.encode(x)
    lost = (sae.decode(a) - x).double().square()
    centred = (x - x.mean(0)).double()
    fit = sae_report(sae, x, chunk=89)                 # the last chunk is one row, in which few features fire
    assert abs(fit["fve"] - (1 - float(lost.sum() / centred.square().sum()))) < 1e-5
    assert abs(fit["fve_standardised"] - (1 - float((lost / x.double().var(0)).sum() / (24 * 89)))) < 1e-4
    assert abs(fit["l0"] - float((a > 0).sum(1).double().mean())) < 1e-6
    assert abs(fit["dead"] - float((a.max(0).values == 0).double().mean())) < 1e-6
    assert sae_report(sae, sae.b_dec + torch.zeros(5, 24) + .01 * states(5))["fve"] < .5       # a mean alone explains nothing


# ------------------------------------------------------------------------------------------------- beside a model
ROWS = [[2, 7, 8, 9, 10, 11], [2, 13, 14], [2, 20, 21, 22, 23]]


def test_residuals_are_collected_without_bos_and_padding_whatever_the_batch(model):
    want = {i: torch.cat([model.residuals(torch.tensor([r]), [i])[i][0, 1:] for r in ROWS]) for i in (0, 1)}
    for batch in (1, 2, 16):
        got = collect_residuals(model, ROWS, [0, 1], 1000, batch)
        assert {i: x.shape for i, x in got.items()} == {0: (11, 24), 1: (11, 24)}
        assert all(torch.allclose(got[i], want[i], atol=1e-5) for i in (0, 1))
    cut = collect_residuals(model, ROWS, [1], 6, 2)
    assert cut[1].shape == (6, 24) and torch.allclose(cut[1], want[1][:6], atol=1e-5)


def test_residuals_of_a_bf16_model_are_collected_in_fp32():
    assert collect_residuals(random_gemma(dtype=torch.bfloat16), ROWS, [0], 4)[0].dtype == torch.float32


def test_promoted_tokens_are_those_that_the_direction_raises_most(model, world):
    rows = random_sae().W_dec[:3]
    scores = (rows * (1 + model.norm.weight)) @ model.embed_tokens.weight.T
    for j, words in enumerate(promoted_tokens(model, world.tok, rows, 5)):
        assert words == [world.tok.id_to_token(int(i)) for i in scores[j].argsort(descending=True)[:5]]
        h = torch.zeros(24) + 1e-3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
        moved = model.logits(model.norm(h + 1e-1 * rows[j])) - model.logits(model.norm(h))
        assert world.tok.token_to_id(words[0]) in moved.argsort(descending=True)[:8]


def test_firing_tokens_are_shares_of_a_features_activation_by_token(model, world):
    saes, rows = {0: random_sae(0), 1: random_sae(1)}, ROWS + [[2, 7, 7, 8, 9]]
    chosen = {0: torch.tensor([3, 17]), 1: torch.tensor([5])}
    for batch in (1, 8):
        got = firing_tokens(model, world.tok, saes, chosen, rows, batch, n=4)
        for i, features in chosen.items():
            for f, told in zip(features.tolist(), got[i]):
                mass = {}
                for row in rows:
                    a = saes[i].encode(model.residuals(torch.tensor([row]), [i])[i][0])[:, f]
                    for t, x in list(zip(row, a.tolist()))[1:]:
                        mass[world.tok.id_to_token(t)] = mass.get(world.tok.id_to_token(t), 0) + x
                best = sorted(((m / sum(mass.values()), w) for w, m in mass.items() if m > 0), reverse=True)[:4]
                assert [w for w, _ in told] == [w for _, w in best]
                assert all(abs(x - m) < 1e-5 for (_, x), (m, _) in zip(told, best))


def test_a_feature_that_never_fires_has_no_firing_tokens(model, world):
    sae = random_sae(threshold=1e9)
    assert firing_tokens(model, world.tok, {0: sae}, {0: torch.tensor([3])}, ROWS) == {0: [[]]}
