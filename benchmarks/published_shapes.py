"""published_shapes.py - the whole road at the published sizes, with random weights: what each stage takes in time and memory.

    python benchmarks/published_shapes.py FOLDER --size 2b         (FOLDER gets 6.5 GB, for 9b 21 GB, and is yours to delete)

Writes a checkpoint (bf16, in shards) and one SAE per layer (16k wide) with exactly the names and shapes of Gemma 2 2B or 9B
and of Gemma Scope, then walks load -> forward -> features -> 3 steps -> generate -> save -> reload with train.py's own
functions, in a process of its own. Peak memory is the resident size, sampled every 10 ms; it counts the pages of the mapped
weight files, which are read when first used: the first forward belongs to the loading. Where transformers is installed, the
same forward is done with it on the same files and compared. Text and tokenizer are the made-up world's: only shapes matter.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import data
import lora
import model_gemma
import train

RAW = dict(model_type="gemma2", architectures=["Gemma2ForCausalLM"], vocab_size=256000, head_dim=256, sliding_window=4096,
           query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rms_norm_eps=1e-6,
           hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0, max_position_embeddings=8192, torch_dtype="bfloat16")
SIZES = {"2b": dict(RAW, num_hidden_layers=26, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4),
         "9b": dict(RAW, num_hidden_layers=42, hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8)}
SAE_LAYERS = {"2b": (5, 10, 15, 20), "9b": (10, 15, 20, 25, 30)}
SHARD = 2e9                                            # bytes; the hub's shards are up to 5 GB
PROBE = torch.arange(5, 69)[None] % 280                # 64 token ids

def on_meta(size):
    with torch.device("meta"):
        return model_gemma.Gemma(model_gemma.config_from_json(SIZES[size]))

def write(folder, size):
    """Checkpoint, SAEs, tokenizer and preference data; one shard in memory at a time."""
    world, rng = data.tiny_world(0), np.random.default_rng(0)
    shapes = {"model." + n: p.shape for n, p in on_meta(size).named_parameters()}
    parts, room = [[]], SHARD
    for name, shape in shapes.items():
        if shape.numel() * 2 > room and parts[-1]:
            parts.append([])
            room = SHARD
        parts[-1].append(name)
        room -= shape.numel() * 2
    where, gen = {}, torch.Generator().manual_seed(0)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        draw = lambda shape: torch.empty(shape, dtype=torch.bfloat16).normal_(std=.02, generator=gen)
        save_file({n: draw(shapes[n]) for n in part}, folder / "model" / file, metadata={"format": "pt"})
        where |= {n: file for n in part}
    data.write_json(folder / "model" / "config.json", SIZES[size])
    world.tok.save(str(folder / "model" / "tokenizer.json"))
    total = sum(shape.numel() * 2 for shape in shapes.values())
    data.write_json(folder / "model" / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    D, N = SIZES[size]["hidden_size"], 16384
    for layer in SAE_LAYERS[size]:
        W = rng.standard_normal((N, D), dtype=np.float32)
        W /= np.linalg.norm(W, axis=1, keepdims=True)
        # a block adds two branches of rms 1 to each dimension; 2.5 standard deviations leave some 100 features
        threshold = np.full(N, 2.5 * (1 + 2 * layer) ** .5, dtype=np.float32)
        path = folder / "sae" / f"layer_{layer}" / "width_16k" / "average_l0_100" / "params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, W_enc=W.T, W_dec=W, b_enc=np.zeros(N, np.float32), b_dec=np.zeros(D, np.float32), threshold=threshold)
    words = [w for w in world.tok.get_vocab() if not w.startswith("<")]
    said = lambda n: " ".join(rng.choice(words, n))
    data.write_text(folder / "pairs.jsonl", "".join(json.dumps(dict(prompt=said(60), chosen=said(60), rejected=said(60))) + "\n" for _ in range(40)))

class Stage:
    """Time a stage and sample the process's resident size meanwhile; prints one line."""

    def __init__(self, name):
        self.name, self.peak, self.over = name, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self):
        while not self.over.wait(.01):
            self.peak = max(self.peak, resident())

    def __enter__(self):
        self.began = time.perf_counter()
        self.thread.start()

    def __exit__(self, *_):
        seconds = time.perf_counter() - self.began
        self.over.set()
        self.thread.join()
        gpu = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU so far" if torch.cuda.is_initialized() else ""
        print(f"{self.name:24s} {seconds:8.1f} s   peak {max(self.peak, resident()) / 1e9:6.2f} GB resident{gpu}", flush=True)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def walk(folder, size, device):
    """Every stage, on our side."""
    args = f"--model {folder}/model --sae {folder}/sae --data {folder}/pairs.jsonl --dtype bfloat16 --device {device} --template tiny --steps 3 --batch 2 --micro 2 --contrast-pairs 8"
    s = train.settle(train.parser().parse_args(args.split()))
    train.choose_sources(s, model_gemma.load_config(s.model))
    tok, out = data.load_tokenizer(s.model), folder / "run"
    rows, _, examples = train.load_rows(s, tok)
    print(f"{'before':24s} {'':10s}   {resident() / 1e9:11.2f} GB resident", flush=True)
    with Stage("load"):
        model = model_gemma.load_gemma(s.model, torch.bfloat16, device)
    with Stage("first forward, 64 tokens"), torch.no_grad():
        base = model(PROBE.to(device)).cpu()
    save_file({"logits": base}, folder / "logits.safetensors")
    with Stage("features, 8 pairs"):
        bases = train.subspace(s, model, tok, examples, out)
    lora.attach(model, s.targets, s.r, s.alpha)
    train.start_adapters(s, model, bases)
    with Stage("3 steps of 2 x 120 tokens"):
        train.align(model, rows, s, out)
    with Stage("generate 2 x 16"):
        replies = model_gemma.generate(model, [r["chosen"][0][:60] for r in rows[:2]], 16, ())
    with torch.no_grad():
        trained = model(PROBE.to(device)).cpu()
    with Stage("save the adapter"):
        lora.save_adapter(model, out, s.model)
    del model
    with Stage("reload, with the adapter"):
        model = model_gemma.load_gemma(s.model, torch.bfloat16, device)
        lora.load_adapter(model, out)
    with torch.no_grad():
        again = model(PROBE.to(device)).cpu()
    assert torch.equal(again, trained) and not torch.equal(again, base) and all(len(r) == 16 for r in replies)
    print("reloaded logits equal the trained model's to the last bit, and differ from the base's")

