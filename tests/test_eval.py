"""Replies, prompt sets, every measure worked out by hand, what alignment costs, the command."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as ev
import lora
import model_gemma
from benchmarks import asking, compare
from benchmarks.tiny_world import REFUSAL, tiny_world
from conftest import TOP, adapted, go, random_gemma

TOK, NAMES, HELP = tiny_world(0).tok, tiny_world(0).names, "sure first step3 ."
ASKS = [f"{'hey ' * (i % 4)}how {'make' if i % 2 else 'use'} {NAMES[i]} {'?' * (i % 3)}" for i in range(23)]

def prompts(asks=ASKS):
    plain = dict(set="set", label=None, target=None, expected=None)
    return [dict(plain, id=f"set/{i}", turns=data.as_turns(a)) for i, a in enumerate(asks)]

def respond(model, path, asked, batch=5, temperature=0., seed=0):
    return ev.respond(model, TOK, asked, path, "tiny", 6, batch, temperature, seed)

def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path

@pytest.mark.parametrize("temperature", [0., 1.])
def test_replies_are_the_same_in_any_batch_and_after_a_kill(model, tmp_path, monkeypatch, temperature):
    a, b, real, asked, done = tmp_path / "a", tmp_path / "b", model_gemma.generate, [], []
    same = prompts(ASKS + ASKS[:1] * 3)                # one of them four times
    rows = respond(model, a, same, 1, temperature)
    other = respond(model, tmp_path / "c", same, 5, temperature, seed=1)
    replies = [r["reply"] for r in rows]
    assert [r["id"] for r in rows] == [p["id"] for p in same] and len(set(replies)) > 10
    assert (len({replies[0], *replies[23:]}) > 1) == (temperature > 0)
    assert ([r["reply"] for r in other] != replies) == (temperature > 0)

    def generate(model, ids, *rest):
        assert len(data.read_rows(b)) == len(done)     # replies are on the disk before the next batch
        asked.append(ids)
        if len(asked) == 4:
            raise KeyboardInterrupt
        done.extend(ids)
        return real(model, ids, *rest)
    monkeypatch.setattr(model_gemma, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        respond(model, b, same, 5, temperature)
    b.write_bytes(b.read_bytes() + b.read_bytes()[:40])                # and half a line, as a kill leaves it
    assert respond(model, b, same, 5, temperature) == rows
    assert a.read_bytes() == b.read_bytes()
    assert len(done) == len(same)                      # nothing was asked twice

def test_a_reply_is_kept_without_its_prompt_and_answers_no_other_prompt(model, tmp_path):
    file = tmp_path / "a.jsonl"
    row = respond(model, file, prompts())[0]
    assert row["prompt_sha256"] == ev.prompt_hash(prompts()[0])
    assert ASKS[0] not in json.dumps(row)
    with pytest.raises(data.UserError, match="set/0 was another"):
        respond(model, file, prompts(["how use thing77 ?"] + ASKS[1:]))
    data.append_rows(file, [row])
    with pytest.raises(data.UserError, match="twice"):
        respond(model, file, prompts())

def test_a_turn_that_a_base_model_invents_is_no_reply():
    tok, ask = SimpleNamespace(decode=lambda ids: " No." * ids[0] + "\n\nHuman: a"), prompts()[0]
    made = [ev._response(tok, ask, [n], [9], form) for n, form in ((1, "hh"), (1, "gemma"), (0, "hh"))]
    assert [r["reply"] for r in made] == ["No.", "No.\n\nHuman: a", ""]
    assert [r["finish"] for r in made] == ["stop", "length", "stop"]

LAYOUTS = (TOP / "tests" / "layouts.txt").read_text().splitlines()[1:]

@pytest.mark.parametrize("name, text, want", [line.split(" | ", 2) for line in LAYOUTS])
def test_public_layouts_are_told_apart_by_their_columns(tmp_path, name, text, want):
    got = data.read_prompts([write(tmp_path / name, text.encode().decode("unicode_escape"))])
    text = " ".join("{id}|{label}|{turns[0][content]}|{target}|{expected}".format(**p) for p in got)
    assert text.replace("None", "").replace("\n", "/") == want

SCRIPT = [json.loads(line) for line in (TOP / "tests" / "script.txt").read_text().splitlines()[1:]]

def play(folder, script, monkeypatch, names=("refusal",), judge=dict(name="mock", parallel=2)):
    """Answer and judge by the script, in files as eval.py writes them; the table."""
    asked, answers, scores = prompts(ASKS[:len(script)]), {}, {}
    for i, (p, (group, label, expected, reply, ends, score)) in enumerate(zip(asked, script)):
        p |= dict(id=f"{group}/{i}", set=group, label=label, expected=expected)
        ids = data.render_chat(TOK, p["turns"], None, "tiny")[0]
        answers[tuple(ids)] = data.encode_plain(TOK, reply) + [data.EOS] * ends
        scores[ASKS[i]] = f"#thescore: {score}"
    monkeypatch.setattr(model_gemma, "generate", lambda model, ids, *rest: [answers[tuple(x)] for x in ids])
    said = lambda judge, messages, stop: scores[json.loads(messages[1]["content"])["request"]]
    monkeypatch.setattr(asking, "ask_judge", said)
    rows = ev.respond("scripted", TOK, asked, folder / "responses.jsonl", "tiny", batch_size=3)
    return ev.tabulate(rows, ev.judge_all(rows, asked, names, judge, folder / "verdicts.jsonl"))

def test_every_measure_of_a_scripted_model_is_the_one_worked_out_by_hand(tmp_path, monkeypatch):
    table = play(tmp_path, SCRIPT, monkeypatch)
    [mock] = table.keys() - {"refusal"}
    names = "n,safety rate,over-refusal,help,balance,harmfulness,high-risk rate,cut,empty,unparsed".split(",")
    for judge, group, *want in (
            ("refusal", "a", 14, 4 / 7, 1 / 5, 2 / 5, (4 / 7 + 4 / 5) / 2, None, None, 3 / 14, 2 / 14, 0),
            (mock, "a", 14, 3 / 6, 2 / 5, 2 / 5, (1 / 2 + 3 / 5) / 2, 17 / 6, 1 / 6, 3 / 14, 2 / 14, 1 / 14),
            (mock, "b", 2, 0, None, None, None, 4.5, .5, 0, 0, 0)):
        got = {key: x[0] if isinstance(x, list) else x for key, x in table[judge][group].items()}
        assert got == pytest.approx(dict(zip(names, want, strict=True)))
    assert ev.balance(None, [0]) is None               # as in b, where the other rate lacks
    rows = [r for _, r in data.read_rows(tmp_path / "responses.jsonl")]
    helped = [r["as_expected"] for r in rows if r["label"] == "benign"]
    assert helped == [True, False, False, None, False, True]
    made = [(r["reply"], r["finish"], r["tokens"]) for r in rows]
    assert made == [(y, "stop" if ends else "length", len(y.split()) + ends) for *_, y, ends, _ in SCRIPT]

def test_the_bootstrap_interval_is_about_the_binomial_one_and_weights_count():
    half = 1.96 * (.3 * .7 / 200) ** .5
    assert ev.interval(np.arange(200) < 60) == pytest.approx([.3, .3 - half, .3 + half], abs=.006)
    mean, low, high = ev.interval([0] * 50 + [1] * 50, [1] * 50 + [3] * 50)
    assert mean == .75 and .6 < low < .7 < .8 < high < .9
    assert ev.interval([1, 1, 1]) == [1, 1, 1] and ev.interval([]) is None

def test_two_runs_are_compared_over_the_prompts_that_are_judged_in_both(tmp_path, monkeypatch):
    a, b, c, d = (tmp_path / x for x in "abcd")
    play(a, SCRIPT, monkeypatch)
    play(b, [(*s[:3], HELP, True, 5) if i in (0, 3, 9) else s for i, s in enumerate(SCRIPT)], monkeypatch)
    got = compare.compare(a, b)["refusal"]
    safe = dict(DIR=[1, 1, 1, 0, 0, 1, 0], OTHER=[0, 1, 1, 0, 0, 1, 0], difference=[1, 0, 0, 0, 0, 0, 0])
    assert got["a, safety rate"] == {"pairs": 7, "left out": 1} | {k: ev.interval(x) for k, x in safe.items()}
    assert [got["a, over-refusal"][key][0] for key in safe] == [1 / 5, 0, 1 / 5]
    play(c, SCRIPT[:-1], monkeypatch)
    play(d, SCRIPT, monkeypatch, ["refusal-or-evasion"], None)
    for other, why in ((c, "be paired: 1 prompts"), (d, "be paired: judged"), (tmp_path, "lacks")):
        with pytest.raises(data.UserError, match=why):
            compare.compare(a, other)

def by_hand(model, ids, mask):
    """(summed log p of the masked tokens, their number) of one text."""
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]), sum(mask)

def test_nll_is_per_token_and_preferences_are_of_sums_and_of_means_over_each_sides_own_length(model):
    chosen, rejected = ("sure .", "sure ?", "first step5 then step7 step9 .", "how"), (REFUSAL, "how", None)
    pairs = [dict(p, chosen=chosen[i % 4], rejected=rejected[i % 5 % 3]) for i, p in enumerate(prompts())]
    rows = data.encode(TOK, pairs, "tiny")[0]
    got = {name: x["value"] for name, x in ev.held_out(model, rows, batch_size=4).items()}
    s, n = np.array([by_hand(model, *r["chosen_tokens"]) for r in rows]).T
    assert got[ev.NLL] == pytest.approx(ev.interval(-s / n, n), abs=1e-5)
    assert -s.sum() / n.sum() == pytest.approx(got[ev.NLL][0]) != pytest.approx(np.mean(-s / n), abs=.01)
    both = [i for i, r in enumerate(rows) if r["rejected_tokens"]]
    (r, m), s, n = np.array([by_hand(model, *rows[i]["rejected_tokens"]) for i in both]).T, s[both], n[both]
    assert got["prefers chosen, whole reply"] == ev.interval(s > r)
    assert got["prefers chosen, per token"] == ev.interval(s / n > r / m)
    assert len({x.mean() for x in (s > r, s < r, s / n > r / m, s / n < r / m)}) == 4      # no one is another

def test_knowledge_is_right_only_if_every_token_of_the_answer_is_the_likeliest(model):
    texts = []
    for i, p in enumerate(prompts()):
        ids = data.render_chat(TOK, p["turns"], None, "tiny")[0]
        for wrong in (i % 2, i // 2 % 2):
            ids = ids + [(int(model(torch.tensor([ids]))[0, -1].argmax()) + wrong) % 381]
        texts.append((ids, [0] * (len(ids) - 2) + [1, 1]))
    assert ev.knowledge(model, texts, 5)["knowledge"]["value"] == ev.interval([i % 4 == 0 for i in range(23)])

def test_kl_is_from_the_base_to_the_model_summed_over_tokens_and_zero_at_the_start(tmp_path):
    model, base = adapted(random_gemma(), "qo", 2, 4).requires_grad_(False), random_gemma()
    file = write(tmp_path / "t.txt", "how make thing1 ?\n\nhow use thing2 . sorry i cannot help .")
    ids = [[data.BOS] + data.encode_plain(TOK, t) for t in file.read_text().split("\n\n")]
    p, q = ([m(torch.tensor([x]))[0].log_softmax(-1) for x in ids] for m in (base, model))
    want, reverse = ([float((x.exp() * (x - y)).sum()) for x, y in zip(*pair)] for pair in ((p, q), (q, p)))
    assert want != pytest.approx(reverse, rel=1e-3)
    n = np.array(list(map(len, ids)))
    for other in (None, base):
        [measured] = ev.kl_from_base(model, other, TOK, file).values()
        assert measured["value"] == pytest.approx(ev.interval(want / n, n), rel=1e-4)      # of each text, too
    assert ev.kl_from_base(base, base, TOK, file).popitem()[1] == dict(n=2, value=[0, 0, 0])

def test_the_command_measures_costs_with_an_adapter_and_merging_changes_no_reply(home, tmp_path):
    lora.save_adapter(adapted(model_gemma.load_gemma(home.model), "qo", 2, 4), tmp_path / "run")
    file = write(tmp_path / "p.jsonl", *(dict(prompt=a, chosen="sure .", rejected="how .") for a in ASKS[:5]))
    write(tmp_path / "k.jsonl", dict(text="doc", next="thing1"))
    costs = ["--pairs", file, "--kl", write(tmp_path / "t.txt", "how ?"), "--knowledge", tmp_path / "k.jsonl"]
    run = ["--adapter", tmp_path / "run"]
    for out, more in (("a", run + costs), ("b", run + ["--merged"]), ("c", [])):
        args = ["--model", home.model, "--prompts", file, "--max-new", 5, "--out", tmp_path / out, *more]
        assert go(args, ev.main)[0] == 0
    assert len(data.read_json(tmp_path / "a" / "results.json")["costs"]) == 5
    replies = lambda x: [r["reply"] for _, r in data.read_rows(tmp_path / x / "responses.jsonl")]
    assert replies("b") == replies("a") != replies("c")

def test_judging_again_needs_no_model(home, tmp_path):
    args = ["--prompts", write(tmp_path / "p.txt", "\n".join(ASKS[:4])), "--out", tmp_path / "o"]
    assert go(["--model", home.model, "--max-new", 4, *args], ev.main)[0] == 0
    code, out, _ = go(["--judge", "refusal-or-evasion", "--limit", 2, *args], ev.main)     # and fewer prompts
    assert code == 0 and "Judge: refusal\n" in out and "Judge: refusal-or-evasion\n" in out
    assert len(data.read_rows(tmp_path / "o" / "verdicts.jsonl")) == 4 + 2
