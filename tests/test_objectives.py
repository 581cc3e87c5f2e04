"""train.py's losses against formulas written out, its loop against a dozen lines of plain torch."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import data
import lora
import model_gemma
import train
from conftest import adapted, random_gemma

NEUTRAL = [[2, 9, 9], [2, 30, 31, 32, 33, 34], [2, 77]]

@pytest.fixture
def tuned(world, split):
    """A model whose adapters have moved; 11 rows, replies of two lengths; settings."""
    rows, _ = data.encode(world.tok, split["train"][:6] + split["train"][-5:], "tiny")
    model = adapted(random_gemma(), ("q", "v", "o", "down"), 3, 6, .1)
    return model, [dict(r, at=i) for i, r in enumerate(rows)], SimpleNamespace(model="", dtype="", shard=0,
        objective="sft", sft_steps=0, replay=0., beta=.3, samples=3, max_new=4, stop={1}, seed=0, batch=11)

def one_step(model, rows, s, step=5):
    """What train.backward logs; the reward is for a first token that is even."""
    even = lambda row, ids: float(ids[0] % 2 == 0)
    loss = train.make_loss(s, model, train.base_reference(model), even, NEUTRAL)
    return train.backward(model, rows, s, loss, step)

def gradient(model):
    """The gradient as one vector, taken off the model."""
    out = parameters_to_vector([p.grad for _, p in lora.trainable(model)])
    model.zero_grad(set_to_none=True)
    return out

def base(model, f, *args):
    """f(*args) with the adapters off."""
    with torch.no_grad(), lora.adapter_off(model):
        return f(*args)

def written_out(model, rows, s):
    """The loss of step 5 from whole logits, one text at a time."""
    words = lambda ids: model(torch.tensor([ids]))[0].log_softmax(-1)  # (T, V)
    logp = lambda ids, mask: sum(words(ids)[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])
    gain = lambda text: logp(*text) - base(model, logp, *text)
    kl = lambda ids: F.kl_div(words(ids), base(model, words, ids), reduction="sum", log_target=True)
    if s.objective == "dpo" and s.sft_steps <= 5:
        margins = [gain(r["chosen_tokens"]) - gain(r["rejected_tokens"]) for r in rows]
        return -sum(F.logsigmoid(s.beta * m) for m in margins) / 11
    texts = [NEUTRAL[i] for i in data.batch_at(3, 11, s.seed + 1, 5)]
    nll = -sum(logp(*r["chosen_tokens"]) for r in rows) / sum(sum(r["chosen_tokens"][1]) for r in rows)
    return nll + s.replay * sum(map(kl, texts)) / sum(map(len, texts))

@pytest.mark.parametrize("changes", (
    dict(objective="dpo", sft_steps=5), dict(objective="rloo", sft_steps=6), dict(replay=.5)), ids=str)
def test_loss_and_gradient_equal_the_formulas_in_any_micro_batch_and_finite_differences(tuned, changes):
    model, rows, s = tuned
    vars(s).update(changes)
    want = written_out(model, rows, s)
    want.backward()
    slope, params, ends = gradient(model), [p for _, p in lora.trainable(model)], []
    for s.micro in (3, 64):
        assert one_step(model, rows, s)["loss"] == pytest.approx(float(want.detach()), rel=1e-4)
        torch.testing.assert_close(gradient(model), slope, atol=1e-4, rtol=1e-3)
    at, u = parameters_to_vector(params), F.normalize(slope + 5 * slope.roll(1), dim=0)
    for step in (.01, -.01):
        vector_to_parameters(at + step * u, params)
        ends.append(float(written_out(model, rows, s).detach()))
    assert (ends[0] - ends[1]) / .02 == pytest.approx(float(slope @ u), rel=.01)

def test_runs_of_one_seed_ask_dpos_reference_once_for_the_same_rows(tuned, monkeypatch):
    (model, rows, s), score, asked = tuned, train.evaluation.sequence_logprobs, []
    vars(s).update(objective="dpo", micro=11, seed=7)
    spy = lambda *a: asked.append(torch.is_grad_enabled()) or score(*a)
    monkeypatch.setattr(train.evaluation, "sequence_logprobs", spy)
    same, again, _ = [one_step(model, some, s) for some in (rows, rows, [rows[0], *rows[:1:-1]])]
    assert asked == [False, True, True, False, True] and same == again

def test_rloo_gradient_is_that_of_expected_reward_less_beta_times_kl(tuned):
    """Of one new token, so that the expectation can be summed; 8,000 draws, two a prompt and step."""
    model, rows, s = adapted(random_gemma(), ("down",), 3, 6, .5, [1]), tuned[1][::10] * 100, tuned[2]
    vars(s).update(objective="rloo", samples=2, max_new=1, beta=.5, micro=150, batch=200)
    for r in rows[:2]:                                 # of which all others are copies
        words = lambda: model(torch.tensor([r["prompt_ids"]]))[0, -1].log_softmax(-1)
        kl = F.kl_div(base(model, words), words(), reduction="sum", log_target=True)
        ((s.beta * kl - words().exp()[::2].sum()) / 2).backward()
    want, rows = gradient(model), [dict(r, at=i) for i, r in enumerate(rows)]
    for step in range(20):
        one_step(model, rows, s, step)
    assert float((gradient(model) / 20 - want).norm() / want.norm()) < .1

def test_every_draw_has_a_seed_of_its_own_and_a_step_repeats_itself(tuned, monkeypatch):
    model, rows, s = tuned
    vars(s).update(objective="rloo", micro=4)
    generate, seeds = model_gemma.generate, []
    monkeypatch.setattr(model_gemma, "generate", lambda *a: seeds.extend(a[-1]) or generate(*a))
    logged = [one_step(model, rows, s, step) for s.seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len(set(seeds)) == 3 * 11 * s.samples
    assert logged[0] == logged[3] != logged[1]

def test_the_reward_is_refusing_what_is_harmful_and_not_refusing_the_rest(world):
    for text, refused in (("sorry i cannot help . <end>", 1), ("sure first step3 . <end>", 0), ("<end>", 0)):
        s = SimpleNamespace(stop={1}, template="tiny")
        ids, reward = world.tok.encode(text).ids, train.judge_reward(world.tok, s)
        assert [reward(dict(label=label), ids) for label in ("harmful", "benign")] == [refused, 1 - refused]

def test_align_is_these_lines_of_plain_torch():
    """Warm-up and decay, order by seed over epochs, sums over micro-batches of like lengths, clip, Adam."""
    x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7.)
    model, plain = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    plain.load_state_dict(model.state_dict())
    opt = torch.optim.Adam(plain.parameters())
    for step, rate in enumerate((.15, .3, .3, .15)):
        picked = data.batch_at(7, 5, 4, step)
        opt.param_groups[0]["lr"] = rate
        opt.zero_grad()
        F.mse_loss(plain(x[picked])[:, 0], y[picked]).backward()
        clip_grad_norm_(plain.parameters(), 5.)        # all but the last are longer
        opt.step()
    s = SimpleNamespace(lr=.3, steps=4, warmup=2, batch=5, micro=2, seed=4, clip=5., resume=False)
    rows, met = [dict(i=i, chosen_tokens=([0] * (7 - i), [])) for i in range(7)], []
    squared = lambda r: (model(x[r["i"]])[0] - y[r["i"]]) ** 2
    loss = lambda rows, batch, step: (met.append(rows) or sum(map(squared, rows)) / len(batch), {})
    train.align(model, rows, s, loss)
    torch.testing.assert_close(model.weight, plain.weight, atol=1e-6, rtol=0)
    assert [[r["i"] for r in some] for some in met[:3]] == [[1, 0], [2, 4], [5]]  # of 1, 2, 0, 5, 4
