"""train.py's objectives against numbers worked out by hand, finite differences, and an expectation that can be summed exactly."""
import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

import lora
import model_gemma
import train
from conftest import random_gemma

@pytest.fixture
def tuned(world, split):
    """A model with adapters that already moved, its rows, and the settings of a step."""
    model = random_gemma()
    lora.attach(model, ("q", "v", "o", "down"), 3, 6)
    stir(model)
    rows = train.encode(world.tok, split["train"][:6] + split["train"][-5:], "tiny")[0]
    return model, rows, SimpleNamespace(objective="sft", micro=3, beta=.1, samples=3, max_new=4, stop={1}, seed=0, batch=11, sft_steps=0)

def stir(model, size=.1):
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in lora.trainable(model):
            p.copy_(torch.randn(p.shape, generator=gen) * size)

def grads(model):
    out = torch.cat([p.grad.flatten() for _, p in lora.trainable(model)])
    model.zero_grad(set_to_none=True)
    return out

def logp_by_hand(model, ids, mask):
    """Sum of log p of the masked tokens from the whole logits, one text at a time."""
    logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(logits[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])

def check_slope(model, loss, epsilon=3e-3):
    """The gradient's projections on three random directions against central differences of the loss."""
    loss().backward()
    params, g = [p for _, p in lora.trainable(model)], grads(model)
    gen, at = torch.Generator().manual_seed(0), [p.detach().clone() for p in params]
    for _ in range(3):
        u = torch.randn(len(g), generator=gen)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, x, d in zip(params, at, u.split([p.numel() for p in params])):
                    p.copy_(x + sign * epsilon * d.view(p.shape))
                ends.append(float(loss()))
        assert (ends[0] - ends[1]) / 2 / epsilon == pytest.approx(float(g @ u), rel=.03, abs=.01 * float(g.norm()))

# -------------------------------------------------------------------------------------------------------------- sft
def test_sft_loss_is_cross_entropy_over_all_supervised_tokens_whatever_the_micro_batch(tuned):
    model, rows, s = tuned
    tokens = sum(sum(r["chosen"][1]) for r in rows)
    want = -sum(logp_by_hand(model, *r["chosen"]) for r in rows) / tokens
    want.backward()
    want, slope = want.detach(), grads(model)
    for s.micro in (1, 3, 11, 64):
        told = train.backward(model, rows, s, 0, None, None)
        assert told["loss"] == pytest.approx(float(want), rel=1e-5) and told["tokens"] == tokens
        torch.testing.assert_close(grads(model), slope, atol=1e-5, rtol=1e-3)
    lengths = {sum(r["chosen"][1]) for r in rows}
    assert len(lengths) > 1                            # else a mean of means would pass

def test_what_comes_after_a_reply_changes_no_gradient(tuned):
    model, rows, _ = tuned
    ids, mask = rows[0]["chosen"]
    model.reply_nll([(ids, mask)])[0].sum().backward()
    before = grads(model)
    model.reply_nll([(ids + [55, 56], mask + [0, 0])])[0].sum().backward()
    torch.testing.assert_close(grads(model), before, atol=1e-5, rtol=1e-4)

# -------------------------------------------------------------------------------------------------------------- dpo
class Scripted:
    """A model that has set log-probabilities: logp[text] for texts named by their first id."""

    def __init__(self, logp):
        self.logp = {k: torch.tensor([float(v)], requires_grad=True) for k, v in logp.items()}

    def reply_nll(self, rows):
        return -torch.cat([self.logp[ids[0]] for ids, _ in rows]), torch.arange(len(rows))

def lend(model):
    return lambda: contextlib.nullcontext(model)

def test_dpo_loss_of_a_worked_example():
    policy, reference = Scripted({1: -2, 2: -5, 3: -7, 4: -6}), Scripted({1: -3, 2: -4, 3: -7, 4: -9})
    rows = [dict(chosen=([1], [1]), rejected=([2], [1])), dict(chosen=([3], [1]), rejected=([4], [1]))]
    # log-ratios +1 and -1, margin 2; then 0 and +3, margin -3
    loss, told = train.dpo_loss(policy, lend(reference), rows, .5, 2)
    assert float(loss.detach()) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1.5))) / 2)
    assert told["margin"] == pytest.approx((2 - 3) / 2)
    loss.backward()
    pull = [.5 / (1 + math.exp(1)) / 2, .5 / (1 + math.exp(-1.5)) / 2]             # beta * sigmoid(-beta margin) / rows
    for text, slope in ((1, -pull[0]), (2, pull[0]), (3, -pull[1]), (4, pull[1])):
        assert float(policy.logp[text].grad) == pytest.approx(slope, rel=1e-5)
    assert all(t.grad is None for t in reference.logp.values())

