"""Scores, features, bases and the distance between subspaces, each against its definition."""
import pytest
import torch

import sails

pytestmark = pytest.mark.filterwarnings("error")
nan, eye = float("nan"), torch.eye(7, dtype=torch.float64)

def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def span(d, r, seed=0):
    return torch.linalg.qr(randn(d, r, seed=seed))[0]

def projector(U):
    return U @ torch.linalg.pinv(U)

def test_absolute_score_finds_features_of_harm_and_relative_score_ranks_them_last():
    aligned, unaligned = torch.tensor([.5, 2., 0., 1.]), torch.tensor([.5, .25, 3., 1.])
    assert sails.score(aligned, unaligned).tolist() == [0., 1.75, 3., 0.]
    assert sails.score(aligned, unaligned, "relative").tolist() == [0., 7., -1., 0.]
    assert sails.top_features(aligned, unaligned, 2).tolist() == [2, 1]
    assert sails.top_features(aligned, unaligned, 2, score="relative").tolist() == [1, 0]

@pytest.mark.parametrize("more, value", [({}, .5 / 1e-6), (dict(eps=.25), 2.)])
def test_relative_score_of_a_feature_silent_in_unaligned_text_is_large_but_finite(more, value):
    assert sails.score([.5], [0.], "relative", **more).tolist() == [value]

def test_equal_scores_go_to_the_lower_index_at_any_width():
    aligned = torch.zeros(5000)
    aligned[[17, 4000]] = 1
    assert sails.top_features(aligned, torch.zeros(5000), 5).tolist() == [17, 4000, 0, 1, 2]

@pytest.mark.parametrize("k", [0, -1, 5])
def test_more_features_than_there_are_or_none_is_an_error(k):
    with pytest.raises(ValueError, match="4 features"):
        sails.top_features(torch.ones(4), torch.zeros(4), k)

@pytest.mark.parametrize("args", [([1., nan], [0., 0.]), ([1.], [float("inf")]), ([1., 1.], [1.] * 3),
                                  ([[1.]], [[1.]]), ([1.], [1.], "cosine")])
def test_scores_refuse_nan_other_lengths_and_unknown_rules(args):
    with pytest.raises(ValueError, match="two finite vectors|cosine"):
        sails.score(*args)

def test_whole_basis_is_orthonormal_and_spans_the_chosen_rows_only():
    W = randn(20, 12)
    V = sails.basis(W, [3, 7, 11, 2])
    assert torch.allclose(V.T @ V, eye[:4, :4], atol=1e-12)
    assert torch.allclose(projector(V), projector(W[[3, 7, 11, 2]].T), atol=1e-10)
    assert sails.basis(randn(40, 8), range(30)).shape == (8, 8)    # more features than dimensions

@pytest.mark.parametrize("sign", [1, -1])
def test_directions_come_by_variance_and_point_to_where_their_rows_are(sign):
    W = torch.diag(torch.tensor([1., 3., 2.], dtype=torch.float64))
    assert torch.allclose(sails.basis(sign * W, [0, 1, 2]), sign * eye[:3, [1, 2, 0]])

@pytest.mark.parametrize("tau, kept", [(9 / 15, 1), (.61, 2), (13 / 15, 2), (.9, 3), (.99, 4), (1, 4)])
def test_tau_keeps_the_fewest_directions_that_hold_its_share(tau, kept):
    W = torch.diag(torch.tensor([3., 2., 1., 1.], dtype=torch.float64))            # shares 9, 4, 1, 1 of 15
    V = sails.basis(W, range(4), tau)
    assert V.shape == (4, kept)
    assert torch.allclose(V[:, :2], eye[:4, :min(kept, 2)])        # the strongest ones

def test_centring_deletes_the_direction_that_all_rows_share():
    W = torch.tensor([[5., 1, 0], [5, -1, 0], [5, 0, 1], [5, 0, -1]], dtype=torch.float64)
    assert abs(float(sails.basis(W, range(4))[0, 0])) > .99
    assert float(sails.basis(W, range(4), center=True)[0].abs().max()) < 1e-12

@pytest.mark.parametrize("given, back", [("float64",) * 2, ("float32",) * 2, ("bfloat16", "float32")])
def test_basis_keeps_the_precision_it_was_given_and_float32_for_half(given, back):
    V = sails.basis(randn(6, 8).to(getattr(torch, given)), [0, 1])
    assert V.dtype == getattr(torch, back)
    assert torch.allclose((V.T @ V).double(), eye[:2, :2], atol=1e-6)

@pytest.mark.parametrize("features, more, words", [
    ([], {}, "features"), ([0, 9], {}, "features"), ([-1], {}, "features"), ([1, 1], {}, "same"),
    ([2, 3], {}, "same"), ([5], {}, "NaN"), ([0], dict(tau=0), "tau"), ([0], dict(tau=1.1), "tau"),
    ([0], dict(tau=nan), "tau"), ([4], {}, "no variance"), ([1], dict(center=True), "no variance")])
def test_degenerate_choices_are_clear_errors(features, more, words):
    W = randn(6, 8)
    W[3], W[4], W[5, 0] = -2 * W[2], 0, nan            # a repeated direction, a zero row, a NaN
    with pytest.raises(ValueError, match=words):
        sails.basis(W, features, **more)

@pytest.mark.parametrize("d, r, q", [(5, 1, 1), (6, 3, 3), (9, 2, 5), (30, 6, 6), (4, 4, 4), (7, 7, 3)])
def test_projector_distance_is_the_norm_of_the_difference_of_projectors(d, r, q):
    for seed in range(4):
        U, V = span(d, r, seed), span(d, q, seed + 100)
        want = pytest.approx(float(torch.linalg.matrix_norm(projector(U) - projector(V))), abs=1e-9)
        assert sails.projector_distance(U, V) == want
        assert sails.projector_distance(V, U) == want
        assert sails.projector_distance(U @ randn(r, r, seed=seed + 300), V) == want
        assert sails.captured(U, V) == pytest.approx(float((projector(U) @ V).square().sum()) / q, abs=1e-9)

@pytest.mark.parametrize("angle", [0, 1e-12, 1e-8, 1e-3, .7, torch.pi / 2 - 1e-9, torch.pi / 2])
def test_a_known_angle_is_measured_to_rounding_small_or_large(angle):
    t = torch.tensor(angle, dtype=torch.float64)
    V = torch.stack([eye[0], t.cos() * eye[1] + t.sin() * eye[2]], 1) @ span(2, 2)
    assert sails.projector_distance(eye[:, :2], V) == pytest.approx(2 ** .5 * float(t.sin()), 1e-6, 4e-15)

@pytest.mark.parametrize("bad", [torch.zeros(5, 0), torch.ones(5), torch.ones(2, 3), torch.ones(5, 2),
                                 span(6, 2), torch.zeros(5, 1), torch.full((5, 1), nan)])
@pytest.mark.parametrize("f", [sails.projector_distance, sails.captured])
def test_without_two_spans_of_one_space_there_is_no_distance(f, bad):
    for pair in ((bad, span(5, 2)), (span(5, 2), bad)):
        with pytest.raises(ValueError, match="independent columns"):
            f(*pair)
