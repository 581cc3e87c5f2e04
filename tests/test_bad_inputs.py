"""Bad inputs, one a row: exit code 2, one line that says what and where, nothing created or changed."""
import contextlib
import gzip
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import zipfile
import zlib
from functools import partial as P
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import train
from benchmarks import choices, compare, gcg
from conftest import go, random_sae

TRAIN = "train --model model --data pairs.jsonl --steps 2 --batch 4 --lr 1e-2 --device cpu --out new"
LORA, FULL = TRAIN + " --method lora --rank 4", TRAIN + " --method full"
SAILS = TRAIN + " --sae sae --layers 0,1 --width 40 --k 6 --rank 4 --contrast-pairs 16"
HALF, RUN = SAILS + " --out half --resume", LORA + " --out run --resume"
CMP = LORA + " --lr 1e-3,1e-2 --out cmp"
EVAL = "eval --model model --prompts asks.jsonl --max-new 3 --device cpu --out new"
ADAPTER, SHARDED = EVAL + " --adapter run", EVAL + " --model sharded"
JUDGED, AGAIN = EVAL + " --out judged", "eval --prompts asks.jsonl --out judged"
COSTS = ("eval --model model --adapter run --pairs pairs.jsonl --kl text.txt --knowledge know.jsonl "
         "--device cpu --out new")
URL = EVAL + " --judge http://127.0.0.1:9/v1 --judge-model m --judge-tries 1 --judge-pause 0"
CHOICES = "choices --model model --choices choices.jsonl --device cpu"
GCG = ("gcg --model model --prompts asks.jsonl --target sure --steps 1 --length 2 --width 4 --device cpu "
       "--out new/a.jsonl")
SHOW, COMPARE = "lora run", "compare judged judged"
SCRIPTS = dict(train=train, eval=evaluation, choices=choices, gcg=gcg, lora=lora, sae=sae_module, data=data,
               gemma=model_gemma, compare=compare)
DEEP, HUGE, GONE, NAN, INF = "@deep", "@huge", object(), float("nan"), float("inf")
SAE = "sae/layer_0/width_40/average_l0_20/params.npz"

# ---- a world of small files, made once and put back for every row ----
def run(command):
    """A command line's exit code, stdout and stderr; its first word names the script."""
    script, *args = shlex.split(command)
    return go(args, SCRIPTS[script].main)

@pytest.fixture(scope="module")
def world_of_files(tmp_path_factory, home, split):
    """(folder in which commands run, a copy of what it holds)."""
    top = tmp_path_factory.mktemp("bad")
    (top / "place").mkdir()
    with contextlib.chdir(top / "place"):
        for name in ("model", "sae"):
            shutil.copytree(vars(home)[name], name)
        shutil.copytree("model", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = sorted(load_file("model/model.safetensors").items())
        parts = {"one.safetensors": dict(tensors[:9]), "two.safetensors": dict(tensors[9:])}
        for name, part in parts.items():
            save_file(part, "sharded/" + name, {"format": "pt"})
        index = dict(weight_map={key: name for name, part in parts.items() for key in part})
        data.write_json("sharded/model.safetensors.index.json", index)
        pairs = [dict(prompt=ex["turns"][0]["content"], chosen=ex["chosen"], rejected=ex["rejected"])
                 for ex in split["train"][:30]]
        data.write_rows("pairs.jsonl", pairs)
        data.write_rows("folder/train.jsonl", pairs)
        Path("pairs.jsonl.gz").write_bytes(gzip.compress(Path("pairs.jsonl").read_bytes()))
        data.write_rows("asks.jsonl", [dict(prompt=f"how make thing{i} ?", label="benign") for i in range(3)])
        data.write_text("text.txt", "how make thing1 ?\n\nhow use thing2 .")
        data.write_rows("know.jsonl", [dict(text="doc", next="thing1")] * 3)
        data.write_rows("choices.jsonl", [dict(question="q", choices=["a", "b"], answer=1)] * 3)
        data.write_text("stranger/notes.txt", "mine")
        for command in (LORA + " --out run", SAILS + " --out half", CMP, JUDGED):
            code, _, err = run(command)
            assert code == 0, err
        for name in ("results.json", "adapter_model.safetensors", "adapter_config.json", "sails.json",
                     "table.md", "heldout-test.jsonl", "heldout-validate.jsonl"):
            Path("half", name).unlink()                # killed after its last checkpoint
        shutil.copytree("run", "foreign", ignore=lambda _, names: [n for n in names if n[:7] != "adapter"])
    shutil.copytree(top / "place", top / "copy")
    return top / "place", top / "copy"

@pytest.fixture
def place(world_of_files, monkeypatch):
    place, copy = world_of_files
    stamps = lambda top: {p.relative_to(top): (p.stat().st_size, p.stat().st_mtime_ns) for p in top.rglob("*")}
    if stamps(place) != stamps(copy):
        shutil.rmtree(place)
        shutil.copytree(copy, place)
    monkeypatch.chdir(place)

def tree():
    """{path: its content's hash, None for a folder} of all that lies here."""
    return {p: hashlib.sha256(p.read_bytes()).digest() if p.is_file() else None for p in Path().rglob("*")}

# ---- damages ----
def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

def put(path, content):
    """Replace a file, or make one; of a text the marks of what json can't write are filled in."""
    text = content if isinstance(content, bytes) else content.replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5)
    text = text if isinstance(text, bytes) else text.replace(f'"{HUGE}"', "9" * 5000).encode()
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(text)

