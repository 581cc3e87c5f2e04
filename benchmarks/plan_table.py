"""plan_table.py - the memory plan against measured peaks, and what published sizes would take.

    python benchmarks/plan_table.py --check FOLDER      FOLDER gets 6 GB; 20 minutes on two cores
    python benchmarks/plan_table.py --table             computed, nothing is run

Print the two parts of results/plan_table.md. A peak is the kernel's VmHWM of a whole run of train.py in a
process of its own. SAILS_REAL names the folder that holds gemma-3-270m; without it that row is left out.
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
import model_gemma
import sae as sae_module
import train
from benchmarks import against_hf, count, plan, published_shapes, tiny_world
from eval import markdown

# ---- against measured peaks ----
SHORT = ("--data {rows} --template {form} --warmup 1 --steps 3 --batch {n} --micro {n} --device cpu "
         "--dtype {dtype}")
RUNS = {  # name: (model, --template, rows at a time, --dtype, further arguments)
    "tiny world, sails": ("tiny", None, None, None, "--method sails --steps 20"),
    "middle, lora, 8 x 128": ("middle", "tiny", 8, "float32", "--method lora"),
    "middle, lora, 8 x 128, checkpointing": ("middle", "tiny", 8, "float32", "--method lora --checkpointing"),
    "middle, full, 8 x 128": ("middle", "tiny", 8, "float32", "--method full --lr 1e-5"),
    "Gemma 3 270M, lora, 4 x 128": ("real", "hh", 4, "float32", "--method lora"),
    "2B, lora, 4 x 128, bf16": ("2b", "tiny", 4, "bfloat16", "--method lora")}
WORDS = "people kind useful dangerous first then help sorry".split()  # a token each, in every tokenizer here
PRINTED = r"memory: at most ([\d.]+) GB, in (.*?) \("

def prepare(folder, name):
    """A model's folder, written with random weights if it is not there; None without SAILS_REAL."""
    if name == "real":
        return os.environ.get("SAILS_REAL") and Path(os.environ["SAILS_REAL"]) / "gemma-3-270m"
    published_shapes.SIZES.setdefault("middle", against_hf.MIDDLE)
    if not (folder / name / "tokenizer.json").exists():
        published_shapes.write_weights(folder / name, name, "cpu")
        tiny_world.tiny_world(0).tok.save(str(folder / name / "tokenizer.json"))
    return folder / name

