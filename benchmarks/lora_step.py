"""lora_step.py - one LoRA training step, ours against transformers + PEFT: seconds and memory.

    pip install -r requirements.txt -r tests/requirements.txt && python benchmarks/lora_step.py

Both sides read the same random Gemma-2 (D 512, 8 layers, vocabulary 32,000; fp32, eager attention) and the
same start of the adapter (r 16 on q, k, v, o) from disk, take the same batch (8 x 128 tokens, the second
half supervised) and the same AdamW with clipping. Each runs in a process of its own, the two in turns;
medians over all steps. Memory is the process's peak resident size, imports included; losses are shown so
that nobody times a wrong answer. Run it on a quiet machine: beside another job threads wait for each other
and both sides' seconds mean nothing.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

RAW = dict(model_type="gemma2", hidden_size=512, num_hidden_layers=8, intermediate_size=2048,
           num_attention_heads=4, num_key_value_heads=2, head_dim=128, vocab_size=32000,
           query_pre_attn_scalar=128, sliding_window=4096, attn_logit_softcapping=50.0,
           final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
           architectures=["Gemma2ForCausalLM"])
BATCH, T, SUPERVISED = 8, 128, 64

def prepare(folder):
    """Write the model and the adapter that both sides start from."""
    import lora
    from model_gemma import Gemma, config_from_json, save_gemma
    torch.manual_seed(0)
    model = Gemma(config_from_json(RAW))
    for p in model.parameters():
        p.data.normal_(std=.02)
    save_gemma(model, folder / "model")
    lora.attach(model, r=16, alpha=32)
    lora.init_lora(model)
    lora.save_adapter(model, folder / "adapter")

def ours(folder):
    """(trainable parameters, function from a batch of ids to the loss)"""
    import lora
    from model_gemma import load_gemma
    model = load_gemma(folder / "model")
    lora.load_adapter(model, folder / "adapter")
    mask = [0] * (T - SUPERVISED) + [1] * SUPERVISED
    return ([p for _, p in lora.trainable(model)],
            lambda ids: model.reply_nll([(row, mask) for row in ids.tolist()])[0].mean())

def peers(folder):
    """The same with transformers and PEFT."""
    import peft
    import transformers
    how = dict(dtype=torch.float32, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", **how)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()

    def loss(ids):
        labels = ids.clone()
        labels[:, :T - SUPERVISED] = -100
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
    return [p for p in model.parameters() if p.requires_grad], loss

def one_side(name, folder, steps):
    """Train a few steps; print one JSON line: seconds of steps after the first, losses, peak memory."""
    params, loss_of = {"ours": ours, "peers": peers}[name](folder)
    opt = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for _ in range(steps + 1):
        ids = torch.randint(3, RAW["vocab_size"], (BATCH, T), generator=rng)
        began = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(), opt.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    print(json.dumps(dict(seconds=seconds[1:], losses=losses, trained=sum(p.numel() for p in params),
                          peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))

def main():
    ap = argparse.ArgumentParser(description="One LoRA step, ours against transformers + PEFT.")
    ap.add_argument("--rounds", type=int, default=5, help="how often each side runs, in turns")
    ap.add_argument("--steps", type=int, default=6, help="timed steps in each run")
    ap.add_argument("--side", choices=["ours", "peers"], help=argparse.SUPPRESS)
    ap.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.side:
        return one_side(args.side, args.folder, args.steps)
    runs = {"ours": [], "peers": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for i in range(args.rounds):
            for side in runs:
                command = [sys.executable, __file__, "--side", side, "--folder", folder]
                run = subprocess.run([*command, "--steps", str(args.steps)], capture_output=True, text=True)
                if run.returncode:
                    sys.exit(f"{side} failed:\n{run.stderr}")
                runs[side].append(json.loads(run.stdout.splitlines()[-1]))
                r = runs[side][-1]
                print(f"round {i} {side:5s}: {statistics.median(r['seconds']):.3f} s a step, "
                      f"peak {r['peak_mb']:.0f} MB, last loss {r['losses'][-1]:.5f}, "
                      f"{r['trained']:,} trained", flush=True)
    gap = max(abs(a - b) for a, b in zip(runs["ours"][0]["losses"], runs["peers"][0]["losses"]))
    print(f"losses differ by at most {gap:.1e} over {args.steps + 1} steps; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    mine, theirs = (statistics.median(x for r in runs[side] for x in r["seconds"]) for side in runs)
    print(f"seconds a step: ours {mine:.3f}, transformers + PEFT {theirs:.3f}: "
          f"{theirs / mine:.2f} times as fast")
    mine, theirs = (statistics.median(r["peak_mb"] for r in runs[side]) for side in runs)
    print(f"peak memory, MB: ours {mine:.0f}, transformers + PEFT {theirs:.0f}: {mine / theirs:.2f} of it")

if __name__ == "__main__":
    main()