def changed(old, changes):
    return {k: v for k, v in {**old, **changes}.items() if v is not GONE}

def js(path, **changes):
    put(path, json.dumps(changed(json.loads(Path(path).read_text()), changes)))

def settings(**changes):
    """Change half/run.json's settings."""
    js("half/run.json", settings=changed(json.loads(Path("half/run.json").read_text())["settings"], changes))

def row(path, n=2, **changes):
    """Change keys of line n of a JSONL file."""
    lines = Path(path).read_text().splitlines()
    lines[n - 1] = json.dumps(changed(json.loads(lines[n - 1]), changes))
    put(path, "\n".join(lines) + "\n")

def line(path, content, n=2):
    """Replace line n of a text file."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    put(path, b"".join([*lines[:n - 1], content if isinstance(content, bytes) else content.encode(), b"\n",
                        *lines[n:]]) if content != json.dumps(DEEP) else
        b"".join(lines[:n - 1]).decode() + content + "\n")

def cut(path, share=.5):
    put(path, Path(path).read_bytes()[:int(share * Path(path).stat().st_size)])

def flip(path, share=.5):
    raw = bytearray(Path(path).read_bytes())
    raw[int(share * len(raw))] ^= 0xff
    put(path, bytes(raw))

def tensors(path, key=None, change=None, **metadata):
    """Change the tensor whose name ends so, by a function; None takes it out."""
    with safe_open(path, "pt") as f:
        found, noted = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    name = next((k for k in found if key and k.endswith(key)), key)
    if key:
        found[name] = change and change(found.get(name, torch.ones(3)))
    save_file({k: t.contiguous() for k, t in found.items() if t is not None}, path, changed(noted, metadata))

def npz(key, change):
    """The same in an SAE."""
    with np.load(SAE) as f:
        arrays = {k: f[k] for k in f.files}
    arrays[key] = change and change(arrays.get(key, np.ones(3, np.float32)))
    np.savez(SAE, **{k: v for k, v in arrays.items() if v is not None})

def spot(value):
    """A tensor or array with one value in its middle replaced."""
    def change(x):
        x = x.clone() if hasattr(x, "clone") else x.copy()
        x.reshape(-1)[x.reshape(-1).shape[0] // 2] = value
        return x
    return change

def to(dtype):
    return lambda x: x.to(dtype) if hasattr(x, "to") else x.astype(dtype)

def header(path, **entry):
    """A safetensors file whose header claims this of one tensor."""
    claim = json.dumps({"model.norm.weight": dict(dtype="F32", shape=[1], data_offsets=[0, 4]) | entry}).encode()
    put(path, len(claim).to_bytes(8, "little") + claim + bytes(4))

def member(claims, content):
    """An SAE file in which W_enc.npy claims this shape and holds `content`, already deflated."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="<f4", fortran_order=False, shape=claims))
    pack = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = pack.compress(head.getvalue()) + pack.flush(zlib.Z_FULL_FLUSH) + content + pack.flush()
    with zipfile.ZipFile(SAE, "w") as z:
        info = zipfile.ZipInfo("W_enc.npy")
        z.writestr(info, body)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 128 + 4 * int(np.prod(claims))

def zeros(mib):
    """So many MiB of zeros, deflated: blocks that can stand one after another."""
    pack = zlib.compressobj(1, zlib.DEFLATED, -15)
    return (pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)) * mib

def published(key=None, change=None):
    """The SAEs as Gemma Scope 2 has them, one of them damaged."""
    for layer in (0, 1):
        home = f"sae/resid_post/layer_{layer}_width_41_l0_medium/params.safetensors"
        Path(home).parent.mkdir(parents=True)
        save_file({k: t.contiguous() for k, t in random_sae(layer, N=41).named_buffers()}, home)
    if key:
        tensors("sae/resid_post/layer_0_width_41_l0_medium/params.safetensors", key, change)