def write_rows(path):
    """Pairs of about 128 tokens each, prompt and reply half of them."""
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=61))
    rows = [dict(prompt=text(), chosen=text(), rejected=text()) for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def alone(folder, *args):
    """What this script prints in a process of its own; its folder is where runs go."""
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{args} failed:\n{done.stderr}")
    return done.stdout

def check(folder):
    """Part 1: planned and measured peaks; the heap beside counted bytes; seconds a row by micro-batch."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl")
    os.chdir(folder)
    tiny_world.make_world(train.WORLD)
    rows = {}
    for n, (name, (model, form, size, dtype, more)) in enumerate(RUNS.items()):
        path = "tiny" if model == "tiny" else prepare(folder, model)
        if path:
            short = SHORT.format(rows=folder / "rows.jsonl", form=form, n=size, dtype=dtype)
            short = short * (model != "tiny")
            out = folder / f"run-{n}-{time.time():.0f}"
            said = alone(folder, "--run", f"--model {path} --out {out} {short} {more}")
            planned, phase = re.search(PRINTED, said).groups()
            measured, planned = int(said.split()[-1]) / 1e9, float(planned)
            rows[name] = {"planned, GB": planned, "largest phase": phase, "measured, GB": measured,
                          "planned / measured": planned / measured}
            print(name, rows[name], file=sys.stderr, flush=True)
    print(*markdown("run", rows), "", sep="\n")
    for name in ("middle", "real", "2b"):
        if path := prepare(folder, name):
            print(alone(folder, "--heap", path).strip(), flush=True)
    print(alone(folder, "--speed", prepare(folder, "middle")).strip())

def one_run(args):
    """A run of train.py; the last word printed is the process's peak in bytes."""
    sys.argv = ["train.py", *args.split()]
    train.main()
    print(against_hf.resident("VmHWM"))

def adapted(path):
    """A model with adapters from a folder, in the dtype of its files."""
    config = json.loads((path / "config.json").read_text())
    bf16 = config.get("torch_dtype") == "bfloat16" and config["hidden_size"] > 1000
    model = model_gemma.load_gemma(path, torch.bfloat16 if bf16 else torch.float32)
    lora.attach(model)
    lora.init_lora(model)
    return model

def heap(path):
    """What a forward pass of 4 x 128 tokens adds to the process, over the bytes that it saves."""
    count.resident()
    model, saved = adapted(path), {}
    before, weights = against_hf.resident("VmRSS"), {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, _ = model.hidden(torch.randint(3, 300, (4, 128)))
    grew, counted = (against_hf.resident("VmRSS") - before) / 1e9, sum(saved.values()) / 1e9
    print(f"heap, {path.name}: {grew:.2f} GB for {counted:.2f} GB saved: {grew / counted:.2f}")
    assert h.requires_grad

def speed(path):
    """Seconds of processor time a row of a LoRA step, 128 tokens, by micro-batch."""
    model = adapted(path)
    torch.set_num_threads(1)  # processor time of two threads would count their waiting
    for micro in (1, 2, 4, 8, 16):
        seconds = []
        for _ in range(4):
            began, ids = time.process_time(), torch.randint(3, 300, (micro, 128)).tolist()
            model.reply_nll([(row, [0] * 64 + [1] * 64) for row in ids])[0].sum().backward()
            seconds.append((time.process_time() - began) / micro)
        print(f"micro-batch {micro}: {min(seconds):.3f} s of one core a row")

# ---- computed ----
SHAPES = {name: published_shapes.SIZES[name] for name in ("2b", "9b")} | {"27b": published_shapes.RAW | dict(
    num_hidden_layers=46, hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
    num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144)}
# Assumed: memory in GB, peak FLOP/s in bf16 and fp32, bytes/s of memory (RTX 4090, A100), devices
DEVICES = {"1 x 24 GB": (24, 165e12, 82e12, 1.0e12, 1), "1 x 80 GB": (80, 312e12, 19.5e12, 2.0e12, 1),
           "8 x 80 GB": (80, 312e12, 19.5e12, 2.0e12, 8)}
SHARE = .4  # of both peaks, assumed
STEPS, BATCH, PAIRS, HELD, PROMPTS, NEW = 500, 32, 1000, 800, 160, 64  # of the paper's run here
LENGTHS = SimpleNamespace(pair=512, reply=512, prompt=512, asked=64, held=512, cloze=0, text=0, described=0)

def table():
    """Part 2: for each size, method and device: what the plan picks, GB and hours."""
    rows = {}
    for size, raw in SHAPES.items():
        config = model_gemma.config_from_json(raw)
        _, width, layers = sae_module.published(f"gemma-2-{size}", config)
        for method, dtype in (("sails", "bfloat16"), ("full", "float32")):
            s = train.settings(f"--model M --method {method} --dtype {dtype} --width {width}".split())
            s.device, s.layers = "cuda", layers
            for device, (memory, *rates, ranks) in DEVICES.items():
                for s.shard in dict.fromkeys((False, ranks > 1)):  # only if it must be; full always is
                    ask = [method], config, LENGTHS, plan.SPARE * memory * 1e9, ranks, BATCH // ranks
                    t, phases, fits = plan.largest(s, *ask)
                    if fits:
                        break
                phase, total = plan.peak(phases)
                cut = ranks > 1 and (s.shard or method == "full")
                choice = f"{t.micro}" + ", checkpointing" * t.checkpointing + ", sharded" * cut
                name = f"{size}, {'LoRA r 16, bf16' if method == 'sails' else 'full, fp32'}, {device}"
                rows[name] = {"GB a device": total / 1e9, "largest phase": phase,
                              "micro-batch": choice if fits else "does not fit",
                              "hours": hours(t, config, method, rates, ranks) if fits else None}
                print(name, rows[name], file=sys.stderr, flush=True)
    print(*markdown("computed, not measured", rows), sep="\n")

def flops(model, walk, *args):
    """[FLOPs] of walk(model, *args), a function of count.py; nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        walk(model, *args)
    return [counter.get_total_flops()]

def hours(s, config, method, rates, ranks):
    """Training, features, held-out pairs twice; writing replies reads every weight for each token."""
    bf16, fp32, bandwidth = rates
    shape, L = plan.shape(s, method, config), LENGTHS
    [one] = count.walked(flops, shape, count.step, s.micro, L.pair, s.micro * L.reply)
    [row] = count.walked(flops, shape, count.scoring, 1, L.held, L.reply)
    below = (max(s.layers) + 1) / config.n_layers if method == "sails" else 0
    work = one * STEPS * BATCH / s.micro + row * (2 * PAIRS * below + 2 * 2 * HELD)
    weights = sum(p.nbytes for p in count.bare(shape).parameters())
    replies = 2 * NEW * -(-PROMPTS // s.replies) * weights / bandwidth
    return (work / ranks / (SHARE * (fp32 if method == "full" else bf16)) + replies) / 3600

def main():
    ap = argparse.ArgumentParser(description="The memory plan against peaks; what big models would take.")
    ap.add_argument("--check", type=Path, help="measure runs; models go into this folder")
    ap.add_argument("--run", help=argparse.SUPPRESS)
    ap.add_argument("--heap", type=Path, help=argparse.SUPPRESS)
    ap.add_argument("--speed", type=Path, help=argparse.SUPPRESS)
    ap.add_argument("--table", action="store_true", help="compute what published sizes take")
    args = ap.parse_args()
    parts = dict(check=check, run=one_run, heap=heap, speed=speed)
    for name, part in parts.items():
        if getattr(args, name):
            part(getattr(args, name).resolve() if name != "run" else args.run)
    if args.table:
        table()

if __name__ == "__main__":
    main()
