"""What a feature does and what an adapter learned: by hand, by planted truth, against chance."""
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import lora
import model_gemma
import sae as sae_module
import sails
from benchmarks import explain, tiny_world
from conftest import go, random_gemma, random_sae, trained
from benchmarks.explain import token_text

ALIGNED, UNALIGNED = [[2, 7, 8, 9, 10, 11], [2, 13, 14]], [[2, 20, 21, 7, 7], [2, 9]]
SHOWN, PROMPTS = [[2, 5, 6, 7, 8, 9, 30], [2, 5, 6, 7, 8, 31], [2, 40, 41]], [[2, 5, 6], [2, 7, 8, 9, 10]]
SAES, PLACES = {i: random_sae(i, D=96, N=200) for i in (0, 1)}, tuple(lora.PLACES)
CONFIG = dict(peft_type="LORA", r=5, lora_alpha=10)

@pytest.mark.parametrize("layer", [0, 1])
def test_an_effect_is_the_change_when_the_step_is_added_to_a_whole_prompts_last_token(model, world, layer):
    step, changes = 3 * random_sae().W_dec[4], []
    for ids in map(torch.tensor, PROMPTS):
        h = model.residuals(ids[None], [layer])[layer]
        h[:, -1] += step
        after, _ = model.hidden(embeds=h, first=layer + 1)
        changes.append(model.logits(after[0, -1]).log_softmax(-1) - model(ids[None])[0, -1].log_softmax(-1))
    mean = torch.stack(changes).mean(0)
    [[raises, lowers]] = explain.effects(model, world.tok, layer, step[None], PROMPTS, n=3)
    for told, best in ((raises, mean.topk(3)), (lowers, mean.topk(3, largest=False))):
        assert told == [[token_text(world.tok, t), pytest.approx(v, abs=1e-4)]
                        for t, v in zip(best.indices.tolist(), best.values.tolist())]

@pytest.fixture(scope="module")
def told(world):
    """describe()'s rows of features 3, 17 of layer 0 and 5, 6 of layer 1; the last never fires."""
    saes, chosen = {0: random_sae(0), 1: random_sae(1)}, {0: torch.tensor([3, 17]), 1: torch.tensor([5, 6])}
    saes[1].threshold[6] = 1e9
    stats = {i: {key: torch.arange(40) / n for n, key in enumerate(("mu_unaligned", "mu_aligned", "t"), 1)}
             for i in saes}
    more = (ALIGNED, UNALIGNED), SHOWN, PROMPTS, 3
    return saes, explain.describe(random_gemma(), world.tok, saes, stats, chosen, *more)

def alone(saes, texts, row):
    """A feature's activations, text by text, BOS left out."""
    run = lambda ids: random_gemma().residuals(torch.tensor([ids]), [row["layer"]])[row["layer"]][0, 1:]
    return [saes[row["layer"]].encode(run(ids))[:, row["feature"]].tolist() for ids in texts]

def test_where_a_feature_fires_is_counted_on_the_two_sets(told, world):
    for row in told[1]:
        sides, mass = [alone(told[0], side, row) for side in (ALIGNED, UNALIGNED)], Counter()
        for ids, values in zip(ALIGNED + UNALIGNED, sum(sides, [])):
            for t, a in zip(ids[1:], values):
                mass[token_text(world.tok, t)] += a
        best = [[w, pytest.approx(m / mass.total(), abs=1e-5)] for w, m in mass.most_common(6) if m > 0]
        assert row["fires_on"] == best
        shares = [sum(max(values) > 0 for values in side) / 2 for side in sides]
        assert [row["fires_aligned"], row["fires_unaligned"]] == shares
        on = [a for values in sum(sides, []) for a in values if a > 0]
        assert row["maximum"] == pytest.approx(max(on, default=0), abs=1e-5)
        assert row["typical"] == pytest.approx(np.mean(on or [0]), abs=1e-5)
        assert row["histogram"] == np.histogram(on, 20, (0, max(on, default=1)))[0].tolist()
        assert row["delta"] == pytest.approx(row["mu_aligned"] - row["mu_unaligned"]) and row["delta"] < 0

