"""model_gemma.py without an oracle: cache, padding, sampling, taps, losses and their gradients, files.
Models are tiny, random, of large weights: with the usual .02 a wrong mask moves logits by less than 1e-4."""
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
import model_gemma
from conftest import go, random_sae
from benchmarks.talk import steer
from model_gemma import KVCache, config_from_json, generate, load_gemma, save_gemma
from test_lora import saved

RAW = dict(num_hidden_layers=4, hidden_size=20, intermediate_size=24, num_attention_heads=4, head_dim=8,
           num_key_value_heads=2, vocab_size=50, query_pre_attn_scalar=12, sliding_window=4)
KINDS = dict(gemma2=dict(RAW, model_type="gemma2", attn_logit_softcapping=20., final_logit_softcapping=10.),
             gemma3=dict(RAW, model_type="gemma3_text", sliding_window_pattern=3))
PROMPTS = [[2, 7, 8, 9, 10, 11, 12], [2, 13], [2, 20, 21, 22]]
both = pytest.mark.parametrize("kind", KINDS)

def tiny(kind="gemma2"):
    """A random model. Its final gains have random signs: else a tied head repeats its last token for ever."""
    model = model_gemma.Gemma(config_from_json(KINDS[kind]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=.2 if "norm" in name else 1.)
        model.norm.weight.normal_(-1., 2.)
    return model.requires_grad_(False)

near = lambda a, b, atol=1e-4, rtol=0.: torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

@both
@torch.no_grad()                                       # where five rows or more are multiplied turned round
@pytest.mark.parametrize("cuts", [[1] * 10, [4, 1, 5], [7, 1, 1, 1]], ids=str)
def test_cached_logits_equal_uncached_ones_whatever_the_pieces(kind, cuts):
    model, (ids, keep) = tiny(kind), data.pad(2 * PROMPTS, "left")
    ids, keep = torch.cat([ids, ids[:, -3:]], 1), torch.cat([keep, keep[:, -3:]], 1)
    whole, cache = model(ids, keep), KVCache()                                         # (6, 10, V)
    for i, k, want in zip(ids.split(cuts, 1), keep.split(cuts, 1), whole.split(cuts, 1)):
        near(model.logits(model.hidden(i, k, cache)[0])[k], want[k])
    assert torch.distributed.utils._recursive_to((cache,), ids.device, False)[0][0] is cache  # as FSDP2 does

@both
def test_batched_cached_generation_equals_each_prompt_alone_without_cache(kind):
    model = tiny(kind)
    together = generate(model, PROMPTS, 12, stop=())
    for prompt, new in zip(PROMPTS, together):
        best = model(torch.tensor([prompt + new]))[0].argmax(-1).tolist()
        assert new == best[len(prompt) - 1:-1]
    assert len(set(sum(together, []))) > 5             # else equality says little

@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_those_of_the_row_alone_also_beside_a_row_of_padding(kind, side):
    model, (ids, keep) = tiny(kind), data.pad([*PROMPTS, []], side)
    logits = model(ids, keep)
    assert logits.isfinite().all()
    for padded, k, prompt in zip(logits, keep, PROMPTS):
        near(padded[k], model(torch.tensor([prompt]))[0])

@pytest.mark.parametrize("rows", [[2], [0, 1, 2]], ids=["one row stops", "all rows stop"])
def test_generation_ends_with_the_stop_token_and_only_then(rows):
    free = generate(tiny(), PROMPTS, 12, stop=())
    stop = {free[row][1] for row in rows}
    for before, out in zip(free, generate(tiny(), PROMPTS, 12, stop)):
        end = next((i for i, token in enumerate(before) if token in stop), 11) + 1
        assert out == before[:end]

def test_a_sampled_reply_depends_on_its_own_seed_and_on_nothing_else():
    model, state = tiny(), torch.get_rng_state()
    draw = lambda prompts, seeds: generate(model, prompts, 8, (), 5., seeds)
    a, b, c = draw(PROMPTS, [3, 4, 5])
    assert draw(PROMPTS[::-1], [5, 4, 3]) == [c, b, a]
    assert draw(PROMPTS[1:2], [4]) == [b]
    assert draw(PROMPTS[1:2], [6]) != [b]
    until = lambda row: row[:row.index(a[1]) + 1] if a[1] in row else row
    assert generate(model, PROMPTS, 8, {a[1]}, 5., [3, 4, 5]) == [until(row) for row in (a, b, c)]
    assert torch.equal(state, torch.get_rng_state())

def test_sampled_tokens_have_the_softmax_frequencies():
    rows = generate(tiny(), [PROMPTS[0]] * 4000, 1, (), 4., range(4000))
    found = torch.bincount(torch.tensor(rows)[:, 0], minlength=50) / 4000
    p = F.softmax(tiny()(torch.tensor(PROMPTS[:1]))[0, -1] / 4, -1)
    assert ((found - p).abs() < 4 * (p / 4000).sqrt() + 1e-3).all()

def say(home, *more, lines=None):
    prompt = ["--prompt", "hey how"] if lines is None else []        # lines: what a person types
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        code, out, err = go(["--model", home.model, "--max-new", 5, *prompt, *more], model_gemma.main)
    return err if code else out

def reply(home, model, *texts):
    turns = [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]
    tok = data.load_tokenizer(home.model)
    ids, _ = data.render_chat(tok, turns, template="tiny")
    return tok.decode(generate(model, [ids], 5, data.stop_ids(tok, "tiny"))[0]).strip() + "\n"

def test_the_command_answers_adds_features_and_an_adapter_and_a_chat_keeps_its_turns(home, tmp_path):
    plain, steered, adapted = load_gemma(home.model), load_gemma(home.model), saved(tmp_path)
    answer = reply(home, plain, "hey how")
    assert say(home) == answer
    assert say(home, "--adapter", tmp_path) == reply(home, adapted, "hey how") != answer
    steer(steered, random_sae(0), 0, 3, 40.)           # home's SAE of layer i is random_sae(i)
    steer(steered, random_sae(1), 1, 5, -25.5)
    features = "--sae", home.sae, "--width", 40, "--steer", "0:3=40", "--steer", "1:5=-25.5"
    assert say(home, *features) == reply(home, steered, "hey how") != answer
    more = reply(home, plain, "hey how", answer, "make thing5 ?")
    assert say(home, lines="hey how\n\n  \nmake thing5 ?\n") == answer + more

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_adds_the_decoder_row_after_the_block_at_every_position(home, dtype):
    model, ids, row = load_gemma(home.model, dtype), torch.tensor([[2, 5, 9]]), 3 * random_sae(1).W_dec[7]
    before = model.residuals(ids, [0, 1])
    steer(model, random_sae(1), 1, 7, 3.)
    after = model.residuals(ids, [0, 1])
    assert torch.equal(after[1], before[1] + row.to(dtype)) and torch.equal(after[0], before[0])

@both
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["q_proj", ""], ids=["one matrix a block", "all weights"])
def test_wanted_positions_and_gradients_are_the_same_alone_and_checkpointed(kind, checkpointing, trained):
    model, (ids, keep) = tiny(kind), data.pad(PROMPTS)
    weights = [p.requires_grad_() for name, p in model.named_parameters() if trained in name]
    want = keep & (torch.arange(7) % 3 == 1)
    every = model.hidden(ids, keep)[0][want]
    model.checkpointing = checkpointing
    few = model.hidden(ids, keep, want=want)[0]
    for a, b in zip(*(torch.autograd.grad(h.square().sum(), weights) for h in (few, every))):
        assert a.any()
        near(a, b, 1e-3, 1e-3)
    near(few, every)

