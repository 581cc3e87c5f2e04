"""Two thousand damaged files, by fixed seeds: reading one gives a finite result or one clear line."""
import json
import random
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
from conftest import random_gemma
from test_bad_inputs import (AC, AM, CONFIG, DEEP, GZ, HUGE, INDEX, INF, NAN, SAE, SCOPE, STATE, TOK, WEIGHTS,
                             TooLate, at_most, files, place, put)  # noqa: F401, two are fixtures

VALUES = None, "x", "", "a" * 10**5, "\ud800", DEEP, HUGE, NAN, INF, -1, 0, 1.5, 10**30, True, [], {}

gemma = lambda path: model_gemma.load_gemma(path.parent).parameters()
sae = lambda path: sae_module.load_sae("sae", 0, "40" if str(path) == SAE else "41").buffers()
pairs = lambda path: data.encode(data.load_tokenizer("model"), data.read_pairs(path)[0], "tiny") and ()

def asks(path):
    for p in data.read_prompts([path], 5):
        data.render_chat(data.load_tokenizer("model"), p["turns"], p["expected"], "tiny")
        json.dumps([evaluation.prompt_hash(p), p["id"], p["set"]], ensure_ascii=False).encode()
    return ()

def adapter(path):
    model = random_gemma()
    lora.load_adapter(model, path.parent)
    return [p for _, p in lora.trainable(model)]

def state(path):
    model = random_gemma()
    lora.attach(model, "qkvo", 4, 8)
    opt = torch.optim.AdamW([p for _, p in lora.trainable(model)])
    lora.load_state(path, lora.trainable(model), opt)
    return [*model.parameters(), *(t for moments in opt.state.values() for t in moments.values())]

SETTINGS = dict(method="lora", lr=.1, layers=[0, 1], sources=dict(model="a", data=["b"]))
KINDS = {CONFIG: (300, gemma), WEIGHTS: (150, gemma), INDEX: (150, gemma), SAE: (200, sae), SCOPE: (100, sae),
         TOK: (50, lambda path: pairs("pairs.jsonl")), "pairs.jsonl": (250, pairs), GZ: (150, pairs),
         "asks.jsonl": (200, asks), "asks.csv": (50, asks), AC: (150, adapter), AM: (50, adapter),
         "settings.json": (100, lambda path: data.same_settings(path, SETTINGS) or ()), STATE: (100, state)}

def mutate(name, content, seed):
    """A file's content, damaged: a value of its JSON replaced or taken out, or some bytes."""
    rng = random.Random(f"{name} {seed}")
    if seed % 2 and name.endswith((".json", ".jsonl")):
        lines = content.decode().splitlines() if name.endswith("l") else [content.decode()]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(bent(json.loads(lines[at]), rng))
        return "\n".join(lines)
    if seed % 4 == 0 and name.endswith(".safetensors"):                # one of the last numbers
        at = len(content) - 4 * rng.randrange(1, 100)
        return content[:at] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff")) + content[at + 4:]
    end = 2000 if name.endswith(".safetensors") else len(content)      # else in the header
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

def outcome(read, name):
    """What is wrong with how a file is read, or None."""
    try:
        with at_most(2):
            return None if all(bool(t.isfinite().all()) for t in read(Path(name))) else "not finite"
    except data.UserError as e:
        return None if str(e).isprintable() and str(e) else f"not one line: {str(e)[:99]!r}"
    except (Exception, TooLate) as e:
        return f"{type(e).__name__}: {str(e)[:99]}"

@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_gives_a_finite_result_or_one_line(place, name):
    put("asks.csv", 'id,prompt,label\n1,how ?,benign\n2,"a, b",harmful\n')
    data.same_settings(Path("settings.json"), SETTINGS)
    (n, read), content, wrong = KINDS[name], Path(name).read_bytes(), {}
    assert outcome(read, name) is None
    for seed in range(n):
        put(name, mutate(name, content, seed))
        wrong[seed] = outcome(read, name)
    assert {seed: why for seed, why in wrong.items() if why} == {}
