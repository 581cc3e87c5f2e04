"""lora.py: adapters start as the identity and in the subspace, merge and reload without loss; PEFT agrees."""
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lora
import model_gemma
from benchmarks import merged
from conftest import adapted, go, random_gemma, stir

ALL, ATTENTION = tuple(lora.PLACES), ("q", "k", "v", "o")
IDS = torch.tensor([[2, 5, 9, 100, 31], [2, 40, 41, 7, 8]])

def draw(r=4, seed=5):
    """A random orthonormal basis (D, r)."""
    return torch.linalg.qr(torch.randn(24, r, generator=torch.Generator().manual_seed(seed)))[0]

def attached(model, start=lora.init_lora, targets=ALL, r=4, **more):
    """The model with adapters as `start`, a function or a dict of bases, sets them; and the adapters."""
    lora.attach(model, targets, r, 2 * r)
    start(model) if callable(start) else lora.init_sails(model, start, **more)
    return [m for _, m in lora.adapters(model)]

def factors(m):
    """The factor that holds the basis at a SAILS start, as (D, r), and the one that is zero."""
    return (m.B, m.A) if m.place in ("o", "down") else (m.A.T, m.B)

state = lambda model: {n: p.detach().clone() for n, p in model.named_parameters()}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [None, {}, dict(norm_aware=True), dict(sides=("write",))], ids=str)
def test_an_adapter_starts_as_the_identity(start, dtype):
    model = random_gemma(dtype=dtype)
    before = model(IDS)
    mods = attached(model) if start is None else attached(model, {1: draw()}, **start)
    assert torch.equal(model(IDS), before)
    assert {p.dtype for m in mods for p in (m.A, m.B)} == {torch.float32}

@pytest.mark.parametrize("sides", [("read", "write"), ("write",)])
def test_chosen_sides_hold_the_nearest_basis_lower_on_a_tie_and_the_others_are_plain_lora(sides):
    model, bases = random_gemma(num_hidden_layers=6), {i: draw(6, seed=i) for i in (1, 3, 5)}
    attached(model, lambda model: lora.init_lora(model, seed=3))
    plain, near = state(model), dict(zip(range(6), [1, 1, 1, 3, 3, 5]))
    report = lora.init_sails(model, bases, seed=3, sides=sides)
    assert report == {i: dict(basis=n, kept=4, filled=0) for i, n in near.items()}
    for name, m in lora.adapters(model):
        holder, other = factors(m)
        want = bases[near[m.layer]][:, :4] if m.side in sides else plain[name + ".A"].T
        assert torch.equal(holder, want) and not other.any()
        assert m.side in sides or -24 ** -.5 <= holder.min() < -.1 < .1 < holder.max() <= 24 ** -.5

def test_a_basis_too_narrow_is_filled_with_an_orthonormal_complement_by_its_own_generator(model):
    V, before, filled = draw(3), torch.get_rng_state(), []
    last = attached(model, targets=("q", "down"), r=7)[-1]             # the last block's down
    for seed in (2, 2, 3):
        assert lora.init_sails(model, {0: V}, seed)[0] == dict(basis=0, kept=3, filled=4)
        filled.append(last.B.detach().clone())
    assert torch.equal(filled[0][:, :3], V)
    torch.testing.assert_close(filled[0].T @ filled[0], torch.eye(7), atol=1e-6, rtol=0)
    assert torch.equal(filled[0], filled[1]) and not torch.allclose(filled[0], filled[2], atol=.1)
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize("targets, r, layers", [
    (("q", "x"), 4, None), ((), 4, None), (("q",), 0, None), (("q",), 25, None), (("q",), 4, [2]),
    (("q",), 4, [-1])])
def test_unknown_targets_layers_and_ranks_are_refused(model, targets, r, layers):
    with pytest.raises(data.UserError, match="choose from q, k|0..1 and 24 dimensions"):
        lora.attach(model, targets, r, 8, layers)
    assert not lora.adapters(model)

def test_an_adapters_gradients_by_hand_equal_autograds():
    m = lora.LoRALinear(torch.nn.Linear(6, 5, bias=False).requires_grad_(False), "q", 0, 3, 7.)
    stir(m, .5)
    x = torch.randn(2, 4, 6, requires_grad=True)
    plain = m.linear(x) + m.scale * x @ m.A.T @ m.B.T
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, m.A, m.B)) for y in (plain, m(x)))):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-4)