def beyond(text):
    """A tokenizer that reads `text` as an id that the model has no row for."""
    tok = Tokenizer.from_file("model/tokenizer.json")
    tok.add_tokens([text])
    tok.save("model/tokenizer.json")

def bos(i):
    raw = json.loads(Path("model/tokenizer.json").read_text())
    raw["added_tokens"][2]["content"] = raw["model"]["vocab"]["x"] = i
    put("model/tokenizer.json", json.dumps(raw))

def env(name, value):
    os.environ[name] = value

# ---- the rows: command, words that the line must hold, damages ----
CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "sharded/model.safetensors.index.json"
AC, AM, TOK = "run/adapter_config.json", "run/adapter_model.safetensors", "model/tokenizer.json"
STATE, SPACE = "half/state.safetensors", "half/subspace.safetensors"
FP8 = torch.float8_e4m3fn
ROWS = [(EVAL, f"config.json {key}", P(js, CONFIG, **{key: v})) for key, values in dict(
    hidden_size=(None, "24", 0, -24, 1.5, NAN, True, DEEP), num_hidden_layers=(0, "2", 10**7, HUGE, [2]),
    vocab_size=(-1, None), head_dim=(0, "8", GONE), num_key_value_heads=(0, [2]), intermediate_size=(None, {}),
    rms_norm_eps=(NAN, -1, "x"), sliding_window=(-1, 2.5, "x"), query_pre_attn_scalar=(0, -1, NAN),
    attn_logit_softcapping=(0, -50, NAN, "x"), final_logit_softcapping=(0, INF), rope_theta=(0, -1, NAN, "x"),
    layer_types=(["sliding_attention", "odd"], "sliding", [1, 2], 5), rope_parameters=("x", [1]),
    model_type=(["gemma2"], "\x1b[31mgemma")).items() for v in values]
ROWS += [(EVAL, "config.json", P(js, CONFIG, **{key: v})) for key, v in (
    ("vocab_size", 10**12), ("head_dim", 7), ("num_key_value_heads", 3), ("hidden_size", 10**9))]
ROWS += [(EVAL, "config.json", P(put, CONFIG, x)) for x in ("[]", "null", "{", "", b"\xff\xfe{", json.dumps(DEEP))]
ROWS += [(EVAL, "norm.weight", P(tensors, WEIGHTS, ".norm.weight", change)) for change in (
    spot(NAN), spot(INF), spot(-INF), to(torch.int8), to(torch.bool), to(FP8), None, lambda x: x[:-1])]
ROWS += [(EVAL, w or "model.safetensors", damage) for w, damage in (
    ("extra", P(tensors, WEIGHTS, "extra", lambda x: x)), ("q_proj", P(tensors, WEIGHTS, "q_proj.weight", lambda x: x.T)),
    ("lm_head", P(tensors, WEIGHTS, "lm_head.weight", lambda x: torch.zeros(381, 24))),
    ("", P(cut, WEIGHTS)), ("", P(put, WEIGHTS, "")), ("", P(put, WEIGHTS, b"\xff" * 99)),
    ("", P(header, WEIGHTS, shape=[10**12, 10**3], data_offsets=[0, 4 * 10**15])),
    ("", P(header, WEIGHTS, shape=[10**18])), ("", P(header, WEIGHTS, dtype="I4")),
    ("", P(header, WEIGHTS, shape=[-1])), ("", P(remove, WEIGHTS)))]
ROWS += [(SHARDED, f"index.json {w}", P(js, INDEX, weight_map=v)) for w, v in (
    ("weight_map", GONE), ("weight_map", None), ("weight_map", ["one.safetensors"]), ("weight_map", "one"),
    ("weight_map", {"model.norm.weight": 1}), ("weight_map", {}), ("weight_map", DEEP), ("..", {"a": "../model/model.safetensors"}),
    ("/etc/passwd", {"a": "/etc/passwd"}))]
ROWS += [(SHARDED, "index.json", P(put, INDEX, x)) for x in ("[]", "{", "null")]
ROWS += [(SHARDED, w, damage) for w, damage in (
    ("nope.safetensors", P(js, INDEX, weight_map={"a": "nope.safetensors"})),
    ("embed_tokens", P(js, INDEX, weight_map={"model.norm.weight": "two.safetensors"})),
    ("norm.weight one.safetensors", P(tensors, "sharded/one.safetensors", "model.norm.weight", lambda x: torch.ones(24))),
    ("two.safetensors", P(cut, "sharded/two.safetensors")), ("one.safetensors", P(remove, "sharded/one.safetensors")))]
