"""published_shapes.py - the whole road at the published sizes, random weights: time and memory of each stage.

    python benchmarks/published_shapes.py FOLDER --size 2b     FOLDER gets 6.5 GB (9b: 20 GB, small: 10 MB)
    python benchmarks/published_shapes.py FOLDER --size 9b --device cuda --stage write walk

Writes a checkpoint (bf16, in shards) and SAEs of some layers with the names and shapes of Gemma 2 and Gemma
Scope, then walks load -> forward -> features -> steps -> generate -> save -> reload with train.py's own
functions, in a process of its own: 3 steps of 2 x 120 tokens on a CPU, 20 of 4 x 512 on a GPU. Peak memory is
the resident size, sampled every 10 ms; it counts the pages of mapped weight files, which are read when first
used: the first forward belongs to the loading. On a GPU also what is allocated there, at the most in each
stage. transformers, where installed, does the same forward on the same files. Text and tokenizer are the
made-up world's.
"""
import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lora
import model_gemma
import train
from benchmarks.tiny_world import tiny_world

RAW = dict(
    model_type="gemma2", architectures=["Gemma2ForCausalLM"], vocab_size=256000, head_dim=256,
    sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0, torch_dtype="bfloat16",
    max_position_embeddings=8192)
SIZES = {
    "small": RAW | dict(vocab_size=1024, num_hidden_layers=4, hidden_size=256, intermediate_size=512,
                        num_attention_heads=2, num_key_value_heads=1),
    "2b": RAW | dict(num_hidden_layers=26, hidden_size=2304, intermediate_size=9216, num_attention_heads=8,
                     num_key_value_heads=4),
    "9b": RAW | dict(num_hidden_layers=42, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
                     num_key_value_heads=8)}
SAE_LAYERS = {"small": (1, 2), "2b": (5, 10, 15, 20), "9b": (10, 20)}  # the 9b: two of five, 0.5 GB each
WIDTHS = {"small": 512, "2b": 16384, "9b": 16384}
SHARD = 2e9  # bytes; the hub's shards are up to 5 GB
STAGES = ["write", "walk", "compare"]
PROBE = torch.arange(5, 69)[None]  # 64 token ids

def on_meta(size):
    """The model's shapes, without memory."""
    with torch.device("meta"):
        return model_gemma.Gemma(model_gemma.config_from_json(SIZES[size]))

def load_of(device):
    """(steps, rows a step, words of a prompt and of a reply, replies, new tokens) that a device can bear."""
    return (20, 4, 254, 8, 64) if device.startswith("cuda") else (3, 2, 58, 2, 16)

def pairs_file(folder, device):
    """The preference data for a device: of long rows or short ones."""
    return folder / f"pairs-{load_of(device)[2]}.jsonl"

def write(folder, size, device):
    """Write checkpoint, tokenizer, SAEs and preference data."""
    world, rng = tiny_world(0), np.random.default_rng(0)
    if not (folder / "model" / "tokenizer.json").exists():
        write_weights(folder / "model", size, device)
    world.tok.save(str(folder / "model" / "tokenizer.json"))
    for layer in SAE_LAYERS[size]:
        write_sae(folder / "sae", layer, SIZES[size]["hidden_size"], WIDTHS[size], rng)
    words = [w.strip("▁") for w in world.tok.get_vocab() if w.startswith("▁") and len(w) > 1]
    text = lambda: " ".join(rng.choice(words, load_of(device)[2]))
    rows = [dict(prompt=text(), chosen=text(), rejected=text()) for _ in range(40)]
    data.write_rows(pairs_file(folder, device), rows)

