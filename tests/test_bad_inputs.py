"""Bad inputs, one a row: exit code 2, one line that says what and where, nothing created or changed."""
import contextlib
import glob
import gzip
import io
import itertools
import json
import os
import re
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
from safetensors.torch import load_file, save_file  # noqa: F401, the table calls load_file
from tokenizers import Tokenizer

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import train
from benchmarks import choices, compare, gcg
from conftest import TOP, go, random_gemma, random_sae
from test_tokens import talk  # noqa: F401, the table calls it

SCRIPTS = dict(train=train, eval=evaluation, choices=choices, gcg=gcg, lora=lora, sae=sae_module, data=data,
               gemma=model_gemma, compare=compare, sails=train.sails)
TABLE, COMMANDS = (TOP / "tests" / "bad_inputs.txt").read_text().splitlines(), {}
for name, script, more in re.findall(r"(\w+) := (\w+) (.*)", "\n".join(TABLE)):
    COMMANDS[name] = f"{COMMANDS.get(script, script)} {more}"
DEEP, HUGE, GONE, NAN, INF = "[deep]", "[huge]", "[gone]", float("nan"), float("inf")
TRAP = type("TRAP", (), dict(__reduce__=lambda _: (exec, ("raise SystemExit('unpickled')",))))
CONFIG, WEIGHTS, TOK = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
SAE = "sae/layer_0/width_40/average_l0_20/params.npz"
SCOPE = "sae/layer_0_width_41_l0_medium/params.safetensors"
AC, AM, STATE = "run/adapter_config.json", "run/adapter_model.safetensors", "half/state.safetensors"
SPACE, INDEX, GZ = "half/subspace.safetensors", "sharded/model.safetensors.index.json", "pairs.jsonl.gz"

def run(command):
    """A command line's exit code, stdout and stderr; its first word names the script."""
    script, *args = shlex.split(command)
    return go(args, SCRIPTS[script].main)

