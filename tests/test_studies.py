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

def test_holm_multiplies_by_the_comparisons_left_and_never_falls():
    assert study.holm(dict(a=.03, b=.01, c=.04)) == pytest.approx(dict(b=.03, a=.06, c=.06))

@pytest.mark.parametrize("lead, half, p, said", (
    (2, 1, .01, "confirmed"), (2, 1, .06, "undecided"), (.5, .6, .2, "undecided"), (-2, 1, .01, "refuted"),
    (.4, .2, .01, "refuted"), (-.5, 2, .01, "undecided")))
def test_a_verdict_needs_a_small_p_or_an_interval_below_what_matters(lead, half, p, said):
    assert study.verdicts({"it": (lead, half, p)}, {"it": 1.}, "+.1f")["it"]["verdict"] == said

def arm(balance, rates, **more):
    """An arm of (bases, seeds, rates) balances, on validation and on unseen topics."""
    x = np.array(balance, float)
    columns = {"rate": rates, "balance": x, "validation balance": x, "validation NLL": 1., **more}
    return {c: np.broadcast_to(value, x.shape) for c, value in columns.items()}

def two_bases(shift):  # validation prefers the second rate in base 0, the first in base 1
    each = lambda b, s: [.5 + .1 * b + .01 * s, .5 + .1 * b + .01 * s + shift]
    return arm([[each(b, s) for s in (0, 1)] for b in (0, 1)], [.001, .003], **{"validation NLL": np.array(
        [[1., 0], [1, 2]])[:, None], "validation balance": np.array([.5, np.nan])[:, None, None]})

def test_rates_are_chosen_within_a_base_by_validation_and_the_csv_holds_every_rate():
    found = two_bases(.2)
    assert study.at(found, "rate").tolist() == [.003, .001]
    assert study.at(found, "balance") == pytest.approx([.705, .605])
    assert study.rate_counts(found, study.tuned) == "0.001 x1, 0.003 x1 (edge)"
    table = study.csv_text(list(study.base_rows(dict(it=found), [7, 8]))).splitlines()
    assert len(table) == 5 and table[2] == "it,0.003,7,2,0.705,0.5,0.0"

def test_leads_are_paired_by_base_in_points():
    arms = dict(a=two_bases(.2), b=two_bases(.1))
    assert tiny_study.lead(arms, "a", "b", rule=lambda x: [1, 1]) == pytest.approx([10, 10])

def test_a_lead_that_grows_as_pairs_get_fewer_has_a_positive_slope():
    one = lambda balance: arm([[[balance]]], .001, knowledge=1., steps=1.)
    arms = dict.fromkeys(tiny_study.ARMS, one(.9))
    for n, gain in zip(tiny_study.SIZES, (6, 4, 2)):
        arms[f"sails, {n} pairs"] = one(.9 + gain / 100)
    assert tiny_study.leads(arms, arms)["H3 lead gained a halving"] == pytest.approx([2])

def test_equal_safety_is_the_lowest_rate_that_reaches_it_on_validation():
    rates = [.001, .002, .004, .008]
    found = arm([[[.9, .96, 1, 1]]], rates, **{"validation NLL": -np.array(rates)})
    rules = tiny_study.equal_safety, study.tuned, tiny_study.cautious, tiny_study.lowest
    assert [rates[rule(found)[0]] for rule in rules] == [.002, .008, .004, .001]

@pytest.mark.slow
def test_the_tiny_study_reports_what_its_folders_hold_skips_and_repeats_them(world, tmp_path, monkeypatch):
    home, split, model = tmp_path / "world-0", tiny_world.world_split, random_gemma(**tiny_world.TINY_MODEL)
    model_gemma.save_gemma(model, home)  # in place of a trained one
    world.tok.save(str(home / "tokenizer.json"))
    for layer in range(4):
        sae_module.save_sae(random_sae(D=64, N=256), home / "sae", layer, 20)
    data.write_json(home / "world.json", dict(seed=0, parameters=1, sae={i: dict(fve=1, l0=9) for i in "02"}))
    monkeypatch.setattr(tiny_world, "world_split", lambda *args: {  # few prompts
        part: x if part in ("train", "topics") else x[::8] for part, x in split(*args).items()})
    monkeypatch.setattr(tiny_study, "RATES", (.001,))
    monkeypatch.setattr(tiny_study, "FULL_RATES", (.001,))
    words = f"--out {tmp_path} --bases 0 --seeds 0,1 --steps 2 --jobs 1"
    folders = [tmp_path / f"base-0/seed-{i}/sails/sails-lr0.001-seed{i}" for i in (0, 1)]
    assert go(["--second", *words.split()], tiny_study.main)[0] == 0
    assert ["sae-0", "sae-1"] == [data.read_json(f / "run.json")["settings"]["sae"][-5:] for f in folders]
    assert (tmp_path / "second_study.md").read_text().count("ahead of") == 10
    (tmp_path / "base-0").rename(tmp_path / "second")
    assert go(words.split(), tiny_study.main)[0] == 0
    nll = [data.read_json(f / "results.json")["validation"]["NLL"] for f in folders]
    table = [line.split(",") for line in (tmp_path / "tiny_study.csv").read_text().splitlines()]
    assert [row[5] for row in table if row[:2] == ["sails", "0.001"]] == [str(round(np.mean(nll), 12))]
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
    objects = [row["id"].split("-")[2] for _, row in data.read_rows(home / "unseen-0" / "validate.jsonl")]
    assert len(objects) == len(set(objects)) > 10
    assert go([*words.split(), "--again", "2"], tiny_study.main)[0] == 0
    data.write_json(folders[0] / "results.json", data.read_json(folders[0] / "results.json") | dict(drift=0))
    assert go([*words.split(), "--again", "34"], tiny_study.main)[0] == 1
    monkeypatch.setattr("train.align", lambda *args: pytest.fail("a finished run was done again"))
    assert go(words.split(), tiny_study.main)[0] == 0
