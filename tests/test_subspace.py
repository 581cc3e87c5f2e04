"""Scores, features, bases, and the distance between subspaces: each against its definition, written out the slow way."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sails

pytestmark = pytest.mark.filterwarnings("error")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def span(d, r, seed=0):
    return torch.linalg.qr(randn(d, r, seed=seed))[0]


def projector(U):
    return U @ torch.linalg.pinv(U)


# ------------------------------------------------------------------------------------------------- scores and features
def test_absolute_score_finds_features_of_harm_and_relative_score_ranks_them_last():
    aligned, unaligned = torch.tensor([.5, 2., 0., 1.]), torch.tensor([.5, .5, 3., 1.])
    assert sails.top_features(aligned, unaligned, 2).tolist() == [2, 1]
    assert sails.top_features(aligned, unaligned, 2, score="relative").tolist() == [1, 0]
    assert sails.score(aligned, unaligned, "relative").tolist() == [0., 3., -1., 0.]


def test_relative_score_of_a_feature_silent_in_unaligned_text_is_large_but_finite():
    assert sails.score(torch.tensor([.5]), torch.tensor([0.]), "relative").tolist() == [.5 / 1e-6]
    assert sails.score(torch.tensor([.5]), torch.tensor([0.]), "relative", eps=.25).tolist() == [2.]


def test_equal_scores_go_to_the_lower_index_at_any_width():
    aligned = torch.zeros(5000)
    aligned[[17, 4000]] = 1
    assert sails.top_features(aligned, torch.zeros(5000), 5).tolist() == [17, 4000, 0, 1, 2]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_features_than_there_are_or_none_is_an_error(k):
    with pytest.raises(ValueError, match="4 features"):
        sails.top_features(torch.ones(4), torch.zeros(4), k)


def test_scores_refuse_nan_other_lengths_and_unknown_rules():
    bad = torch.tensor([1., float("nan")])
    for args, words in (((bad, torch.zeros(2)), "NaN"), ((torch.ones(2), bad), "NaN"), ((torch.ones(2), torch.ones(3)), "shapes"),
                        ((torch.ones(2), torch.ones(2), "cosine"), "cosine")):
        with pytest.raises(ValueError, match=words):
            sails.score(*args)


# --------------------------------------------------------------------------------------------------------------- basis
def test_whole_basis_is_orthonormal_and_spans_the_chosen_rows_only():
    W = randn(20, 12)
    V = sails.basis(W, [3, 7, 11, 2])
    assert torch.allclose(V.T @ V, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(projector(V), projector(W[[3, 7, 11, 2]].T), atol=1e-10)


def test_directions_come_by_variance_and_point_to_where_their_rows_are():
    W = torch.diag(torch.tensor([1., 3., 2.], dtype=torch.float64))
    for sign in (1, -1):
        assert torch.allclose(sails.basis(sign * W, [0, 1, 2]), sign * torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]])


def test_tau_keeps_the_fewest_directions_that_hold_its_share():
    W = torch.diag(torch.tensor([3., 2., 1., 1.], dtype=torch.float64))          # shares 9, 4, 1, 1 of 15
    for tau, kept in ((.1, 1), (9 / 15, 1), (.61, 2), (13 / 15, 2), (.9, 3), (.99, 4), (1, 4)):
        assert sails.basis(W, range(4), tau).shape == (4, kept), tau
    assert torch.allclose(sails.basis(W, range(4), .8), torch.eye(4, dtype=torch.float64)[:, :2])    # the strongest ones


def test_centring_deletes_the_direction_that_all_rows_share():
    W = torch.tensor([[5., 1, 0], [5, -1, 0], [5, 0, 1], [5, 0, -1]], dtype=torch.float64)
    assert abs(float(sails.basis(W, range(4))[0, 0])) > .99
    assert float(sails.basis(W, range(4), center=True)[0].abs().max()) < 1e-12


def test_more_features_than_dimensions_still_give_a_basis():
    assert sails.basis(randn(40, 8), range(30)).shape == (8, 8)


def test_basis_keeps_the_precision_it_was_given_and_float32_for_half():
    W = randn(6, 8)
    for given, back in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        V = sails.basis(W.to(given), [0, 1])
        assert V.dtype == back and torch.allclose((V.T @ V).double(), torch.eye(2, dtype=torch.float64), atol=1e-6)


def test_basis_does_not_touch_the_random_state_or_its_input():
    W, state = randn(6, 8), torch.get_rng_state()
    before = W.clone()
    sails.basis(W, [0, 1], .8, True)
    assert torch.equal(W, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("features, tau, words", [
    ([], 1., "indices"), ([0, 9], 1., "indices"), ([-1], 1., "indices"), ([1, 1], 1., "same"), ([2, 3], 1., "same"),
    ([0], 0., "tau"), ([0], 1.1, "tau"), ([0], float("nan"), "tau"), ([5], 1., "NaN"), ([4], 1., "no variance")])
def test_degenerate_choices_are_clear_errors(features, tau, words):
    W = randn(6, 8)
    W[3], W[4], W[5, 0] = -2 * W[2], 0, float("nan")                             # a repeated direction, a zero row, a NaN
    with pytest.raises(ValueError, match=words):
        sails.basis(W, features, tau)


def test_one_centred_row_leaves_nothing_and_is_an_error():
    with pytest.raises(ValueError, match="no variance"):
        sails.basis(randn(3, 8), [1], center=True)


# ------------------------------------------------------------------------------------------------- distance and angles
CASES = [(d, r, q, seed) for seed in range(4) for d, r, q in ((5, 1, 1), (6, 3, 3), (9, 2, 5), (30, 6, 6), (4, 4, 4), (7, 7, 3))]


@pytest.mark.parametrize("d, r, q, seed", CASES)
def test_projector_distance_is_the_norm_of_the_difference_of_projectors(d, r, q, seed):
    U, V = span(d, r, seed), span(d, q, seed + 100)
    want = float(torch.linalg.matrix_norm(projector(U) - projector(V)))
    assert sails.projector_distance(U, V) == pytest.approx(want, abs=1e-12)
    assert sails.projector_distance(V, U) == pytest.approx(want, abs=1e-12)
    turn = span(r, r, seed + 200)
    assert sails.projector_distance(U @ turn, V) == pytest.approx(want, abs=1e-12)
    assert sails.projector_distance(U @ randn(r, r, seed=seed + 300), V) == pytest.approx(want, abs=1e-9)   # any basis of the span


@pytest.mark.parametrize("d, r, q, seed", CASES)
def test_projector_distance_is_sqrt_two_times_the_sines_of_the_principal_angles(d, r, q, seed):
    U, V = span(d, r, seed), span(d, q, seed + 100)
    angles = sails.principal_angles(U, V)
    assert len(angles) == min(r, q) and bool((angles[1:] >= angles[:-1]).all())
    want = (2 * float((angles.sin() ** 2).sum()) + abs(r - q)) ** .5
    assert sails.projector_distance(U, V) == pytest.approx(want, abs=1e-12)
    assert sails.captured(U, V) == pytest.approx(float((angles.cos() ** 2).sum()) / q, abs=1e-12)


def test_distance_is_zero_to_rounding_for_one_span_and_not_for_two():
    U = span(40, 5)
    assert sails.projector_distance(U, U @ span(5, 5, 1)) < 1e-14
    assert sails.captured(U, U @ span(5, 5, 1)) == pytest.approx(1, abs=1e-14)
    other = U.clone()
    other[:, 0] += 1e-9 * span(40, 6, 2)[:, 5]
    assert 1e-10 < sails.projector_distance(U, other) < 2e-9


@pytest.mark.parametrize("angle", [0, 1e-12, 1e-8, 1e-3, .7, torch.pi / 2 - 1e-9, torch.pi / 2])
def test_a_known_angle_is_measured_to_rounding_small_or_large(angle):
    U, V = torch.eye(5, dtype=torch.float64)[:, :2], torch.zeros(5, 2, dtype=torch.float64)
    t = torch.tensor(angle, dtype=torch.float64)
    V[0, 0], V[1, 1], V[2, 1] = 1, t.cos(), t.sin()
    assert sails.principal_angles(U, V).tolist() == pytest.approx([0, float(angle)], rel=1e-9, abs=1e-15)
    assert sails.projector_distance(U, V) == pytest.approx(2 ** .5 * float(t.sin()), rel=1e-9, abs=1e-15)


def test_orthogonal_spans_are_as_far_apart_as_it_gets():
    eye = torch.eye(7, dtype=torch.float64)
    assert sails.projector_distance(eye[:, :3], eye[:, 3:5]) == pytest.approx(5 ** .5)
    assert sails.captured(eye[:, :3], eye[:, 3:5]) == 0


@pytest.mark.parametrize("bad, words", [
    (torch.zeros(5, 0), "shape"), (torch.ones(5), "shape"), (torch.ones(2, 3), "shape"), (torch.ones(5, 2), "repeated"),
    (torch.zeros(5, 1), "repeated"), (torch.full((5, 1), float("nan")), "NaN"), (torch.full((5, 1), float("inf")), "NaN")])
def test_no_span_no_distance(bad, words):
    good = span(5, 2)
    for f in (sails.projector_distance, sails.principal_angles, sails.captured):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=words):
                f(*pair)


def test_spans_of_different_spaces_have_no_distance():
    with pytest.raises(ValueError, match="of one D"):
        sails.projector_distance(span(5, 2), span(6, 2))
