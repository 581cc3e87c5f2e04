"""The Gemma module's own promises: cache, padding, taps, loss and its gradients, checkpointing, files. No oracle needed.

Models are tiny and random, with large weights: with the usual 0.02 a wrong mask or cap would move logits by less than 1e-4.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import model_gemma
from data import UserError
from model_gemma import Gemma, KVCache, attend_mask, config_from_json, generate, load_gemma, rope_table, save_gemma

TOP = Path(model_gemma.__file__).parent
RAW = dict(hidden_size=20, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=50,
           query_pre_attn_scalar=12, sliding_window=4)
KINDS = dict(gemma2=dict(RAW, model_type="gemma2", num_hidden_layers=4, attn_logit_softcapping=20., final_logit_softcapping=10.),
             gemma3=dict(RAW, model_type="gemma3_text", num_hidden_layers=4, sliding_window_pattern=3))
PROMPTS = [[2, 7, 8, 9, 10, 11, 12], [2, 13], [2, 20, 21, 22]]


def tiny(kind="gemma2", **changes):
    """A random model. Its final gains have random signs: with a tied head it would else repeat its last token for ever."""
    model = Gemma(config_from_json({**KINDS[kind], **changes}))
    torch.manual_seed(0)                               # after the model is made, which may draw numbers of its own or not
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=.2 if "norm" in name else 1.)
        model.norm.weight.normal_(-1., 2.)
    return model.requires_grad_(False)


both = pytest.mark.parametrize("kind", KINDS)


# --------------------------------------------------------------------------------------------- cache, padding, sampling
@both
def test_cached_logits_equal_uncached_ones_whatever_the_pieces(kind):
    model, (ids, keep) = tiny(kind), data.pad(PROMPTS, "left")
    ids, keep = torch.cat([ids, ids[:, -3:]], 1), torch.cat([keep, keep[:, -3:]], 1)
    whole = model(ids, keep)                                                           # (3, 10, V)
    for cuts in ([1] * 10, [4, 1, 5], [7, 1, 1, 1]):
        cache, at = KVCache(), 0
        for n in cuts:
            part = model.logits(model.hidden(ids[:, at:at + n], keep[:, at:at + n], cache)[0])
            seen, at = keep[:, at:at + n], at + n
            torch.testing.assert_close(part[seen], whole[:, at - n:at][seen], atol=1e-4, rtol=0)
            assert cache.length == at


@both
def test_batched_cached_generation_equals_each_prompt_alone_without_cache(kind):
    model, together = tiny(kind), None
    together = generate(model, PROMPTS, 12, stop=())
    for prompt, new in zip(PROMPTS, together):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert new == ids[len(prompt):]
    assert len({tuple(t) for t in together}) > 1 and len(set(sum(together, []))) > 5       # else equality says little


@both
def test_left_padded_logits_equal_those_of_the_row_alone(kind):
    model, (ids, keep) = tiny(kind), data.pad(PROMPTS, "left")
    padded = model(ids, keep)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(padded[row, -len(prompt):], model(torch.tensor([prompt]))[0], atol=1e-4, rtol=0)


def test_a_row_of_nothing_but_padding_stays_finite():
    ids, keep = data.pad(PROMPTS)
    keep[1] = False
    assert tiny()(ids, keep).isfinite().all()


@pytest.mark.parametrize("rows", [[2], [0, 1, 2]], ids=["one row stops", "all rows stop"])
def test_generation_ends_with_the_stop_token_and_only_then(rows):
    model = tiny()
    free = generate(model, PROMPTS, 12, stop=())
    stop = {free[row][1] for row in rows}
    for before, out in zip(free, generate(model, PROMPTS, 12, stop)):
        end = next((i for i, token in enumerate(before) if token in stop), 11) + 1
        assert out == before[:end]


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone():
    model = tiny()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draw = [generate(model, PROMPTS, 8, (), temperature=5., seed=s) for s in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2] and torch.equal(state, torch.get_rng_state())


def test_sampled_tokens_have_the_softmax_frequencies():
    model = tiny()
    rows = generate(model, [PROMPTS[0]] * 4000, 1, (), temperature=4.)
    found = torch.bincount(torch.tensor(rows)[:, 0], minlength=50) / 4000
    p = F.softmax(model(torch.tensor(PROMPTS[:1]))[0, -1] / 4, -1)
    assert (found - p).abs().max() < 4 * (p.max() / 4000).sqrt()


@both
def test_a_repeated_cache_continues_one_prefix_many_ways_and_stays_itself(kind):
    model, prefix, tails = tiny(kind), torch.tensor([[2, 5, 6, 7, 8]]), torch.tensor([[9, 10], [11, 12], [13, 14]])
    cache = KVCache()
    model.hidden(prefix, cache=cache)
    for _ in range(2):                                 # twice: the first use must not have changed the original
        many = cache.repeat(3)
        got = model.logits(model.hidden(tails, cache=many)[0])
        want = model(torch.cat([prefix.expand(3, -1), tails], 1))[:, 5:]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert (cache.length, many.length) == (5, 7)


# ----------------------------------------------------------------------------------------------------- taps, embeddings
@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_wanted_positions_come_back_and_they_are_the_same(kind, checkpointing):
    model, (ids, keep) = tiny(kind).requires_grad_(True), data.pad(PROMPTS)
    model.checkpointing, want = checkpointing, keep & (torch.arange(7) % 3 == 1)
    few, all_ = model.hidden(ids, keep, want=want)[0], model.hidden(ids, keep)[0][want]
    torch.testing.assert_close(few, all_, atol=1e-4, rtol=0)
    weights = [p for p in model.parameters()]
    for a, b in zip(torch.autograd.grad(few.square().sum(), weights), torch.autograd.grad(all_.square().sum(), weights)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@both
def test_taps_equal_a_walk_by_hand(kind):
    model, (ids, keep) = tiny(kind), data.pad(PROMPTS)
    c, at = model.config, (keep.long().cumsum(1) - 1)
    h, taps = model.hidden(ids, keep, taps=range(4))
    walk = model.embed_tokens.weight[ids] * 20 ** .5
    for i, block in enumerate(model.layers):
        cos, sin = rope_table(at, c.head_dim, c.theta[c.local[i]], walk.dtype)
        walk = block(walk, cos, sin, attend_mask(at, at, keep, 4 if c.local[i] else None), None)
        torch.testing.assert_close(taps[i], walk, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h, model.norm(walk), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(h, taps[3], atol=1.)     # the last residual is not the normed output


def test_residuals_run_no_block_above_the_deepest_one_asked_for():
    model, calls, ids = tiny(), [], torch.tensor(PROMPTS[:1])
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    got = model.residuals(ids, [2, 0])
    assert calls == [0, 1, 2] and set(got) == {0, 2}
    full = model.hidden(ids, taps=(0, 2))[1]
    assert all(torch.equal(got[i], full[i]) for i in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_rows_embed_as_their_ids(dtype):
    model, (ids, keep) = tiny().to(dtype), data.pad(PROMPTS)
    hot = F.one_hot(ids, 50).to(dtype).requires_grad_()
    assert torch.equal(model.embed(hot), model.embed(ids))
    h = model.hidden(keep=keep, embeds=model.embed(hot))[0]
    assert torch.equal(h, model.hidden(ids, keep)[0])
    h.float().square().sum().backward()
    assert hot.grad[keep].abs().sum(-1).min() > 0      # token gradients reach every position, as attacks need


def test_logits_are_fp32_and_within_the_cap_also_in_bf16():
    logits = tiny().bfloat16()(torch.tensor(PROMPTS[:1]))
    assert logits.dtype == torch.float32 and 5 < logits.abs().max() <= 10


# ------------------------------------------------------------------------------------------------- loss and gradients
def loss_case(head_trains):
    model = tiny()
    model.embed_tokens.weight.requires_grad_(head_trains)
    h, targets, g = torch.randn(23, 20) * 2, torch.randint(50, (23,)), torch.rand(23)
    return model, h.requires_grad_(), targets, g       # g: unequal weights, as a masked or DPO loss has them


@pytest.mark.parametrize("shape", [(3, 7, 20), (2, 4, 7, 20)], ids=str)
def test_the_norms_gradients_by_hand_equal_autograds(shape):
    torch.manual_seed(0)
    norm = model_gemma.RMSNorm(20, .3)                 # an eps that matters
    norm.weight.data.normal_()
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + .3) * (1 + norm.weight)
    want = torch.autograd.grad(plain, (x, norm.weight), g)
    for a, b in zip(torch.autograd.grad(norm(x), (x, norm.weight), g), want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_reply_nll_scores_the_masked_tokens_and_only_those():
    model, rows = tiny(), [([2, 5, 6, 7, 8], [0, 0, 0, 1, 1]), ([2, 9, 10], [0, 1, 0])]
    nll, row = model.reply_nll(rows)
    want = [F.cross_entropy(model(torch.tensor([ids]))[0, t - 1], torch.tensor(ids[t])) for ids, t in
            ((rows[0][0], 3), (rows[0][0], 4), (rows[1][0], 1))]
    torch.testing.assert_close(nll, torch.stack(want), atol=1e-4, rtol=0)
    assert row.tolist() == [0, 0, 1]


def by_autograd(model, h, targets, g):
    z = F.linear(h, model.embed_tokens.weight)
    if model.config.final_cap is not None:
        z = model.config.final_cap * torch.tanh(z / model.config.final_cap)
    return F.cross_entropy(z, targets, reduction="none")


@pytest.mark.parametrize("cap", [10., None])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_nll_and_its_gradients_equal_autograds_on_full_logits(cap, head_trains, chunk):
    model, h, targets, g = loss_case(head_trains)
    model.config.final_cap = cap
    inputs = [h] + [model.embed_tokens.weight] * head_trains
    ours, theirs = model.nll(h, targets, chunk), by_autograd(model, h, targets, g)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((ours * g).sum(), inputs), torch.autograd.grad((theirs * g).sum(), inputs)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nll_of_a_bf16_model_is_fp32_and_close_to_the_fp32_models():
    model, h, targets, g = loss_case(False)
    want, [slope] = by_autograd(model, h, targets, g), torch.autograd.grad(by_autograd(model, h, targets, g).sum(), h)
    model, low = model.bfloat16(), h.detach().bfloat16().requires_grad_()
    nll = model.nll(low, targets, 5)
    nll.sum().backward()
    assert nll.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert (nll - want).abs().max() < .2 and F.cosine_similarity(low.grad.float().flatten(), slope.flatten(), 0) > .999


def gradients(model, ids, keep):
    h = model.hidden(ids, keep)[0]
    model.nll(h[:, :-1][keep[:, 1:]], ids[:, 1:][keep[:, 1:]], 4).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_trained_tied_head_gets_the_gradient_of_both_its_uses():
    model, (ids, keep) = tiny().requires_grad_(True), data.pad(PROMPTS)
    ours = gradients(model, ids, keep)
    model.zero_grad()
    logits = model(ids, keep)[:, :-1][keep[:, 1:]]
    F.cross_entropy(logits, ids[:, 1:][keep[:, 1:]], reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-4, rtol=1e-3)


@both
def test_checkpointing_gives_the_same_gradients_with_everything_else_frozen(kind):
    (ids, keep), got = data.pad(PROMPTS), []
    for on in (False, True):
        model = tiny(kind)
        model.checkpointing = on
        for block in model.layers:
            block.self_attn.q_proj.weight.requires_grad_()
        got.append(gradients(model, ids, keep))
    assert len(got[0]) == 4 and all(t.abs().max() > 0 for t in got[1].values())
    for name in got[0]:
        torch.testing.assert_close(got[0][name], got[1][name], atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------------- loading
def write(folder, model, shards=2):
    """The model as the hub lays it out, in several files. Returns the weight map."""
    tensors = {"model." + n: p.detach().clone() for n, p in model.named_parameters()}
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    where = {n: f for f, part in parts.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(model.config.raw))
    return where


def edit(folder, where, change):
    """Rewrite the first shard through change(tensors)."""
    path = folder / sorted(set(where.values()))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_shards_and_our_own_file_load_to_the_last_bit(kind, dtype, tmp_path):
    model = tiny(kind)
    write(tmp_path, model, 3)
    loaded = load_gemma(tmp_path, dtype)
    save_gemma(loaded, tmp_path / "again")
    again = load_gemma(str(tmp_path / "again"), dtype)
    for (name, p), q, r in zip(model.named_parameters(), loaded.parameters(), again.parameters()):
        assert q.dtype == dtype and not q.requires_grad and torch.equal(p.to(dtype), q) and torch.equal(q, r), name
    saved = data.read_json(tmp_path / "again" / "config.json")
    assert saved["dtype"] == str(dtype).removeprefix("torch.") and saved["hidden_size"] == 20


def swap(tensors, name, tensor):
    tensors[name] = tensor


FAULTS = {
    "no folder": (lambda d, w: None, "no such folder"),
    "no config": (lambda d, w: (d / "config.json").unlink(), r"no file config\.json"),
    "config is no JSON": (lambda d, w: (d / "config.json").write_text("{"), r"config\.json: not a JSON file"),
    "config lacks a key": (lambda d, w: (d / "config.json").write_text('{"model_type": "gemma2"}'), "num_hidden_layers"),
    "another model": (lambda d, w: (d / "config.json").write_text('{"model_type": "llama"}'), "'llama'.*gemma2"),
    "index is no index": (lambda d, w: (d / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "missing shard": (lambda d, w: (d / w["model.norm.weight"]).unlink(), r"no file model-0000\d-of-00002"),
    "truncated file": (lambda d, w: (d / w["model.norm.weight"]).write_bytes(
        (d / w["model.norm.weight"]).read_bytes()[:-100]), "not a whole safetensors file"),
    "empty file": (lambda d, w: (d / w["model.norm.weight"]).write_bytes(b""), "not a whole safetensors file"),
    "wrong shape": (lambda d, w: edit(d, w, lambda t: swap(t, min(t), torch.zeros(3, 5))), r"shape \(3, 5\).*asks for"),
    "extra tensor": (lambda d, w: edit(d, w, lambda t: swap(t, "model.layers.9.bias", torch.zeros(3))), "unexpected tensor model.layers.9"),
    "missing tensor": (lambda d, w: edit(d, w, lambda t: t.pop(min(t))), "1 tensors are missing.*model.embed_tokens.weight"),
    "other head": (lambda d, w: edit(d, w, lambda t: swap(t, "lm_head.weight", torch.ones(50, 20))), "lm_head.weight differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_model_folder_is_one_clear_line(fault, tmp_path):
    where = write(tmp_path, tiny())
    make, says = FAULTS[fault]
    make(tmp_path, where)
    with pytest.raises(UserError, match=says) as e:
        load_gemma(tmp_path if fault != "no folder" else tmp_path / "none")
    assert "\n" not in str(e.value)


def test_a_second_copy_of_the_tied_head_is_accepted(tmp_path):
    model = tiny()
    edit(tmp_path, write(tmp_path, model), lambda t: swap(t, "lm_head.weight", model.embed_tokens.weight.detach().clone()))
    assert torch.equal(load_gemma(tmp_path).embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("layers, scalar, warns", [(42, 224, True), (42, 256, False), (46, 144, False), (26, 224, False)])
def test_only_a_9b_config_with_the_launch_days_scalar_is_warned_of(layers, scalar, warns, capsys):
    config_from_json(dict(KINDS["gemma2"], num_hidden_layers=layers, query_pre_attn_scalar=scalar))
    assert ("corrected to 256" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("raw", [
    dict(rope_scaling={"rope_type": "linear", "factor": 8.}), dict(hidden_activation="silu"), dict(attention_bias=True),
    dict(tie_word_embeddings=False), dict(layer_types=["full_attention"])], ids=lambda raw: next(iter(raw)))
def test_what_this_forward_does_not_compute_is_refused(raw):
    with pytest.raises(UserError):
        config_from_json({**KINDS["gemma2"], **raw})


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no folder", "truncated file"])
def test_the_command_says_what_is_wrong_without_a_traceback(fault, tmp_path):
    FAULTS[fault][0](tmp_path, write(tmp_path, tiny()))
    data.tiny_world(0).tok.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path if fault != "no folder" else tmp_path / "none"
    run = subprocess.run([sys.executable, TOP / "model_gemma.py", "--model", folder, "--prompt", "x"], capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
