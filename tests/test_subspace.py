"""Scores, features, bases and the distance between subspaces, each against its definition."""
import pytest
import torch

import sails
from benchmarks import theory

pytestmark = pytest.mark.filterwarnings("error")
nan, eye = float("nan"), torch.eye(7, dtype=torch.float64)

def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

span = lambda d, r, seed=0: torch.linalg.qr(randn(d, r, seed=seed))[0]
projector = lambda U: U @ torch.linalg.pinv(U)

def test_absolute_score_finds_features_of_harm_relative_ranks_them_last_and_ties_go_to_the_lower_index():
    aligned, unaligned = torch.tensor([.5, 2., 0., 1.]), torch.tensor([.5, .25, 3., 1.])
    assert sails.score(aligned, unaligned).tolist() == [0., 1.75, 3., 0.]
    assert sails.score(aligned, unaligned, "relative").tolist() == [0., 7., -1., 0.]
    assert sails.score([.5], [0.], "relative").tolist() == [.5 / 1e-6]             # large but finite
    assert sails.score([.5], [0.], "relative", eps=.25).tolist() == [2.]
    assert sails.top_features(aligned, unaligned, 2).tolist() == [2, 1]
    assert sails.top_features(aligned, unaligned, 2, score="relative").tolist() == [1, 0]
    aligned = torch.zeros(5000).index_fill(0, torch.tensor([17, 4000]), 1)
    assert sails.top_features(aligned, torch.zeros(5000), 5).tolist() == [17, 4000, 0, 1, 2]

@pytest.mark.parametrize("f, args", [
    *((sails.top_features, ([1.] * 4, [0.] * 4, k)) for k in (0, -1, 5)),
    (sails.strongest, (torch.tensor([1., nan, 2., 3.]), 1)),
    *((sails.score, x) for x in (([1., nan], [0., 0.]), ([1.], [float("inf")]), ([1., 1.], [1.] * 3),
                                 ([[1.]], [[1.]]), ([1.], [1.], "cosine")))])
def test_scores_refuse_nan_other_lengths_unknown_rules_and_more_features_than_there_are_or_none(f, args):
    with pytest.raises(ValueError, match="two finite vectors|cosine|4 features"):
        f(*args)

@pytest.mark.parametrize("given, back, far", [
    ("float64", "float64", 1e-10), ("float32", "float32", 1e-5), ("bfloat16", "float32", 1e-5)])
def test_whole_basis_is_orthonormal_in_its_precision_and_spans_the_chosen_rows_only(given, back, far):
    W = randn(20, 12).to(getattr(torch, given))
    V = sails.basis(W, [3, 7, 11, 2])
    assert V.dtype == getattr(torch, back)
    assert torch.allclose(V.double().T @ V.double(), eye[:4, :4], atol=far)
    assert torch.allclose(projector(V.double()), projector(W[[3, 7, 11, 2]].double().T), atol=far)
    assert sails.basis(randn(40, 8), range(30)).shape == (8, 8)    # more features than dimensions

@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tau, kept", [(9 / 15, 1), (.61, 2), (13 / 15, 2), (.9, 3), (.99, 4), (1, 4)])
def test_tau_keeps_the_fewest_directions_that_hold_its_share_and_point_to_their_rows(tau, kept, sign):
    W = torch.diag(torch.tensor([1., 3., 1., 2.], dtype=torch.float64))            # shares 1, 9, 1, 4 of 15
    V = sails.basis(sign * W, range(4), tau)
    assert V.shape == (4, kept)
    assert torch.allclose(V[:, :2], sign * eye[:4, [1, 3][:kept]])

def test_centring_deletes_the_direction_that_all_rows_share():
    W = torch.tensor([[5., 1, 0], [5, -1, 0], [5, 0, 1], [5, 0, -1]], dtype=torch.float64)
    assert abs(float(sails.basis(W, range(4))[0, 0])) > .99
    assert float(sails.basis(W, range(4), center=True)[0].abs().max()) < 1e-12

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
        assert theory.captured(U, V) == pytest.approx(float((projector(U) @ V).square().sum()) / q, abs=1e-9)

@pytest.mark.parametrize("angle", [0, 1e-12, 1e-8, 1e-3, .7, torch.pi / 2 - 1e-9, torch.pi / 2])
def test_a_known_angle_is_measured_to_rounding_small_or_large(angle):
    t = torch.tensor(angle, dtype=torch.float64)
    V = torch.stack([eye[0], t.cos() * eye[1] + t.sin() * eye[2]], 1) @ span(2, 2)
    assert sails.projector_distance(eye[:, :2], V) == pytest.approx(2 ** .5 * float(t.sin()), 1e-6, 4e-15)

@pytest.mark.parametrize("bad", [torch.zeros(5, 0), torch.ones(5), torch.ones(2, 3), torch.ones(5, 2),
                                 span(6, 2), torch.zeros(5, 1), torch.full((5, 1), nan)])
@pytest.mark.parametrize("f", [sails.projector_distance, theory.captured])
def test_without_two_spans_of_one_space_there_is_no_distance(f, bad):
    for pair in ((bad, span(5, 2)), (span(5, 2), bad)):
        with pytest.raises(ValueError, match="independent columns"):
            f(*pair)
