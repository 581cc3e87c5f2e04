"""count.py - bytes that the model's own code holds, counted without computing, and bytes that there are.

A training step, a pass without gradients and the writing of replies are walked on the meta device with two
blocks and with three, while every new storage is noted: a block more adds what the third added (the first is
not like others: nothing asks for its input's gradient). plan.py makes a run's plan of it.
"""
import ctypes
import functools
import json
import os
import re
import weakref
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import model_gemma
from benchmarks import tiny_world

try:
    import resource
except ImportError:  # Windows sets no such limits
    resource = None

# ---- what the code holds ----
class Live(TorchDispatchMode):
    """Counts the bytes of storages made inside it while they live; peaks holds one maximum a stage."""
    def __init__(self):
        super().__init__()
        self.now, self.peaks, self.seen = 0, [0], weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = lambda some: [t for t in tree_leaves(some) if isinstance(t, torch.Tensor)]
        storages = lambda some: [t.untyped_storage() for t in tensors(some)]
        given = storages((args, kwargs))
        for x in storages(out):
            if x not in self.seen and all(x is not g for g in given):  # neither a view nor a parameter
                self.seen.add(x)
                self.now += x.nbytes()
                weakref.finalize(x, self.free, x.nbytes())
        self.peaks[-1] = max(self.peaks[-1], self.now)
        return out

    def free(self, size):
        """A storage's end."""
        self.now -= size

    def stage(self, *_):
        """Begin another stage; fit to be a tensor's hook."""
        self.peaks.append(self.now)

# What decides about a model's bytes. raw: config.json's text; trains: "all", "adapters" or "nothing"
Shape = namedtuple("Shape", "raw dtype trains targets r checkpointing")

def bare(shape, blocks=None):
    """A model on the meta device, with adapters or to be trained as a whole; of its own number of blocks."""
    config = model_gemma.config_from_json(json.loads(shape.raw))
    config.n_layers = blocks or config.n_layers
    config.local *= 3  # three blocks of a model of one
    with torch.device("meta"):
        model = model_gemma.Gemma(config).to(model_gemma.DTYPES[shape.dtype])
        model.requires_grad_(shape.trains == "all").checkpointing = shape.checkpointing
        if shape.trains == "adapters":
            lora.attach(model, shape.targets, shape.r)
    return model

@functools.cache
def walked(walk, shape, *args):
    """walk(model, *args), numbers, of a whole model: a block more adds what the third added."""
    two, three = (walk(bare(shape, blocks), *args) for blocks in (2, 3))
    layers = json.loads(shape.raw)["num_hidden_layers"]
    return [a + (layers - 2) * (b - a) for a, b in zip(two, three, strict=True)]

def step(model, rows, tokens, scored, reference=False, replay=False):
    """Bytes that the blocks save for the backward pass, then the peaks of a micro-batch's stages.
    scored: how many positions have a target. reference: of rloo, asked while the model's own graph waits."""
    for _, p in lora.trainable(model):
        p.grad = torch.zeros_like(p)  # as from the micro-batch before
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    keep = torch.ones_like(ids, dtype=torch.bool)
    with Live() as live:
        embeds = model.embed(ids)
        h = model.hidden(None, keep, embeds=embeds)[0]
        saved = live.now
        live.stage()
        loss = model.nll(h.flatten(0, 1)[:scored], ids.flatten()[:scored]).sum()
        if reference or replay:
            with torch.no_grad():
                base = model.hidden(ids, keep)[0]
        if replay:
            p, q = (model.logits(x.flatten(0, 1)).log_softmax(-1) for x in (base, h))
            loss = loss + (p.exp() * (p - q)).sum()
            del p, q
        h.register_hook(live.stage)
        if embeds.requires_grad:
            embeds.register_hook(live.stage)
        del h, embeds
        loss.backward()
    return saved, *live.peaks

@torch.no_grad()
def scoring(model, rows, tokens, scored):
    """The peaks of a pass without gradients, and of log-probabilities of `scored` positions."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    with Live() as live:
        h = model.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        live.stage()
        model.nll(h.flatten(0, 1)[:scored], ids.flatten()[:scored])
    return live.peaks

@torch.no_grad()
def generation(model, rows, tokens, new):
    """The peaks of reading prompts and of the last token after them, caches included."""
    ids, peaks = torch.zeros(rows, tokens + new, dtype=torch.long, device="meta"), []
    for before, now in ((0, tokens), (tokens + new - 1, 1)):
        cache = model_gemma.KVCache()
        if before:
            model.hidden(ids[:, :before], None, cache)
        with Live() as live:
            live.now = sum(x.nbytes for x in cache.values())
            model.logits(model.hidden(ids[:, :now], None, cache)[0][:, -1])
        peaks += live.peaks
    return peaks

# ---- what there is ----
@functools.cache
def resident():
    """Bytes that this process holds; a toy's training step first, so that all libraries are in memory."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what a tokenizer's reading took
    with torch.random.fork_rng(devices=[]):  # nobody else's draws change
        toy = model_gemma.Gemma(model_gemma.config_from_json(tiny_world.TINY_MODEL | dict(vocab_size=64)))
    toy.reply_nll([([1] * 64, [1] * 64)] * 4)[0].sum().backward()
    torch.optim.AdamW(toy.parameters()).step()
    return found("/proc/self/statm", r"\d+ (\d+)", 0) * os.sysconf("SC_PAGE_SIZE")

def found(path, form, otherwise):
    """The number that a form finds in one of the kernel's files; `otherwise` where there is none."""
    with suppress(OSError, TypeError):
        return int(re.search(form, Path(path).read_text(), re.M)[1])
    return otherwise

def room(device, held=0):
    """Bytes for a process that holds `held` of them: of a GPU, or of RAM within every limit on it."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    page, groups = os.sysconf("SC_PAGE_SIZE"), []
    left = [found("/proc/meminfo", r"MemAvailable: *(\d+)", 0) * 1024 or os.sysconf("SC_PHYS_PAGES") * page]
    with suppress(OSError):
        groups = re.findall("^(?:0:|\\d+:memory):/(.*)", Path("/proc/self/cgroup").read_text(), re.M)
    for own in [Path("/sys/fs/cgroup", *part, name) for name in groups for part in ([], ["memory"])]:
        for folder in (own, *own.parents):  # the groups above it have limits too; files can be dropped
            used = [found(folder / f, r"^(\d+)", 0) for f in ("memory.current", "memory.usage_in_bytes")]
            files = found(folder / "memory.stat", r"^inactive_file (\d+)", 0)
            limits = [found(folder / f, r"^(\d+)", 2 ** 62) for f in ("memory.max", "memory.limit_in_bytes")]
            left.append(min(limits) - max(used) + files)
    if resource and resource.getrlimit(resource.RLIMIT_AS)[0] >= 0:
        left.append(resource.getrlimit(resource.RLIMIT_AS)[0] - found("/proc/self/statm", r"(\d+)", 0) * page)
    return held + max(0, min(left))
