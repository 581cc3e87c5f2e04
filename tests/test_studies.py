"""The studies: their intervals on data whose truth is known, and each of them from end to end."""
import numpy as np
import pytest
import torch
from conftest import go, random_gemma, random_sae
from safetensors.torch import load_file

import data
import model_gemma
import sae as sae_module
from benchmarks import real_study, study, tiny_study, tiny_world

def keyed(table):  # rows are bases, columns seeds
    return {(b, s): x for b, row in enumerate(table) for s, x in enumerate(row)}

@pytest.mark.parametrize("bases, seeds, between", ((8, 8, 1), (3, 8, .3), (8, 3, 0), (1, 8, 2), (2, 8, 2)))
def test_intervals_over_bases_cover_the_truth_95_times_in_100(bases, seeds, between):
    rng, fixed = np.random.default_rng([bases, seeds]), bases < 3  # few: a statement about these bases
    shift = between * rng.standard_normal((1 if fixed else 1000, bases, 1))
    found = [study.spread(keyed(x)) for x in shift + rng.standard_normal((1000, bases, seeds))]
    assert .93 < np.mean([abs(mean - shift.mean() * fixed) <= half for mean, half in found]) < .97

def test_intervals_equal_the_textbook_and_one_value_has_none():
    assert data.t_interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3 ** .5))
    assert study.spread(keyed([[1, 3], [2, 2], [6, 10]])) == pytest.approx((4, 4.303 * 12 ** .5 / 3 ** .5))
    assert study.spread(keyed([[1, 3], [5, 9]])) == pytest.approx((4.5, 4.303 * (10 / 2 / 4) ** .5))  # 2 df
    assert np.isnan(study.spread(keyed([[5.]]))[1])

@pytest.mark.parametrize("seeds, between", ((1, 0.), (3, .02)))
def test_intervals_of_nll_count_replies_and_seeds(seeds, between):
    rng, found = np.random.default_rng(1), []
    for _ in range(1000):
        tokens = rng.integers(5, 60, 200) * np.ones((seeds, 1))
        worse = .02 + .1 * rng.standard_normal(200) + between * rng.standard_normal((seeds, 1))
        ours, theirs = (np.stack([lp, tokens], -1) for lp in (-2.3 * tokens, -(2.3 + worse) * tokens))
        found.append(study.paired_nll(ours, theirs))
    assert .93 < np.mean([abs(mean - .02) <= half for mean, half in found]) < .98

