"""lora.py: an adapter starts as the identity, in the subspace; merges and files lose nothing; drift means what it says; PEFT agrees."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lora
import model_gemma
from conftest import random_gemma
from data import UserError

ALL = tuple(lora.PLACES)
IDS = torch.tensor([[2, 5, 9, 100, 31], [2, 40, 41, 7, 8]])


def draw(D=24, r=4, seed=5):
    """A random orthonormal basis (D, r)."""
    return torch.linalg.qr(torch.randn(D, r, generator=torch.Generator().manual_seed(seed)))[0]


def stir(model, seed=1, size=.3):
    """Give every factor random values, as training would."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, m in lora.adapters(model):
            m.A.copy_(torch.randn(m.A.shape, generator=gen) * size), m.B.copy_(torch.randn(m.B.shape, generator=gen) * size)


def at(model, name):
    return dict(lora.adapters(model))[name]


def step(model, opt):
    model.reply_nll([(IDS[0].tolist(), [0, 0, 1, 1, 1]), (IDS[1].tolist(), [0, 0, 1, 1, 1])])[0].mean().backward()
    grads = {n: p.grad.clone() for n, p in lora.trainable(model)}
    opt.step(), opt.zero_grad(set_to_none=True)
    return grads


# ------------------------------------------------------------------------------------------------ attaching, starting
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("init", ("lora", "sails", "norm aware", "frozen", "write side only"))
def test_adapter_starts_as_identity(init, dtype):
    model = random_gemma(dtype=dtype)
    before = model(IDS)
    lora.attach(model, ALL, 4, 8)
    if init == "lora":
        lora.init_lora(model)
    else:
        lora.init_sails(model, {1: draw()}, 0, init == "frozen", init == "norm aware", ("write",) if init[0] == "w" else ("read", "write"))
    assert torch.equal(model(IDS), before)
    assert all(m.A.dtype == m.B.dtype == torch.float32 for _, m in lora.adapters(model))
    stir(model)
    assert float((model(IDS).detach() - before).abs().max()) > .01          # else nothing was attached


def test_readers_hold_the_basis_in_their_rows_and_writers_in_their_columns(model):
    V = draw()
    lora.attach(model, ALL, 4, 8)
    lora.init_sails(model, {0: V})
    for _, m in lora.adapters(model):
        if m.place in ("o", "down"):
            assert torch.equal(m.B, V) and not m.A.any()
        else:
            assert torch.equal(m.A, V.T) and not m.B.any()


def test_a_layer_takes_the_nearest_basis_and_the_lower_of_a_tie():
    model = random_gemma(num_hidden_layers=6)
    bases = {1: draw(seed=1), 3: draw(seed=3), 5: draw(seed=5)}
    lora.attach(model, ("q",), 4, 8)
    told = lora.init_sails(model, bases)
    assert [told[i]["basis"] for i in range(6)] == [1, 1, 1, 3, 3, 5]
    assert all(torch.equal(m.A, bases[told[m.layer]["basis"]].T) for _, m in lora.adapters(model))


def test_only_chosen_sides_start_in_the_basis(model):
    lora.attach(model, ("q", "o"), 4, 8)
    lora.init_sails(model, {0: draw()}, seed=3, sides=("write",))
    starts = {n: (m.A.clone(), m.B.clone()) for n, m in lora.adapters(model)}
    assert torch.equal(at(model, "layers.0.self_attn.o_proj").B, draw())
    lora.init_lora(model, seed=3)
    q = at(model, "layers.0.self_attn.q_proj")
    assert torch.equal(q.A, starts["layers.0.self_attn.q_proj"][0]) and not q.B.any() and q.A.any()
    assert q.A.abs().max() <= 24 ** -.5


def test_a_basis_too_narrow_is_filled_with_an_orthonormal_complement(model):
    V = draw(r=3)
    lora.attach(model, ("q", "down"), 7, 14)
    told = lora.init_sails(model, {0: V}, seed=2)
    assert told[0] == dict(basis=0, kept=3, filled=4)
    W = at(model, "layers.1.mlp.down_proj").B.detach().double()
    assert torch.equal(W[:, :3].float(), V)
    assert float((W.T @ W - torch.eye(7)).abs().max()) < 1e-6
    lora.init_sails(model, {0: V}, seed=2)
    assert torch.equal(at(model, "layers.1.mlp.down_proj").B.double(), W)
    lora.init_sails(model, {0: V}, seed=3)
    assert not torch.allclose(at(model, "layers.1.mlp.down_proj").B.double(), W, atol=.1)


