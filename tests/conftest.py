"""Shared by the tests of training: a tiny random Gemma, an SAE for it and preference data, laid out as the hub lays them out."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]
import data
import model_gemma
import sae as sae_module

# heads * head_dim != D and fewer key/value heads than heads, so that no factor fits where it does not belong
RAW = dict(model_type="gemma2", vocab_size=286, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12, sliding_window=8, bos_token_id=2, eos_token_id=1, pad_token_id=0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                           # on tensors this small threads do little but wait for each other
    yield
    torch.set_num_threads(threads)


def random_gemma(seed=0, dtype=torch.float32, **changes):
    """A random model whose norms matter: gains between .4 and 1.6, other weights of a size that moves logits."""
    gen = torch.Generator().manual_seed(seed)
    model = model_gemma.Gemma(model_gemma.config_from_json({**RAW, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=gen) * 1.2 - .6 if p.dim() == 1 else torch.randn(p.shape, generator=gen) * .3)
    return model.to(dtype).requires_grad_(False)


def random_sae(seed=0, D=24, N=40, threshold=.1):
    """An untrained SAE that fires on about half of its features, decoder rows of norm 1."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N, D, generator=gen), dim=1)
    return sae_module.JumpReLUSAE(W.T.clone(), W, .1 * torch.randn(N, generator=gen), .1 * torch.randn(D, generator=gen), torch.full((N,), threshold))


def write_pairs(path, examples):
    """Examples as read_pairs gives them -> a JSONL file that it reads."""
    data.write_text(path, "".join(json.dumps(dict(prompt=ex["turns"], **{k: ex[k] for k in ("id", "label", "chosen", "rejected")})) + "\n" for ex in examples))


@pytest.fixture
def model():
    return random_gemma()


@pytest.fixture(scope="session")
def world():
    return data.tiny_world(0)


@pytest.fixture(scope="session")
def split(world):
    return data.world_split(world, 0)


@pytest.fixture(scope="session")
def home(tmp_path_factory, world, split):
    """Paths of what a run reads: .model (2 layers, random, the tiny world's tokenizer), .sae (layers 0 and 1, width 40), .data, .test."""
    home = tmp_path_factory.mktemp("home")
    model_gemma.save_gemma(random_gemma(), home / "model")
    world.tok.save(str(home / "model" / "tokenizer.json"))
    for layer in (0, 1):
        sae_module.save_sae(random_sae(layer), home / "sae", layer, 20)
    write_pairs(home / "pairs.jsonl", split["train"])
    write_pairs(home / "test.jsonl", split["id_test"])
    return SimpleNamespace(model=str(home / "model"), sae=str(home / "sae"), data=str(home / "pairs.jsonl"), test=str(home / "test.jsonl"))
