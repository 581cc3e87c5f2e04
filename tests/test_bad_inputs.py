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

SCRIPTS = dict(train=train, eval=evaluation, choices=choices, gcg=gcg, lora=lora, sae=sae_module, data=data,
               gemma=model_gemma, compare=compare)
COMMANDS = dict(
    LORA="train --model model --data pairs.jsonl --steps 2 --batch 4 --lr 1e-2 --device cpu --method lora --rank 4 "
         "--out new",
    FULL="train --model model --data pairs.jsonl --steps 2 --batch 4 --lr 1e-4 --device cpu --method full --out new",
    SAILS="train --model model --data pairs.jsonl --steps 2 --batch 4 --lr 1e-2 --device cpu --sae sae --layers 0,1 "
          "--width 40 --k 6 --rank 4 --contrast-pairs 16 --out new",
    EVAL="eval --model model --prompts asks.jsonl --max-new 3 --device cpu --out new",
    COSTS="eval --model model --adapter run --pairs pairs.jsonl --kl text.txt --knowledge know.jsonl --device cpu "
          "--out new", AGAIN="eval --prompts asks.jsonl --out judged", SHOW="lora run", COMPARE="compare judged judged",
    CHOICES="choices --model model --choices choices.jsonl --device cpu",
    GCG="gcg --model model --prompts asks.jsonl --target sure --steps 1 --length 2 --width 4 --device cpu "
        "--out new/a.jsonl")
for name, base, more in (
        ("RUN", "LORA", "--out run --resume"), ("HALF", "SAILS", "--out half --resume"), ("ADAPTER", "EVAL", "--adapter run"),
        ("CMP", "LORA", "--lr 1e-3,1e-2 --out cmp"), ("SHARDED", "EVAL", "--model sharded"), ("SCOPE", "SAILS", "--width 41"),
        ("JUDGED", "EVAL", "--adapter run --out judged"), ("GZ", "LORA", "--data pairs.jsonl.gz"),
        ("READS", "LORA", "--replay .1 --text text.txt --test asks.jsonl --max-new 3 --out reads --resume"),
        ("URL", "EVAL", "--judge http://127.0.0.1:9/v1 --judge-model m --judge-tries 1 --judge-pause 0")):
    COMMANDS[name] = f"{COMMANDS[base]} {more}"
DEEP, HUGE, GONE, NAN, INF = "@deep", "@huge", "@gone", float("nan"), float("inf")
CONFIG, WEIGHTS, TOK = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
SAE, SCOPE = "sae/layer_0/width_40/average_l0_20/params.npz", "sae/layer_0_width_41_l0_medium/params.safetensors"
AC, AM, STATE = "run/adapter_config.json", "run/adapter_model.safetensors", "half/state.safetensors"
SPACE, INDEX = "half/subspace.safetensors", "sharded/model.safetensors.index.json"

# ---- a world of small files, made once and put back for every row ----
def run(command):
    """A command line's exit code, stdout and stderr; its first word names the script."""
    script, *args = shlex.split(command)
    return go(args, SCRIPTS[script].main)