def test_a_basis_too_wide_keeps_its_first_columns(model):
    V = draw(r=6)
    lora.attach(model, ("q",), 4, 8)
    assert lora.init_sails(model, {0: V})[0] == dict(basis=0, kept=4, filled=0)
    assert torch.equal(at(model, "layers.0.self_attn.q_proj").A, V[:, :4].T)
    lora.detach(model)
    lora.attach(model, ("q",), 25, 8)
    with pytest.raises(UserError, match="more than the residual stream's 24"):
        lora.init_sails(model, {0: V})


def test_starting_leaves_the_global_random_state_alone(model):
    before = torch.get_rng_state()
    lora.attach(model, ALL, 7, 8)
    lora.init_lora(model), lora.init_sails(model, {0: draw(r=3)})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("targets, r, layers", ((("q", "x"), 4, None), ((), 4, None), (("q",), 0, None), (("q",), 4, [2]), (("q",), 4, [-1])))
def test_unknown_targets_layers_and_ranks_are_refused(model, targets, r, layers):
    with pytest.raises(UserError, match="choose from|layers 0..1"):
        lora.attach(model, targets, r, 8, layers)
    assert not lora.adapters(model)


def test_norm_aware_readers_read_exactly_the_residual_direction(model):
    v, h = draw(r=1), torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 7
    lora.attach(model, ("q", "k", "v", "gate", "up"), 1, 1)
    for aware in (True, False):
        lora.init_sails(model, {0: v}, norm_aware=aware)
        for name, m in lora.adapters(model):
            norm = getattr(model.layers[m.layer], "input_layernorm" if "self_attn" in name else "pre_feedforward_layernorm")
            seen = norm(h) @ m.A.T                                                              # (50, 1): what the adapter gets
            want = h @ v / (h.square().mean(1, keepdim=True) + norm.eps).sqrt()
            ratio = seen / want
            assert (float(ratio.std() / ratio.mean().abs()) < 1e-4) == aware
            assert abs(float(m.A.norm()) - 1) < 1e-5   # step sizes stay comparable


def test_norm_aware_writers_write_exactly_the_residual_direction(model):
    v = draw(r=1)
    lora.attach(model, ("o", "down"), 1, 1)
    for aware in (True, False):
        lora.init_sails(model, {0: v}, norm_aware=aware)
        for _, m in lora.adapters(model):
            norm = getattr(model.layers[m.layer], "post_attention_layernorm" if m.place == "o" else "post_feedforward_layernorm")
            written = norm(m.B.T * 3)[0]
            assert (float(torch.cosine_similarity(written, v[:, 0], 0)) > 1 - 1e-6) == aware


def test_norm_aware_leaves_out_dimensions_that_the_norm_shuts_and_is_exact_in_the_others(model):
    v, shut = draw(r=1), [3, 11]
    with torch.no_grad():
        for block in model.layers:
            for name in set(lora.NORMS.values()):
                getattr(block, name).weight[shut] = torch.tensor([-1., -1 + 1e-3])             # gains 0 and .001, as real Gemmas have
    lora.attach(model, ALL, 1, 1)
    lora.init_sails(model, {0: v}, norm_aware=True)
    for _, m in lora.adapters(model):
        held, gain = (m.B if m.side == "write" else m.A.T)[:, 0].detach(), 1 + getattr(model.layers[m.layer], lora.NORMS[m.place]).weight
        want = v[:, 0].clone()
        want[shut] = 0
        assert torch.isfinite(held).all() and float(torch.cosine_similarity(held * gain, want, 0)) > 1 - 1e-6


# -------------------------------------------------------------------------------------------------------- in training
@pytest.mark.parametrize("start", ("lora", "sails"))
def test_half_of_the_factors_have_no_gradient_at_first_and_all_have_one_from_then_on(model, start):
    lora.attach(model, ALL, 4, 8)
    lora.init_lora(model) if start == "lora" else lora.init_sails(model, {0: draw()})
    opt = torch.optim.Adam([p for _, p in lora.trainable(model)], lr=1e-3)
    moving = [n for n, g in step(model, opt).items() if g.any()]
    # what holds the start gets nothing through a partner that is zero; the zero factors get it all
    assert set(moving) == {n + (".A" if m.side == "write" and start == "sails" else ".B") for n, m in lora.adapters(model)}
    assert len(moving) == len(lora.adapters(model)) == 14
    for _ in range(2):
        assert all(g.any() for g in step(model, opt).values())