def test_dpo_starts_at_log_two_and_a_step_raises_the_margin(tuned):
    model, rows, s = tuned
    lora.init_lora(model)
    s.objective = "dpo"
    told = train.backward(model, rows, s, 0, train.base_reference(model), None)
    assert told["loss"] == pytest.approx(math.log(2), abs=1e-5) and told["margin"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for _, p in lora.trainable(model):
            p -= .01 * p.grad
    assert train.backward(model, rows, s, 0, train.base_reference(model), None)["margin"] > .01

def test_dpo_equals_full_logits_and_does_not_depend_on_the_micro_batch(tuned):
    model, rows, s = tuned
    s.objective, reference = "dpo", train.base_reference(model)
    with lora.adapter_off(model):
        then = [[logp_by_hand(model, *r[x]).detach() for x in ("chosen", "rejected")] for r in rows]
    margin = torch.stack([logp_by_hand(model, *r["chosen"]) - a - logp_by_hand(model, *r["rejected"]) + b for r, (a, b) in zip(rows, then)])
    want = -torch.nn.functional.logsigmoid(.1 * margin).mean()
    want.backward()
    want, margin, slope = want.detach(), margin.detach(), grads(model)
    for s.micro in (2, 64):
        told = train.backward(model, rows, s, 0, reference, None)
        assert told["loss"] == pytest.approx(float(want), rel=1e-4) and told["margin"] == pytest.approx(float(margin.mean()), rel=1e-3)
        torch.testing.assert_close(grads(model), slope, atol=1e-4, rtol=1e-2)

def test_gradients_agree_with_finite_differences(tuned):
    model, rows, s = tuned
    reference, texts = train.base_reference(model), [r["chosen"][0] for r in rows[:4]]
    check_slope(model, lambda: train.sft_loss(model, rows[:4], 20)[0])
    check_slope(model, lambda: train.dpo_loss(model, reference, rows[:4], .1, 4)[0])
    check_slope(model, lambda: train.replay_loss(model, reference, texts))

def test_the_first_steps_are_sft_where_asked_for(tuned):
    model, rows, s = tuned
    told = [train.backward(model, rows, s, 0, None, None)]
    s.objective, s.sft_steps = "dpo", 2
    told += [train.backward(model, rows, s, step, train.base_reference(model), None) for step in (0, 1, 2)]
    assert told[1] == told[2] == told[0] and "margin" in told[3]

# ------------------------------------------------------------------------------------------------------------- rloo
def test_advantages_are_rewards_less_the_mean_of_the_others():
    got = train.leave_one_out(torch.tensor([[1., 0., 0., 1.], [3., 3., 3., 3.], [0., 0., 0., 8.]]))
    torch.testing.assert_close(got, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0., 0., 0., 0.], [-8 / 3, -8 / 3, -8 / 3, 8.]]))

def test_rloo_loss_of_a_worked_example(monkeypatch):
    replies = [[11], [12], [13], [14], [11], [12], [13], [14]]
    monkeypatch.setattr(model_gemma, "generate", lambda model, prompts, *a, **k: replies[:len(prompts)])
    policy, reference = (Drawn(logp) for logp in ({11: -1, 12: -2, 13: -3, 14: -4}, {11: -1, 12: -1, 13: -3, 14: -5}))
    s = SimpleNamespace(samples=4, max_new=1, stop={1}, beta=.5)
    rows = [dict(prompt=[2, 7], label="harmful"), dict(prompt=[2, 8], label="benign")]
    reward = lambda row, ids: float(row["label"] == "harmful" and ids[0] in (11, 14))
    loss, told = train.rloo_loss(policy, lend(reference), rows, reward, s, 2, 0)
    # log-ratios 0, -1, 0, 1. First prompt: rewards less beta times them 1, .5, 0, .5, advantages 2/3, 0, -2/3, 0;
    # the second's, which rewards nothing: 0, .5, 0, -.5 and 0, 2/3, 0, -2/3
    assert float(loss.detach()) == pytest.approx(-((2 / 3 * -1 - 2 / 3 * -3) + (2 / 3 * -2 - 2 / 3 * -4)) / 8)
    assert told == dict(reward=pytest.approx(.25), kl=pytest.approx(0.))
    loss.backward()
    assert [float(policy.logp[t].grad) for t in (11, 12, 13, 14)] == pytest.approx([-1 / 12, -1 / 12, 1 / 12, 1 / 12], abs=1e-6)

class Drawn(Scripted):
    """The same, texts named by their first reply token."""

    def reply_nll(self, rows):
        assert all(mask == [0, 0, 1] for _, mask in rows)
        return super().reply_nll([(ids[2:], mask) for ids, mask in rows])

