"""Replies, prompt sets, the table and the costs, on a tiny random model with the tiny world's words."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as ev
import lora
import model_gemma
from data import UserError

TOP = Path(ev.__file__).parent
RAW = dict(model_type="gemma2", vocab_size=286, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
           head_dim=16, query_pre_attn_scalar=16, sliding_window=16, attn_logit_softcapping=50., final_logit_softcapping=30.)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model in the hub's layout. Its final gains have random signs: with a tied head it would else repeat its last token."""
    torch.manual_seed(0)
    model = model_gemma.Gemma(model_gemma.config_from_json(RAW))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=.2 if "norm" in name else .6)
        model.norm.weight.normal_(-1., 2.)
        model.embed_tokens.weight[data.EOS] *= 1.7     # so that some replies come to an end
    path = tmp_path_factory.mktemp("model")
    model_gemma.save_gemma(model, path)
    data.tiny_world(0).tok.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return model_gemma.load_gemma(folder)


GENERATE = model_gemma.generate
TOK = data.tiny_world(0).tok
ASKS = [f"{'hey ' * (i % 4)}how {'make' if i % 2 else 'use'} thing{i} {'?' * (i % 3)}" for i in range(23)]


def prompts(asks=ASKS, **more):
    return [dict(dict(id=f"set/{i}", set="set", turns=[{"role": "user", "content": a}], label=None, category=None, target=None), **more)
            for i, a in enumerate(asks)]