ROWS += [(SAILS, f"params.npz {key}", P(npz, key, change)) for key, change in (
    ("W_enc", spot(NAN)), ("W_dec", spot(NAN)), ("b_enc", spot(INF)), ("b_dec", spot(-INF)), ("threshold", spot(NAN)),
    ("W_enc", to(np.int32)), ("b_dec", to(bool)), ("threshold", to("U9")), ("W_enc", to(complex)), ("b_enc", None),
    ("extra", lambda x: x), ("W_enc", lambda x: x.T), ("threshold", lambda x: x[:9]), ("scaling_factor", lambda x: 2 * x), ("W_enc", lambda x: x.ravel()))]
ROWS += [(SAILS, "params.npz", damage) for damage in (
    P(npz, "W_dec", lambda x: 2 * x), P(npz, "b_enc", to(object)), P(cut, SAE), P(put, SAE, "not a zip"), P(put, SAE, ""), P(flip, SAE), P(member, (24, 10**12), b""),
    P(member, (24, 10**7), zeros(916)), P(cut, SAE, .98))]
ROWS += [(SAILS + " --width 41", f"params.safetensors {key}", P(published, key, change)) for key, change in (
    ("W_enc", spot(NAN)), ("W_dec", to(FP8)), ("b_dec", to(torch.int8)), ("threshold", None), ("b_enc", to(torch.bool)))]
ROWS += [(LORA, "tokenizer.json", damage) for damage in (
    *(P(put, TOK, x) for x in ("{}", "[]", "null", "", json.dumps(DEEP))), P(cut, TOK), P(remove, TOK), P(bos, "<x>"))]
ROWS += [(LORA, "tokenizer", P(beyond, "how")), (EVAL, "tokenizer", P(beyond, "how"))]
# pairs, prompts, texts
ROWS += [(LORA, f"pairs.jsonl line 2 {key}", P(row, "pairs.jsonl", **{key: v})) for key, values in dict(
    chosen=(None, 3, ["a"], "\ud800", {}), rejected=(3, "a \udfff"), label=(3, ["harmful"], "\x1b[2Jodd", {}), id=([1], "\ud800"),
    prompt=(None, 3, {}, "how \udc00")).items() for v in values]
ROWS += [(LORA, "pairs.jsonl line 2", P(line, "pairs.jsonl", x)) for x in (
    "[1]", "{", json.dumps(DEEP), b"\xff\xfe", '{"prompt": ' + "9" * 5000, '"text"', b'{"a": "\x00"}')]
ROWS += [(LORA, f"pairs.jsonl line 2 {w}", P(row, "pairs.jsonl", prompt=v)) for w, v in (
    ("role", [dict(role="system", content="a")]), ("content", [dict(role="user", content=None)]), ("", []), ("", ["a"]),
    ("", [dict(role="user", content="a"), dict(role="assistant", content="b")]))]
ROWS += [(LORA + " --data pairs.jsonl.gz", "pairs.jsonl.gz", damage) for damage in (
    P(cut, "pairs.jsonl.gz"), P(flip, "pairs.jsonl.gz"), P(flip, "pairs.jsonl.gz", .3), P(flip, "pairs.jsonl.gz", .99),
    P(put, "pairs.jsonl.gz", "plain"), P(put, "pairs.jsonl.gz", ""), P(flip, "pairs.jsonl.gz", 0), P(cut, "pairs.jsonl.gz", .99))]
ROWS += [(LORA, "pairs.jsonl", P(put, "pairs.jsonl", x)) for x in ("", "\n\n", b"\xff\xfe\x00")]
ROWS += [(LORA + " --data folder", "folder", P(remove, "folder/train.jsonl")),
         (LORA + " --data folder", "train.jsonl line 2", P(line, "folder/train.jsonl", "{"))]
ROWS += [(EVAL, f"asks.jsonl {key}", P(row, "asks.jsonl", **{key: v})) for key, values in dict(
    prompt=(None, 3, {}, "a \ud800"), label=(3, ["benign"], {}), set=(5, ["a"], "\udc00"), id=({}, [1]), chosen=(5,)).items()
    for v in values]
ROWS += [(EVAL, "asks.jsonl 2", P(line, "asks.jsonl", x)) for x in ("{", "[]1", json.dumps(DEEP), "3")]
ROWS += [(EVAL, "asks.jsonl", P(row, "asks.jsonl", type=None, focus=None)),
         (EVAL, "id", P(row, "asks.jsonl", 1, id="\x1b[2Jx"), P(row, "asks.jsonl", id="\x1b[2Jx")),
         (EVAL, "set", P(row, "asks.jsonl", set="a | 1.000 |\n| forged"))]
