"""What several test files share: a tiny random Gemma, an SAE for it, preference data, in the hub's layout."""
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]
import data
import lora
import model_gemma
import sae as sae_module
import sails
import train
from benchmarks import plan, tiny_world

# heads * head_dim != D, fewer key/value heads: no factor fits in a wrong place; 381: the tiny world's words
RAW = dict(model_type="gemma2", vocab_size=381, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
           num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12,
           sliding_window=8, bos_token_id=2, eos_token_id=1, pad_token_id=0)
NINE = RAW | dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                  num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256)

@pytest.fixture(autouse=True, scope="session")         # of the session: fixtures of modules come before tests
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

@torch.no_grad()
def stir(model, size=.3):
    """Give every trainable weight a random value, as training would."""
    gen = torch.Generator().manual_seed(1)
    for _, p in lora.trainable(model):
        p.normal_(0, size, generator=gen)

def adapted(model, targets, r, alpha, size=.3, layers=None):
    """The model with adapters that change it."""
    lora.attach(model, targets, r, alpha, layers)
    stir(model, size)
    return model

def random_sae(seed=0, D=24, N=40, threshold=.1):
    """An untrained SAE that fires on about half of its features, decoder rows of norm 1."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N, D, generator=gen), dim=1)
    b_enc, b_dec = .1 * torch.randn(N, generator=gen), .1 * torch.randn(D, generator=gen)
    return sae_module.JumpReLUSAE(W.T.clone(), W, b_enc, b_dec, torch.full((N,), threshold))

QUICK = "--steps 4 --batch 8 --micro 3 --warmup 2 --lr 1e-2 --max-new 6 --device cpu"
READ_BY = {sails.METHODS: "--layers 0,1", sails.READS_DATA: "--contrast-pairs 16",
           sails.READS_SAE: "--sae {sae} --k 6 --tau 1 --width 40", train.METHODS[:-1]: "--rank 4"}
FIT = "--sae fit --fit-width 32 --fit-active 4 --fit-tokens 400 --fit-steps 20 --k 4"

def command(home, out, more=""):
    """train.py's arguments for a quick run on `home`: those that its methods read; a last value counts."""
    methods = re.findall(r"--method (\S+)", more) or ["sails"]
    read = [x for readers, x in READ_BY.items() if set(methods[-1].split(",")) & set(readers)]
    read = " ".join(read).format(sae=home.sae)
    if "--sae fit" in more:
        read = read.replace("--width 40", "")
    return f"--model {home.model} --data {home.data} --out {out} {QUICK} {read} {more}".split()

def go(args, main=train.main):
    """Run a script's main in this process as if in one of its own: (exit code, stdout, stderr)."""
    train._kept.clear()
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["script", *map(str, args)])
        patch.setattr(os, "fsync", lambda file: None)  # no test cuts the power
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as e:
            data.run_main(main)
    return e.value.code or 0, out.getvalue(), err.getvalue()

def start(args, cwd, *launcher):
    """train.py in a process of its own."""
    env = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([sys.executable, *launcher, f"{TOP}/train.py", *args], cwd=cwd, text=True,
                            env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]

def by_two():
    """The launcher of two processes, on a port that is free."""
    return f"-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()}".split()

def trained(home, out, more=""):
    """A run by the command: its folder, what it printed, what align got and made of the weights."""
    seen, align = SimpleNamespace(out=out), train.align
    weights = lambda model: {n: p.detach().clone() for n, p in model.named_parameters()}

    def watched(model, rows, *rest):
        seen.start, seen.trains = weights(model), {n for n, _ in lora.trainable(model)}
        align(model, rows, *rest)
        seen.end, seen.rows, seen.sets = weights(model), rows, train._kept["sets"][1]
        seen.checkpointing = model.checkpointing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "align", watched)
        patch.setattr(train, "judge_reward", parity)
        patch.setattr(plan, "walked", lambda *_: [0, 0])           # memory is test_plan.py's
        code, seen.said, err = go(command(home, out, more))
    assert code == 0, err
    return seen

def log(folder):
    """log.jsonl without its timing."""
    return [row | dict(tokens_per_s=0) for _, row in data.read_rows(folder / "log.jsonl")]

def parity(tok, stop):
    """A reward in place of the judge's: a random model never refuses."""
    return lambda row, ids: float(ids[0] % 2)

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

@pytest.fixture(scope="session")
def run(home, tmp_path_factory):
    return trained(home, tmp_path_factory.mktemp("run") / "sails", f"--test {home.test}")