def test_contexts_are_the_strongest_of_the_shown_texts_none_twice(told, world):
    for row in told[1]:
        seen = {}
        for t, values in enumerate(alone(told[0], SHOWN, row)):
            for p, a in enumerate(values, 1):
                key, word = tuple(SHOWN[t][max(0, p - 3):p + 1]), token_text(world.tok, SHOWN[t][p])
                seen[key] = max(seen.get(key, (0, word)), (a, word))
        best = [pytest.approx(a, abs=1e-5) for a, _ in sorted(seen.values(), reverse=True)[:3] if a > 0]
        assert [c["activation"] for c in row["contexts"]] == best
        assert {c["tokens"][c["at"]] for c in row["contexts"]} <= {word for a, word in seen.values() if a > 0}

def planted(features, seed, rank=5):
    """A LoRA that reads and writes these features' rows as the projections meet them; None: noise."""
    model, gen = random_gemma(hidden_size=96), torch.Generator().manual_seed(100 + seed)  # no SAE's own
    lora.attach(model, PLACES, rank, 10)
    for _, m in lora.adapters(model):
        for p in (m.A, m.B):
            p.data.normal_(generator=gen)
        if features is not None:
            g = 1 + getattr(model.layers[m.layer], model_gemma.NORMS[m.place]).weight
            rows = F.normalize(SAES[m.layer].W_dec[features] * g, dim=1)
            (m.A if m.side == "read" else m.B.T).data.copy_(rows)
    return model, {name: p.detach() for name, p in lora._tensors(model).items()}

def test_shares_energy_and_inside_equal_those_of_the_whole_update():
    model, tensors = planted(None, 3)
    chosen = {0: [7, 8], 1: [9]}
    rows = {e["name"]: e for e in explain.learned(tensors, CONFIG, model, SAES, chosen)["adapters"]}
    for name, m in lora.adapters(model):
        e, dW = rows[name], m.update().detach()
        dW = dW if m.side == "read" else dW.T          # (., D)
        gain = 1 + getattr(model.layers[m.layer], model_gemma.NORMS[m.place]).weight
        u = F.normalize(SAES[m.layer].W_dec[chosen[m.layer]] * gain, dim=1)
        want = (dW @ u.T).square().sum(0) / dW.square().sum()
        assert [o["share"] for o in e["chosen"]] == pytest.approx(want.tolist(), rel=1e-4)
        inside = (dW @ torch.linalg.qr(u.T)[0]).square().sum() / dW.square().sum()
        want = [float(dW.square().sum()), float(inside)]
        assert [e["energy"], e["inside"]] == pytest.approx(want, rel=1e-4)
        assert (e["side"], e["sae_layer"], e["chance"]) == (m.side, m.layer, len(u) / 96)

def test_the_features_of_an_adapter_built_from_planted_ones_are_found():
    found = []
    for seed in range(5):
        features = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:5].tolist()
        model, tensors = planted(features, seed)
        for e in explain.learned(tensors, CONFIG, model, SAES, {})["sums"]:
            found.append(len({o["feature"] for o in e["others"]} & set(features)) / 5)
    assert np.mean(found) >= .8

def test_nothing_is_above_the_baseline_of_twenty_random_adapters():
    for seed in range(20):
        model, tensors = planted(None, seed)
        explained = explain.learned(tensors, CONFIG, model, SAES, {})
        assert [e["name"] for e in explained["sums"] + explained["adapters"] if e["others"]] == []

