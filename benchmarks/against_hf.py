"""against_hf.py - this code against transformers + PEFT: seconds of steps, generation, forward; memory.

    pip install -r requirements.txt -r tests/requirements.txt && python benchmarks/against_hf.py

One table: theirs / ours in seconds, ours / theirs in memory. Both sides read the same weights, adapter and
batches from disk, and each is a process that stays alive: it does a few repetitions when it is asked, in
turns with the other, so that a disturbance meets both; medians. LoRA steps come first, so memory, the peak
resident size (on a GPU: allocated there), is that of a process that did nothing else. The first losses, the
logits and the generated tokens of both sides must agree, or the run ends. Theirs: eager attention, since no
other kind trains with Gemma 2's soft cap on a CPU; for Gemma 3 also sdpa, and each cell takes the faster one
(memory: the smaller). Real Gemma 3 270M is read from SAILS_REAL/gemma-3-270m. On a GPU the published shape
of the 9B comes after that, random weights in bf16, one side at a time. Run it on a quiet machine.
Letters: B batch, T tokens, V vocabulary.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file, save_file

import data

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
SHARE, MEMORY = "share of the matrix-product peak", "peak memory of the LoRA step"
KINDS = [job for job in JOBS if job != "fixed"]  # which comes with generate
HOW = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}  # theirs, by the side's name
NEW = 64  # tokens a reply has at most
LONG = 20  # seconds after which a job gets no third turn
LIMIT = 75  # seconds that flex_attention has for the published shape: compiling may take for ever
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
        fill(model, 1.5 * c.d_model ** -.5)
        save_gemma(model, folder)
    # stop tokens, a sixteenth of the vocabulary: replies end early and late, as an evaluation's do
    stop = torch.randperm(c.vocab_size - 3, generator=rng)[:c.vocab_size // 16] + 3
    ids = torch.randint(3, c.vocab_size, (16, B, T), generator=rng)  # 16 batches, then the first again
    asks = torch.randint(3, c.vocab_size, (prompts, T // 2), generator=rng)
    save_file(dict(ids=ids, stop=stop, asks=asks), folder / "inputs.safetensors")

@torch.no_grad()
def fill(model, std=.02):
    """Draw every parameter from a seed of its own name: the same numbers on both sides.
    std is that of the blocks' matrices: with .02 a small model says one word for ever and no reply ends."""
    for name, p in model.named_parameters():
        seed = zlib.crc32(name.removeprefix("model.").encode())
        rng = torch.Generator(p.device).manual_seed(seed)
        p.normal_(std=std if p.dim() == 2 and "embed" not in name else .02, generator=rng)

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

    def replies(self, asks, stop, new):
        """Greedy continuations of asks (B, T): lists of at most `new` ids, a stop token included."""
        return self.gemma.generate(self.model, asks.tolist(), new, stop)

    def adapt(self, folder):
        """Put an adapter on, from which the other side starts too; the parameters that train."""
        self.lora.attach(self.model, **RANK)
        self.lora.init_lora(self.model)
        self.lora.save_adapter(self.model, folder / "adapter")
        return [p for _, p in self.lora.trainable(self.model)]

    def bare(self, _):
        """Take the adapter off: the base as it was."""
        self.lora.detach(self.model)

    def free(self, _):
        """Every parameter trains, without an adapter."""
        self.bare(_)
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
        self.model.generation_config.eos_token_id = None

    def logits(self, ids):
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def replies(self, asks, stop, new):
        how = dict(eos_token_id=sorted(stop)) if stop else {}
        ids = self.model.generate(input_ids=asks, attention_mask=torch.ones_like(asks), do_sample=False,
                                  pad_token_id=0, max_new_tokens=new, **how)
        rows = [row[asks.shape[1]:] for row in ids.tolist()]
        ends = [next((n for n, token in enumerate(row, 1) if token in stop), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends)]

    def adapt(self, folder):
        self.model = self.peft.PeftModel.from_pretrained(self.model, folder / "adapter", is_trainable=True)
        self.model.train()
        return [p for p in self.model.parameters() if p.requires_grad]

    def bare(self, _):
        if isinstance(self.model, self.peft.PeftModel):
            self.model = self.model.unload()
        self.model.eval()

    def free(self, _):
        self.bare(_)
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