def test_residuals_run_no_block_above_the_deepest_one_asked_for():
    model, ids = tiny(), torch.tensor(PROMPTS[:1])
    full = model.hidden(ids, taps=(0, 2))[1]
    model.layers[3] = None
    got = model.residuals(ids, [2, 0])
    assert set(got) == {0, 2} and all(torch.equal(got[i], full[i]) for i in got)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_rows_embed_as_their_ids_and_logits_are_fp32(dtype):
    model, (ids, keep) = tiny().to(dtype), data.pad(PROMPTS)
    h = model.hidden(keep=keep, embeds=model.embed(F.one_hot(ids, 50).to(dtype)))[0]
    assert torch.equal(h, model.hidden(ids, keep)[0])
    assert model.logits(h).dtype == torch.float32

def test_the_norms_gradients_by_hand_equal_autograds():
    torch.manual_seed(0)
    x, g = torch.randn(2, 4, 7, 20, requires_grad=True), torch.randn(2, 4, 7, 20)
    norm = model_gemma.RMSNorm(20, .3)                 # an eps that matters
    norm.weight.data.normal_()
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + .3) * (1 + norm.weight)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight), g) for y in (norm(x), plain))):
        near(a, b, 1e-5, 1e-5)

@pytest.mark.parametrize("cap", [None, 5.])
def test_attentions_gradients_by_hand_equal_autograds(cap):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 6, generator=gen) for heads in (4, 2, 2))
    q, k, v = (t.mul_(3).requires_grad_() for t in (q, k, v))
    see = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()

    def plain(q, k, v):
        scores = model_gemma.softcap(.5 * q @ k.repeat_interleave(2, 1).transpose(2, 3), cap)
        return scores.masked_fill(~see, -1e30).softmax(-1) @ v.repeat_interleave(2, 1)
    mask = model_gemma.additive(see, torch.float32)
    both = [f(q, k, v) for f in (plain, lambda *x: model_gemma._Attend.apply(*x, mask, .5, cap))]
    near(*both, 1e-5)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in both)):
        near(one, other, 1e-3)