ROWS += [(f"{EVAL} --prompts {name}", f"{name} {w}", P(put, name, text)) for name, w, text in (
    ("a.csv", "", 'prompt,label\n"a,b\n'), ("a.csv", "2", "prompt,label\na,b,c\n"), ("a.csv", "prompt", "what\na\n"),
    ("a.csv", "", b"prompt\n\xff\n"), ("a.csv", "", ""), ("a.csv", "2", b"prompt\na\x00b\n"), ("a.csv", "prompt", "prompt,prompt\na,b\n"),
    ("a.txt", "", b"\xff"), ("a.txt", "", "\n"), ("a.csv", "label", "prompt,label\na,odd\n"))]
ROWS += [(COSTS, f"{w}", damage) for w, damage in (
    ("text.txt", P(put, "text.txt", b"\xff")), ("text.txt", P(put, "text.txt", " \n")), ("text.txt", P(remove, "text.txt")),
    *((f"know.jsonl line 2 {key}", P(row, "know.jsonl", **{key: v})) for key in ("text", "next") for v in (None, 3, "\ud800")),
    ("know.jsonl line 2 next", P(row, "know.jsonl", next="")), ("know.jsonl", P(put, "know.jsonl", "")),
    ("pairs.jsonl line 2 chosen", P(row, "pairs.jsonl", chosen=None)))]
ROWS += [(COSTS + " --kl t.jsonl", "t.jsonl line 1 text", P(put, "t.jsonl", json.dumps(dict(text=v)))) for v in (None, 3)]
ROWS += [(CHOICES, "choices.jsonl 2", P(row, "choices.jsonl", **{key: v})) for key, v in (
    ("answer", -1), ("answer", 2), ("choices", list("abcdefghijk")), ("answer", None), ("answer", True), ("question", None),
    ("choices", ["a", None]), ("choices", "ab"), ("question", "\ud800"))]
# adapters
ROWS += [(ADAPTER, key.replace("peft_type", "LoRA"), P(js, AC, **{key: v})) for key, values in dict(
    r=(None, 0, -1, "4", 10**12, 4.5, GONE, True), lora_alpha=(None, NAN, INF, "x", 0, HUGE), use_rslora=("yes",), peft_type=("IA3", None),
    init_lora_weights=("pissa", "pissa_niter_16", "olora", "corda", "loftq"), use_dora=(True,), bias=("all",), rank_pattern=({"q": 2},),
    modules_to_save=(["lm_head"],), fan_in_fan_out=(True,), target_modules=(5,)).items() for v in values]
ROWS += [(ADAPTER, "adapter_config.json", P(put, AC, x)) for x in ("[]", "null", "{", json.dumps(DEEP), b"\xff")]
ROWS += [(ADAPTER, f"adapter_model.safetensors {w}", P(tensors, AM, key, change)) for w, key, change in (
    ("lora_A", "q_proj.lora_A.weight", spot(NAN)), ("lora_B", "o_proj.lora_B.weight", spot(INF)), ("lora_A", "q_proj.lora_A.weight", to(torch.int8)),
    ("lora_A", "q_proj.lora_A.weight", to(torch.bool)), ("lora_A", "k_proj.lora_A.weight", to(FP8)), ("q_proj", "q_proj.lora_B.weight", None),
    ("", "extra", lambda x: x), ("lora_A", "v_proj.lora_A.weight", lambda x: x[:2]))]
ROWS += [(ADAPTER, "adapter_model.safetensors", damage) for damage in (
    P(cut, AM), P(remove, AM), P(put, AM, ""), P(header, AM, shape=[10**15], data_offsets=[0, 4 * 10**15]))]
ROWS += [(ADAPTER, "adapter_config.json", P(remove, AC)), (SHOW, "adapter_config.json r", P(js, AC, r=None)),
         (SHOW, "adapter_config.json", P(put, AC, "[]")), (SHOW, "lora_B", P(tensors, AM, "q_proj.lora_B.weight", None)),
         (SHOW, "adapter_model.safetensors", P(cut, AM)), (SHOW, "sails.json", P(put, "run/sails.json", "[]"))]
# what a run left: resumed, compared, evaluated
ROWS += [(HALF, "run.json", P(put, "half/run.json", x)) for x in ("null", "[]", "{", "{}", json.dumps(DEEP), b"\xff", "",
         '{"settings": [1]}', '{"settings": null}')]