def write_weights(folder, size, device):
    """Write random weights in shards, one of them in memory at a time, with index and config.
    They are drawn on the device: nine billion numbers take a CPU minutes."""
    shapes = {"model." + n: p.shape for n, p in on_meta(size).named_parameters()}
    parts, room = [[]], SHARD
    for name, shape in shapes.items():
        if shape.numel() * 2 > room and parts[-1]:
            parts.append([])
            room = SHARD
        parts[-1].append(name)
        room -= shape.numel() * 2
    where, gen = {}, torch.Generator(device).manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    blank = lambda shape: torch.empty(shape, dtype=torch.bfloat16, device=device)
    draw = lambda shape: blank(shape).normal_(std=.02, generator=gen).cpu()
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file({n: draw(shapes[n]) for n in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(shape.numel() * 2 for shape in shapes.values())
    data.write_json(folder / "config.json", SIZES[size])
    index = dict(metadata=dict(total_size=total), weight_map=where)
    data.write_json(folder / "model.safetensors.index.json", index)

def write_sae(folder, layer, D, N, rng):
    """Write a random SAE of which about 100 features fire on a token."""
    W = rng.standard_normal((N, D), dtype=np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    # a block adds two branches of rms 1 to each dimension; 2.5 standard deviations leave some 100 features
    threshold = np.full(N, 2.5 * (1 + 2 * layer) ** .5, dtype=np.float32)
    path = folder / f"layer_{layer}" / "width_16k" / "average_l0_100" / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    b_enc, b_dec = np.zeros(N, np.float32), np.zeros(D, np.float32)
    np.savez(path, W_enc=W.T, W_dec=W, b_enc=b_enc, b_dec=b_dec, threshold=threshold)

class Stage:
    """Times a stage and samples the process's resident size meanwhile; prints one line.
    tokens: how many it works through, if a rate is wanted."""

    def __init__(self, name, tokens=0):
        self.name, self.tokens, self.peak, self.over = name, tokens, 0, threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def sample(self):
        while not self.over.wait(.01):
            self.peak = max(self.peak, resident())

    def __enter__(self):
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        self.thread.start()

    def __exit__(self, *_):
        gpu = ""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            gpu = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
        seconds = time.perf_counter() - self.began
        self.over.set()
        self.thread.join()
        peak = max(self.peak, resident()) / 1e9
        rate = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        print(f"{self.name:26s} {seconds:8.1f} s   peak {peak:6.2f} GB resident{gpu}{rate}", flush=True)

def resident():
    """The process's resident size in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def walk(folder, size, device):
    """Every stage, on our side."""
    steps, batch, _, replies, new = load_of(device)
    line = (f"--model {folder}/model --sae {folder}/sae --data {pairs_file(folder, device)} --dtype bfloat16 "
            f"--device {device} --template tiny --steps {steps} --batch {batch} --micro {batch} --width 16k "
            f"--contrast-pairs 8 --layers {','.join(map(str, SAE_LAYERS[size]))}")
    s = train.settings(line.split())
    train.choose_sources(s)
    s.method, s.lr, s.seed, s.resume, s.shared = "sails", s.lr[0], s.seed[0], False, str(folder / "run")
    sets, out = train.load_sets(s), folder / "run"
    out.mkdir(exist_ok=True)
    for name in ("subspace", "state"):  # of an earlier walk: it is not to go on
        (out / f"{name}.safetensors").unlink(missing_ok=True)
    print(f"{'before':26s} {'':10s}   {resident() / 1e9:11.2f} GB resident", flush=True)
    with Stage("load"):
        model = model_gemma.load_gemma(s.model, torch.bfloat16, device)
    with Stage("first forward, 64 tokens"), torch.no_grad():
        base = model(PROBE.to(device)).cpu()
    save_file({"logits": base}, folder / "logits.safetensors")
    with Stage("features, 8 pairs"):
        train.start(s, model, sets, out)
    T = len(sets.train[0]["chosen_tokens"][0])  # one length: a word is a token
    with Stage(f"{steps} steps of {batch} x {T} tokens", steps * batch * T):
        train.align(model, sets.train, s, train.make_loss(s, model), out)
    with Stage(f"generate {replies} x {new}", replies * new):
        said = model_gemma.generate(model, [r["prompt_ids"] for r in sets.train[:replies]], new, ())
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
    assert torch.equal(again, trained)
    assert not torch.equal(again, base)
    assert all(len(r) == new for r in said)
    print("reloaded logits equal the trained model's to the last bit, and differ from the base's")

def compare(folder, _, device):
    """transformers' logits on the same files, against ours."""
    if importlib.util.find_spec("transformers") is None:
        return print("transformers is not installed: not compared")
    import transformers
    how = dict(dtype=torch.bfloat16, attn_implementation="eager")
    with Stage("transformers, load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **how).to(device)
    with Stage("transformers, forward"), torch.no_grad():
        theirs = model(PROBE.to(device)).logits.float().cpu()
    ours = load_file(folder / "logits.safetensors")["logits"]
    print(f"logits, ours against transformers {transformers.__version__}: largest difference "
          f"{(ours - theirs).abs().max():.3g} at a size of {theirs.abs().max():.3g}; "
          f"{(ours == theirs).float().mean():.2%} equal to the last bit")

def main():
    ap = data.Arguments(description="Time and memory of every stage at the published sizes, random weights.")
    ap.add_argument("folder", type=Path, help="where the files go")
    ap.add_argument("--size", choices=SIZES, default="2b")
    ap.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these, in this order")
    args = ap.parse_args()
    if len(args.stage) == 1:
        return globals()[args.stage[0]](args.folder, args.size, args.device)
    count = sum(p.numel() for p in on_meta(args.size).parameters())
    print(f"{args.size}: {count:,} parameters, {2 * count / 1e9:.2f} GB in bf16; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {args.device}", flush=True)
    again = [sys.executable, __file__, str(args.folder), "--size", args.size, "--device", args.device]
    there = args.folder / "model" / "config.json"
    of_size = not there.exists() or data.read_json(there) == SIZES[args.size]
    data.need(of_size, f"{args.folder} holds another size; give another folder")
    for stage in args.stage:  # a process each: memory is measured from nothing
        if stage != "write" or not pairs_file(args.folder, args.device).exists():
            code = subprocess.run([*again, "--stage", stage]).returncode
            if code:
                return code

if __name__ == "__main__":
    data.run_main(main)