def test_a_frozen_basis_gets_no_gradient_and_stays_bit_identical(model):
    lora.attach(model, ALL, 4, 8)
    lora.init_sails(model, {0: draw()}, freeze=True)
    base = {n: p.clone() for n, p in model.named_parameters()}
    opt = torch.optim.Adam([p for _, p in lora.trainable(model)], lr=1e-2)
    for _ in range(4):
        step(model, opt)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, base[n])}
    assert moved == {n + (".A" if m.side == "write" else ".B") for n, m in lora.adapters(model)}
    assert all((m.B if m.side == "write" else m.A).grad is None for _, m in lora.adapters(model))
    assert all(r["overlap"] > 1 - 1e-5 and r["energy"] > 1 - 1e-5 for r in lora.drift(model))


def test_base_weights_are_bit_identical_after_training(model):
    base = {n: p.clone() for n, p in model.named_parameters()}
    lora.attach(model, ALL, 4, 8)
    lora.init_lora(model)
    opt = torch.optim.Adam([p for _, p in lora.trainable(model)], lr=1e-2)
    for _ in range(3):
        step(model, opt)
    lora.detach(model)
    assert {n for n, _ in model.named_parameters()} == set(base)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


# ----------------------------------------------------------------------------------------------- off, merged, drifted
def test_adapter_off_is_the_base_and_on_again_afterwards_even_after_an_error(model):
    before = model(IDS)
    lora.attach(model, ALL, 4, 8)
    stir(model)
    with pytest.raises(KeyError), lora.adapter_off(model):
        assert torch.equal(model(IDS), before)
        raise KeyError
    assert not torch.allclose(model(IDS), before, atol=.01)


def test_adapter_off_refuses_a_merged_model_whose_base_is_gone(model):
    lora.attach(model, ("q",), 4, 8)
    lora.merge(model)
    with pytest.raises(AssertionError), lora.adapter_off(model):
        pass


