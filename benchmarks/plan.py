"""plan.py - what a run will hold in memory, before any weight is loaded, and the micro-batch that fits.

    python train.py --model M --dry-run      prints the plan's table; every run prints two lines of it

Activations are counted, see count.py; weights, what is trained, SAEs and the reference come on top. Phases
follow each other: the largest is the peak, not their sum. benchmarks/plan_table.py holds all this against
measured peaks.     Letters: D d_model, L layers, N SAE width, V vocabulary.
"""
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import eval as evaluation
import lora
import sails
from benchmarks.count import Shape, bare, generation, resident, room, scoring, step, walked
from data import need, say

MOST_ON_A_CPU = 4  # 8 or 16 are hardly faster a row there and need more memory: results/plan_table.md
HEAP = 1.4  # heap per byte of saved activations: glibc left up to .9 of holes, see results/plan_table.md
SPARE = .9  # share of the free memory that `auto` fills: the allocators of GPUs leave holes too

def micro(text):
    """An argument's type: a number of rows, or `auto`."""
    return text if text == "auto" else data.at_least(1)(text)

# ---- the phases of a run ----
def sizes(s, sets=None):
    """Lengths of the longest texts in tokens; before the data are read, what --max-tokens allows."""
    if sets is None:
        n = s.max_tokens
        return SimpleNamespace(pair=n, reply=n, prompt=n, asked=n, held=n, cloze=0, text=n, described=400 * n)
    replies = lambda rows: [r[k] for r in rows for k in ("chosen_tokens", "rejected_tokens") if r[k]]
    both = lambda rows: [len(ids) for ids, _ in replies(rows)]
    asked = [len(data.render_chat(sets.tok, p["turns"], None, s.template)[0]) for p in sets.prompts]
    pairs, texts = both(sets.train), list(map(len, sets.neutral))
    return SimpleNamespace(
        pair=max(pairs), reply=max(sum(mask) for _, mask in replies(sets.train)),
        prompt=max(len(r["prompt_ids"]) for r in sets.train), asked=max(asked, default=0),
        held=max(both(sets.validate + sets.test)), cloze=max((len(x[0]) for x in sets.cloze), default=0),
        text=max(texts, default=0), described=sum(pairs[:400]) + sum(min(t, 128) for t in texts[:128]))

def shape(s, method, config):
    """What count.py is to build."""
    trains = {"full": "all", "base": "nothing"}.get(method, "adapters")
    raw = json.dumps(config.raw | dict(query_pre_attn_scalar=config.query_scalar))  # as corrected
    return Shape(raw, s.dtype, trains, tuple(s.targets), s.r, s.checkpointing)