def compare(folder, device):
    """transformers' logits on the same files, against ours."""
    import transformers
    with Stage("transformers, load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, attn_implementation="eager").to(device)
    with Stage("transformers, forward"), torch.no_grad():
        theirs = model(PROBE.to(device)).logits.float().cpu()
    ours = load_file(folder / "logits.safetensors")["logits"]
    print(f"logits, ours against transformers {transformers.__version__}: largest difference {(ours - theirs).abs().max():.3g} "
          f"at a size of {theirs.abs().max():.3g}; {(ours == theirs).float().mean():.2%} equal to the last bit")

def main():
    ap = argparse.ArgumentParser(description="Time and memory of every stage at the published sizes, with random weights.")
    ap.add_argument("folder", type=Path, help="where the files go")
    ap.add_argument("--size", choices=SIZES, default="2b")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--stage", choices=["write", "walk", "compare"], help="only this one")
    args = ap.parse_args()
    if args.stage == "write":
        return write(args.folder, args.size)
    if args.stage == "walk":
        return walk(args.folder, args.size, args.device)
    if args.stage == "compare":
        return compare(args.folder, args.device)
    total = sum(2 * p.numel() for p in on_meta(args.size).parameters())
    print(f"{args.size}: {total / 2:,.0f} parameters, {total / 1e9:.2f} GB in bf16; torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for stage in ("write", "walk", "compare"):         # a process each: memory is measured from nothing
        if stage == "write" and (args.folder / "pairs.jsonl").exists():
            continue
        done = subprocess.run([sys.executable, __file__, str(args.folder), "--size", args.size, "--device", args.device, "--stage", stage])
        if done.returncode:
            sys.exit(f"stage {stage} failed")

if __name__ == "__main__":
    main()