@pytest.mark.parametrize("dtype, tol", ((torch.float32, 1e-4), (torch.bfloat16, .5)))
def test_merged_logits_equal_adapted_ones_and_unmerging_is_bit_exact(dtype, tol):
    model = random_gemma(dtype=dtype)
    lora.attach(model, ALL, 4, 8)
    stir(model, size=.1)
    adapted, base = model(IDS), {n: p.clone() for n, p in model.named_parameters()}
    lora.merge(model), lora.merge(model)               # twice is once
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(model(IDS), adapted, atol=tol, rtol=0)
    lora.unmerge(model), lora.unmerge(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert torch.equal(model(IDS), adapted)


def test_detach_after_merge_leaves_a_plain_merged_model(model):
    lora.attach(model, ALL, 4, 8)
    stir(model, size=.1)
    adapted = model(IDS)
    lora.merge(model), lora.detach(model)
    assert not lora.adapters(model) and {n for n, _ in model.named_parameters()} == {n for n, _ in random_gemma().named_parameters()}
    torch.testing.assert_close(model(IDS), adapted, atol=1e-4, rtol=0)


def test_drift_starts_at_one_and_counts_a_known_rotation(model):
    V = draw(r=4)
    away = draw(r=8, seed=9)                           # take directions orthogonal to V
    out = torch.linalg.qr(torch.cat([V, away], 1))[0][:, 4:8]
    lora.attach(model, ("q", "o"), 4, 8)
    lora.init_sails(model, {0: V})
    assert all(abs(r["overlap"] - 1) < 1e-6 and r["energy"] is None for r in lora.drift(model))
    turn = torch.tensor([0., .3, .8, 1.5])
    now = V * turn.cos() + out * turn.sin()            # principal angles 0, .3, .8, 1.5
    with torch.no_grad():
        for _, m in lora.adapters(model):
            (m.A if m.side == "read" else m.B).copy_(now.T if m.side == "read" else now)
    want = float(turn.cos().square().mean())
    for rows in (lora.drift(model), lora.drift(model, {0: V})):
        assert len(rows) == 4 and all(abs(r["overlap"] - want) < 1e-5 for r in rows)
    with torch.no_grad():                              # a span does not care in which basis it is written
        m = at(model, "layers.0.self_attn.q_proj")
        m.A.copy_(torch.randn(4, 4) @ m.A * 5)
    assert abs(lora.drift(model)[0]["overlap"] - want) < 1e-4


def test_drift_energy_is_the_share_of_the_update_inside_the_subspace(model):
    lora.attach(model, ("q", "o", "down"), 4, 8)
    V = draw(r=3)
    stir(model)
    rows = lora.drift(model, {0: V})
    for row, (name, m) in zip(rows, lora.adapters(model)):
        dW = m.delta().double()
        inside = dW @ V.double() @ V.T.double() if m.side == "read" else V.double() @ V.T.double() @ dW
        assert row["name"] == name and row["side"] == m.side
        assert abs(row["energy"] - float(inside.square().sum() / dW.square().sum())) < 1e-6
    means = lora.mean_drift(rows)
    assert abs(means["write"]["energy"] - sum(r["energy"] for r in rows if r["side"] == "write") / 4) < 1e-9
    assert lora.drift(model) == []                     # plain LoRA started in no subspace


# ---------------------------------------------------------------------------------------------------------------- files
def saved(folder, targets=ALL, layers=None, r=4, alpha=6):
    model = random_gemma()
    lora.attach(model, targets, r, alpha, layers)
    stir(model)
    lora.save_adapter(model, folder, "some/base")
    return model


def test_adapter_survives_saving_and_loading(tmp_path):
    model = saved(tmp_path, ("q", "down"), [1])
    again = random_gemma()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert [n for n, _ in lora.adapters(again)] == [n for n, _ in lora.adapters(model)]
    assert not list(tmp_path.glob(".*")) and {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


def test_rslora_scale_is_read(tmp_path):
    model = saved(tmp_path)
    config = data.read_json(tmp_path / "adapter_config.json")
    data.write_json(tmp_path / "adapter_config.json", dict(config, use_rslora=True, lora_alpha=config["lora_alpha"] / 2))     # 4 ** .5
    again = random_gemma()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("targets, layers", ((("q", "k", "v", "o"), None), (ALL, None), (("o", "down"), [1]), (("gate", "up", "k"), [0])))
def test_peft_loads_the_folder_and_gives_the_same_logits(tmp_path, targets, layers):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from transformers import Gemma2ForCausalLM
    model_gemma.save_gemma(random_gemma(), tmp_path / "base")
    model = saved(tmp_path / "run", targets, layers)
    base = Gemma2ForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        plain = base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run")(IDS).logits
    torch.testing.assert_close(model(IDS), theirs, atol=1e-4, rtol=0)
    assert float((plain - theirs).abs().max()) > .1    # PEFT is silent about an adapter that does nothing


def spoil(folder, how):
    config, path = data.read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if isinstance(how, dict):
        data.write_json(folder / "adapter_config.json", config | how)
    elif how == "no config":
        (folder / "adapter_config.json").unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no weights":
        path.unlink()
    elif how == "no alpha":
        data.write_json(folder / "adapter_config.json", {k: v for k, v in config.items() if k != "lora_alpha"})
    else:
        if how == "missing":
            tensors.pop(first)
        elif how == "foreign name":
            tensors["base_model.model.model.embed_tokens.lora_A.weight"] = torch.zeros(4, 24)
        elif how == "wrong place":
            tensors["base_model.model.model.layers.0.mlp.q_proj.lora_A.weight"] = torch.zeros(4, 24)
        elif how == "shape":
            tensors[first] = torch.zeros(4, 25)
        elif how == "layer":
            tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
        save_file(tensors, path)


@pytest.mark.parametrize("how, said", (
    ("no config", "no adapter_config.json"), ("truncated", "not a whole safetensors file"), ("no weights", "not a whole safetensors file"),
    ("missing", "missing or has another shape"), ("foreign name", "tensor names are not those"), ("wrong place", "missing or has another shape"),
    ("shape", "missing or has another shape"), ("layer", "layers 0..1"), (dict(use_dora=True), "not a plain LoRA adapter"), (dict(r=8), "missing or has another shape"),
    (dict(peft_type="IA3"), "not a plain LoRA adapter"), (dict(modules_to_save=["lm_head"]), "not a plain LoRA adapter"), (dict(bias="all"), "not a plain LoRA adapter"),
    ("no alpha", "not a plain LoRA adapter")), ids=str)
def test_a_foreign_or_damaged_adapter_is_refused_and_leaves_the_model_plain(tmp_path, how, said):
    saved(tmp_path)
    spoil(tmp_path, how)
    model = random_gemma()
    with pytest.raises(UserError, match=said):
        lora.load_adapter(model, tmp_path)
    assert not lora.adapters(model)


def test_the_saved_config_has_what_peft_and_vllm_need(tmp_path):
    saved(tmp_path, ("q", "down"), [1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 6 and config["layers_to_transform"] == [1]
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["init_lora_weights"] is True and config["base_model_name_or_path"] == "some/base"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == [f"base_model.model.model.layers.1.{p}.lora_{x}.weight" for p in ("mlp.down_proj", "self_attn.q_proj") for x in "AB"]
    assert all(t.dtype == torch.float32 for t in tensors.values())