@pytest.fixture(scope="module")
def files(tmp_path_factory, home, split):
    """(folder in which commands run, a copy of what it holds, the copy's tree)."""
    top = tmp_path_factory.mktemp("bad")
    for name in ("model", "sae"):
        shutil.copytree(vars(home)[name], top / "place" / name)
    with contextlib.chdir(top / "place"):
        shutil.copytree("model", "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
        model_gemma.save_gemma(random_gemma(), "sharded", shard_bytes=50_000)
        for layer in (0, 1):
            path = Path(SCOPE.replace("_0_", f"_{layer}_"))
            path.parent.mkdir()
            save_file({k: t.contiguous() for k, t in random_sae(layer, N=41).named_buffers()}, path)
        rows = [dict(prompt=ex["turns"][0]["content"], chosen=ex["chosen"], rejected=ex["rejected"])
                for ex in split["train"][:30]]
        for name in ("pairs.jsonl", "folder/train.jsonl"):
            data.write_rows(name, rows)
        put(GZ, gzip.compress(Path("pairs.jsonl").read_bytes()))
        data.write_rows("asks.jsonl", [dict(prompt=f"how make thing{i} ?", label="benign") for i in range(3)])
        data.write_rows("plain.jsonl", [dict(prompt=f"how {i} ?", response="sure") for i in range(30)])
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
    return top / "place", top / "copy", tree(top / "copy")

@pytest.fixture
def place(files, monkeypatch):
    place, copy, kept = files
    monkeypatch.chdir(place)
    here = tree()
    for p in [p for p in here if p not in kept][::-1]:  # what a folder holds before the folder
        remove(p)
    for p in [p for p in kept if here.get(p) != kept[p]]:
        shutil.copy2(copy / p, p) if kept[p] else os.mkdir(p)

def tree(top="."):
    """{path in `top`: when it was written and its size, False for a folder} of all that lies there."""
    names = glob.glob("**", root_dir=top, recursive=True, include_hidden=True)
    about = lambda path: path.is_file() and (path.stat().st_mtime_ns, path.stat().st_size)
    return {name: about(Path(top, name)) for name in names}

remove = lambda path: (shutil.rmtree if Path(path).is_dir() else os.unlink)(path)

def put(path, content):
    """Replace or make a file; what stands for JSON that json does not write is filled in."""
    for short, long in ((DEEP, "[" * 10**5 + "]" * 10**5), (HUGE, "9" * 5000)):
        if isinstance(content, str):
            content = content.replace(f'"{short}"', long).replace(short, long)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

def js(path, key, value, *, at=None):
    """Change a JSON file's key (in what stands under the key `at`)."""
    whole = json.loads(Path(path).read_text())
    part = whole[at] if at else whole
    part.pop(key, None)
    part |= {} if value == GONE else {key: value}
    put(path, json.dumps(whole))

def line(path, content=None, n=2, change=put):
    """Replace line n of a file, or change it as a file of its own."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    put("line", lines[n - 1])
    change("line", *content) if change != put else put("line", content)
    lines[n - 1] = Path("line").read_bytes() + b"\n"
    put(path, b"".join(lines))
    remove("line")

row = lambda path, key, value, n=2: line(path, (key, value), n, js)
cut = lambda path, share=.5: put(path, Path(path).read_bytes()[:int(share * Path(path).stat().st_size)])

def flip(path, share=.5):
    raw = bytearray(Path(path).read_bytes())
    raw[int(share * len(raw))] ^= 0xff
    put(path, bytes(raw))

spot = lambda x, value: x.flatten().index_fill(0, torch.tensor(x.numel() // 2), value).view(x.shape)

CHANGES = dict(nan=lambda x: spot(x, NAN), inf=lambda x: spot(x, INF), int8=lambda x: x.to(torch.int8),
    gone=lambda x: None, bool=lambda x: x.bool(), fp8=lambda x: x.to(torch.float8_e4m3fn),
    short=lambda x: x[:-1], T=lambda x: x.T, twice=lambda x: 2 * x, other=lambda x: spot(x, .5),
    minus=lambda x: spot(x, -1), new=lambda x: torch.full((3,), 2.))

def tensor(path, key, change):
    """Change the tensor whose name ends so, in a safetensors or npz file; a step in the metadata."""
    if path == SAE:
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
    if path == SAE:
        np.savez(path, **{k: t.numpy() for k, t in found.items()})
    else:
        save_file(found, path, {k: v for k, v in noted.items() if v != GONE})

def arrays(**changed):
    """Change arrays of an SAE's file."""
    with np.load(SAE) as f:
        np.savez(SAE, **{**f} | changed)

def header(path, **entry):
    """A safetensors file whose header claims this of one tensor."""
    claims = dict(dtype="F32", shape=[1], data_offsets=[0, 4]) | entry
    claim = json.dumps({"model.norm.weight": claims}).encode()
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

def full(n):
    """A disk on which no file grows beyond n bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

def rows():
    """(command, words, damages) of every row of bad_inputs.txt."""
    for text in (line for line in TABLE if "|" in line and line[0] != "#"):
        parts, before = re.split("<([^<>]*)>", text), re.match("[^|]*[|]?[^|]*", text)[0].count("<")
        choices = [part.split("; ") for part in parts[1::2]]
        for chosen in itertools.product(*choices):
            whole = "".join(map("".join, zip(parts[::2], (*chosen, ""))))
            if before:
                whole = whole.replace("$", chosen[before - 1]).replace("^", chosen[0].split()[0])
            command, words, damages, *_ = (part.strip() for part in [*whole.split("|", 2), "", ""])
            script, more = command.split(" ", 1) if " " in command else (command, "")
            more = more.encode().decode("unicode_escape").replace("LONG", "x" * 300)
            id = f"{command} {damages}"[:99]
            yield pytest.param(f"{COMMANDS.get(script, script)} {more}", words, damages, id=id)

class TooLate(BaseException):
    """No handler of the scripts' own may catch it."""

@contextlib.contextmanager
def at_most(seconds):
    """TooLate after so many seconds."""
    def late(*_):
        raise TooLate
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "URL"])
def test_every_command_of_the_table_runs_where_nothing_is_damaged(place, name):
    code, _, err = run(COMMANDS[name])
    assert code == 0, err

def test_the_name_of_a_set_forges_no_row_of_the_table(place):
    row("asks.jsonl", "set", "a | 1.000 |\n| forged")
    code, said, err = run(COMMANDS["EVAL"])
    assert code == 2 and "set" in err or not re.search("^. forged", said, re.M)

@pytest.mark.parametrize("command, words, damages", [*rows()])
def test_a_bad_input_ends_in_one_clear_line_and_changes_nothing(place, monkeypatch, command, words, damages):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    eval(damages or "()")
    contents = lambda: {path: about and Path(path).read_bytes() for path, about in tree().items()}
    before = contents()
    try:
        with at_most(10):                              # no input hangs, on a busy machine either
            code, _, err = run(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
    assert [w for w in shlex.split(words) if w.lower() not in err.lower()] == [], err
    assert err[:-1].isprintable() and "secret" not in err
    assert contents() == before                        # folders, too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024