def repeat(times, device, do):
    """(seconds, first result) of do(), `times` times."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds, first = [], None
    for _ in range(times):
        wait()
        began = time.perf_counter()
        out = do()
        wait()
        seconds.append(time.perf_counter() - began)
        first = out if first is None else first
    return seconds, first

# ---- a side's process ----
class Worker:
    """Does what it is asked, one job a line, and answers with a line of JSON."""
    def __init__(self, name, side, folder, device):
        self.folder, self.side, self.device = folder, side, device
        inputs = load_file(folder / "inputs.safetensors")
        self.ids, self.asks = inputs["ids"].to(device), inputs["asks"].to(device)
        self.stop = frozenset(inputs["stop"].tolist())
        self.it = (Ours if side == "ours" else Theirs)(name, folder, device, side)
        self.state, self.done = "", 0

    def serve(self):
        """Answer the lines of stdin. What a library prints must not mix with the answers."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        for line in sys.stdin:
            ask = json.loads(line)
            try:
                answer = getattr(self, ask.pop("job"))(**ask)
            except torch.OutOfMemoryError:
                answer = "out of memory"
                torch.cuda.empty_cache()
            print(json.dumps(answer), file=answers, flush=True)

    def become(self, state):
        """The model `bare`, with a fresh adapter (`adapt`), or trained as a whole (`free`)."""
        if state != self.state:
            self.params, self.state, self.done = getattr(self.it, state)(self.folder), state, 0
            how = dict(lr=1e-3, weight_decay=0.0, fused=True)
            self.opt = torch.optim.AdamW(self.params, **how) if self.params else None

    @torch.no_grad()
    def forward(self, times):
        self.become("bare")
        seconds, out = repeat(times, self.device, lambda: self.it.logits(self.ids[0]))
        some = out[:, ::16].float().contiguous()
        save_file(dict(logits=some), self.folder / f"logits-{self.side}.safetensors")
        return dict(seconds=seconds)

    def generate(self, times, stop=True, new=NEW):
        self.become("bare")
        stop = self.stop if stop else ()
        seconds, out = repeat(times, self.device, lambda: self.it.replies(self.asks, stop, new))
        return dict(seconds=seconds, tokens=out)

    def fixed(self, times, new=NEW):
        return self.generate(times, stop=False, new=new)

    def step(self, times, state="adapt"):
        self.become(state)
        seconds, loss = repeat(times, self.device, self.one_step)
        return dict(seconds=seconds, loss=loss.item())

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

