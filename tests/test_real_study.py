"""The real study: its numbers on data whose truth is known, its SAEs, and the whole of it on a tiny model."""
import numpy as np
import pytest
import torch
from conftest import go, random_sae

import data
from benchmarks import real_study

@pytest.mark.parametrize("seeds, between", ((1, 0.), (3, .02)))
def test_intervals_count_replies_weighed_by_tokens_and_seeds(seeds, between):
    rng, found = np.random.default_rng(1), []
    for _ in range(1000):
        tokens = rng.integers(5, 60, 200)
        worse = .02 + .1 * rng.standard_normal(200) + between * rng.standard_normal((seeds, 1))
        found.append(real_study.interval(worse * tokens, tokens))
    assert .93 < np.mean([abs(mean - .02) <= half for mean, half in found]) < .98

def test_losses_are_the_nll_of_chosen_and_dpos():
    now, then = np.array([[[-6., 3, -8, 4]]]), np.array([[[-7., 3, -5, 4]]])
    assert [x.tolist() for x in real_study.losses("sft", now, then)] == [[[6]], [3]]
    x, weight = real_study.losses("dpo", now, then, .5)
    assert x[0, 0] == pytest.approx(np.log1p(np.exp(-.5 * (1 + 3)))) and weight.tolist() == [1]

def test_a_lead_has_the_p_of_a_normal_mean_with_the_intervals_width(monkeypatch):
    gaps = np.random.default_rng(0).normal(.02, .1, 400)
    replies = lambda runs: np.stack([np.array([-gaps * (runs == ["lora"]), np.ones(400), gaps, gaps]).T])
    for name, x in dict(scores=replies, FEW_MANY=()).items():
        monkeypatch.setattr(real_study, name, x)
    done = {("sft-60", m): real_study.SimpleNamespace(runs=[m]) for m in ("sails", "lora")}
    [(lead, half, p)] = real_study.comparisons(done, real_study.SimpleNamespace(beta=.1)).values()
    assert lead == pytest.approx(gaps.mean()) and half == pytest.approx(1.96 * gaps.std(ddof=1) / 20)
    assert p == pytest.approx(2 - 2 * float(torch.special.ndtr(torch.tensor(1.96 * lead / half))), abs=1e-6)

def test_derived_saes_choose_the_same_features_and_have_other_rows():
    sae, x, mean = random_sae(), torch.linspace(-2, 2, 72).view(3, 24), torch.linspace(-1, 2, 24)
    sae.W_enc.mul_(torch.linspace(1, 3, 24)[:, None])  # not the rows, and not of norm 1: as when trained
    plain, turned = (real_study.derived(sae, mean, names) for names in (["mean"], ["encoder"]))
    for new in (plain, turned):
        assert torch.equal(new.encode(x), sae.encode(x)) and bool((sae.encode(x) > 0).any())
        assert torch.allclose(new.W_dec.norm(dim=1), torch.ones(40))
        assert torch.cosine_similarity(new.W_dec, sae.W_dec).min() < .99
    assert (plain.W_dec @ mean).abs().max() < 1e-5 and (turned.W_dec @ mean).abs().max() > .1
    assert torch.cosine_similarity(turned.W_dec, sae.W_enc.T).min() > .9999

@pytest.mark.slow
def test_the_real_study_reports_what_its_folders_hold_and_repeats_runs(home, tmp_path, monkeypatch):
    small = dict(CELLS=["sft-12", "sft-6", "dpo-12"], FEW_MANY=[("sft-6", "sft-12")], ASKED=6, SEEDS=(0, 1),
                 PLAIN="sft-12", BEST="best-12", RATES=(.01, .02), METHODS=("sails", "lora", "raw-pca"),
                 TALK=12, LONGEST=40, PARTS=dict(test=12, validate=8, train=12))
    for name, value in small.items():
        monkeypatch.setattr(real_study, name, value)
    words = (f"--model {home.model} --data {home.data} --out {tmp_path} --jobs 1 --steps 2 --max-new 2 "
             "--layers 1 --k 4 --fit-width 49 --fit-steps 5").split()
    assert go(words, real_study.main)[0] == 0
    read = lambda kind, n, part: data.read_rows(tmp_path / f"data-{kind}-{n}" / f"{part}.jsonl")
    assert read("sft", 6, "train") == read("dpo", 12, "train")[:6] and len(read("sft", 6, "train")) == 6
    assert read("sft", 6, "test") == read("sft", 12, "test") and len(read("dpo", 6, "test")) == 12
    table = [r.split(",") for r in (tmp_path / "real_study.csv").read_text().splitlines()]
    for _, method, objective, size, rate, seed, _, nll, *_ in table[1:6]:  # of the first cell
        run = tmp_path / f"{objective}-{size}" / f"{method}-lr{rate}-seed{seed}"
        measured = data.read_json(run / "results.json")["NLL of chosen, nats per token"][0]
        assert float(nll) == pytest.approx(measured, abs=1e-6)
    report = (tmp_path / "real_study.md").read_text()
    assert report.count("sails ahead of") == 6 and "larger at sft-6 than at sft-12" in report
    assert "sails, mean" in report and len(list((tmp_path / "base").rglob("layer_1"))) == 1  # shared
    assert go([*words, "--again", "2"], real_study.main)[0] == 0
    monkeypatch.setattr("train.align", lambda *args: pytest.fail("a finished run was done again"))
    assert go(words, real_study.main)[0] == 0
