"""Two thousand damaged files, by fixed seeds: reading one gives a finite result or one clear line."""
import gzip
import json
import random

import pytest
import torch
from safetensors.torch import save_file

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
from conftest import random_gemma, random_sae, write_pairs
from test_bad_inputs import DEEP, HUGE, INF, NAN, SAE, SCOPE, TooLate, at_most, put

VALUES = None, "x", "", "a" * 10**5, "\ud800", DEEP, HUGE, NAN, INF, -1, 0, 1.5, 10**30, True, [], {}
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

@pytest.fixture(scope="module")
def top(tmp_path_factory, world, split):
    """A one-layer model, SAEs, pairs, prompts, an adapter, settings and a checkpoint."""
    top, (model, opt) = tmp_path_factory.mktemp("fuzz"), trained()
    lora.save_adapter(model, top / "run", "model", dict(method="lora"))
    lora.save_state(top / "state.safetensors", lora.trainable(model), opt, 1)
    for name in ("model", "sharded"):
        model_gemma.save_gemma(random_gemma(num_hidden_layers=1), top / name)
        world.tok.save(str(top / name / "tokenizer.json"))
    index = {name: "model.safetensors" for name in model_gemma.tensor_shapes(top / "model/model.safetensors")}
    data.write_json(top / "sharded/model.safetensors.index.json", dict(weight_map=index))
    sae_module.save_sae(random_sae(), top / "sae", 0, 20)
    (top / SCOPE).parent.mkdir()
    save_file({k: t.contiguous() for k, t in random_sae(N=41).named_buffers()}, top / SCOPE)
    write_pairs(top / "pairs.jsonl", split["train"][:8])
    (top / "pairs.jsonl.gz").write_bytes(gzip.compress((top / "pairs.jsonl").read_bytes()))
    ask = dict(prompt="how ?", label="benign", set="s", type="t", focus="f", target="sure", chosen="sure")
    data.write_rows(top / "asks.jsonl", [dict(ask, id=str(i)) for i in range(8)])
    data.write_text(top / "asks.csv", 'id,prompt,label\n1,how ?,benign\n2,"a, b",harmful\n')
    data.same_settings(top / "run.json", SETTINGS)
    return top

# ---- the cheapest entry that reads a file in a real command; the tensors that come of it ----
def gemma(path):
    return model_gemma.load_gemma(path.parent).parameters()

def sae(path):
    top = next(p for p in path.parents if p.name == "sae")
    return sae_module.load_sae(top, 0, "41" if path.suffix == ".safetensors" else "40").buffers()

def pairs(path):
    examples = path.parent / "pairs.jsonl" if path.name == "tokenizer.json" else path
    home = path.parent if path.name == "tokenizer.json" else path.parent / "model"
    examples = examples if examples.exists() else path.parents[1] / "pairs.jsonl"
    data.encode(data.load_tokenizer(home), data.read_pairs(examples)[0], "tiny")
    return ()

def asks(path):
    tok = data.load_tokenizer(path.parent / "model")
    for p in data.read_prompts([path], 5):
        data.render_chat(tok, p["turns"], p["expected"], "tiny")
        json.dumps([evaluation.prompt_hash(p), p["id"], p["set"]], ensure_ascii=False).encode()
    return ()

def adapter(path):
    model = random_gemma(num_hidden_layers=1)
    lora.load_adapter(model, path.parent)
    return [p for _, p in lora.trainable(model)]

def settings(path):
    return data.same_settings(path, SETTINGS) or ()

def state(path):
    model, opt = trained()
    lora.load_state(path, lora.trainable(model), opt)
    return [*model.parameters(), *(t for moments in opt.state.values() for t in moments.values())]

KINDS = {"model/config.json": (gemma, 300), "model/model.safetensors": (gemma, 150), SAE: (sae, 200),
         "sharded/model.safetensors.index.json": (gemma, 150), "model/tokenizer.json": (pairs, 50), SCOPE: (sae, 100),
         "pairs.jsonl": (pairs, 250), "pairs.jsonl.gz": (pairs, 150), "asks.jsonl": (asks, 200), "asks.csv": (asks, 50),
         "run/adapter_config.json": (adapter, 150), "run/adapter_model.safetensors": (adapter, 50),
         "run.json": (settings, 100), "state.safetensors": (state, 100)}

def mutate(name, content, seed):
    """A file's content, damaged: a value of its JSON replaced or taken out, or some bytes."""
    rng = random.Random(f"{name} {seed}")
    if seed % 2 and name.endswith((".json", ".jsonl")):
        lines = content.decode().splitlines() if name.endswith("l") else [content.decode()]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(bent(json.loads(lines[at]), rng))
        return "\n".join(lines)
    if seed % 4 == 0 and name.endswith(".safetensors"):                # a number among the last ones
        at = len(content) - 4 * rng.randrange(1, 100)
        return content[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff")) + content[at + 4:]
    end = 2000 if name.endswith(".safetensors") else len(content)      # else mostly in the header
    a, b = sorted(rng.randrange(min(end, len(content))) for _ in "ab")
    noise, bit = rng.randbytes(rng.choice((1, 1, 4, 50))), bytes([content[a] ^ 1 << rng.randrange(8)])
    return content[:a] + rng.choice((noise + content[a + len(noise):], b"", noise + content[a:], content[b:],
                                     content[a:b] + content[a:], bit + content[a + 1:]))

def bent(value, rng):
    """A JSON value with one of VALUES somewhere in it, or without one of its keys."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < .1:
        return rng.choice(VALUES)
    key, value = rng.choice([*value] if isinstance(value, dict) else range(len(value))), value.copy()
    value[key] = bent(value[key], rng)
    if rng.random() < .1:
        del value[key]
    return value

def outcome(read, path):
    """What is wrong with how a file is read, or None."""
    try:
        with at_most(2):
            return None if all(bool(t.isfinite().all()) for t in read(path)) else "not finite"
    except data.UserError as e:
        return None if str(e).isprintable() and str(e) else f"not one line: {str(e)[:99]!r}"
    except (Exception, TooLate) as e:
        return f"{type(e).__name__}: {str(e)[:99]}"

@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_gives_a_finite_result_or_one_line(top, name):
    (read, n), content, wrong = KINDS[name], (top / name).read_bytes(), {}
    assert outcome(read, top / name) is None
    for seed in range(n):
        put(top / name, mutate(name, content, seed))
        wrong[seed] = outcome(read, top / name)
    (top / name).write_bytes(content)
    assert {seed: why for seed, why in wrong.items() if why} == {}