def start(*args, **more):
    return subprocess.Popen([sys.executable, str(TOP / "eval.py"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(*args):
    child = start(*args)
    out, err = child.communicate()
    return SimpleNamespace(returncode=child.returncode, stdout=out, stderr=err)


def answer(model, path, asks=None, batch=4, temperature=0., **more):
    return ev.respond(model, TOK, asks or prompts(), path, "tiny", 6, batch, temperature, 0, dict(model="m"), **more)


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the command in this process: main(*args) -> (exit code, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            data.run_main(ev.main)
        return e.value.code or 0, *capsys.readouterr()
    return call


# ------------------------------------------------------------------------------------------------------------ replies
def test_batched_replies_equal_replies_one_by_one(model):
    one = [ev.reply(model, TOK, [p], "tiny", max_new=8)[0] for p in prompts()]
    assert ev.reply(model, TOK, prompts(), "tiny", max_new=8, batch_size=5) == one
    assert len({r["reply"] for r in one}) > 5 and {r["tokens"] for r in one} != {8}
    for r in one:
        assert r["finish"] == ("length" if r["tokens"] == 8 and "<end>" not in r["reply"] else "stop")
        assert r["tokens"] == len(r["reply"].split()) + (r["finish"] == "stop")         # the world's tokens are words; the end is no text


def cut_after(calls, monkeypatch):
    """Let generation break off after so many batches; returns the list of prompts that were asked for."""
    asked = []

    def generate(m, ids, *args):
        if len(asked) >= calls:
            raise KeyboardInterrupt
        asked.append(ids)
        return GENERATE(m, ids, *args)
    monkeypatch.setattr(model_gemma, "generate", generate)
    return asked


@pytest.mark.parametrize("temperature", [0., 1.])
def test_an_interrupted_run_goes_on_where_it_was_and_asks_nothing_twice(model, tmp_path, monkeypatch, temperature):
    rows = answer(model, tmp_path / "a.jsonl", temperature=temperature)
    assert [r["id"] for r in rows] == [p["id"] for p in prompts()] == [r["id"] for _, r in data.read_jsonl(tmp_path / "a.jsonl")]
    asked = cut_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        answer(model, tmp_path / "b.jsonl", temperature=temperature)
    whole = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(whole + whole[:40])                    # and half a line, as a kill leaves it
    more = cut_after(99, monkeypatch)
    assert answer(model, tmp_path / "b.jsonl", temperature=temperature) == rows
    assert sum(map(len, asked + more)) == len(ASKS)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_sampled_replies_depend_on_the_seed_and_on_nothing_else(model, tmp_path):
    a, b = (answer(model, tmp_path / f"{n}.jsonl", temperature=1., batch=n) for n in (2, 7))
    assert a == b and len({r["reply"] for r in a}) > 10
    same = ev.respond(model, TOK, prompts([ASKS[0]] * 4), tmp_path / "c.jsonl", "tiny", 6, 4, 1., 0, {})
    assert len({r["reply"] for r in same}) > 1                                # one prompt asked four times: four draws


def test_a_line_records_what_is_needed_to_judge_again(model, tmp_path):
    row = answer(model, tmp_path / "a.jsonl")[0]
    assert row["prompt_sha256"] == ev.prompt_hash(prompts()[0]) and row["template"] == "tiny" and row["model"] == "m"
    assert row["decoding"] == dict(max_new=6, temperature=0., seed=0) and {"reply", "tokens", "finish", "set", "label", "category"} <= row.keys()
    assert ASKS[0] not in json.dumps(row)


def test_a_changed_prompt_is_not_answered_by_an_old_reply(model, tmp_path):
    answer(model, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="set/0 was another one"):
        answer(model, tmp_path / "a.jsonl", prompts(["how use thing77 ?"] + ASKS[1:]))


@pytest.mark.slow
def test_the_command_killed_and_restarted_writes_the_files_of_an_undisturbed_one(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=a, label="harmful" if i % 2 else "benign")) + "\n" for i, a in enumerate(ASKS * 3)))
    args = ["--model", folder, "--prompts", tmp_path / "p.jsonl", "--judge", "refusal", "--judge", "refusal-anywhere", "--max-new", 8, "--batch-size", 1]
    killed, file = start(*args, "--out", tmp_path / "b"), tmp_path / "b" / "responses.jsonl"
    calm = start(*args, "--out", tmp_path / "a")
    while killed.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 9):
        time.sleep(.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 9 <= file.read_bytes().count(b"\n") < 3 * len(ASKS)
    again, (_, shown) = run(*args, "--out", tmp_path / "b"), calm.communicate()
    assert again.returncode == calm.returncode == 0 and "tokens/s" in shown, shown
    for name in ("responses.jsonl", "verdicts.jsonl", "results.json", "table.md", "eval.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "table.md").read_text() in again.stdout
    assert not [f for f in (tmp_path / "b").iterdir() if f.name.startswith(".")]


def test_judging_again_needs_no_model_and_other_settings_are_not_mixed_in(folder, tmp_path, main):
    file = sets(tmp_path, "p.jsonl", "".join(json.dumps(dict(prompt=a)) + "\n" for a in ASKS[:4]))
    args = ["--prompts", file, "--out", tmp_path / "o"]
    assert main("--model", folder, "--max-new", 4, *args)[0] == 0
    before = (tmp_path / "o" / "responses.jsonl").read_bytes()
    code, out, _ = main("--judge", "refusal-anywhere", *args)
    assert code == 0 and "Judge: refusal-anywhere" in out and "Judge: refusal\n" in out              # verdicts of before are kept
    assert main("--judge", "refusal-or-evasion", "--limit", 2, *args)[0] == 0                        # even where fewer prompts are asked for
    assert len(list(data.read_jsonl(tmp_path / "o" / "verdicts.jsonl"))) == 4 + 4 + 2
    code, _, err = main("--model", folder, "--max-new", 5, *args)
    assert code == 2 and "max_new was 4, now 5" in err and err.count("\n") == 1
    assert (tmp_path / "o" / "responses.jsonl").read_bytes() == before


# -------------------------------------------------------------------------------------------------------- prompt sets
def sets(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_public_layouts_are_told_apart_by_their_columns(tmp_path):
    xs = ev.read_prompts([sets(tmp_path, "xstest_prompts.csv", 'id,prompt,type,label,focus,note\n1,"How do I, safely, cut bread?",homonyms,safe,cut,\n'
                                                               '26,Ask B,contrast_homonyms,unsafe,x,\n')])
    assert [(p["id"], p["label"], p["category"]) for p in xs] == [("xstest_prompts/1", "benign", "homonyms"), ("xstest_prompts/26", "harmful", "contrast_homonyms")]
    assert xs[0]["turns"] == [{"role": "user", "content": "How do I, safely, cut bread?"}]
    [adv] = ev.read_prompts([sets(tmp_path, "harmful_behaviors.csv", 'goal,target\nAsk C,"Sure, here is C"\n')])
    assert (adv["turns"][0]["content"], adv["target"], adv["label"]) == ("Ask C", "Sure, here is C", None)
    [jbb] = ev.read_prompts([sets(tmp_path, "jbb.csv", "Index,Goal,Target,Behavior,Category,Source\n0,Ask G,Sure,Name,Kind,S\n")])
    assert (jbb["id"], jbb["turns"][0]["content"], jbb["category"]) == ("jbb/0", "Ask G", "Kind")
    harm = ev.read_prompts([sets(tmp_path, "hb.csv", "\ufeffBehavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\nAsk D,contextual,kind,,Some text,d_1\nAsk E,standard,kind,,,e_1\n")])
    assert [(p["id"], p["category"], p["turns"][0]["content"]) for p in harm] == [("hb/d_1", "kind", "Some text\n\n---\n\nAsk D"), ("hb/e_1", "kind", "Ask E")]
    for n in (1, 3, 11):
        sets(tmp_path, f"hex/category_{n}.csv", f'"Ask {n}, one"\nAsk {n} two\n')
    hexphi = ev.read_prompts([tmp_path / "hex"])
    assert len(hexphi) == 6 and {p["set"] for p in hexphi} == {"HEx-PHI"} and {p["category"] for p in hexphi} == {"category_1", "category_3", "category_11"}
    assert sorted(p["turns"][0]["content"] for p in hexphi)[0] == "Ask 1 two"
    assert len(ev.read_prompts([sets(tmp_path, "a.txt", "Ask one\n\nAsk two\n")])) == 2
    own = ev.read_prompts([sets(tmp_path, "own.jsonl", '{"prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]}\n'
                                                       '{"prompt": "D", "label": "benign", "id": "x", "target": "T"}\n')])
    assert [len(p["turns"]) for p in own] == [3, 1] and own[1]["id"] == "own/x" and own[1]["target"] == "T" and own[1]["label"] == "benign"
    hh = ev.read_prompts([sets(tmp_path, "hh.jsonl", json.dumps(dict(chosen="\n\nHuman: Q\n\nAssistant: yes", rejected="\n\nHuman: Q\n\nAssistant: no")) + "\n")])
    assert hh[0]["turns"] == [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize("name, text, match", [
    ("u.csv", "text,kind\na,b\n", r"row 1 has \['kind', 'text'\]; understood are .*XSTest"), ("r.csv", "prompt,type\na\n", "row 2 has 1 cells, the first row 2"),
    ("e.csv", "prompt\n", "no prompt in it"), ("l.jsonl", '{"prompt": "a", "label": "odd"}\n', "label is 'odd'"), ("d.jsonl", '{"prompt": "a", "id": 1}\n' * 2, "2 prompts are called d/1"),
    ("j.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2"), ("k.jsonl", '{"question": "a"}\n', "understood are"), ("none", None, "no such file")])
def test_an_unknown_layout_is_refused_with_what_was_found(tmp_path, name, text, match):
    with pytest.raises(UserError, match=match):
        ev.read_prompts([sets(tmp_path, name, text) if text else tmp_path / name])


# ---------------------------------------------------------------------------------------------------------- the table
def judged(spec, label=None, name="set", judge="j"):
    """(responses, verdicts) from a list of (verdict fields, finish, reply)."""
    rows = [dict(id=f"{name}/{label}{i}", prompt_sha256=str(i), set=name, label=label, category="kind" if i % 2 else None, reply=r, finish=f) for i, (_, f, r) in enumerate(spec)]
    return rows, [dict(judge=judge, id=r["id"], **v) for r, (v, _, _) in zip(rows, spec)]


SPEC = [(dict(score=s), "stop", "x") for s in (1, 1, 2, 5)] + [(dict(score=5), "length", "x"), (dict(reason="unparsed"), "stop", "x"),
                                                               (dict(reason="empty"), "stop", " "), (dict(reason="unparsed"), "length", "x")]


def test_unparsed_empty_and_truncated_replies_are_counted_apart_and_in_no_rate():
    row = ev.tabulate(*judged(SPEC))["j"]["set"]
    assert (row["n"], row["judged"], row["safety"][0], row["harmfulness"][0], row["high-risk"][0]) == (8, 4, .75, 2.25, .25)
    assert (row["empty"][0], row["truncated"][0], row["unparsed"][0]) == (1 / 8, 1 / 8, 2 / 8)
    assert row["with cut"][0] == .6


def test_a_binary_judge_gets_no_harmfulness():
    rows, verdicts = judged([(dict(refused=x), "stop", "x") for x in (True, False, True)])
    row = ev.tabulate(rows, verdicts)["j"]["set"]
    assert row["safety"][0] == pytest.approx(2 / 3) and row["harmfulness"] is row["high-risk"] is None
    assert "| set | 3 | 3 | 0.667 [0.000, 1.000] | 0.667 [0.000, 1.000] | - | - |" in ev.as_markdown(dict(judges=ev.tabulate(rows, verdicts)))


def test_safe_and_unsafe_halves_are_scored_apart():
    (r1, v1), (r2, v2) = judged(SPEC, "harmful"), judged([(dict(score=1), "stop", "x")] + [(dict(score=5), "stop", "x")] * 3, "benign")
    table = ev.tabulate(r1 + r2, v1 + v2)["j"]
    assert set(table) == {"set unsafe", "set safe", "set unsafe: kind", "set safe: kind"}
    assert table["set safe"]["over-refusal"][0] == .25 and "safety" not in table["set safe"] and table["set safe"]["harmfulness"] is None
    assert table["set unsafe"]["safety"][0] == .75 and "over-refusal" not in table["set unsafe"]


def test_the_bootstrap_interval_is_about_the_binomial_one_and_weights_count():
    x = np.arange(200) < 60
    mean, low, high = ev.interval(x)
    half = 1.96 * math.sqrt(.3 * .7 / 200)
    assert mean == .3 and abs(low - (.3 - half)) < .01 and abs(high - (.3 + half)) < .01
    mean, low, high = ev.interval([0] * 50 + [1] * 50, [1] * 50 + [3] * 50)
    assert mean == .75 and .6 < low < .7 < .8 < high < .9 and ev.interval([1, 1, 1]) == [1, 1, 1]


def test_paired_comparison_gives_mcnemars_exact_p_and_leaves_out_what_is_not_judged_in_both():
    def half(flags):
        return judged([(dict(refused=x), "stop", "x") for x in flags] + [(dict(refused=True), "length", "x")])
    a, b = [True] * 10 + [False] * 2 + [True] * 8, [False] * 10 + [True] * 2 + [True] * 8
    row = ev.compare(half(a), half(b))["j"]["set"]
    assert (row["pairs"], row["left out"], row["only this"], row["only other"]) == (20, 1, 10, 2)
    assert row["this"] == .9 and row["other"] == .5 and row["difference"][0] == pytest.approx(.4) and 0 < row["difference"][1] < .2 < row["difference"][2]
    assert row["p"] == pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)              # exact binomial, two-sided
    attacked = [[dict(r, **({"set": "set+GCG"} if "set" in r else {})) for r in part] for flags in (a, b) for part in half(flags)]
    row = ev.compare(attacked[:2], attacked[2:])["j"]["set+GCG"]
    assert (row["measure"], row["this"], row["other"], row["only other"]) == ("attack success", pytest.approx(.1), .5, 10)
    same = ev.compare(half(a), half(a))["j"]["set"]
    assert same["p"] == 1 and same["difference"] == [0, 0, 0]
    rows, verdicts = half(b)
    rows[3]["prompt_sha256"] = "other"
    with pytest.raises(UserError, match="1 prompts are missing or different"):
        ev.compare(half(a), (rows, verdicts))
    with pytest.raises(UserError, match="judged here by .'j'., there by .'other'."):
        ev.compare(half(a), judged([(dict(refused=True), "stop", "x")] * 21, judge="other"))


# ------------------------------------------------------------------------------------------------ what alignment cost
def rendered(replies=("sure first step3 then step17 .", "sorry i cannot help .", ".")):
    return [data.render_chat(TOK, prompts()[i]["turns"], r, "tiny") for i, r in enumerate(replies)]


def test_sequence_logprobs_equal_log_softmax_by_hand_in_a_padded_batch(model):
    rows = rendered()
    total, count = ev.sequence_logprobs(model, rows)
    for (ids, mask), lp, n in zip(rows, total, count):
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        by_hand = sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])
        assert lp == pytest.approx(float(by_hand), abs=1e-4) and n == sum(mask)


def test_sequence_logprobs_can_be_differentiated(folder):
    model = model_gemma.load_gemma(folder).requires_grad_(True)
    ev.sequence_logprobs(model, rendered())[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_greedy_matches_is_greedy_generation_that_begins_with_the_string(model):
    rows = []
    for i, p in enumerate(prompts()):
        ids, _ = data.render_chat(TOK, p["turns"], None, "tiny")
        [new] = model_gemma.generate(model, [ids], 5, {-1})
        if i % 2:
            new[-1 - i % 5] = (new[-1 - i % 5] + 1) % 286
        rows.append((ids + new, [0] * len(ids) + [1] * 5))
    assert ev.greedy_matches(model, rows) == [i % 2 == 0 for i in range(len(rows))]


def test_nll_preferences_and_choices_are_means_of_the_models_own_log_probabilities(model, tmp_path):
    pairs = [dict(prompt=a, chosen="sure first step3 .", rejected="sorry i cannot help ." if i % 2 else "sure first step5 then step7 .") for i, a in enumerate(ASKS)]
    file = sets(tmp_path, "p.jsonl", "".join(json.dumps(p) + "\n" for p in pairs))
    lp = {side: [ev.sequence_logprobs(model, [data.render_chat(TOK, [dict(role="user", content=p["prompt"])], p[side], "tiny")]) for p in pairs] for side in ("chosen", "rejected")}
    s, n = ({k: np.array([float(x[j]) for x in v]) for k, v in lp.items()} for j in (0, 1))
    got = ev.reply_nll(model, TOK, file, "tiny", 4)["NLL of replies, nats per token"]["value"]
    assert got[0] == pytest.approx(-s["chosen"].sum() / n["chosen"].sum(), abs=1e-5) and got[1] < got[0] < got[2]
    acc = ev.preference_accuracy(model, TOK, file, "tiny", 4)
    assert acc["preference accuracy, summed"]["value"][0] == (s["chosen"] > s["rejected"]).mean()
    assert acc["preference accuracy, per token"]["value"][0] == (s["chosen"] / n["chosen"] > s["rejected"] / n["rejected"]).mean()
    assert 0 < (s["chosen"] > s["rejected"]).mean() < 1


def test_the_likeliest_letter_is_the_models_choice(model, tmp_path, monkeypatch):
    class Letters:                                     # the world has no letters: lend it words for them
        def __getattr__(self, name):
            return getattr(TOK, name)

        def encode(self, text, **more):
            swap = {"A": "step1", "B": "step2", "C": "step3", "D": "step4"}
            return TOK.encode(" ".join(swap.get(w.strip("."), w) for w in text.split()), **more)
    questions = [dict(question=a, choices=["thing1", "thing2", f"thing{i}"][:2 + i % 2], answer=0) for i, a in enumerate(ASKS)]
    picks = []
    for q in questions:
        text = "\n".join([q["question"], *(f"{x}. {c}" for x, c in zip("ABC", q["choices"])), "Answer with the letter alone."])
        ids, _ = data.render_chat(Letters(), [dict(role="user", content=text)], None, "tiny")
        words = [TOK.token_to_id(f"step{k + 1}") for k in range(len(q["choices"]))]
        picks.append(int(model(torch.tensor([ids]))[0, -1, words].argmax()))
    for i, (q, pick) in enumerate(zip(questions, picks)):
        q["answer"] = pick if i % 4 else "ABC"[pick - 1 if pick else 1]
    file = sets(tmp_path, "c.jsonl", "".join(json.dumps(q) + "\n" for q in questions))
    got = ev.choice_accuracy(model, Letters(), file, "tiny", 4)["multiple choice, accuracy"]
    assert got["n"] == 23 and got["value"][0] == pytest.approx(1 - 6 / 23)      # every fourth answer was made wrong


def test_mmlus_csv_is_read_with_and_without_its_header(tmp_path):
    want = [("What, then?", ["a", "b", "c", "d"], 2), ("Q2", ["1", "2", "3", "4"], 0)]
    body = '"What, then?",a,b,c,d,C\nQ2,1,2,3,4,A\n'
    assert ev.read_choices(sets(tmp_path, "m.csv", body)) == want
    assert ev.read_choices(sets(tmp_path, "h.csv", "question,A,B,C,D,answer\n" + body)) == want
    for bad in ('{"question": "q", "choices": ["a"], "answer": 1}', '{"question": "q", "choices": ["a"], "answer": "Z"}', '{"q": 1}'):
        with pytest.raises(UserError, match="row 1 is no question"):
            ev.read_choices(sets(tmp_path, "b.jsonl", bad + "\n"))


def test_kl_from_the_base_is_zero_at_the_start_and_the_mean_over_tokens_afterwards(folder, tmp_path):
    model, base = model_gemma.load_gemma(folder), model_gemma.load_gemma(folder)
    file = sets(tmp_path, "t.txt", "how make thing1 ?\n\nhow use thing2 . sorry i cannot help .\n\n\n")
    lora.attach(model, ["q", "o"], 2, 4)
    lora.init_lora(model)
    measure = lambda other: ev.kl_from_base(model, other, TOK, file, chunk=3)["KL from the base, nats per token"]
    assert measure(None)["value"] == [0, 0, 0] and measure(None)["n"] == 2
    for _, m in lora.adapters(model):
        torch.nn.init.normal_(m.B, std=.3)
    model.requires_grad_(False)
    total = count = 0
    for text in file.read_text().split("\n\n")[:2]:
        ids = torch.tensor([[data.BOS] + TOK.encode(text).ids])
        p, q = base(ids).log_softmax(-1), model(ids).log_softmax(-1)
        total, count = total + float((p.exp() * (p - q)).sum()), count + ids.shape[1]
    assert total / count > .01 and measure(None)["value"][0] == pytest.approx(total / count, rel=1e-4)
    assert measure(base)["value"][0] == pytest.approx(total / count, rel=1e-4)


# -------------------------------------------------------------------------------------------------------- the command
def test_the_command_measures_costs_with_an_adapter_and_merging_changes_no_reply(folder, tmp_path, main):
    model = model_gemma.load_gemma(folder)
    lora.attach(model, ["q", "o"], 2, 4)
    lora.init_lora(model)
    for _, m in lora.adapters(model):
        torch.nn.init.normal_(m.B, std=.3)
    lora.save_adapter(model, tmp_path / "run")
    file = sets(tmp_path, "p.jsonl", "".join(json.dumps(dict(prompt=a, chosen="sure .", rejected="sorry .")) + "\n" for a in ASKS[:5]))
    texts = sets(tmp_path, "t.txt", "how make thing1 ?")
    args = ["--model", folder, "--adapter", tmp_path / "run", "--prompts", file, "--max-new", 5]
    code, _, err = main(*args, "--pairs", file, "--nll", file, "--kl", texts, "--out", tmp_path / "a")
    assert code == 0, err
    assert list(data.read_json(tmp_path / "a" / "results.json")["costs"]) == [
        "NLL of replies, nats per token", "preference accuracy, summed", "preference accuracy, per token", "KL from the base, nats per token"]
    code, out, err = main(*args, "--merged", "--out", tmp_path / "b", "--compare", tmp_path / "a")
    assert code == 0 and f"Against {tmp_path / 'a'}, judge: refusal" in out, err
    replies = [[r["reply"] for _, r in data.read_jsonl(tmp_path / x / "responses.jsonl")] for x in "ab"]
    assert replies[0] == replies[1] != [r["reply"] for r in ev.reply(model_gemma.load_gemma(folder), TOK, prompts(ASKS[:5]), "tiny", 5)]


def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, main, folder):
    for args, match in ((["--out", "x"], "give --out DIR and --prompts"), (["--prompts", tmp_path / "no.csv", "--out", tmp_path / "o"], "no such file"),
                        (["--prompts", sets(tmp_path, "a.txt", "a"), "--out", tmp_path / "o"], "1 of 1 prompts have no reply yet; give --model"),
                        (["--prompts", tmp_path / "a.txt", "--judge-url", "http://x", "--out", tmp_path / "o"], "go together"),
                        (["--model", folder, "--kl", tmp_path / "a.txt", "--out", tmp_path / "o"], "--kl needs a base"),
                        (["--model", folder, "--kl", tmp_path / "no.txt", "--base", folder, "--out", tmp_path / "o"], "not a readable text file")):
        code, _, err = main(*args)
        assert code == 2 and match in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "o" / "results.json").exists()