def phases(s, method, config, size, world=1):
    """{phase: {part: bytes}} of a process with one method: what is held at once at a phase's peak.
    s.micro, s.replies and s.checkpointing are settled; each of `world` ranks holds a share of the base."""
    D, V, L, cpu = config.d_model, config.vocab_size, config.n_layers, s.device == "cpu"
    form = shape(s, method, config)
    only = form._replace(checkpointing=False)  # which what has no gradients does not know
    whole, peaks = bare(form), lambda walk, *x: walked(walk, form if walk is step else only, *x)
    base = sum(p.nbytes for p in whole.parameters() if method == "full" or not p.requires_grad)
    trained = sum(p.numel() for _, p in lora.trainable(whole)) * (12 / world if method == "full" else 16)
    always = {"process": resident() if cpu else 0, "weights": base / world}
    if world > 1:  # what FSDP2 has gathered: the embedding and two blocks, for `full` gradients too
        block = (base - V * D * whole.dtype.itemsize) / L
        always["gathered"] = (base - (L - 2) * block) * (2 if method == "full" else 1)
    if method == "full" and (s.objective != "sft" or s.replay > 0):
        always["reference"] = base / world
    out, N = {}, 0
    if method in sails.READS_SAE:
        N = s.fit_width if s.sae == "fit" else width(s.width)
        out["saving"] = {"SAEs": len(s.layers) * 2 * N * D * 4, "work": N * D * 4}
    if s.sae == "fit" and (N or method == "base"):
        work = (8 * s.fit_width * D + 5 * 1024 * s.fit_width) * 4  # weights, gradients, moments; a batch
        out["SAE fitting"] = dict(residuals=s.fit_tokens * (len(s.layers) if cpu else 1) * D * 4, work=work)
    if method in sails.READS_DATA:
        taps = len(s.layers) * s.micro * size.pair * D * whole.dtype.itemsize
        means = len(s.layers) * D * D * 8 + 4 * (size.described * D * len(s.layers) + 3 * V * s.k)
        work = max(peaks(scoring, s.micro, size.pair, 1)) + taps + 12 * max(size.pair, 1024) * N
        out["features"] = dict(SAEs=len(s.layers) * 2 * N * D * 4, work=work, residuals=means if cpu else 0)
    if method != "base":
        rows, tokens, reply = dict(
            sft=(1, size.pair - 1, size.reply), dpo=(2, size.pair - 1, size.reply),
            rloo=(s.samples, size.prompt + s.max_new, s.max_new))[s.objective]
        tokens = max(tokens, size.text if s.replay > 0 else 0)
        rows *= s.micro
        saved, *most = peaks(step, rows, tokens, rows * reply, s.objective == "rloo", s.replay > 0)
        out["training"] = dict(trained=trained, activations=saved * (HEAP if cpu else 1),
                               work=max(most) - saved)
        if s.objective == "rloo":
            drawn = max(peaks(generation, rows, size.prompt, s.max_new)) + 24 * rows * V  # float64 softmax
            out["drawing"] = dict(trained=trained, work=drawn)
    work = [*peaks(scoring, 16, size.held, 16 * size.reply)]
    if size.asked:
        work += peaks(generation, s.replies, size.asked, s.max_new)
    if size.cloze:
        work += peaks(scoring, 256, size.cloze, 256)
    if s.watch and method != "base":  # replies while all is held but the gradients
        out["watching"] = dict(trained=trained * (2 / 3 if method == "full" else 3 / 4), work=max(work))
    out["evaluation"] = dict(work=max(work))
    return {phase: always | parts for phase, parts in out.items()}

def peak(plan):
    """(phase, bytes) of the largest phase."""
    return max(((phase, sum(parts.values())) for phase, parts in plan.items()), key=lambda x: x[1])

def width(name):
    """16k -> 16,384: widths are powers of two under rounded names."""
    unit = {"k": 1000, "m": 10 ** 6}.get(name[-1:], 1)
    number = re.match(r"\d+", name)
    return 2 ** round(math.log2(int(number[0]) * unit)) if number and int(number[0]) else 0

# ---- the choice ----
def trial(s, methods, config, size, limit, ranks, **changes):
    """Settings with changes, their largest method's phases; replies at a time halved until they fit."""
    s = SimpleNamespace(**vars(s) | changes)
    world = lambda method: ranks if s.shard or method == "full" else 1  # as train.py cuts models up
    s.replies = 8 * s.micro  # as many more as where something trains
    while True:
        plan = max((phases(s, m, config, size, world(m)) for m in methods), key=lambda p: peak(p)[1])
        phase, total = peak(plan)
        if total <= limit or phase not in ("evaluation", "watching") or s.replies == 1:
            return s, plan, total <= limit
        s.replies //= 2

def largest(s, methods, config, size, limit, ranks, share):
    """The trial of the largest micro-batch that fits, with checkpointing only if none does without."""
    top = min(share, MOST_ON_A_CPU) if s.device == "cpu" else share
    for checkpointing in dict.fromkeys((s.checkpointing, True)):
        at = lambda n: trial(s, methods, config, size, limit, ranks, micro=n, checkpointing=checkpointing)
        done = at(top)
        if not done[2]:
            done = at(1)  # tells whether any fits
            smaller = (at(top >> i) for i in range(1, top.bit_length())) if done[2] else ()
            done = next((t for t in smaller if t[2]), done)
        if done[2]:
            return done
    return done

