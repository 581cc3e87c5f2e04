"""against_hf.py - this code against transformers + PEFT: seconds of steps, generation, forward; memory.

    pip install -r requirements.txt -r tests/requirements.txt && python benchmarks/against_hf.py

One table: theirs / ours in seconds, ours / theirs in memory. Both sides read the same weights, adapter and
batches from disk, and each is a process that stays alive: it does a few repetitions when it is asked, in
turns with the other, so that a disturbance meets both; medians. Memory is the peak resident size of fresh
processes. The first losses, the logits and the generated tokens of both sides must agree, or the run ends.
Theirs: eager attention, which is the only kind that computes Gemma 2's soft cap on a CPU; for Gemma 3 also
sdpa, and each cell takes the faster one. Real Gemma 3 270M is read from SAILS_REAL/gemma-3-270m, if set.
On a GPU the published shape of the 9B comes after that, random weights in bf16, one side at a time.
Letters: B batch, T tokens, V vocabulary.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file, save_file

G2 = dict(model_type="gemma2", architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0,
          final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh", sliding_window=4096)
TINY = G2 | dict(hidden_size=64, num_hidden_layers=4, intermediate_size=128, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, vocab_size=512)
MIDDLE = G2 | dict(hidden_size=512, num_hidden_layers=8, intermediate_size=2048, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=128, vocab_size=32000)
NINE = G2 | dict(hidden_size=3584, num_hidden_layers=42, intermediate_size=14336, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, vocab_size=256000)
REAL = Path(os.environ.get("SAILS_REAL", "nowhere"), "gemma-3-270m")
# name: what the table calls it, config or folder, B, T, prompts to continue
SHAPES = {
    "tiny": ("vocabulary 512, D 64, 4 layers, 64 x 24", TINY, 64, 24, 64),
    "middle": ("32,000, D 512, 8 layers, 8 x 128", MIDDLE, 8, 128, 16),
    "large": ("256,000, D 512, 8 layers, 4 x 128", MIDDLE | dict(vocab_size=256000), 4, 128, 16),
    "270m": ("Gemma 3 270M, real weights, 4 x 128", REAL, 4, 128, 16)}
PUBLISHED = {  # bf16, made in place from a seed; the second runs every line of the first on a CPU
    "9b": ("Gemma 2 9B's shape, 8 x 512", NINE, 8, 512, 8),
    "debug": ("a small shape, 4 x 32", TINY, 4, 32, 4)}
JOBS = {"step": "LoRA step", "full": "full step", "generate": "generate",
        "fixed": "generate, fixed length", "forward": "forward"}
HOW = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}  # theirs, by the side's name
NEW = 64  # tokens a reply has at most
RANK = dict(r=16, alpha=32)  # of the adapters, on q, k, v, o

# ---- what both sides read ----
def prepare(folder, name):
    """Write weights, unless they are there or made from a seed, and what both sides are fed with."""
    from model_gemma import Gemma, config_from_json, load_config, save_gemma
    _, raw, B, T, prompts = (SHAPES | PUBLISHED)[name]
    c = load_config(str(raw)) if isinstance(raw, Path) else config_from_json(raw)
    rng = torch.Generator().manual_seed(0)
    if name in PUBLISHED:
        (folder / "config.json").write_text(json.dumps(raw))
    elif not isinstance(raw, Path):
        model = Gemma(c)
        fill(model)
        save_gemma(model, folder)
    # stop tokens, a sixteenth of the vocabulary: replies end early and late, as an evaluation's do
    stop = torch.randperm(c.vocab_size - 3, generator=rng)[:c.vocab_size // 16] + 3
    ids = torch.randint(3, c.vocab_size, (16, B, T), generator=rng)  # 16 batches, then the first again
    asks = torch.randint(3, c.vocab_size, (prompts, T // 2), generator=rng)
    save_file(dict(ids=ids, stop=stop, asks=asks), folder / "inputs.safetensors")

@torch.no_grad()
def fill(model):
    """Draw every parameter from a seed of its own name: the same numbers on both sides."""
    for name, p in model.named_parameters():
        seed = zlib.crc32(name.removeprefix("model.").encode())
        p.normal_(std=.02, generator=torch.Generator(p.device).manual_seed(seed))

# ---- the two sides: what a process calls ----
class Ours:
    """The side of this repository."""
    def __init__(self, name, folder, device, side):
        import lora
        import model_gemma
        self.lora, self.gemma, self.start = lora, model_gemma, resident("VmRSS")
        if name in PUBLISHED:
            torch.set_default_dtype(torch.bfloat16)
            with torch.device(device):
                self.model = model_gemma.Gemma(model_gemma.load_config(str(folder)))
            torch.set_default_dtype(torch.float32)
            self.model.requires_grad_(False)
            fill(self.model)
        else:
            self.model = model_gemma.load_gemma(str(weights(name, folder)), device=device)

    def logits(self, ids):
        """ids (B, T) -> (B, T, V)"""
        return self.model(ids)

    def replies(self, asks, stop):
        """Greedy continuations of asks (B, T): lists of ids, a stop token included."""
        return self.gemma.generate(self.model, asks.tolist(), NEW, stop)

    def adapt(self, folder):
        """Put the adapter on; the parameters that train."""
        self.lora.attach(self.model, **RANK)
        if not (folder / "adapter").exists():
            self.lora.init_lora(self.model)
            self.lora.save_adapter(self.model, folder / "adapter")
        self.lora.detach(self.model)
        self.lora.load_adapter(self.model, folder / "adapter")
        return [p for _, p in self.lora.trainable(self.model)]

    def free(self):
        """Take the adapter off; every parameter trains."""
        self.lora.detach(self.model)
        self.model.requires_grad_(True)
        return [p for _, p in self.lora.trainable(self.model)]

    def loss(self, ids):
        """The mean -log p of the second half of each row."""
        half = ids.shape[1] // 2
        mask = [0] * half + [1] * (ids.shape[1] - half)
        return self.model.reply_nll([(row, mask) for row in ids.tolist()])[0].mean()

    def checkpointing(self):
        """Recompute blocks in the backward pass from now on."""
        self.model.checkpointing = True

class Theirs:
    """The side of transformers and PEFT."""
    def __init__(self, name, folder, device, side):
        import peft
        import transformers
        self.peft, self.start = peft, resident("VmRSS")
        auto, how = transformers.AutoModelForCausalLM, dict(attn_implementation=HOW[side])
        if name in PUBLISHED:
            config = transformers.AutoConfig.from_pretrained(folder)
            with torch.device(device):
                self.model = auto.from_config(config, dtype=torch.bfloat16, **how)
            fill(self.model)
        else:
            self.model = auto.from_pretrained(weights(name, folder), dtype=torch.float32, **how).to(device)
        self.model.eval()
        self.model.generation_config.eos_token_id = None

    def logits(self, ids):
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def replies(self, asks, stop):
        how = dict(eos_token_id=sorted(stop)) if stop else {}
        ids = self.model.generate(input_ids=asks, attention_mask=torch.ones_like(asks), do_sample=False,
                                  pad_token_id=0, max_new_tokens=NEW, **how)
        rows = [row[asks.shape[1]:] for row in ids.tolist()]
        ends = [next((n for n, token in enumerate(row, 1) if token in stop), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends)]

    def adapt(self, folder):
        self.model = self.peft.PeftModel.from_pretrained(self.model, folder / "adapter", is_trainable=True)
        self.model.train()
        return [p for p in self.model.parameters() if p.requires_grad]

    def free(self):
        if isinstance(self.model, self.peft.PeftModel):
            self.model = self.model.unload()
        self.model.train().requires_grad_(True)
        return list(self.model.parameters())

    def loss(self, ids):
        labels = ids.clone()
        labels[:, :ids.shape[1] // 2] = -100
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels,
                          use_cache=False).loss

    def checkpointing(self):
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))

def weights(name, folder):
    """Where the weights of a shape are."""
    raw = SHAPES[name][1]
    return raw if isinstance(raw, Path) else folder

def resident(what):
    """VmRSS or VmHWM, its peak, of this process in bytes; getrusage's would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))