ROWS += [(HALF, key, P(settings, **{key: v})) for key, v in (("k", HUGE), ("lr", None), ("sources", None), ("stray", 1), ("seed", GONE))]
ROWS += [(HALF, "half", P(remove, "half/run.json")), (SAILS + " --out half", "half", P(remove, "half/run.json")),
         (SAILS + " --out half", "--resume"), (HALF + " --k 5", "k 6 5"), (RUN + " --lr 1e-3", "lr 0.01 0.001")]
ROWS += [(HALF, w, damage) for w, damage in (
    ("model", P(tensors, WEIGHTS, ".norm.weight", spot(.5))), ("data", P(row, "pairs.jsonl", chosen="sure")), ("sae", P(npz, "b_dec", spot(.5))),
    ("model", P(js, CONFIG, rms_norm_eps=1e-5)), ("model", P(beyond, "zyx")),
    ("log.jsonl", P(put, "half/log.jsonl", "null\n{\n")), ("log.jsonl", P(remove, "half/log.jsonl")))]
ROWS += [(RUN, w, damage) for w, damage in (
    ("model", P(tensors, WEIGHTS, ".norm.weight", spot(.5))), ("data", P(row, "pairs.jsonl", chosen="sure")),
    *(("results.json", P(put, "run/results.json", x)) for x in ("null", "{", "[]", json.dumps(DEEP))),
    ("results.json", P(js, "run/results.json", lr=None)), ("results.json", P(js, "run/results.json", sets=3)))]
ROWS += [(f"{RUN} {more}", name, P(put, f"run/{name}", "changed")) for more, name in ()]
ROWS += [(HALF, f"state.safetensors {w}", damage) for w, damage in (
    *(("", x) for x in (P(cut, STATE), P(put, STATE, ""), P(put, STATE, "x" * 99))),
    *(("step", P(tensors, STATE, step=v)) for v in (GONE, "x", "-1", "9", "1.5")),
    *((f"{m}layers.0.self_attn.q_proj.{x}", P(tensors, STATE, f"{m}layers.0.self_attn.q_proj.{x}", c)) for m, x, c in (
        ("p.", "A", spot(NAN)), ("p.", "B", None), ("m.", "A", spot(INF)), ("m.", "A", None), ("v.", "B", spot(-1)), ("v.", "A", spot(NAN)),
        ("p.", "A", lambda x: x[:2]), ("m.", "B", lambda x: x.T), ("p.", "A", to(torch.int8)), ("p.", "A", to(FP8)))),
    ("extra", P(tensors, STATE, "p.extra", lambda x: x)))]
ROWS += [(HALF, f"subspace.safetensors {w}", damage) for w, damage in (
    ("", P(cut, SPACE)), ("V.0", P(tensors, SPACE, "V.0", spot(NAN))), ("V.0", P(tensors, SPACE, "V.0", lambda x: x[:9])),
    ("V.1", P(tensors, SPACE, "V.1", None)), ("V.x", P(tensors, SPACE, "V.x", lambda x: x)), ("V.0", P(tensors, SPACE, "V.0", to(torch.int8))))]
ROWS += [(CMP, w, *damage) for w, *damage in (
    ("model", P(tensors, WEIGHTS, ".norm.weight", spot(.5))), ("results.json", P(put, "cmp/base/results.json", "null")),
    ("model", P(tensors, WEIGHTS, ".norm.weight", spot(.5)), P(remove, "cmp/base")),
    ("results.json validation", P(js, "cmp/lora-lr0.01-seed0/results.json", validation=None)),
    ("results.json", P(js, "cmp/lora-lr0.01-seed0/results.json", lr=NAN)), ("run.json", P(put, "cmp/lora-lr0.01-seed0/run.json", "[]")),
    ("run.json", P(remove, "cmp/lora-lr0.01-seed0/run.json")), ("notes.txt", P(put, "cmp/base/notes.txt", "x"), P(remove, "cmp/base/run.json")))]
ROWS += [(JUDGED, w, damage) for w, damage in (
    *(("eval.json", P(put, "judged/eval.json", x)) for x in ("null", "[]", "{", "{}", json.dumps(DEEP), '{"settings": 3}', b"\xff")),
    ("eval.json", P(remove, "judged/eval.json")), ("weights", P(tensors, WEIGHTS, ".norm.weight", spot(.5))),
    ("prompts", P(row, "asks.jsonl", prompt="how use thing9 ?")))]
