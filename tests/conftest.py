"""What several test files share: a tiny random Gemma, an SAE for it, preference data, in the hub's layout."""
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
from benchmarks import tiny_world

# heads * head_dim != D, fewer key/value heads: no factor fits in a wrong place; 381: the tiny world's words
RAW = dict(model_type="gemma2", vocab_size=381, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
           num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12,
           sliding_window=8, bos_token_id=2, eos_token_id=1, pad_token_id=0)

@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                           # with tensors this small threads wait for each other
    yield
    torch.set_num_threads(threads)

def random_gemma(seed=0, dtype=torch.float32, **changes):
    """A random model whose norms matter: gains between .4 and 1.6, weights of a size that moves logits."""
    gen = torch.Generator().manual_seed(seed)
    model = model_gemma.Gemma(model_gemma.config_from_json({**RAW, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-.6, .6, generator=gen) if p.dim() == 1 else p.normal_(0, .3, generator=gen)
    return model.to(dtype).requires_grad_(False)

def random_sae(seed=0, D=24, N=40, threshold=.1):
    """An untrained SAE that fires on about half of its features, decoder rows of norm 1."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N, D, generator=gen), dim=1)
    b_enc, b_dec = .1 * torch.randn(N, generator=gen), .1 * torch.randn(D, generator=gen)
    return sae_module.JumpReLUSAE(W.T.clone(), W, b_enc, b_dec, torch.full((N,), threshold))

def write_pairs(path, examples):
    """Examples as read_pairs gives them -> a JSONL file that it reads."""
    keys = "id", "label", "chosen", "rejected"
    data.write_rows(path, [dict(prompt=ex["turns"], **{k: ex[k] for k in keys}) for ex in examples])

@pytest.fixture
def model():
    return random_gemma()

@pytest.fixture(scope="session")
def world():
    return tiny_world.tiny_world(0)

@pytest.fixture(scope="session")
def split(world):
    return tiny_world.world_split(world, 0)

@pytest.fixture(scope="session")
def home(tmp_path_factory, world, split):
    """What a run reads: .model (2 layers, random), .sae (layers 0, 1, width 40), .data, .test (pairs)."""
    home = tmp_path_factory.mktemp("home")
    model_gemma.save_gemma(random_gemma(), home / "model")
    world.tok.save(str(home / "model" / "tokenizer.json"))
    for layer in (0, 1):
        sae_module.save_sae(random_sae(layer), home / "sae", layer, 20)
    write_pairs(home / "pairs.jsonl", split["train"])
    write_pairs(home / "test.jsonl", split["test"])
    paths = dict(model="model", sae="sae", data="pairs.jsonl", test="test.jsonl")
    return SimpleNamespace(**{k: str(home / name) for k, name in paths.items()})