# ---- a side's process ----
class Worker:
    """Does what it is asked, one job a line, and answers with a line of JSON."""
    def __init__(self, name, side, folder, device):
        self.folder, self.side, self.device = folder, side, device
        inputs = load_file(folder / "inputs.safetensors")
        self.ids, self.asks = inputs["ids"].to(device), inputs["asks"].to(device)
        self.stop = frozenset(inputs["stop"].tolist())
        self.it = (Ours if side == "ours" else Theirs)(name, folder, device, side)
        self.kind, self.done = None, 0

    def serve(self):
        """Answer the lines of stdin. What a library prints must not mix with the answers."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        for line in sys.stdin:
            ask = json.loads(line)
            print(json.dumps(getattr(self, ask.pop("job"))(**ask)), file=answers, flush=True)

    def repeat(self, times, do):
        """(seconds, results) of do(), `times` times."""
        wait = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        seconds, out = [], []
        for _ in range(times):
            wait()
            began = time.perf_counter()
            out.append(do())
            wait()
            seconds.append(time.perf_counter() - began)
        return seconds, out

    @torch.no_grad()
    def forward(self, times):
        seconds, out = self.repeat(times, lambda: self.it.logits(self.ids[0])[:, ::16])
        save_file(dict(logits=out[0].float().contiguous()), self.folder / f"logits-{self.side}.safetensors")
        return dict(seconds=seconds)

    def generate(self, times, stop=True):
        seconds, out = self.repeat(times, lambda: self.it.replies(self.asks, self.stop if stop else ()))
        return dict(seconds=seconds, tokens=out[0])

    def fixed(self, times):
        return self.generate(times, stop=False)

    def step(self, times, kind="adapt"):
        if self.kind != kind:
            self.params = self.it.adapt(self.folder) if kind == "adapt" else self.it.free()
            self.opt = torch.optim.AdamW(self.params, lr=1e-3, weight_decay=0.0)
            self.kind, self.done = kind, 0
        seconds, losses = self.repeat(times, self.one_step)
        return dict(seconds=seconds, losses=[x.item() for x in losses])

    def full(self, times):
        return self.step(times, "free")

    def one_step(self):
        loss = self.it.loss(self.ids[self.done % len(self.ids)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.opt.zero_grad()
        self.done += 1
        return loss.detach()

    def checkpointing(self):
        return self.it.checkpointing()

    def flops(self):
        """Floating-point operations of the matrix products of a step."""
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            self.one_step()
        return counter.get_total_flops()

    def peak(self, reset=False):
        """[bytes in use at the most, bytes before the model was made]"""
        if not self.device.startswith("cuda"):
            return [resident("VmHWM"), self.it.start]
        most = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return [most, 0]

    def products(self, times):
        a, b = torch.randn(2, 2048, 2048, device=self.device)
        return dict(seconds=self.repeat(times, lambda: torch.mm(a, b))[0])

class Remote:
    """A Worker in a process of its own."""
    def __init__(self, name, side, folder, device):
        self.side, self.noise = side, tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--worker", name, side, str(folder), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.noise, text=True)

    def ask(self, job, **more):
        """The answer; RuntimeError with its last words if the process has died."""
        try:
            self.process.stdin.write(json.dumps(dict(job=job, **more)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.noise.seek(0)
            raise RuntimeError(f"{self.side}, {job}: {self.noise.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

# ---- the race ----
def race(job, remotes, turns, folder):
    """{side: median seconds} of a job in turns; the sides' first results must agree."""
    first = {r.side: r.ask(job, times=1) for r in remotes}
    agree(job, first, folder)
    seconds, times = {r.side: [] for r in remotes}, 1
    for _ in range(turns):
        for r in remotes:
            seconds[r.side] += r.ask(job, times=times)["seconds"]
        times = max(1, round(1 / max(x[-1] for x in seconds.values())))  # as many as fit into a second
        if len(remotes) > 2:  # theirs: the faster one goes on
            slow = max(remotes[1:], key=lambda r: seconds[r.side][-1])
            remotes = [r for r in remotes if r is not slow]
            del seconds[slow.side]
    return {side: statistics.median(x) for side, x in seconds.items()}