ROWS += [(AGAIN, f"{name}.jsonl {w}", damage) for name in ("responses", "verdicts") for w, damage in (
    *((f"line 2 {key}", P(row, f"judged/{name}.jsonl", **{key: v})) for key, v in (
        ("id", GONE), ("id", [1]), ("prompt_sha256" if name == "responses" else "judge", 3),
        ("reply" if name == "responses" else "reply_sha256", None))),
    *(("line 2", P(line, f"judged/{name}.jsonl", x)) for x in ("[1]", "{", b"\xff")))]
ROWS += [(AGAIN, "responses.jsonl", P(remove, "judged/responses.jsonl")), (JUDGED + " --seed 1", "seed"),
         (COMPARE, "verdicts.jsonl", P(put, "judged/verdicts.jsonl", '{"judge": 3}\n')), (COMPARE, "responses.jsonl", P(line, "judged/responses.jsonl", "{"))]
# values
ROWS += [(f"{on} {option} {v}", option) for on, some in (
    (LORA, {"--seed": "-1 x 1.5 1,1 9e99 99999999999999999999999 ''", "--lr": "nan inf -1 1e-2,1e-2 '' 0,nan", "--targets": "q,q x '' q,",
            "--device": "nonsense '' cuda:99 meta", "--clip": "-1 nan inf", "--warmup": "-5 1.5", "--steps": "0 -1 1e30",
            "--rank": "0 -1 1000000000000 x", "--alpha": "nan inf -1", "--batch": "0 -3", "--micro": "0", "--max-tokens": "0 -1",
            "--save-every": "0", "--method": "'' odd lora,lora", "--template": "odd ''", "--dtype": "float16", "--replay": "nan -1 inf",
            "--jobs": "0 -1", "--data": "''", "--model": "''", "--out": "''", "--objective": "odd"}),
    (SAILS, {"--layers": "2,2 -1 x '' 0,5", "--k": "0 -1 1000000000000 x", "--tau": "nan -1 1.5", "--sae": "''", "--width": "'' 99k",
             "--drop": "-1 1,1 x 99", "--contrast-pairs": "0 -1"}),
    (LORA + " --objective dpo", {"--beta": "nan -1 inf"}), (LORA + " --objective rloo", {"--samples": "1 x -2"}),
    (EVAL, {"--temperature": "-1 nan inf", "--limit": "-1 0 x", "--seed": "-1 99999999999999999999999", "--max-new": "0 -1", "--batch-size": "0",
            "--judge": "odd '' http://", "--prompts": "''", "--model": "''", "--out": "''", "--adapter": "''", "--device": "nonsense", "--template": "odd"}),
    (URL, {"--judge-timeout": "nan inf -1", "--judge-tries": "0", "--judge-pause": "nan inf -1", "--judge-parallel": "0 1000000000000",
           "--judge-key-env": "''"}),
    (GCG, {"--width": "0", "--length": "0", "--steps": "-1", "--seed": "-1 99999999999999999999999", "--limit": "-1", "--target": "''"}))
    for option, values in some.items() for v in values.split()]
ROWS += [(f"{on} {option} '{v}'", w) for on, option, v, w in (
    (LORA, "--model", "\udcff", "model"), (LORA, "--data", "no\udcffwhere", "data"), (EVAL, "--prompts", "a\nb.txt", "prompts"),
    (LORA, "--data", "\x1b[31mx", "x"), (EVAL, "--judge", "\x1b[31mx", "--judge"), (GCG, "--target", "\udcff", "--target"))]
ROWS += [(URL, "OPENAI_API_KEY", P(env, "OPENAI_API_KEY", "secret\r")), (URL, "OPENAI_API_KEY", P(env, "OPENAI_API_KEY", "secret\n\x1b")),
         (URL, "OPENAI_API_KEY", P(env, "OPENAI_API_KEY", "secret\u20ac"))]
# settings that the chosen mode does not read
ROWS += [(f"{on} {option}", option.split()[0]) for on, some in (
    (LORA, "--k 4; --tau .5; --sae sae; --layers 0; --width 40; --score relative; --center; --contrast prompts; --last 2; --contrast-pairs 9; "
           "--subspace global; --standardise; --drop 3; --norm-aware; --freeze-basis; --sides read; --fit-width 9; --beta .2; --samples 3; "
           "--sft-steps 2; --full-lr 1e-3; --jobs 2; --contrast-data pairs.jsonl"),
    (SAILS, "--fit-width 9; --fit-active 3; --fit-tokens 99; --fit-steps 3; --standardise; --last 2; --contrast-data pairs.jsonl"),
    (FULL, "--rank 4; --alpha 4; --targets q; --k 4; --norm-aware"), (LORA + " --objective dpo", "--samples 3"),
    (SAILS + " --method mean-diff", "--k 6"), (SAILS + " --method random", "--contrast replies"),
    (EVAL, "--judge-tries 3; --judge-timeout 3; --judge-pause 2; --judge-parallel 2; --judge-key-env X; --judge-model m; --merged; --base model"),
    (COSTS, "--temperature 1; --max-new 3; --limit 2; --judge refusal; --seed 3"), (AGAIN, "--temperature 1; --adapter run; --template tiny"))
    for option in some.split("; ")]
