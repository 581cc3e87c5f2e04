"""The studies' own statistics on data whose truth is known: benchmarks/tiny_study.py and benchmarks/real_study.py."""
import sys

import numpy as np
import pytest

from conftest import TOP

sys.path.insert(0, str(TOP / "benchmarks"))
import real_study
import tiny_study

def replies(rng, draws, n=200, seeds=1, gap=.02, between=0.):
    """Test scores of two methods (draws, seeds, n, 4) whose NLL per token differ by `gap`: per-reply noise that both share
    over seeds, replies of 5 to 60 tokens, a shift per seed."""
    tokens = rng.integers(5, 60, (draws, 1, n)) * np.ones((1, seeds, 1))
    per_reply = gap + .1 * rng.standard_normal((draws, 1, n)) + between * rng.standard_normal((draws, seeds, 1))
    ours = -2.3 * tokens
    make = lambda lp: np.stack([lp, tokens, lp, tokens], -1)
    return make(ours), make(ours - per_reply * tokens)

def covered(intervals, truth):
    return np.mean([abs(mean - truth) <= half for mean, half in intervals])

def test_the_interval_of_nats_per_token_covers_the_truth_95_times_in_100():
    ours, theirs = replies(np.random.default_rng(0), 2000)
    gaps = ours[:, 0, :, 0] - theirs[:, 0, :, 0]
    assert .93 < covered([real_study.per_token(g, t) for g, t in zip(gaps, ours[:, 0, :, 1])], .02) < .97

@pytest.mark.parametrize("between, least, most", ((.02, .93, .98), (0., .93, 1.)))
def test_a_paired_difference_counts_replies_and_seeds(between, least, most):
    """Where seeds do not differ it is wider than need be, never narrower."""
    ours, theirs = replies(np.random.default_rng(1), 2000, seeds=3, between=between)
    found = [real_study.paired(a, b) for a, b in zip(ours, theirs)]
    assert least < covered(found, .02) <= most
    if between:                                        # counting replies alone would be too sure of itself
        alone = [real_study.per_token((a - b)[..., 0].mean(0), a[0, :, 1]) for a, b in zip(ours, theirs)]
        assert covered(alone, .02) < .8

def test_a_paired_difference_is_positive_where_the_other_is_worse():
    ours, theirs = replies(np.random.default_rng(2), 1, seeds=3, gap=.5)
    assert real_study.paired(ours[0], theirs[0])[0] > .4 and real_study.paired(theirs[0], ours[0])[0] < -.4

def test_margins_at_equal_nll_are_read_between_the_base_and_the_best_rate():
    points = [(2.5, 0.), (2.4, .02), (2.3, .06), (2.36, .2)]           # the base, then rising rates; the last one overshoots
    assert real_study.margin_at(points, 2.35) == pytest.approx(.04)
    assert real_study.margin_at(points, 2.3) == pytest.approx(.06)

def test_margins_count_nats_per_token_beyond_the_base():
    base = np.array([[-20., 10., -30., 10.]])
    assert real_study.margins(np.array([[-15., 10., -29., 10.]]), base) == pytest.approx([.4])

def test_dpo_is_validated_against_the_base_and_sft_by_nll_alone():
    then, now = np.array([[-20., 10., -19., 10.]] * 2), np.array([[-18., 10., -21., 10.]] * 2)
    assert real_study.validation(now, then, "sft") == pytest.approx(1.8)
    assert real_study.validation(now, then, "dpo") == pytest.approx(np.log1p(np.exp(-.1 * 4)))

def test_the_look_alikes_are_pairs_and_the_contrast_never_sees_a_scored_one():
    rows = real_study.evaluation.read_prompts([TOP / "benchmarks" / "lookalikes.jsonl"])
    assert [r["label"] for r in rows] == ["benign", "harmful"] * 80
    assert len({r["turns"][0]["content"] for r in rows}) == 160
    assert len(rows[2 * real_study.FIRST:]) == 100

def variant(shift, noise, method="sails"):
    """Three bases x three seeds x two rates; validation prefers the second, where balance is higher by `shift`."""
    rng, rows = np.random.default_rng(3), []
    for base in range(3):
        for seed in range(3):
            for lr, loss in ((1e-3, .9), (3e-3, .2)):
                safe = .5 + .1 * base + shift * (lr == 3e-3) + noise * rng.standard_normal() * (lr == 3e-3)
                rows.append(dict(method=method, base=base, seed=seed, lr=lr, validation_loss=loss, ood=dict(safe=safe, over=0., balance=safe), facts=1., commentary=1.))
    return rows

def test_a_reading_names_only_what_is_outside_its_interval_and_pairs_equal_bases_and_seeds():
    said = tiny_study.reading({"plain": variant(0, .001), "better": variant(.1, .001), "noisy": variant(.02, .2)})
    assert "better against plain: tuned OOD safe +10." in said and "tuned balance +10." in said
    assert "noisy" not in said and "gentle" not in said and "facts" not in said

def test_a_reading_compares_other_methods_with_sails_at_the_same_level():
    said = tiny_study.reading({"sails, a": variant(0, .001), "lora, a": variant(-.1, .001, "lora"), "sails, b": variant(.2, .001), "lora, b": variant(.3, .001, "lora")})
    assert "lora, a against sails, a: tuned OOD safe -10." in said and "lora, b against sails, b: tuned OOD safe +10." in said
    assert "sails, b against sails, a: tuned OOD safe +20." in said