def agree(job, answers, folder):
    """SystemExit unless each side says what ours says; prints by how much they differ."""
    ours = answers["ours"]
    for side, theirs in answers.items():
        if side == "ours":
            continue
        if job in ("generate", "fixed"):
            lengths = [len(row) for row in ours["tokens"]]
            good = ours["tokens"] == theirs["tokens"]
            what = (f"{sum(lengths)} equal tokens in {len(lengths)} replies, lengths {min(lengths)} to "
                    f"{max(lengths)}, mean {statistics.mean(lengths):.1f}")
        else:
            if job == "forward":
                a, b = (load_file(folder / f"logits-{s}.safetensors")["logits"] for s in ("ours", side))
            else:
                a, b = torch.tensor(ours["losses"][0]), torch.tensor(theirs["losses"][0])
            gap = (a - b).abs().max().item()
            good, what = gap <= 1e-4, f"{'logits' if job == 'forward' else 'first losses'} differ by {gap:.1e}"
        print(f"  {JOBS[job]}, ours and {side}: {what}", flush=True)
        if not good:
            sys.exit(f"{JOBS[job]}: ours and {side} do not agree")

def memory(name, sides, folder, device):
    """{side: [peak, before the model]} in bytes of three LoRA steps in fresh processes."""
    out = {}
    for side in sides:
        with Remote(name, side, folder, device) as r:
            r.ask("step", times=3)
            out[side] = r.ask("peak")
    return out

