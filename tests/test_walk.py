"""A walk through the method: one planted feature, from a preference pair to the files that a run leaves.
Read it beside the paper. A random Gemma gets one concept: every word for a harmful object (harm17, ...)
carries the direction CONCEPT. An SAE of 8 features has that direction as feature 3; feature 5 fires on
everything, the others never. What follows is what `python train.py` does, a step a test."""
import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import model_gemma
import sae as sae_module
import sails
from conftest import go, random_gemma

PLANTED, ALWAYS, LAYER, D, N = 3, 5, 1, 24, 8
ROWS = torch.linalg.qr(torch.randn(D, N, generator=torch.Generator().manual_seed(3)))[0].T      # (N, D)
CONCEPT = ROWS[PLANTED]  # (D,)

@pytest.fixture(scope="module")
def model(world):
    model = random_gemma()
    harmful = [world.tok.token_to_id("▁" + name) for name in world.names if name.startswith("harm")]
    model.embed_tokens.weight[harmful] += 4 * CONCEPT
    return model

@pytest.fixture(scope="module")
def sae():
    W_enc, b_enc = torch.zeros(D, N), torch.zeros(N)
    W_enc[:, PLANTED] = CONCEPT
    b_enc[ALWAYS] = 9.
    return sae_module.JumpReLUSAE(W_enc, ROWS, b_enc, torch.zeros(D), torch.full((N,), 8.))

@pytest.fixture(scope="module")
def rows(world, split):
    return data.encode(world.tok, split["train"], "tiny")[0]

@pytest.fixture(scope="module")
def V(model, sae, rows):
    stats = sails.contrast_means(model, {LAYER: sae}, sails.contrast_pairs(rows, "prompts", last=3))
    return sails.subspaces("sails", stats, {LAYER: sae}, k=1, tau=1.)[0][LAYER]  # (D, 1)

def test_1_a_preference_pair_becomes_ids_and_a_mask_over_its_last_prompt_tokens(world, rows):
    (ids, mask), _ = sails.contrast_pairs(rows, "prompts", last=3)[0]
    words = [world.tok.id_to_token(i).strip("▁") for i in ids]
    assert words[:4] == ["<bos>", "<user>", *rows[0]["turns"][0]["content"].split()[:2]]
    marked = [w for w, m in zip(words, mask) if m]
    assert marked[0].startswith("harm") and marked[1:] == ["?", "<model>"]

def test_2_the_planted_feature_fires_at_the_harmful_word_alone(model, sae, rows):
    harmful, benign = (pair[0] for pair in sails.contrast_pairs(rows, "prompts")[0])
    a, u = (sae.encode(model.residuals(torch.tensor([ids]), [LAYER])[LAYER][0]) for ids in (harmful, benign))
    assert [t for t in range(1, len(harmful)) if a[t, PLANTED] > 0] == [len(harmful) - 3]      # the object
    assert not u[1:, PLANTED].any() and bool((a[:, ALWAYS] == 9).all())

def test_3_delta_is_the_difference_of_mean_activations_and_picks_the_planted_feature(model, sae, rows):
    pairs = sails.contrast_pairs(rows, "prompts", last=3)
    s = sails.contrast_means(model, {LAYER: sae}, pairs)[LAYER]
    delta = sails.score(s["mu_aligned"], s["mu_unaligned"])
    assert delta.nonzero()[:, 0].tolist() == [PLANTED]  # what always fires has the mean 9 in both sets
    assert s["mu_aligned"][ALWAYS] == s["mu_unaligned"][ALWAYS] == 9
    assert sails.top_features(s["mu_aligned"], s["mu_unaligned"], k=1).tolist() == [PLANTED]

def test_4_the_subspace_is_spanned_by_the_planted_features_decoder_row(V):
    torch.testing.assert_close(V[:, 0], CONCEPT)

def test_5_readers_start_with_v_as_their_row_and_writers_with_v_as_their_column(model, V):
    ids = torch.tensor([[2, 3, 40, 50, 60]])
    before = model(ids)
    lora.attach(model, ("q", "k", "v", "o"), r=1, alpha=2)
    lora.init_sails(model, {LAYER: V})
    for _, m in lora.adapters(model):
        holds, other = (m.B[:, 0], m.A) if m.place == "o" else (m.A[0], m.B)
        torch.testing.assert_close(holds.detach(), CONCEPT)
        assert not other.any()
    assert torch.equal(model(ids), before)             # the adapted model is the base, to the bit
    lora.detach(model)

@pytest.fixture(scope="module")
def run(model, sae, world, home, tmp_path_factory):
    """The folder of `train.py` on this model, SAE and data, two steps with the basis frozen."""
    top = tmp_path_factory.mktemp("walk")
    model_gemma.save_gemma(model, top / "model")
    world.tok.save(str(top / "model" / "tokenizer.json"))
    sae_module.save_sae(sae, top / "sae", LAYER, 1)
    line = (f"--model {top}/model --sae {top}/sae --layers {LAYER} --width {N} --contrast prompts "
            f"--data {home.data} --out {top}/run --k 1 --tau 1 --r 1 --steps 2 --batch 4 --lr 0.01 "
            "--device cpu --freeze-basis")
    assert go(line.split())[0] == 0
    return top / "run"

def test_6_training_moves_the_other_factor_so_the_update_reads_and_writes_the_concept_alone(run):
    tensors = load_file(run / "adapter_model.safetensors")
    for name in [n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n]:
        B, A = (tensors[f"{name}.lora_{x}.weight"] for x in "BA")
        dW = (B @ A).T if name.endswith("o_proj") else B @ A           # (., D): the side of the stream last
        torch.testing.assert_close(dW @ CONCEPT[:, None] @ CONCEPT[None], dW)
        assert dW.norm() > 1e-3

def test_7_the_report_names_the_feature_where_it_fires_and_how_far_the_adapter_drifted(run):
    [row] = data.read_json(run / "features.json")
    assert (row["layer"], row["feature"]) == (LAYER, PLANTED)
    assert row["delta"] == row["mu_aligned"] > 1
    assert all(word.strip().startswith("harm") for word, _ in row["fires_on"])
    drift = data.read_json(run / "sails.json")["drift"]
    assert drift == {side: pytest.approx(dict(overlap=1, energy=1)) for side in ("read", "write")}