class Remote:
    """A Worker in a process of its own."""
    def __init__(self, name, side, folder, device):
        self.side, self.device, self.noise = side, device, tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--worker", name, side, str(folder), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.noise, text=True)

    def ask(self, job, **more):
        """The answer; MemoryError, or RuntimeError with its last words if the process has died."""
        try:
            self.process.stdin.write(json.dumps(dict(job=job, **more)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.noise.seek(0)
            raise RuntimeError(f"{self.side}, {job}: {self.noise.read()[-3000:] or 'killed'}")
        answer = json.loads(line)
        if answer == "out of memory":
            raise MemoryError(f"{self.side}, {job}: out of memory")
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

# ---- the race ----
def race(job, remotes, turns, folder):
    """{side: median seconds} of a job in turns; the sides' first results must agree.
    With LoRA steps comes "products", seconds of a product of matrices in between."""
    talks = job in ("generate", "fixed")
    warm = {r.side: r.ask(job, times=1, **(dict(new=2) if talks else {})) for r in remotes}
    seconds, beside, times, began = {r.side: [] for r in remotes}, {}, 1, time.perf_counter()
    for turn in range(turns):
        answers = {r.side: r.ask(job, times=times) for r in remotes}
        if turn == 0:
            agree(job, dict(answers if talks else warm), folder)
        for side, answer in answers.items():
            seconds[side] += answer["seconds"]
        if job == "step":
            beside.setdefault("products", []).extend(products(5, remotes[0].device))
        if len(remotes) > 2:  # of theirs the faster one goes on
            slow = max(remotes[1:], key=lambda r: seconds[r.side])
            remotes = [r for r in remotes if r is not slow]
            del seconds[slow.side]
        times = max(1, round(1 / max(x[-1] for x in seconds.values())))  # as many as fit into a second
        if turn > 0 and time.perf_counter() - began > LONG:
            break
    return {name: statistics.median(x) for name, x in (seconds | beside).items()}

def products(times, device):
    """Seconds of fp32 products of 2048 x 2048 matrices: the most that a machine can do."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return repeat(times, device, lambda: torch.mm(a, b))[0]

def agree(job, answers, folder):
    """SystemExit unless what ours says is what one of theirs says; prints by how much they differ.
    Of the two kinds of attention for Gemma 3 one may round otherwise than ours and end in another word."""
    ours, agreed = answers.pop("ours"), []
    for side, theirs in answers.items():
        if job in ("generate", "fixed"):
            lengths = [len(row) for row in ours["tokens"]]
            same = sum(a == b for a, b in zip(ours["tokens"], theirs["tokens"]))
            good = same == len(lengths)
            what = (f"{same} of {len(lengths)} replies equal, {min(lengths)} to {max(lengths)} tokens, mean "
                    f"{statistics.mean(lengths):.1f}")
        elif job == "forward":
            a, b = (load_file(folder / f"logits-{s}.safetensors")["logits"] for s in ("ours", side))
            gap, size = (a - b).abs().max().item(), b.abs().max().item()
            good, what = gap <= 1e-4 * max(1, size), f"logits up to {size:.1f} differ by {gap:.1e}"
        else:
            gap = abs(ours["loss"] - theirs["loss"])
            good, what = gap <= 1e-4, f"first losses {ours['loss']:.5f} differ by {gap:.1e}"
        print(f"  {JOBS[job]}, ours and {side}: {what}", flush=True)
        agreed.append(good)
    if not any(agreed):
        sys.exit(f"{JOBS[job]}: ours and theirs do not agree")

def shape_row(name, jobs, turns, device):
    """One row of the table, {column: cell}."""
    title, cells = SHAPES[name][0], dict(shape=SHAPES[name][0])
    sides = ["ours", "eager", "sdpa"] if name == "270m" else ["ours", "eager"]
    print(f"{name}: {title}", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder)
        prepare(folder, name)
        remotes = [stack.enter_context(Remote(name, side, folder, device)) for side in sides]
        for job in ("step", "forward", "generate", "fixed", "full"):
            if job not in jobs or (job == "full" and name == "270m"):
                continue
            took = race(job, remotes, turns, folder)
            product, mine = took.pop("products", None), took.pop("ours")
            [(side, theirs)] = took.items()
            cells[JOBS[job]] = f"{theirs / mine:.2f}"
            print(f"  {JOBS[job]}: ours {mine:.4f} s, theirs ({side}) {theirs:.4f} s", flush=True)
            if job == "step":
                cells |= peaks(remotes, mine, product)
    return cells

def peaks(remotes, seconds, product):
    """The cells SHARE and MEMORY, just after LoRA steps; seconds: of our step, of a product beside it."""
    memory = {r.side: r.ask("peak") for r in remotes}
    for side, (most, before) in memory.items():
        print(f"  peak of {side}: {most / 1e6:.0f} MB, {(most - before) / 1e6:.0f} MB more than before its "
              "model was made", flush=True)
    theirs = min(most for side, (most, _) in memory.items() if side != "ours")
    rate, reached = 2 * 2048 ** 3 / product, remotes[0].ask("flops") / seconds
    print(f"  ours does {reached / 1e9:.1f} GFLOP/s in products of matrices, torch.mm of 2048 x 2048 "
          f"{rate / 1e9:.1f}", flush=True)
    return {SHARE: f"{reached / rate:.0%}", MEMORY: f"{memory['ours'][0] / theirs:.2f}"}

# ---- the published shape, one side at a time ----
SPEEDS = ("forward, tokens/s", "generate, tokens/s", "LoRA step, tokens/s", "with checkpointing, tokens/s")
SIZES = ("GB", "with checkpointing, GB")
COLUMNS = ("side", *SPEEDS[:3], SIZES[0], SPEEDS[3], SIZES[1])

def published(name, device):
    """A second table's lines: tokens/s and GB of each side; what does not run is said.
    flex_attention knows the soft cap, but trains on a GPU only; sdpa leaves the cap out: another function."""
    title, _, B, T, prompts = PUBLISHED[name]
    print(f"{name}: {title}, bf16", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, name)
        for side in ["ours", "eager", *(["flex"] if device.startswith("cuda") else [])]:
            began = time.perf_counter()
            with Remote(name, side, folder, device) as r:
                end = threading.Timer(LIMIT, r.process.kill)
                if side == "flex":
                    end.start()
                try:
                    rows.append(one_side(r, B * T, prompts * NEW))
                except RuntimeError as e:
                    if side != "flex":
                        raise
                    print(f"  flex_attention does not run: {str(e).strip().splitlines()[-1][:300]}")
                finally:
                    end.cancel()
            print(f"  {side}: {time.perf_counter() - began:.0f} s in all", flush=True)
    losses = [row["loss"] for row in rows if "loss" in row]
    print(f"  first losses: {', '.join(f'{x:.5f}' for x in losses)}", flush=True)
    if max(losses, default=0) - min(losses, default=0) > 2e-2:
        sys.exit("the first losses do not agree")
    return table(f"{title}, bf16, {device}", COLUMNS, [*rows, compared(*rows)])

def compared(ours, *theirs):
    """A row of ours by the best of theirs: the fastest, the smallest."""
    row = dict(side="ours / the best of theirs")
    for key in (*SPEEDS, *SIZES):
        have = [x[key] for x in theirs if key in x]
        if have and key in ours:
            row[key] = f"{ours[key] / (min if key in SIZES else max)(have):.2f}"
    return row

def table(title, columns, rows):
    """Lines of a markdown table of rows {column: cell}."""
    cell = lambda x: x if isinstance(x, str) else f"{x:,.1f}" if x < 100 else f"{x:,.0f}"
    return ["", title, "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|",
            *("| " + " | ".join(cell(row.get(key, "-")) for key in columns) + " |" for row in rows)]

@contextlib.contextmanager
def memory_said():
    """Print that a job is out of memory; the others are still asked for."""
    try:
        yield
    except MemoryError as e:
        print(f"  {e}", flush=True)

def one_side(r, tokens, new):
    """A side's row: 3 steps to warm up, 8 timed, without and with checkpointing; forward and generation."""
    row = dict(side=r.side)
    speed = lambda job, n, times: n / statistics.median(r.ask(job, times=times)["seconds"])
    for job, key, n, times in (("forward", SPEEDS[0], tokens, 8), ("fixed", SPEEDS[1], new, 1)):
        with memory_said():
            r.ask(job, times=1)
            row[key] = speed(job, n, times)
    for rate, size in zip(SPEEDS[2:], SIZES):
        if rate == SPEEDS[3]:
            r.ask("checkpointing")
        r.ask("peak", reset=True)
        with memory_said():
            row.setdefault("loss", r.ask("step", times=3)["loss"])
            row[rate] = speed("step", tokens, 8)
            row[size] = r.ask("peak")[0] / 1e9
    return row

def main():
    ap = argparse.ArgumentParser(description="This code against transformers + PEFT.")
    ap.add_argument("--turns", type=int, default=3, help="how often a job is timed, each side in turn")
    ap.add_argument("--shape", nargs="+", choices=[*SHAPES, *PUBLISHED], help="only these")
    ap.add_argument("--only", default=list(KINDS), type=data.list_of(str, KINDS), help=",".join(KINDS))
    ap.add_argument("--device", default="cpu", type=data.device, help="cpu or cuda")
    ap.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.worker:
        name, side, folder, device = args.worker
        return Worker(name, side, Path(folder), device).serve()
    import transformers
    began = time.perf_counter()
    jobs = [*args.only, *(["fixed"] if "generate" in args.only else [])]
    names = args.shape or [*SHAPES, *(["9b"] if args.device.startswith("cuda") else [])]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} threads, {args.device}", flush=True)
    rows, more = [], []
    for name in names:
        if name == "270m" and not REAL.exists():
            print(f"{SHAPES[name][0]}: left out, SAILS_REAL names no folder with {REAL.name}", flush=True)
        elif name in SHAPES:
            rows.append(shape_row(name, jobs, args.turns, args.device))
        else:
            more += published(name, args.device)
    title = "theirs / ours in seconds, ours / theirs in memory"
    print("\n".join([*(table(title, ["shape", *JOBS.values(), SHARE, MEMORY], rows) if rows else []), *more]))
    print(f"\n{time.perf_counter() - began:.0f} s in all")

if __name__ == "__main__":
    main()
