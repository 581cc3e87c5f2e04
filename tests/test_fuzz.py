"""Two thousand damaged files, by fixed seeds: reading one gives a finite result or one clear line."""
import contextlib
import gzip
import json
import random
import signal

import pytest
import torch
from safetensors.torch import save_file

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
from conftest import random_gemma, random_sae, write_pairs
from test_bad_inputs import DEEP, GONE, HUGE, TooLate, put

VALUES = (None, "x", "", "a" * 10**5, "\ud800", DEEP, HUGE, -1, 0, 1.5, 10**30, float("nan"), float("inf"), True, [], {}, GONE)

@pytest.fixture(scope="module")
def top(tmp_path_factory, world, split):
    """A one-layer model, SAEs, pairs, an adapter and a checkpoint of it."""
    top, model = tmp_path_factory.mktemp("fuzz"), random_gemma(num_hidden_layers=1)
    for name in ("model", "sharded"):
        model_gemma.save_gemma(model, top / name)
        world.tok.save(str(top / name / "tokenizer.json"))
    index = {"model." + n: "model.safetensors" for n, _ in model.named_parameters()}
    data.write_json(top / "sharded/model.safetensors.index.json", dict(metadata=dict(total_size=1), weight_map=index))
    sae_module.save_sae(random_sae(), top / "sae", 0, 20)
    (top / "scope/resid_post/layer_0_width_40_l0_medium").mkdir(parents=True)
    tensors = {k: t.contiguous() for k, t in random_sae().named_buffers()}
    save_file(tensors, top / "scope/resid_post/layer_0_width_40_l0_medium/params.safetensors")
    write_pairs(top / "pairs.jsonl", split["train"][:8])
    (top / "pairs.jsonl.gz").write_bytes(gzip.compress((top / "pairs.jsonl").read_bytes()))
    data.write_rows(top / "asks.jsonl", [dict(id=str(i), prompt=f"how make thing{i} ?", label="benign", set="s", type="t", focus="f",
                                              target="sure", chosen="sure") for i in range(8)])
    data.write_text(top / "asks.csv", "id,prompt,label\n1,how make thing1 ?,benign\n2,\"a, b\",harmful\n")
    data.same_settings(top / "run.json", SETTINGS)
    model, opt = trained()
    lora.save_adapter(model, top / "run", "model", dict(method="lora"))
    lora.save_state(top / "state.safetensors", lora.trainable(model), opt, 1)
    return top

SETTINGS = dict(method="lora", lr=.1, layers=[0, 1], sources=dict(model="a", data=["b"]))

def trained():
    """A one-layer model with an adapter, and its optimizer after a step."""
    model = random_gemma(num_hidden_layers=1)
    lora.attach(model, "qo", 2, 4)
    lora.init_lora(model)
    opt = torch.optim.AdamW([p for _, p in lora.trainable(model)])
    model(torch.tensor([[2, 5, 9]])).sum().backward()
    opt.step()
    return model, opt

# ---- the cheapest entry that reads a file in a real command; each returns tensors ----
def gemma(top, name="model"):
    return [*model_gemma.load_gemma(top / name).parameters()]

def sae(top, name="sae"):
    return [*sae_module.load_sae(top / name, 0, "40").buffers()]

def pairs(top, name="pairs.jsonl"):
    data.encode(data.load_tokenizer(top / "model"), data.read_pairs(top / name)[0], "tiny")
    return []

def asks(top, name="asks.jsonl"):
    for p in data.read_prompts([top / name], 5):
        data.render_chat(data.load_tokenizer(top / "model"), p["turns"], p["expected"], "tiny")
        json.dumps([evaluation.prompt_hash(p), p["id"], p["set"]], ensure_ascii=False).encode()
    return []

def adapter(top):
    model = random_gemma(num_hidden_layers=1)
    lora.load_adapter(model, top / "run")
    return [p for _, p in lora.trainable(model)]

def settings(top):
    data.same_settings(top / "run.json", SETTINGS)
    return []

def state(top):
    model, opt = trained()
    lora.load_state(top / "state.safetensors", lora.trainable(model), opt)
    return [*model.parameters(), *(t for moments in opt.state.values() for t in moments.values())]

KINDS = {  # file: how it is read, a reader's arguments, mutations
    "model/config.json": (gemma, (), 300), "model/model.safetensors": (gemma, (), 200),
    "sharded/model.safetensors.index.json": (gemma, ("sharded",), 150), "model/tokenizer.json": (pairs, (), 50),
    "sae/layer_0/width_40/average_l0_20/params.npz": (sae, (), 200),
    "scope/resid_post/layer_0_width_40_l0_medium/params.safetensors": (sae, ("scope",), 150),
    "pairs.jsonl": (pairs, (), 250), "pairs.jsonl.gz": (pairs, ("pairs.jsonl.gz",), 150), "asks.jsonl": (asks, (), 200),
    "asks.csv": (asks, ("asks.csv",), 50), "run/adapter_config.json": (adapter, (), 150), "run.json": (settings, (), 100),
    "run/adapter_model.safetensors": (adapter, (), 50), "state.safetensors": (state, (), 100)}

def mutate(name, content, seed):
    """A file's content, damaged: a value of its JSON replaced or taken out, or some bytes."""
    rng = random.Random(f"{name} {seed}")
    if seed % 2 and ".json" in name and not name.endswith(".gz"):
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(bent(json.loads(lines[at]), rng))
        return "\n".join(lines)
    end = 2000 if name.endswith(".safetensors") and seed % 3 else len(content)     # most of them in the header
    a, b = sorted(rng.randrange(min(end, len(content))) for _ in "ab")
    noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 4, 50))))
    return rng.choice((content[:a] + noise + content[a + len(noise):], content[:a], content[:a] + noise + content[a:],
                       content[:b] + content[a:], content[:a] + content[b:], content[:a] + bytes([content[a] ^ 1 << rng.randrange(8)])
                       + content[a + 1:]))

def bent(value, rng):
    """A JSON value with one of VALUES somewhere in it."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < .1:
        return rng.choice(VALUES[:-1])
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key, value = rng.choice(keys), value.copy()
    if rng.random() < .1:
        del value[key]
    else:
        value[key] = bent(value[key], rng)
    return value

def outcome(read, top, args):
    """What is wrong with how a file is read, or None."""
    def late(*_):
        raise TooLate
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        return None if all(bool(t.isfinite().all()) for t in read(top, *args)) else "not finite"
    except data.UserError as e:
        return None if str(e) and "\n" not in str(e) and str(e).isprintable() else f"not one line: {str(e)[:99]!r}"
    except (Exception, TooLate) as e:
        return f"{type(e).__name__}: {str(e)[:99]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)

@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_gives_a_finite_result_or_one_line(top, name):
    (read, args, n), content = KINDS[name], (top / name).read_bytes()
    assert outcome(read, top, args) is None
    wrong = {}
    try:
        for seed in range(n):
            with contextlib.redirect_stderr(None):     # a note on 224 in a config
                put(top / name, mutate(name, content, seed))
                wrong[seed] = outcome(read, top, args)
    finally:
        (top / name).write_bytes(content)
    assert {seed: why for seed, why in wrong.items() if why} == {}
