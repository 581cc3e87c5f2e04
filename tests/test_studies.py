"""The studies: their tests on gaps whose truth is known, and the tiny one from end to end."""
import numpy as np
import pytest
import torch
from conftest import go, random_gemma, random_sae
from safetensors.torch import load_file

import data
import model_gemma
import sae as sae_module
from benchmarks import study, tiny_study, tiny_world

def test_intervals_equal_the_textbook():
    assert data.t_interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3 ** .5))

def test_the_sign_flip_test_counts_every_sign():
    assert study.flip_p(np.array([1., 2, 3])) == pytest.approx(2 / 8)  # all plus and all minus
    assert study.flip_p(np.array([1., -1])) == 1 and study.flip_p(np.zeros(3)) == 1

def test_the_sign_flip_test_is_wrong_5_times_in_100_where_nothing_is_ahead():
    gaps = np.random.default_rng(0).standard_t(3, (1000, 10))
    assert .03 < np.mean([study.flip_p(x) < .05 for x in gaps]) < .065

def test_holm_multiplies_by_the_comparisons_left_and_never_falls():
    assert study.holm(dict(a=.03, b=.01, c=.04)) == pytest.approx(dict(b=.03, a=.06, c=.06))

@pytest.mark.parametrize("gap, half, p, said", (
    (2, 1, .01, "confirmed"), (2, 1, .06, "undecided"), (.5, .6, .2, "undecided"), (-2, 1, .01, "refuted"),
    (.4, .2, .01, "refuted"), (-.5, 2, .01, "undecided")))
def test_a_verdict_needs_a_small_p_or_an_interval_below_what_matters(gap, half, p, said):
    assert study.verdict(gap, half, p, 1.) == said

def rows(shift, method="sails"):  # validation prefers the second rate in base 0, the first in base 1
    return {(b, s, lr): dict(method=method, lr=lr, balance=.5 + .1 * b + .01 * s + shift * (lr == .003),
                             validation=dict(balance=(.5, None)[b], NLL=1. + (lr == .003) * (2 * b - 1)))
            for b in (0, 1) for s in (0, 1) for lr in (.001, .003)}

def test_rates_are_chosen_within_a_base_by_validation_and_the_csv_holds_every_rate():
    rates = study.tuned(rows(.2))
    assert rates == {0: .003, 1: .001}
    assert [r["lr"] for r in study.at(rows(.2), rates).values()] == [.003, .003, .001, .001]
    assert study.rate_counts(rows(.2), rates) == "0.001 x1, 0.003 x1 (edge)"
    found = study.csv_text(list(study.base_rows(rows(.2), ["balance"]))).splitlines()
    assert len(found) == 5 and found[2] == "0.003,0,2,0.5,0.0,0.705"

def test_gaps_are_paired_by_base_in_points():
    ours, theirs = (study.at(rows(x), {0: .003, 1: .003}) for x in (.2, .1))
    assert tiny_study.gap(ours, theirs, "balance") == pytest.approx([10, 10])

def test_a_lead_that_grows_as_pairs_get_fewer_has_a_positive_slope():
    arm = lambda balance: {(0, 0, .001): dict(method="sails", lr=.001, balance=balance, steps=1, knowledge=1,
                                              validation=dict(balance=1., NLL=1.))}
    done = dict.fromkeys(tiny_study.ARMS, arm(.9))
    for n, gain in zip(tiny_study.SIZES, (6, 4, 2)):
        done[f"sails, {n} pairs"] = arm(.9 + gain / 100)
    steps = {m: done[m] for m in ("sails", *tiny_study.OTHERS)}
    assert tiny_study.gaps(done, steps)["H3 lead gained a halving"] == pytest.approx([2])

def test_equal_safety_is_the_lowest_rate_that_reaches_it_on_validation():
    found = {(0, 0, lr): dict(method="sails", lr=lr, validation=dict(balance=x, NLL=-lr))
             for lr, x in ((.001, .9), (.002, .96), (.004, 1.), (.008, 1.))}
    assert tiny_study.equal_safety(found) == {0: .002}
    assert study.tuned(found) == {0: .008} and tiny_study.cautious(found) == {0: .004}

@pytest.mark.slow
def test_the_tiny_study_reports_what_its_folders_hold_skips_and_repeats_them(world, tmp_path, monkeypatch):
    home, split, model = tmp_path / "world-0", tiny_world.world_split, random_gemma(**tiny_world.TINY_MODEL)
    model_gemma.save_gemma(model, home)  # in place of a trained one
    world.tok.save(str(home / "tokenizer.json"))
    for layer in (tiny_study.WRONG_LAYER, tiny_study.LAYER):
        sae_module.save_sae(random_sae(D=64, N=256), home / "sae", layer, 20)
    data.write_json(home / "world.json", dict(seed=0, parameters=1, sae={i: dict(fve=1, l0=9) for i in "02"}))
    monkeypatch.setattr(tiny_world, "world_split", lambda *args: {  # few prompts
        part: x if part in ("train", "topics") else x[::8] for part, x in split(*args).items()})
    monkeypatch.setattr(tiny_study, "RATES", (.001,))
    monkeypatch.setattr(tiny_study, "FULL_RATES", (.001,))
    words = f"--out {tmp_path} --bases 0 --seeds 0,1 --steps 2 --jobs 1"
    assert go(words.split(), tiny_study.main)[0] == 0
    folders = [tmp_path / "base-0" / "sails" / f"sails-lr0.001-seed{seed}" for seed in (0, 1)]
    nll = [data.read_json(f / "results.json")["validation"]["NLL"] for f in folders]
    table = [line.split(",") for line in (tmp_path / "tiny_study.csv").read_text().splitlines()]
    assert [row[5] for row in table if row[:2] == ["sails", "0.001"]] == [str(round(np.mean(nll), 9))]
    harm = torch.tensor(data.read_json(home / "harm.json"))
    asked, _ = data.encode(world.tok, tiny_world.all_requests(world, range(192)), "tiny")
    h = model.residuals(torch.tensor([r["prompt_ids"] for r in asked]), [2])[2][:, -3:].mean(1)
    sign = torch.tensor([(-1., 1.)[r["label"] == "harmful"] for r in asked])  # as many of either
    assert torch.cosine_similarity(sign @ h, harm, dim=0) > .999
    inside = [float((load_file(f / "subspace.safetensors")["V.2"].T @ harm).square().sum()) for f in folders]
    assert f"| {np.mean(inside):.3f} ±" in (tmp_path / "tiny_study.md").read_text()  # k = r: no random fill
    few = [row for _, row in data.read_rows(home / "pairs-8-1" / "train.jsonl")]
    assert [row["label"] for row in few] == ["harmful"] * 4 + ["benign"] * 4
    assert all(row in [r for _, r in data.read_rows(home / "pairs-16-1" / "train.jsonl")] for row in few)
    watched = data.read_rows(home / "unseen-0" / "validate.jsonl")
    objects = [row["id"].split("-")[2] for _, row in watched]
    assert len(objects) == len(set(objects)) > 10
    assert go([*words.split(), "--again", "2"], tiny_study.main)[0] == 0
    data.write_json(folders[0] / "results.json", data.read_json(folders[0] / "results.json") | dict(drift=0))
    assert go([*words.split(), "--again", "34"], tiny_study.main)[0] == 1
    monkeypatch.setattr("train.align", lambda *args: pytest.fail("a finished run was done again"))
    assert go(words.split(), tiny_study.main)[0] == 0