def test_rloo_gradient_is_that_of_expected_reward_less_beta_times_kl():
    """One new token, so that the expectation can be summed over the vocabulary; the estimate is averaged over 6,000 draws."""
    model = random_gemma()
    lora.attach(model, ("down",), 1, 6, [1])
    stir(model, .5)
    reference, prompt, beta = train.base_reference(model), [2, 7, 8], 1.
    good = torch.arange(286) % 2 == 0
    logp = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    with torch.no_grad(), reference() as ref:
        then = ref(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    kl = (logp.exp() * (logp - then)).sum()
    assert kl > .1                              # else beta would not matter
    (-(logp.exp() * good).sum() + beta * kl).backward()
    want = grads(model)
    s = SimpleNamespace(samples=200, max_new=1, stop=set(), beta=beta)
    reward = lambda row, ids: float(ids[0] % 2 == 0)
    for seed in range(30):
        train.rloo_loss(model, reference, [dict(prompt=prompt, label=None)], reward, s, 1, seed)[0].div(30).backward()
    got = grads(model)
    assert float(torch.cosine_similarity(got, want, 0)) > .98          # without its KL it would be .77
    assert float(got.norm() / want.norm()) == pytest.approx(1, abs=.1)

def test_rloo_steps_raise_the_rewarded_replies(tuned):
    model, rows, s = tuned
    lora.init_lora(model)
    s.objective, s.samples, s.max_new, reference = "rloo", 8, 1, train.base_reference(model)
    reward = lambda row, ids: float(ids[0] % 2 == 0)
    share = lambda: float(model(torch.tensor([rows[0]["prompt"]])).detach()[0, -1].softmax(-1)[::2].sum())
    before, opt = share(), torch.optim.Adam([p for _, p in lora.trainable(model)], lr=3e-2)
    for step in range(12):
        told = train.backward(model, rows[:4], s, step, reference, reward)
        opt.step(), opt.zero_grad()
    assert share() > before + .1 and 0 <= told["reward"] <= 1

def test_rloo_draws_anew_each_step_and_repeats_itself_exactly(tuned, monkeypatch):
    model, rows, s = tuned
    s.objective, seen, generate = "rloo", [], model_gemma.generate
    monkeypatch.setattr(model_gemma, "generate", lambda *a, **k: seen.append(k["seed"]) or generate(*a, **k))
    reward = lambda row, ids: float(len(ids))
    state = torch.get_rng_state()
    told = [train.backward(model, rows, s, step, train.base_reference(model), reward) for step in (0, 1, 0)]
    assert told[0] == told[2] != told[1]
    assert len(set(seen[:8])) == 8                     # 4 micro-batches, 2 steps: no draw is another's repetition
    assert torch.equal(torch.get_rng_state(), state)

def test_the_reward_is_refusing_harm_and_helping_otherwise(world):
    reward = train.judge_reward(world.tok, {1})
    says = lambda text: world.tok.encode(text).ids
    for text, refused in (("sorry i cannot help . <end>", 1.), ("sorry i cannot help .", 1.), ("sure first step3 then step4 . <end>", 0.), ("<end>", 0.)):
        assert reward(dict(label="harmful"), says(text)) == refused
        assert reward(dict(label="benign"), says(text)) == 1 - refused
    spoken = SimpleNamespace(decode=lambda ids: "".join({1: "<eos>", 5: "No."}[t] for t in ids))
    assert train.judge_reward(spoken, {1})(dict(label="harmful"), [5, 1]) == 1.    # the judge sees the reply, not the token that ends it

# ---------------------------------------------------------------------------------------------- replay and reference
def test_replay_is_zero_at_the_start_and_the_kl_from_base_to_model_per_token_later(tuned):
    model, rows, _ = tuned
    reference, texts = train.base_reference(model), [rows[0]["chosen"][0], rows[-1]["chosen"][0], [2, 9, 9]]
    sums = n = 0
    for ids in texts:
        now = model(torch.tensor([ids]))[0].detach().double().log_softmax(-1)
        with lora.adapter_off(model):
            then = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        sums, n = sums + float((then.exp() * (then - now)).sum()), n + len(ids)
    assert float(train.replay_loss(model, reference, texts).detach()) == pytest.approx(sums / n, rel=1e-3) and sums / n > .01
    lora.init_lora(model)
    assert float(train.replay_loss(model, reference, texts)) == pytest.approx(0, abs=1e-6)

def test_the_reference_is_the_model_itself_without_adapters_or_a_frozen_copy_for_full(tuned):
    model, ids = tuned[0], torch.tensor([[2, 5, 6]])
    with lora.adapter_off(model):
        base = model(ids)
    with train.base_reference(model)() as ref:
        assert ref is model and torch.equal(ref(ids), base)
    assert not torch.equal(model(ids), base)
    full = random_gemma().requires_grad_(True)
    reference, before = train.base_reference(full), full(ids).detach()
    with torch.no_grad():
        full.norm.weight += 1
    with reference() as ref:
        assert torch.equal(ref(ids), before) and not any(p.requires_grad for p in ref.parameters())
    assert all(p.requires_grad for p in full.parameters())