@pytest.fixture(scope="module")
def files(tmp_path_factory, home, split):
    """(folder in which commands run, a copy of what it holds)."""
    top = tmp_path_factory.mktemp("bad")
    for name in ("model", "sae"):
        shutil.copytree(vars(home)[name], top / "place" / name)
    with contextlib.chdir(top / "place"):
        shutil.copytree("model", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
        tensors, index = sorted(load_file(WEIGHTS).items()), {}
        for name, part in (("one.safetensors", tensors[:9]), ("two.safetensors", tensors[9:])):
            save_file(dict(part), "sharded/" + name, {"format": "pt"})
            index |= {key: name for key, _ in part}
        data.write_json(INDEX, dict(weight_map=index))
        for layer in (0, 1):
            path = Path(SCOPE.replace("_0_", f"_{layer}_"))
            path.parent.mkdir()
            save_file({k: t.contiguous() for k, t in random_sae(layer, N=41).named_buffers()}, path)
        rows = [dict(prompt=ex["turns"][0]["content"], chosen=ex["chosen"], rejected=ex["rejected"])
                for ex in split["train"][:30]]
        for name in ("pairs.jsonl", "folder/train.jsonl"):
            data.write_rows(name, rows)
        put("pairs.jsonl.gz", gzip.compress(Path("pairs.jsonl").read_bytes()))
        data.write_rows("asks.jsonl", [dict(prompt=f"how make thing{i} ?", label="benign") for i in range(3)])
        put("text.txt", "how make thing1 ?\n\nhow use thing2 .")
        data.write_rows("know.jsonl", [dict(text="doc", next="thing1")] * 3)
        data.write_rows("choices.jsonl", [dict(question="q", choices=["a", "b"], answer=1)] * 3)
        put("stranger/notes.txt", "mine")
        for name in ("RUN", "HALF", "CMP", "READS", "JUDGED"):
            code, _, err = run(COMMANDS[name].replace("--resume", ""))
            assert code == 0, err
        for name in ("results.json", "table.md", "adapter_model.safetensors", "adapter_config.json"):
            remove(f"half/{name}")                     # killed after its last checkpoint
        shutil.copytree("run", "foreign", ignore=lambda _, names: [n for n in names if n[:7] != "adapter"])
    shutil.copytree(top / "place", top / "copy")
    return top / "place", top / "copy"

@pytest.fixture
def place(files, monkeypatch):
    place, copy = files
    stamps = lambda top: {p.relative_to(top): p.stat().st_mtime_ns for p in top.rglob("*")}
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
    """Replace or make a file; in a text the marks of what json can't write are filled in."""
    if not isinstance(content, bytes):
        content = content.replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5).replace(f'"{HUGE}"', "9" * 5000).encode()
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content)

def js(path, key, value, *, at=None):
    """Change a JSON file's key (in what stands under the key `at`)."""
    whole = json.loads(Path(path).read_text())
    part = whole[at] if at else whole
    part.pop(key, None)
    part |= {} if value == GONE else {key: value}
    put(path, json.dumps(whole))

def setting(key, value):
    js("half/run.json", key, value, at="settings")

def line(path, content, n=2):
    """Replace line n of a file."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    put("one", content)
    put(path, b"".join([*lines[:n - 1], Path("one").read_bytes() + b"\n", *lines[n:]]))
    remove("one")

def row(path, key, value, n=2):
    """Change a key in line n of a JSONL file."""
    put("row", Path(path).read_bytes().splitlines()[n - 1])
    js("row", key, value)
    line(path, Path("row").read_bytes(), n)
    remove("row")

def cut(path, share=.5):
    put(path, Path(path).read_bytes()[:int(share * Path(path).stat().st_size)])

def flip(path, share=.5):
    raw = bytearray(Path(path).read_bytes())
    raw[int(share * len(raw))] ^= 0xff
    put(path, bytes(raw))

def spot(x, value):
    x = x.clone()
    x.view(-1)[x.numel() // 2] = value
    return x

CHANGES = dict(nan=lambda x: spot(x, NAN), inf=lambda x: spot(x, INF), int8=lambda x: x.to(torch.int8), gone=lambda x: None,
               bool=lambda x: x.bool(), fp8=lambda x: x.to(torch.float8_e4m3fn), short=lambda x: x[:-1], T=lambda x: x.T,
               twice=lambda x: 2 * x, other=lambda x: spot(x, .5), minus=lambda x: spot(x, -1), new=lambda x: torch.ones(3))

def tensor(path, key, change, **metadata):
    """Change the tensor whose name ends so, in a safetensors or npz file; a step in the metadata."""
    if path.endswith("npz"):
        with np.load(path) as f:
            found, noted = {k: torch.from_numpy(f[k]) for k in f.files}, {}
    else:
        with safe_open(path, "pt") as f:
            found, noted = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    if key == "step":
        noted |= dict(step=change)
    else:
        name = next((k for k in found if k.endswith(key)), key)
        found[name] = CHANGES[change](found.get(name))
    found = {k: t.contiguous() for k, t in found.items() if t is not None}
    if path.endswith("npz"):
        np.savez(path, **{k: t.numpy() for k, t in found.items()})
    else:
        save_file(found, path, {k: v for k, v in noted.items() if v != GONE})

def array(key, dtype):
    """Give an SAE's array another dtype."""
    with np.load(SAE) as f:
        np.savez(SAE, **{k: f[k].astype(dtype) if k == key else f[k] for k in f.files})