def test_the_gates_gradients_by_hand_equal_autograds():
    gate, up = torch.randn(2, 3, 5, requires_grad=True).unbind()
    both = F.gelu(gate, approximate="tanh") * up, model_gemma._Gated.apply(gate, up)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), (gate, up)) for out in both)):
        near(one, other, 1e-5)

def test_reply_nll_scores_the_masked_tokens_and_only_those():
    model, rows = tiny(), [([2, 5, 6, 7, 8], [0, 0, 0, 1, 1]), ([2, 9, 10], [0, 1, 0])]
    nll, row = model.reply_nll(rows)
    logp = [F.log_softmax(model(torch.tensor([ids]))[0], -1) for ids, _ in rows]
    near(nll, -torch.stack([logp[0][2, 7], logp[0][3, 8], logp[1][0, 9]]))
    assert row.tolist() == [0, 0, 1]

@pytest.mark.parametrize("cap, chunk", [(10., 5), (10., 1024), (None, 5)])
@pytest.mark.parametrize("head_trains", [False, True])
def test_nll_and_its_gradients_equal_autograds_on_full_logits_in_bf16_nearly(cap, head_trains, chunk):
    model = tiny()
    model.config.final_cap, table = cap, model.embed_tokens.weight.requires_grad_(head_trains)
    h, targets, g = (torch.randn(23, 20) * 2).requires_grad_(), torch.randint(50, (23,)), torch.rand(23)
    z, inputs = F.linear(h, table), [h] + [table] * head_trains
    z = z if cap is None else cap * torch.tanh(z / cap)
    ours, theirs = model.nll(h, targets, chunk), F.cross_entropy(z, targets, reduction="none")
    near(ours, theirs, 1e-5, 1e-5)
    slopes = [torch.autograd.grad((nll * g).sum(), inputs) for nll in (ours, theirs)]  # g: unequal, as DPO's
    for a, b in zip(*slopes):
        near(a, b, 1e-4, 1e-4)
    low = h.detach().bfloat16().requires_grad_()
    nll = model.bfloat16().nll(low, targets, chunk)
    (nll * g).sum().backward()
    assert nll.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert (nll - theirs).abs().max() < .2
    assert F.cosine_similarity(low.grad.float().flatten(), slopes[1][0].flatten(), 0) > .999

@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_with_a_copy_of_the_tied_head_and_our_own_file_load_to_the_last_bit(kind, dtype, tmp_path):
    model = tiny(kind)
    tensors = {"model." + n: p.detach() for n, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    files = {n: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, n in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    data.write_json(tmp_path / "model.safetensors.index.json", dict(weight_map=files))
    data.write_json(tmp_path / "config.json", model.config.raw)
    loaded = load_gemma(tmp_path, dtype)
    save_gemma(loaded, tmp_path / "again")
    again = load_gemma(str(tmp_path / "again"), dtype)
    for p, q, r in zip(model.parameters(), loaded.parameters(), again.parameters()):
        assert q.dtype == dtype and not q.requires_grad
        assert torch.equal(p.to(dtype), q) and torch.equal(q, r)
    assert data.read_json(tmp_path / "again" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")

@pytest.mark.parametrize("layers, scalar", [(42, 224), (42, 256), (46, 144), (26, 224)])
def test_only_a_9b_config_with_the_launch_days_scalar_is_warned_of(layers, scalar, capsys):
    config_from_json(dict(KINDS["gemma2"], num_hidden_layers=layers, query_pre_attn_scalar=scalar))
    assert ("256" in capsys.readouterr().err) == ((layers, scalar) == (42, 224))