def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counted_half():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < .4
    pairs = [(a > b) + .5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert study.auc(scores, positive) == pytest.approx(np.mean(pairs))

def rows(shift, method="sails"):  # validation prefers the second rate in base 0, the first in base 1
    return {(b, s, lr): dict(method=method, lr=lr, balance=.5 + .1 * b + .01 * s + shift * (lr == .003),
                             validation=dict(balance=(.5, None)[b], NLL=1. + (lr == .003) * (2 * b - 1)))
            for b in (0, 1) for s in (0, 1) for lr in (.001, .003)}

def test_rates_are_chosen_within_a_base_by_validation_and_the_csv_holds_every_rate():
    picked = study.pick(rows(.2), "tuned")
    assert [r["lr"] for r in picked.values()] == [.003, .003, .001, .001]
    assert study.rate_counts(rows(.2), picked) == "0.001 x1, 0.003 x1 (edge)"
    found = study.csv_text(list(study.base_means(rows(.2), ["balance"]))).splitlines()
    assert len(found) == 5 and found[2] == "sails,0.003,0,2,0.5,0.0,0.705"

def test_differences_are_paired_by_base_and_seed_and_named_only_beyond_their_interval():
    assert study.paired(*(study.pick(rows(x), 1) for x in (.2, .1)), "balance") == pytest.approx((10, 0))
    said = study.differs({"sails, a": rows(0), "lora, a": rows(.1, "lora"), "sails, b": rows(0)}, ["balance"])
    assert "lora, a balance tuned +5.0" in said and "sails, b" not in said
    assert study.verdict(dict(lora=(2, 1), full=(-2, 1))) == "SAILS is ahead of lora; is behind full."

def test_the_tiny_study_reports_what_its_folders_hold_and_skips_them(world, tmp_path, monkeypatch):
    home, split, model = tmp_path / "world-0", tiny_world.world_split, random_gemma(**tiny_world.TINY_MODEL)
    model_gemma.save_gemma(model, home)  # in place of a trained one
    world.tok.save(str(home / "tokenizer.json"))
    sae_module.save_sae(random_sae(D=64, N=256), home / "sae", tiny_study.LAYER, 20)
    data.write_json(home / "world.json", dict(seed=0, parameters=1, sae={i: dict(fve=1, l0=9) for i in "23"}))
    monkeypatch.setattr(tiny_world, "world_split", lambda *args: {  # few prompts
        part: x if part in ("train", "topics") else x[::8] for part, x in split(*args).items()})
    words = f"--out {tmp_path} --only main --methods sails,lora --bases 0 --seeds 0,1 --steps 2 --jobs 1"
    go(words.split(), tiny_study.main)
    folders = [tmp_path / "base-0" / "default" / f"sails-lr0.01-seed{seed}" for seed in (0, 1)]
    nll = [data.read_json(f / "results.json")["validation"]["NLL"] for f in folders]
    table = [line.split(",") for line in (tmp_path / "tiny_study.csv").read_text().splitlines()]
    assert [row[7] for row in table if row[2:4] == ["sails", "0.01"]] == [str(round(np.mean(nll), 9))]
    harm = torch.tensor(data.read_json(home / "described.json")["harm"])
    asked, _ = data.encode(world.tok, tiny_world.all_requests(world, range(192)), "tiny")
    h = model.residuals(torch.tensor([r["prompt_ids"] for r in asked]), [2])[2][:, -3:].mean(1)
    sign = torch.tensor([(-1., 1.)[r["label"] == "harmful"] for r in asked])  # as many of either
    assert torch.cosine_similarity(sign @ h, harm, dim=0) > .999
    inside = [float((load_file(f / "subspace.safetensors")["V.2"].T @ harm).square().sum()) for f in folders]
    assert f"| {np.mean(inside):.3f} |" in (tmp_path / "tiny_study.md").read_text()  # k = r: no random fill
    monkeypatch.setattr("train.align", lambda *args: pytest.fail("a finished run was done again"))
    go(words.split(), tiny_study.main)

def test_the_real_study_reports_what_its_folders_hold_and_repeats_a_run(home, tmp_path):
    words = (f"--model {home.model} --data {home.data} --out {tmp_path} --methods sails,raw-pca --seeds 0,1 "
             "--objectives dpo --jobs 1 --steps 2 --max-new 2 --layers 1 --k 4 --fit-width 48 --fit-steps 5")
    go(words.split(), real_study.main)
    final = sorted((tmp_path / "dpo-final").glob("sails-*"))
    scores = [np.array([r["chosen"] for _, r in data.read_rows(f / "heldout-test.jsonl")]) for f in final]
    nll, report = [-sum(x[:, 0]) / sum(x[:, 1]) for x in scores], (tmp_path / "real_study.md").read_text()
    measured = [data.read_json(f / "results.json")["NLL of chosen, nats per token"][0] for f in final]
    assert nll == pytest.approx(measured, abs=1e-6) and f"| {np.std(nll, ddof=1):.4f} |" in report
    assert f"| {np.mean(nll):.4f} ±" in report and "of them inside raw-pca's" in report
    ids = lambda file: {r["id"].split("/")[-1] for _, r in data.read_rows(file)}
    kept, asked = ids(tmp_path / "contrast.jsonl"), ids(final[0] / "responses.jsonl")
    assert len(kept) == 60 and len(asked) >= 100 and not kept & asked
    assert len(list(tmp_path.rglob("layer_1"))) == 1  # all share one SAE
    assert go([*words.split(), "--again", "1"], real_study.main)[0] == 0
    for path in tmp_path.glob("dpo*/*/results.json"):
        data.write_json(path, data.read_json(path) | dict(parameters=0))
    assert go([*words.split(), "--again", "1"], real_study.main)[0] == 1