def shape_row(name, jobs, turns, device):
    """One row of the table, as cells."""
    title, raw, *_ = SHAPES[name]
    sides = ["ours", "eager", "sdpa"] if name == "270m" else ["ours", "eager"]
    cells = dict.fromkeys([*JOBS, "share", "memory"], "-")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, name)
        print(f"{name}: {title}", flush=True)
        remotes = [Remote(name, side, folder, device) for side in sides]
        try:
            for job in ("forward", "generate", "fixed", "step", "full"):  # the last two change the model
                if job not in jobs or (job == "full" and name == "270m"):
                    continue
                took = race(job, remotes, turns, folder)
                mine, (side, theirs) = took.pop("ours"), *took.items()
                cells[job] = f"{theirs / mine:.2f}"
                print(f"  {JOBS[job]}: ours {mine:.4f} s, theirs ({side}) {theirs:.4f} s", flush=True)
                if job == "step":
                    rate = 2 * 2048 ** 3 / statistics.median(remotes[0].ask("products", times=9)["seconds"])
                    reached = remotes[0].ask("flops") / mine
                    cells["share"] = f"{reached / rate:.0%}"
                    print(f"  {reached / 1e9:.1f} GFLOP/s of {rate / 1e9:.1f}", flush=True)
        finally:
            for r in remotes:
                r.__exit__()
        if "step" in jobs:
            peak = memory(name, sides, folder, device)
            best = min(peak[side][0] for side in sides[1:])
            cells["memory"] = f"{peak['ours'][0] / best:.2f}"
            for side, (most, before) in peak.items():
                print(f"  peak of {side}: {most / 1e6:.0f} MB, {(most - before) / 1e6:.0f} MB above the "
                      "process before its model", flush=True)
    return f"| {title} | " + " | ".join(cells.values()) + " |"

# ---- the published shape, one side at a time ----
def published(name, device):
    """Rows of a second table: tokens/s and GB of each side; what does not run is said."""
    title, _, B, T, prompts = PUBLISHED[name]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, name)
        for side in ("ours", "eager", "flex"):
            began = time.perf_counter()
            try:
                with Remote(name, side, folder, device) as r:
                    rows.append(one_side(r, B * T, prompts * NEW))
            except RuntimeError as e:
                print(f"  {side} does not run: {str(e).strip().splitlines()[-1][:300]}", flush=True)
            print(f"  {side}: {time.perf_counter() - began:.0f} s in all", flush=True)
    losses = [row.pop("loss") for row in rows]
    print(f"{title}, bf16: first losses {', '.join(f'{x:.4f}' for x in losses)}")
    if max(losses) - min(losses) > 2e-2:
        sys.exit("the first losses do not agree")
    return ["| " + " | ".join([title, *row.values()]) + " |" for row in rows]

def one_side(r, tokens, new):
    """Cells of a side: 3 steps to warm up, 8 timed, without and with checkpointing; then the others."""
    row = dict(side=r.side)
    speed = lambda job, n, times: f"{n / statistics.median(r.ask(job, times=times)['seconds']):,.0f}"
    for job, n, times in (("forward", tokens, 8), ("fixed", new, 1)):
        r.ask(job, times=1)
        row[job] = speed(job, n, times)
    for kind in ("plain", "checkpointing"):
        if kind == "checkpointing":
            r.ask("checkpointing")
        r.ask("peak", reset=True)
        losses = r.ask("step", times=3)["losses"]
        row.setdefault("loss", losses[0])
        row[kind] = speed("step", tokens, 8)
        row[kind + " GB"] = f"{r.ask('peak')[0] / 1e9:.1f}"
    return row

def main():
    ap = argparse.ArgumentParser(description="This code against transformers + PEFT.")
    ap.add_argument("--turns", type=int, default=3, help="how often a job is timed, each side in turn")
    ap.add_argument("--shape", nargs="+", choices=[*SHAPES, *PUBLISHED], help="only these")
    ap.add_argument("--only", default="step,full,generate,forward", help="jobs, separated by commas")
    ap.add_argument("--device", default="cpu", help="cpu or cuda")
    ap.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        name, side, folder, device = args.worker
        return Worker(name, side, Path(folder), device).serve()
    import transformers
    began, jobs = time.perf_counter(), args.only.split(",")
    jobs += ["fixed"] if "generate" in jobs else []
    names = args.shape or [*SHAPES, *(["9b"] if args.device.startswith("cuda") else [])]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads, {args.device}", flush=True)
    rows, more = [], []
    for name in names:
        if name == "270m" and not REAL.exists():
            print(f"{SHAPES[name][0]}: left out, SAILS_REAL names no folder with {REAL.name}")
        elif name in SHAPES:
            rows.append(shape_row(name, jobs, args.turns, args.device))
        else:
            more += published(name, args.device)
    heads = ["shape", *JOBS.values(), "share of the matrix-product peak", "peak memory of the LoRA step"]
    if rows:
        print("\n".join(["", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *rows]))
    heads = ["shape", "side", "forward, tokens/s", "generate, tokens/s", "LoRA step, tokens/s", "GB",
             "with checkpointing, tokens/s", "GB"]
    if more:
        print("\n".join(["", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *more]))
    print(f"\n{time.perf_counter() - began:.0f} s in all")

if __name__ == "__main__":
    main()