@torch.no_grad()
@pytest.mark.parametrize("aware, shut", [(True, []), (True, [3, 11]), (False, [])])
def test_norm_aware_factors_hold_exactly_the_residual_direction_less_what_the_norm_shuts(model, aware, shut):
    v, h = draw(1), torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 7
    for layer in model.layers:
        for norm in (norm for name, norm in layer.named_children() if name.endswith("layernorm")):
            norm.weight[shut] = torch.tensor([-1., -1 + 1e-3])[:len(shut)]     # gains 0 and .001
    mods = attached(model, {0: v.clone()}, r=1, norm_aware=aware)
    v[shut] = 0
    for m in mods:
        branch = "attention" if m.place in ATTENTION else "feedforward"
        before = "input" if branch == "attention" else "pre_feedforward"
        norm = getattr(model.layers[m.layer], f"{before if m.side == 'read' else 'post_' + branch}_layernorm")
        if m.side == "read":
            got, want = norm(h) @ m.A.T, h @ v / (h.square().mean(1, keepdim=True) + norm.eps).sqrt()
        else:
            got, want = norm(m.B.T * 3).T, v
        assert (torch.cosine_similarity(got.double(), want.double(), 0).item() > 1 - 1e-8) == aware
        assert factors(m)[0].norm().item() == pytest.approx(1, abs=1e-5)       # step sizes stay comparable

@pytest.mark.parametrize("start, more", [
    (lora.init_lora, {}), ({0: draw()}, {}), ({0: draw()}, dict(freeze=True))])
def test_zero_factors_learn_first_then_all_and_the_base_and_a_frozen_basis_never(model, start, more):
    mods = attached(model, start, **more)
    before, zero = state(model), {n for n, p in lora.trainable(model) if not p.any()}
    opt = torch.optim.Adam([p for _, p in lora.trainable(model)], lr=1e-2)
    for step in range(4):
        opt.zero_grad()
        model.reply_nll([(row, [0, 0, 1, 1, 1]) for row in IDS.tolist()])[0].mean().backward()
        learns = {n for n, p in lora.trainable(model) if p.grad.any()}
        assert learns == ({n for n, _ in lora.trainable(model)} if step else zero) and len(zero) == 14
        opt.step()
    moved = {id(p) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {id(p) for m in mods for p in ([factors(m)[1]] if more else [m.A, m.B])}
    assert not more or all(min(r["overlap"], r["energy"]) > 1 - 1e-5 for r in lora.drift(model))

@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.bfloat16, .5)])
def test_merged_logits_equal_adapted_ones_and_unmerging_and_adapter_off_are_bit_exact(dtype, tol):
    model = random_gemma(dtype=dtype)
    plain = model(IDS)
    attached(model, lambda model: stir(model, .1))
    adapted, base = model(IDS), state(model)
    with pytest.raises(KeyError), lora.adapter_off(model) as lent:
        assert torch.equal(lent(IDS), plain)
        raise KeyError
    assert torch.equal(model(IDS), adapted) and not torch.allclose(adapted, plain, atol=.01)   # on again
    lora.merge(model)
    lora.merge(model)                                  # twice is once
    with pytest.raises(AssertionError), lora.adapter_off(model):
        pass                                           # the base is merged away
    merged = model(IDS)
    torch.testing.assert_close(merged, adapted, atol=tol, rtol=0)
    lora.unmerge(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert torch.equal(model(IDS), adapted)
    lora.merge(model)
    lora.detach(model)
    assert torch.equal(model(IDS), merged) and state(model).keys() == state(random_gemma()).keys()

@torch.no_grad()
def test_drift_starts_at_one_and_counts_a_known_rotation(model):
    V, out = torch.linalg.qr(torch.cat([draw(), draw(seed=9)], 1))[0].split(4, 1)
    mods = attached(model, {0: V})
    assert all(abs(r["overlap"] - 1) < 1e-6 and r["energy"] is None for r in lora.drift(model))
    turn = torch.tensor([0., .3, .8, 1.5])             # the principal angles
    mix = torch.eye(4) + torch.ones(4, 4)              # a span does not depend on the basis it is written in
    for m in mods:
        factors(m)[0].copy_((V * turn.cos() + out * turn.sin()) @ mix)
    for row in lora.drift(model) + lora.drift(model, {0: V}):
        assert row["overlap"] == pytest.approx(turn.cos().square().mean().item(), abs=1e-5)

def test_drift_energy_is_the_share_of_the_update_inside_the_subspace(model):
    P, mods = draw(3) @ draw(3).T, attached(model, stir)
    assert lora.drift(model) == []                     # plain LoRA starts in no subspace
    rows, energy = lora.drift(model, {0: draw(3)}), dict(read=[], write=[])
    for m in mods:
        inside = m.update() @ P if m.side == "read" else P @ m.update()
        energy[m.side].append((inside.square().sum() / m.update().square().sum()).item())
    for side, want in energy.items():
        assert [r["energy"] for r in rows if r["side"] == side] == pytest.approx(want, 1e-5)
        assert lora.mean_drift(rows)[side]["energy"] == pytest.approx(sum(want) / len(want), 1e-5)

def saved(folder, targets=ALL, layers=None):
    model = adapted(random_gemma(), targets, 4, 6, layers=layers)
    lora.save_adapter(model, folder, "some/base")
    return model

def load_changed(model, folder, config, old="", new=""):
    """Load an adapter whose config and tensors' names are changed before."""
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    data.write_json(file, data.read_json(file) | config)
    save_file({name.replace(old, new): t for name, t in load_file(weights).items()}, weights)
    lora.load_adapter(model, folder)

@pytest.mark.parametrize("config", [{}, dict(use_rslora=True, lora_alpha=3)], ids=str)   # 3 / 4 ** .5 = 6 / 4
def test_an_adapter_survives_saving_and_loading(tmp_path, model, config):
    adapted = saved(tmp_path, ("q", "down"), [1])
    assert data.read_json(tmp_path / "adapter_config.json")["layers_to_transform"] == [1]
    load_changed(model, tmp_path, config)
    assert torch.equal(model(IDS), adapted(IDS)) and state(model).keys() == state(adapted).keys()

def theirs(folder):
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager", dtype="auto")

@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")         # of peft's own making
@pytest.mark.parametrize("targets, layers", [
    (ATTENTION, None), (ALL, None), (("o", "down"), [1]), (("gate", "up", "k"), [0])])
def test_peft_loads_the_folder_and_gives_the_same_logits(tmp_path, targets, layers):
    peft = pytest.importorskip("peft")
    model_gemma.save_gemma(random_gemma(), tmp_path / "base")
    want = saved(tmp_path / "run", targets, layers)(IDS)
    model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "run")
    torch.testing.assert_close(want, model(IDS).logits, atol=1e-4, rtol=0)