ROWS += [("train --dry-run --method sails", "--model"), ("train --model tiny --method sails --fit-width 9", "--fit-width"),
         ("train --model tiny --method sails --fit-steps 9 --dry-run", "--fit-steps")]
# --out
ROWS += [(f"{on} --out {out}", w, *damage) for on, out, w, *damage in (
    *((on, out, out) for on in (LORA, FULL, EVAL) for out in ("pairs.jsonl", "pairs.jsonl/new", "/proc/nope", "stranger", "foreign", "model", "sharded")),
    *((on, "x" * 300, "xxx") for on in (LORA, EVAL, GCG)), (LORA + " --data folder", "folder", "folder"), (FULL + " --model sharded", "sharded", "sharded"),
    (FULL, "./model/", "model"), (FULL, "model/new", "model"), (SAILS, "sae", "sae"), (LORA, ".", "."), (EVAL, "run", "run"), (EVAL, "cmp", "cmp"),
    (EVAL, "half", "half"), (LORA, "judged", "judged"), (LORA + " --resume", "foreign", "foreign"), (LORA + " --resume", "cmp", "cmp"), (CMP, "run", "run"),
    (ADAPTER, "foreign", "foreign"), (CMP, "pairs.jsonl", "pairs.jsonl"), (CMP, "stranger", "stranger"), (CMP, "model", "model"),
    (LORA, "'a\0b'", "--out"), (LORA, "link", "link", lambda: os.symlink("model", "link")), (GCG, "asks.jsonl", "asks.jsonl"),
    (GCG, "model/config.jsonl", "config"), (GCG, "pairs.jsonl/a.jsonl", "pairs.jsonl"), (GCG, "know.jsonl", "know.jsonl"), (GCG, "stranger", "stranger"))]
ROWS += [(GCG, w, damage) for w, damage in (("asks.jsonl prompt", P(row, "asks.jsonl", prompt=3)), ("adapter", None), ("asks.jsonl target", P(row, "asks.jsonl", target=3))) if damage]
ROWS += [("data --model model --data pairs.jsonl", "pairs.jsonl line 2", P(line, "pairs.jsonl", "{")), ("gemma --model model --prompt a --temperature nan", "--temperature"),
         ("sae --model model --sae sae --layer 7 --width 40 --prompt how", "7"), ("sae --model model --sae sae --layer 0 --width 40 --prompt ''", "--prompt"),
         ("data --model model --data pairs.jsonl --row 999", "--row"), ("gemma --model model --prompt '\udcff' --device cpu", "--prompt")]

class TooLate(BaseException):
    """No handler of the scripts' own may catch it."""

def called(r):
    """A row's name: the command's end and what is damaged."""
    deed = lambda d: f"{d.func.__name__} {' '.join(map(repr, d.args))} {d.keywords or ''}" if isinstance(d, P) else ""
    base = next(k for k in sorted(NAMED, key=len, reverse=True) if r[0].startswith(k) or k == "")
    return " ".join(f"{NAMED[base]}{r[0][len(base):]} {' '.join(map(deed, r[2:]))}".split())[:90].encode("ascii", "backslashreplace").decode()

NAMED = {v: k for k, v in globals().items() if isinstance(v, str) and k.isupper() and " --" in v} | {"": ""}
COMMANDS = {k: v for v, k in NAMED.items() if k not in ("", "URL", "TRAIN")}

@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_runs_where_nothing_is_damaged(place, name):
    code, _, err = run(COMMANDS[name])
    assert code == 0, err

@pytest.mark.parametrize("bad", ROWS, ids=called)
def test_a_bad_input_ends_in_one_clear_line_and_changes_nothing(place, monkeypatch, bad):
    command, words, *damages = bad
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    for damage in damages:
        damage()

    def late(*_):
        raise TooLate
    before, peak, old = tree(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        code, _, err = run(command)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
    assert [w for w in words.split() if w.lower() not in err.lower()] == [], err
    assert err[:-1].isprintable() and "secret" not in err
    assert tree() == before                            # folders, too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024