def way_out(s, methods, config, size, *rest):
    """The flags with which a run would fit, or that none does."""
    narrow = {} if "full" in methods else {"--dtype bfloat16": dict(dtype="bfloat16")}
    for tokens in (size.pair, *(n for n in (256, 128, 64) if n < size.pair)):
        short = SimpleNamespace(**{k: min(v, tokens) for k, v in vars(size).items()})
        for flag, change in ({"": {}} | narrow).items():
            t, _, fits = largest(SimpleNamespace(**vars(s) | change), methods, config, short, *rest)
            flags = [f"--micro {t.micro}", "--checkpointing" * (t.checkpointing > s.checkpointing), flag,
                     f"--max-tokens {tokens}" * (tokens < size.pair)]
            if fits:
                return "with " + " ".join(filter(None, flags)) + " it fits"
    return "no flag makes it fit" + "; --shard under torchrun spreads it" * (not s.shard)

def show(s, config, plan):
    """Print a dry run's table: what would be trained, then the phases' parts in GB."""
    whole = bare(shape(s, min(s.method, key=lambda m: m == "full"), config))  # adapters, if there are any
    trained = sum(p.numel() for _, p in lora.trainable(whole))
    base = sum(p.numel() for n, p in whole.named_parameters() if s.method == ["full"] or not p.requires_grad)
    again = ", and again as the reference" * any("reference" in parts for parts in plan.values())
    gigabytes = {phase: {part: size / 1e9 for part, size in dict(total=sum(parts.values()), **parts).items()}
                 for phase, parts in plan.items()}
    say(f"base {base:,} parameters in {s.dtype}{again}; trainable {trained:,} = {trained / base:.2%}",
        *evaluation.markdown("GB in", gigabytes))

def settle(s, runs, config, sets=None):
    """Set micro, replies and checkpointing of s and its runs, or refuse; the plan's phases and the room.
    run.json of a run that has begun holds its choice: another micro-batch would round otherwise."""
    cpu, ranks = s.device == "cpu", data.ranks()[1]
    there = room(s.device, resident() if cpu else 0)
    there /= max(s.jobs, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if cpu else 1)
    there = min(data.gather(there))  # all choose alike
    begun = [path for r in runs if (path := Path(r.out) / "run.json").exists()]
    kinds = dict(micro=range(1, 10 ** 6 + 1), replies=range(1, 10 ** 8), checkpointing=bool)
    old = [data.check(data.read_json(path, settings=dict)["settings"], path, **kinds) for path in begun[:1]]
    reads = lambda m: (m != "base", m in sails.READS_SAE, m in sails.READS_DATA)  # who reads more holds more
    some = {r.method for r in runs}
    ask = {*(some & {"full"}), max(some - {"full"}, key=reads)}, config, sizes(s, sets)
    rest = ranks, -(-s.batch // ranks)
    auto = s.micro == "auto"
    if old and auto:
        s.micro, s.checkpointing = old[0]["micro"], s.checkpointing or old[0]["checkpointing"]
    if s.micro == "auto":
        t, plan, fits = largest(s, *ask, SPARE * there, *rest)
    else:
        t, plan, fits = trial(s, *ask, there, rest[0])
    t.replies = old[0]["replies"] if old else t.replies
    phase, total = peak(plan)
    if s.dry_run:
        show(t, config, plan)
    need(fits, f"{total / 1e9:.1f} GB are needed in {phase}, {there / 1e9:.1f} are free; "
         + ("" if fits else way_out(s, *ask, SPARE * there, *rest)))
    for r in (s, *runs):
        r.micro, r.replies, r.checkpointing = t.micro, t.replies, t.checkpointing
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in plan[phase].items() if size)
    say(f"memory: at most {total / 1e9:.2f} GB, in {phase} ({parts}), of {there / 1e9:.1f} free",
        f"{'chosen: ' * auto}--micro {t.micro}{' --checkpointing' * t.checkpointing}, "
        f"{t.replies} replies at a time")
    if cpu and s.dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        say("bfloat16 trains slowly on this CPU: torch multiplies such matrices fast with AVX-512 alone;",
            "float32 is faster by far, if it fits")