@pytest.mark.parametrize("change", ["lora_B", "lora_E", "D"])
def test_what_is_no_lora_on_this_model_is_refused(change):
    model, tensors = planted(None, 0)
    if change == "lora_B":                             # an A without its B; what is no part of a LoRA
        tensors.pop(next(name for name in tensors if change in name))
    tensors |= {f"layers.0.mlp.up_proj.{change}.weight": torch.zeros(5, 96)} if change == "lora_E" else {}
    with pytest.raises(data.UserError, match="do not belong together" if change == "D" else "no plain LoRA"):
        explain.learned(tensors, CONFIG, model, {0: random_sae()} if change == "D" else SAES, {})

def test_a_run_explains_itself_and_the_command_says_the_same_with_or_without_its_features(run, home):
    explained, features = (data.read_json(run.out / f"{name}.json") for name in ("explain", "features"))
    for e in explained["sums"] + explained["adapters"]:
        mine = [f["feature"] for f in features if f["layer"] == e["sae_layer"]]
        assert [o["feature"] for o in e["chosen"]] == mine and e["inside"] > e["chance"] == 6 / 24
    asked = f"--explain {run.out} --model {home.model} --sae {home.sae} --layers 0,1 --width 40".split()
    code, said, _ = go([*asked, "--features", run.out / "features.json"], sails.main)
    assert code == 0 and f"the chosen span {explained['sums'][0]['inside']:.3f}" in said
    assert said.count("chosen, raises '") == 5 * len(explained["sums"])
    assert "shares of the update" in (said := go(asked, sails.main)[1]) and "chosen" not in said

def test_only_gemma_scopes_features_get_a_link():
    found = [explain.neuronpedia_url(x, 20, "16k", 7) for x in ("google/gemma-scope-9b-pt-res@abc", "fit")]
    assert found == ["https://www.neuronpedia.org/gemma-2-9b/20-gemmascope-res-16k/7", None]

def test_texts_of_the_contrast_are_shown_only_if_asked_for(run, home, tmp_path):
    assert all(row["contexts"] == [] for row in data.read_json(run.out / "features.json"))  # no --text
    shown = trained(home, tmp_path / "run", "--show-texts --steps 1 --layers 0").out
    assert any(row["contexts"] for row in data.read_json(shown / "features.json"))

@pytest.mark.slow
def test_chosen_features_raise_refusal_words_more_than_others_that_fire(tmp_path):
    tiny_world.make_world(tmp_path, 0, (0, 1))
    model, tok = model_gemma.load_gemma(tmp_path), data.load_tokenizer(tmp_path)
    saes, words = {2: sae_module.load_sae(tmp_path / "sae", 2, "256")}, set(tiny_world.REFUSAL.split())
    for seed in (0, 1):
        rows, _ = data.encode(tok, data.read_pairs(tmp_path / f"data-{seed}" / "train.jsonl")[0], "tiny")
        ends = [r["prompt_ids"] for r in explain.spread(rows, 8)]
        pairs = sails.contrast_pairs([r for r in rows if r["label"] == "harmful"])  # refusals, answers
        stats = sails.contrast_means(model, saes, pairs)
        mu = [stats[2][key] for key in ("mu_aligned", "mu_unaligned")]
        fires, sides = (sum(mu) > 0).nonzero()[:, 0], [[ids for ids, _ in side] for side in zip(*pairs)]
        told = explain.describe(model, tok, saes, stats, {2: fires}, sides, [], ends)
        nats = {r["feature"]: sum(v for w, v in r["raises"] if w in words) for r in told}
        found = sum(nats[f] for f in sails.top_features(*mu, 8).tolist())
        rng, every = np.random.default_rng(0), np.array(list(nats.values()))
        null = [rng.permutation(every)[:8].sum() for _ in range(1000)]
        assert np.mean(np.array(null) >= found) < .05

def test_promoted_tokens_are_those_whose_logits_the_direction_raises_most(model, world):
    rows = random_sae().W_dec[:3]
    raised = F.linear(rows * (1 + model.norm.weight), model.embed_tokens.weight).argsort(descending=True)
    for words, best in zip(explain.promoted_tokens(model, world.tok, rows, 5), raised.tolist()):
        assert words == [token_text(world.tok, i) for i in best[:5]]