def header(path, **entry):
    """A safetensors file whose header claims this of one tensor."""
    claim = json.dumps({"model.norm.weight": dict(dtype="F32", shape=[1], data_offsets=[0, 4]) | entry}).encode()
    put(path, len(claim).to_bytes(8, "little") + claim + bytes(4))

def bomb(rows, mib):
    """An SAE file whose W_enc claims (24, rows) and unpacks to so many MiB of zeros."""
    pack, head = zlib.compressobj(1, zlib.DEFLATED, -15), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="<f4", fortran_order=False, shape=(24, rows)))
    begin = pack.compress(head.getvalue()) + pack.flush(zlib.Z_FULL_FLUSH)
    zeros = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    with zipfile.ZipFile(SAE, "w") as z:
        info = zipfile.ZipInfo("W_enc.npy")
        z.writestr(info, begin + zeros * mib + pack.flush())
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 128 + 96 * rows

def beyond(text):
    """A tokenizer that reads `text` as an id for which the model has no row."""
    tok = Tokenizer.from_file(TOK)
    tok.add_tokens([text])
    tok.save(TOK)

def env(name, value):
    os.environ[name] = value

def full(n):
    """A disk on which no file grows beyond n bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

# ---- the rows: command, words that the line must hold, damages as (function, arguments) ----
def rows():
    name = lambda path: Path(path).name
    for base, path, values in (
        ("EVAL", CONFIG, dict(
            hidden_size=(None, "24", 0, -24, 1.5, NAN, DEEP), num_hidden_layers=(0, "2", 10**7, HUGE, [2]), head_dim=(0, "8", GONE),
            vocab_size=(-1, None), num_key_value_heads=(0, [2]), intermediate_size=({},), rms_norm_eps=(NAN, -1, "x"),
            sliding_window=(-1, 2.5, "x"), query_pre_attn_scalar=(0, -1, NAN), attn_logit_softcapping=(0, -50, NAN, "x"),
            final_logit_softcapping=(0, INF), rope_theta=(0, NAN, "x"), rope_parameters=("x", [1]), model_type=(["gemma2"], "\x1b[31m"),
            layer_types=(["sliding_attention", "odd"], "sliding", [1, 2], 5))),
        ("ADAPTER", AC, dict(
            r=(None, 0, -1, "4", 10**12, 4.5, GONE), lora_alpha=(None, NAN, INF, "x", HUGE), use_rslora=("yes",), use_dora=(True,),
            init_lora_weights=("pissa", "pissa_niter_16", "olora", "corda", "loftq"), rank_pattern=({"q": 2},), bias=("all",),
            modules_to_save=(["lm_head"],), target_modules=(5,))),
        ("SHARDED", INDEX, dict(weight_map=(GONE, None, ["a"], "one", {}, DEEP, {"a": 1}, {"a": "../model/model.safetensors"}))),
        ("RUN", "run/results.json", dict(lr=(None, NAN), sets=(3,), method=(GONE,)))):
        yield from ((base, "", key if path == AC else f"{name(path)} {key}", (js, path, key, v)) for key, vs in values.items() for v in vs)
    for base, path, values in (
        ("LORA", "pairs.jsonl", dict(
            chosen=(None, 3, ["a"], "\ud800"), rejected=(3, "\udfff"), label=(3, ["harmful"], "\x1b[2J", {}), id=([1], "\ud800"),
            prompt=(None, 3, {}, [], "\udc00", [dict(role="user", content=None)], [dict(role="system", content="a")]))),
        ("EVAL", "asks.jsonl", dict(prompt=(None, 3, {}, "\ud800"), label=(3, ["benign"]), set=(5, "\udc00", "a |\n| b"), id=({}, [1]),
                                    chosen=(5,))),
        ("COSTS", "know.jsonl", dict(text=(None, 3, "\ud800"), next=(None, 3, ""))), ("GCG", "asks.jsonl", dict(target=(3,))),
        ("CHOICES", "choices.jsonl", dict(answer=(-1, 2, None, True), choices=([*"abcdefghijk"], ["a", None], "ab"), question=(None, "\ud800"))),
        ("AGAIN", "judged/responses.jsonl", dict(id=(GONE, [1]), reply=(None,), prompt_sha256=(3,))),
        ("AGAIN", "judged/verdicts.jsonl", dict(id=(GONE, [1]), judge=(3,), reply_sha256=(None,))),
        ("COMPARE", "judged/verdicts.jsonl", dict(id=(GONE,)))):
        for key, vs in values.items():
            key_too = key if path in ("pairs.jsonl", "know.jsonl") else ""
            yield from ((base, "", f"{name(path)} 2 {key_too}", (row, path, key, v)) for v in vs)
        yield from ((base, "", f"{name(path)} 2", (line, path, x)) for x in ("[1]", "{", f'"{DEEP}"', b"\xff\xfe"))
    for base, path in (("EVAL", CONFIG), ("ADAPTER", AC), ("SHARDED", INDEX), ("RUN", "run/results.json"), ("HALF", "half/run.json"),
                       ("JUDGED", "judged/eval.json"), ("LORA", TOK), ("SHOW", AC), ("CMP", "cmp/base/results.json")):
        yield from ((base, "", name(path), (put, path, x)) for x in ("[]", "null", "{", "", b"\xff", f'"{DEEP}"'))
    for base, path, keys in (("EVAL", WEIGHTS, ("norm.weight",)), ("ADAPTER", AM, ("q_proj.lora_A.weight",)), ("SCOPE", SCOPE, ("W_enc", "W_dec")),
                             ("HALF", STATE, ("p.layers.0.self_attn.q_proj.A", "m.layers.0.self_attn.q_proj.A")), ("HALF", SPACE, ("V.0",))):
        yield from ((base, "", key, (tensor, path, key, x)) for key in keys for x in "nan inf int8 bool fp8 gone short".split())
        for damage in ((cut,), (put, b""), (put, b"\xff" * 99), (remove,)):
            if path not in (STATE, SPACE) or damage[0] != remove:
                yield base, "", "" if damage[0] == remove else name(path), (damage[0], path, *damage[1:])
        for claim in (dict(shape=[10**15], data_offsets=[0, 4 * 10**15]), dict(shape=[10**18]), dict(dtype="I4"), dict(shape=[-1])):
            yield base, "", name(path), (lambda path, claim: header(path, **claim), path, claim)
    for key, changes in dict(W_enc="nan gone T", W_dec="nan", b_enc="inf gone", b_dec="nan", threshold="nan short", extra="new").items():
        yield from (("SAILS", "", f"params.npz {key}", (tensor, SAE, key, x)) for x in changes.split())
    for key, dtype in (("W_enc", int), ("b_dec", bool), ("threshold", "U9"), ("W_enc", complex), ("b_enc", object)):
        yield "SAILS", "", "params.npz", (array, key, dtype)
    for damage in ((tensor, SAE, "W_dec", "twice"), (tensor, SAE, "scaling_factor", "new"), (cut, SAE), (put, SAE, "no zip"), (put, SAE, ""),
                   (flip, SAE), (cut, SAE, .98), (bomb, 10**12, 0), (bomb, 10**7, 916)):
        yield "SAILS", "", "" if "new" in damage else "params.npz", damage
    yield from (("GZ", "", "pairs.jsonl.gz", (f, "pairs.jsonl.gz", share)) for f, share in (
        (cut, .5), (cut, .99), (flip, 0), (flip, .3), (flip, .5), (flip, .99), (put, "plain"), (put, "")))
    for base, words, *damages in (
        ("EVAL", "config.json", (js, CONFIG, "vocab_size", 10**12)), ("EVAL", "config.json", (js, CONFIG, "head_dim", 7)),
        ("EVAL", "config.json", (js, CONFIG, "num_key_value_heads", 3)), ("EVAL", "extra", (tensor, WEIGHTS, "extra", "new")),
        ("EVAL", "q_proj", (tensor, WEIGHTS, "q_proj.weight", "T")), ("EVAL", "lm_head", (tensor, WEIGHTS, "lm_head.weight", "new")),
        ("SHARDED", "nope.safetensors", (js, INDEX, "weight_map", {"a": "nope.safetensors"})), ("SHARDED", "two.safetensors", (cut, "sharded/two.safetensors")),
        ("SHARDED", "embed_tokens", (js, INDEX, "weight_map", {"model.norm.weight": "two.safetensors"})),
        ("SHARDED", "norm.weight", (lambda: save_file(load_file("sharded/one.safetensors") | {"model.norm.weight": torch.ones(24)}, "sharded/one.safetensors"),)),
        ("SHARDED", "one.safetensors", (remove, "sharded/one.safetensors")), ("LORA", "tokenizer", (beyond, "how")), ("EVAL", "tokenizer", (beyond, "how")),
        ("LORA", "tokenizer.json", (cut, TOK)), ("LORA", "tokenizer.json", (remove, TOK)), ("ADAPTER", "LoRA", (js, AC, "peft_type", "IA3")),
        ("ADAPTER", "adapter_config.json", (remove, AC)), ("ADAPTER", "", (tensor, AM, "extra", "new")), ("SHOW", "lora_B", (tensor, AM, "lora_B.weight", "gone")),
        ("SHOW", "sails.json", (put, "run/sails.json", "[]")), ("LORA", "pairs.jsonl", (put, "pairs.jsonl", "")), ("LORA", "pairs.jsonl", (put, "pairs.jsonl", "\n\n")),
        ("EVAL", "id", (row, "asks.jsonl", "id", "\x1b[2J"), (row, "asks.jsonl", "id", "\x1b[2J", 1)), ("COSTS", "text.txt", (put, "text.txt", b"\xff")),
        ("EVAL", "asks.jsonl", (row, "asks.jsonl", "type", None), (row, "asks.jsonl", "focus", None)), ("COSTS", "text.txt", (put, "text.txt", " ")),
        ("COSTS", "text.txt", (remove, "text.txt")), ("COSTS", "know.jsonl", (put, "know.jsonl", "")), ("LORA", "new", (full, 4096)), ("EVAL", "new", (full, 100)),
        # other sources than the run began with
        *((base, "", (tensor, WEIGHTS, ".norm.weight", "other")) for base in ("HALF", "RUN", "CMP", "JUDGED")), ("CMP", "", (tensor, WEIGHTS, ".norm.weight", "other"), (remove, "cmp/base")),
        *((base, "", damage) for base in ("HALF", "RUN") for damage in ((row, "pairs.jsonl", "chosen", "sure"), (js, CONFIG, "rms_norm_eps", 1e-5), (beyond, "zyx"))),
        ("HALF", "sae", (tensor, SAE, "b_dec", "other")), ("READS", "text", (put, "text.txt", "how")), ("READS", "asks", (row, "asks.jsonl", "prompt", "how")),
        ("JUDGED", "", (js, AC, "lora_alpha", 9)), ("JUDGED", "", (tensor, AM, "lora_B.weight", "other")), ("JUDGED", "prompts", (row, "asks.jsonl", "prompt", "how")),
        # what a run left
        *(("HALF", "step", (tensor, STATE, "step", v)) for v in (GONE, "x", "-1", "9", "1.5")), ("HALF", "extra", (tensor, STATE, "p.extra", "new")),
        ("HALF", "v.layers", (tensor, STATE, "q_proj.A", "minus")) if False else ("HALF", "v.layers.0.self_attn.q_proj.B", (tensor, STATE, "v.layers.0.self_attn.q_proj.B", "minus")),
        ("HALF", "V.1", (tensor, SPACE, "V.1", "gone")), ("HALF", "V.x", (tensor, SPACE, "V.x", "new")), ("HALF", "log.jsonl", (put, "half/log.jsonl", "null\n{\n")),
        *(("HALF", key, (setting, key, v)) for key, v in (("k", HUGE), ("lr", None), ("sources", None), ("stray", 1), ("seed", GONE))),
        *(("HALF", "run.json", (put, "half/run.json", x)) for x in ('{}', '{"settings": [1]}', '{"settings": null}')), ("JUDGED", "eval.json", (put, "judged/eval.json", '{"settings": 3}')),
        ("HALF", "half", (remove, "half/run.json")), ("JUDGED", "judged", (remove, "judged/eval.json")), ("CMP", "cmp", (remove, "cmp/lora-lr0.01-seed0/run.json")),
        ("CMP", "run.json", (put, "cmp/lora-lr0.01-seed0/run.json", "[]")), ("AGAIN", "responses.jsonl", (remove, "judged/responses.jsonl")),
        *(("URL", "OPENAI_API_KEY", (env, "OPENAI_API_KEY", f"secret{end}")) for end in ("\r", "\n\x1b", "\u20ac"))):
        yield base, "", words, *damages
    for file, words, text in (("a.csv", "", 'prompt,label\n"a,b\n'), ("a.csv", "2", "prompt,label\na,b,c\n"), ("a.csv", "prompt", "what\na\n"), ("a.csv", "", b"prompt\n\xff\n"),
                              ("a.csv", "", ""), ("a.csv", "prompt", "prompt,prompt\na,b\n"), ("a.csv", "label", "prompt,label\na,odd\n"), ("a.txt", "", b"\xff"), ("a.txt", "", "\n")):
        yield "EVAL", f"--prompts {file}", f"{file} {words}", (put, file, text)
    yield from (("COSTS", "--kl t.jsonl", "t.jsonl 1 text", (put, "t.jsonl", json.dumps(dict(text=v)))) for v in (None, 3))
    yield from (("LORA", "--data folder", "train.jsonl", damage) for damage in ((remove, "folder/train.jsonl"), (line, "folder/train.jsonl", "{")))
    for base, option, *values in map(str.split, VALUES.splitlines()):
        yield from ((base, f"{option} {v}", option) for v in values)
    for base, options in (text.split(": ") for text in UNREAD.splitlines()):
        yield from ((base, option, option.split()[0]) for option in options.split("; "))
    for bases, outs in (text.split(": ") for text in OUTS.splitlines()):
        yield from ((base, f"--out {out.strip('+')}", out) for base in bases.split() for out in outs.split())
    for base, more, words in (
        ("", "train --dry-run --method sails", "--model"), ("", "train --model tiny --method sails --fit-width 9", "--fit-width"), ("SAILS", "--out half", "--resume"),
        ("HALF", "--k 5", "k 6 5"), ("RUN", "--lr 1e-3", "lr .01 .001"), ("JUDGED", "--seed 1", "seed"), ("LORA", "--model '\udcff'", "no such"), ("LORA", "--data '\x1b[31mx'", "x"),
        ("EVAL", "--prompts 'a\nb.txt'", "no such"), ("GCG", "--target '\udcff'", "--target"), ("LORA", f"--out {'x' * 300}", "xxx"), ("EVAL", f"--out {'x' * 300}", "xxx"),
        ("LORA", "--out 'a\0b'", "--out"), ("LORA", "--data folder --out folder", "folder"), ("FULL", "--model sharded --out sharded", "sharded"), ("GCG", "--out model/config.jsonl", "config"),
        ("", "sae --model model --sae sae --layer 7 --width 40 --prompt how", "7"), ("", "sae --model model --sae sae --layer 0 --width 40 --prompt ''", "--prompt"),
        ("", "data --model model --data pairs.jsonl --row 99", "--row"), ("", "gemma --model model --prompt '\udcff' --device cpu", "--prompt")):
        yield base, more, words

VALUES = """LORA --seed -1 x 1.5 1,1 9e99 99999999999999999999999 ''
LORA --lr nan inf -1 1e-2,1e-2 '' 0,nan
LORA --targets q,q x '' q,
LORA --device nonsense '' cuda:99
LORA --clip -1 nan inf
LORA --warmup -5 1.5
LORA --steps 0 -1 1e30
LORA --rank 0 -1 1000000000000 x
LORA --alpha nan inf -1
LORA --method '' odd lora,lora
LORA --replay nan -1 inf
LORA --data ''
LORA --model ''
LORA --out ''
LORA --template odd
LORA --batch 0
SAILS --layers 2,2 -1 x '' 0,5
SAILS --k 0 -1 1000000000000
SAILS --tau nan -1 1.5
SAILS --drop -1 1,1 x 99
SAILS --sae ''
EVAL --temperature -1 nan inf
EVAL --limit -1 0
EVAL --seed -1 99999999999999999999999
EVAL --judge odd '' http://
EVAL --prompts ''
EVAL --adapter ''
EVAL --out ''
URL --judge-timeout nan inf -1
URL --judge-pause nan inf -1
URL --judge-tries 0
GCG --seed -1 99999999999999999999999
GCG --length 0
GCG --target ''"""
UNREAD = """LORA: --k 4; --tau .5; --sae sae; --layers 0; --width 40; --score relative; --contrast prompts; --last 2; --standardise
LORA: --norm-aware; --freeze-basis; --sides read; --fit-width 9; --beta .2; --samples 3; --sft-steps 2; --full-lr 1e-3; --drop 3
LORA: --contrast-data pairs.jsonl; --jobs 2; --center; --subspace global; --contrast-pairs 9; --objective dpo --samples 3
SAILS: --fit-width 9; --fit-active 3; --fit-tokens 99; --fit-steps 3; --standardise; --last 2
FULL: --rank 4; --alpha 4; --targets q; --k 4; --norm-aware
EVAL: --judge-tries 3; --judge-timeout 3; --judge-pause 2; --judge-parallel 2; --judge-key-env X; --judge-model m; --merged; --base model
COSTS: --temperature 1; --max-new 3; --limit 2; --judge refusal; --seed 3
AGAIN: --temperature 1; --adapter run; --template tiny"""
OUTS = """LORA FULL EVAL: pairs.jsonl pairs.jsonl/new /proc/nope stranger foreign model
EVAL: run cmp half
LORA CMP: judged
CMP: pairs.jsonl stranger model run
RUN: cmp foreign
SAILS: sae
LORA: .
GCG: asks.jsonl know.jsonl pairs.jsonl/a.jsonl stranger"""

class TooLate(BaseException):
    """No handler of the scripts' own may catch it."""

def called(bad):
    """A row's name."""
    base, more, _, *damages = bad
    name = " ".join([base, more, *(f"{f.__name__} {' '.join(map(repr, args))}" for f, *args in damages)])
    return name[:100].encode("ascii", "backslashreplace").decode()

@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "URL"])
def test_every_command_of_the_table_runs_where_nothing_is_damaged(place, name):
    code, _, err = run(COMMANDS[name])
    assert code == 0, err

@pytest.mark.parametrize("bad", rows(), ids=called)
def test_a_bad_input_ends_in_one_clear_line_and_changes_nothing(place, monkeypatch, bad):
    base, more, words, *damages = bad
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    before, peak = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def late(*_):
        raise TooLate
    old = signal.signal(signal.SIGALRM, late)
    try:
        for damage, *args in damages:
            damage(*args)
        before = tree()
        signal.setitimer(signal.ITIMER_REAL, 3)
        code, _, err = run(f"{COMMANDS.get(base, '')} {more}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
    assert [w for w in words.split() if w.lower() not in err.lower()] == [], err
    assert err[:-1].isprintable() and "secret" not in err
    assert tree() == before                            # folders, too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024