@pytest.mark.parametrize("config, old, new, says", [
    (dict(use_dora=True), "", "", "plain LoRA.*use_dora"), ({}, "layers.0", "layers.7", "layers 0..1"),
    ({}, "layers.0.mlp.down_proj", "embed_tokens", "those of a LoRA"), ({}, "down", "q", "another model")])
def test_a_foreign_adapter_is_refused_and_leaves_the_model_plain(tmp_path, model, config, old, new, says):
    saved(tmp_path)
    with pytest.raises(data.UserError, match=says):
        load_changed(model, tmp_path, config, old, new)
    assert not lora.adapters(model)

def test_a_model_with_adapters_is_not_saved_as_one_and_a_hub_base_is_split_from_its_revision(model, tmp_path):
    attached(model)
    with pytest.raises(data.UserError, match="merge and detach its adapters first"):
        model_gemma.save_gemma(model, tmp_path)
    lora.save_adapter(model, tmp_path, "google/gemma-2-2b@v1")
    noted = data.read_json(tmp_path / "adapter_config.json")
    assert (noted["base_model_name_or_path"], noted["revision"]) == ("google/gemma-2-2b", "v1")

@torch.no_grad()
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.bfloat16, 0)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("limit", [5 * 10 ** 9, 12_000], ids=["whole", "shards"])
def test_transformers_has_the_logits_of_our_merged_checkpoint_in_shards_too(tmp_path, dtype, tol, limit):
    out, want = tmp_path / "out", random_gemma(dtype=dtype)
    model_gemma.save_gemma(want, tmp_path / "base")
    saved(tmp_path)
    merged.save_merged(tmp_path, out, tmp_path / "base", shard_bytes=limit)
    ours, files = model_gemma.load_gemma(out, dtype)(IDS), sorted(out.glob("*.safetensors"))
    torch.testing.assert_close(ours, theirs(out)(IDS).logits.float(), atol=tol, rtol=0)
    lora.load_adapter(want, tmp_path)
    lora.merge(want)
    assert torch.equal(ours, want(IDS))                # in the base's own dtype, rounded once
    if limit == 12_000:
        names = data.read_json(out / "model.safetensors.index.json")["weight_map"]
        assert names == {t: f.name for f in files for t in model_gemma.tensor_shapes(f)}
        large = {f.name for f in files if f.stat().st_size > 14_000}           # a header takes up to 2 kB
        assert len(files) > 2 and large == {names["model.embed_tokens.weight"]}

@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_made_by_peft_on_q_and_v_with_rslora_merges_as_peft_merges_it(home, tmp_path):
    peft, base = pytest.importorskip("peft"), theirs(home.model)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert go([tmp_path, "--merge", tmp_path / "out"], lora.main)[0] == 0
    ours, want = model_gemma.load_gemma(tmp_path / "out")(IDS), model.merge_and_unload()(IDS).logits
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=0)

def test_a_merged_folder_has_tokenizer_and_card_and_tells_no_path_of_this_machine(home, tmp_path):
    out, _ = tmp_path / "out", saved(tmp_path)
    data.write_json(tmp_path / "run.json", dict(settings=dict(method="sails", data=str(tmp_path))))
    data.write_text(tmp_path / "table.md", "| help | 0.5 |")
    command = [tmp_path, "--merge", out, "--model", home.model, "--dtype", "bfloat16"]
    assert go(command, lora.main)[0] == 0 and data.read_json(out / "config.json")["dtype"] == "bfloat16"
    card = (out / "README.md").read_text() * (out / "tokenizer.json").is_file()
    for words in ("base_model: model\n", "Method: sails", "alpha 6", "Gemma Terms", "| help | 0.5 |"):
        assert words in card
    assert not [words for words in (str(tmp_path), home.model, "{") if words in card]
    assert go(command, lora.main)[2] .startswith(f"error: {out} has files in it")
