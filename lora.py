"""lora.py - low-rank adapters by hand: attach, start in a subspace, merge, save, load, measure their drift.

LoRA (arXiv 2106.09685): y = W x + (alpha / r) B A x, W frozen, A (r, in) and B (out, r) trained in fp32.
SAILS starts one factor in the safety subspace V (D, r), the other at 0: the adapted model starts as the base.
    q k v gate up   READ the residual stream (in = D):  A = V^T, B = 0
    o down          WRITE to it (out = D):              B = V,   A = 0
Files are PEFT's: PEFT loads them as they are.   Letters: D d_model, r rank, r_s columns of a basis.
Run it (`python lora.py RUN`) to see what an adapter holds; --merge OUT merges it.
"""
import contextlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.autograd.function import once_differentiable

import data
import model_gemma
from data import UserError, need

PLACES = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
              gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
WRITERS = ("o", "down")

class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter A (r, in), B (out, r), in fp32 for any dtype.
    kept: the layer's weight while the adapter is merged into it. start: the subspace V as set in."""
    def __init__(self, linear, place, layer, r, alpha):
        super().__init__()
        self.linear, self.place, self.layer, self.r, self.scale = linear, place, layer, r, alpha / r
        self.side = "write" if place in WRITERS else "read"
        self.A = nn.Parameter(torch.zeros(r, linear.in_features, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))
        self.on, self.kept, self.start = True, None, None

    def forward(self, x):
        if not self.on or self.kept is not None:
            return self.linear(x)
        return model_gemma.by_hand(_Adapted, x, self.linear.weight, self.A, self.B, self.scale)

    def update(self):
        """The weight change dW (out, in), fp32."""
        return self.scale * self.B @ self.A

class _Adapted(torch.autograd.Function):
    """x W^T + scale x A^T B^T and its gradient by hand, W frozen.
    x is kept in the base's dtype, one tensor for q, k and v; autograd would keep an fp32 copy for each."""
    @staticmethod
    def forward(ctx, x, W, A, B, scale):
        ctx.scale, ctx.shape, x = scale, x.shape, x.flatten(0, -2)  # (rows, in)
        y, low = F.linear(x, W), F.linear(x.float(), A) * scale  # (rows, out), (rows, r)
        ctx.save_for_backward(x, W, A, B, low)
        wide = y.float().addmm_(low, B.T)  # in place: fewer passes
        return wide.to(y.dtype).view(*ctx.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, W, A, B, low = ctx.saved_tensors
        g = g.flatten(0, -2)
        wide = g.float()
        d, grad_x = (wide @ B) * ctx.scale, None  # (rows, r)
        if ctx.needs_input_grad[0]:
            grad_x = (d @ A).to(x.dtype).addmm_(g, W).view(ctx.shape)
        return grad_x, None, d.T @ x.float(), wide.T @ low, None

def adapters(model):
    """[(name, LoRALinear)] in the model's order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]

def trainable(model):
    """[(name, parameter)] of all that gets a gradient."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

# ---- attach and start ----
def attach(model, targets=("q", "k", "v", "o"), r=16, alpha=32, layers=None):
    """Put a zero adapter beside each target of `layers` (default all); freeze all else."""
    n = model.config.n_layers
    layers = range(n) if layers is None else layers
    known, inside = targets and set(targets) <= set(PLACES), all(0 <= i < n for i in layers)
    need(known, f"targets {','.join(targets)}: choose from {', '.join(PLACES)}")
    need(1 <= r <= model.config.d_model and inside, f"rank {r}, layers {list(layers)}: the model has layers "
         f"0..{n - 1} and {model.config.d_model} dimensions")
    model.requires_grad_(False)
    for i in layers:
        for place in targets:
            path, leaf = PLACES[place].split(".")
            parent = model.layers[i].get_submodule(path)
            setattr(parent, leaf, LoRALinear(getattr(parent, leaf), place, i, r, alpha))

def detach(model):
    """Take the adapters off; a linear layer stays as it is now, merged or untouched."""
    for name, m in adapters(model):
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, m.linear)

@torch.no_grad()
def init_lora(model, seed=0):
    """LoRA's own start: B = 0, A uniform in +-1/sqrt(in), as in microsoft/LoRA and PEFT."""
    rng = torch.Generator().manual_seed(seed)
    for _, m in adapters(model):
        bound = m.A.shape[1] ** -0.5
        m.A.copy_(torch.empty(m.A.shape).uniform_(-bound, bound, generator=rng))
        m.B.zero_()

@torch.no_grad()
def init_sails(model, bases, seed=0, freeze=False, norm_aware=False, sides=("read", "write")):
    """Start every adapter in a subspace: readers A = V^T, B = 0; writers B = V, A = 0.
    bases       {SAE layer: V (D, r_s), orthonormal, best direction first}; a layer takes the nearest
    freeze      the factor that holds V does not train: the update stays in the subspace
    norm_aware  readers get v / (1 + w_in), writers v / (1 + w_post), but 0 where that blows up: v is what is
                read after the block's norm (written before it), up to one scalar a matrix
    sides       where V is used; other adapters start as plain LoRA
    Returns {layer: {"basis": SAE layer, "kept": columns of V in use, "filled": random ones}}."""
    init_lora(model, seed)
    rng, report = torch.Generator().manual_seed(seed + 1), {}
    fitted = {i: fit_to_rank(V.float().cpu(), adapters(model)[0][1].r, rng) for i, V in sorted(bases.items())}
    for _, m in adapters(model):
        near = nearest(fitted, m.layer)
        V, columns = fitted[near].to(m.A.device), bases[near].shape[1]  # (D, r)
        report[m.layer] = dict(basis=near, kept=min(columns, m.r), filled=max(0, m.r - columns))
        if m.side not in sides:
            continue
        if norm_aware:
            gain = 1 + getattr(model.layers[m.layer], model_gemma.NORMS[m.place]).weight.float()  # (D,)
            # where the norm all but shuts (1 to 3 % of Gemma 3 270M) 1 / gain would be all of V
            V = torch.where(gain.abs()[:, None] > .05 * gain.abs().median(), V / gain[:, None], 0.)
            V = V * (m.r ** .5 / V.norm())  # V's size keeps step sizes comparable
        m.start = V.clone()
        holds, other = (m.A, m.B) if m.side == "read" else (m.B, m.A)
        holds.copy_(V.T if m.side == "read" else V)
        holds.requires_grad_(not freeze)
        other.zero_()
    return report

def nearest(by_layer, layer):
    """The key nearest to a layer, the lower of a tie."""
    return min(by_layer, key=lambda i: (abs(i - layer), i))

def fit_to_rank(V, r, rng):
    """V (D, r_s) -> (D, r): its first r columns, or V and a random orthonormal complement."""
    D, have = V.shape
    if have >= r:
        return V[:, :r]
    fill = torch.randn(D, r - have, generator=rng, dtype=torch.float64)
    for _ in range(2):  # projected out twice: once leaves 1e-8 of V in it
        fill = torch.linalg.qr(fill - V.double() @ (V.double().T @ fill))[0]
    return torch.cat([V, fill.float()], 1)

# ---- off, merged, drifted ----
@contextlib.contextmanager
def adapter_off(model):
    """Lend the model as its base: the reference of DPO and of KL terms, without a second copy."""
    mods = [m for _, m in adapters(model)]
    assert all(m.kept is None for m in mods), "merged: the base is not there; call unmerge() first"
    try:
        for m in mods:
            m.on = False
        yield model
    finally:
        for m in mods:
            m.on = True

@torch.no_grad()
def merge(model):
    """Add each adapter to its weight. A copy is kept: subtracting would change 5 % of bf16."""
    for _, m in adapters(model):
        if m.kept is None:
            m.kept = m.linear.weight.detach().clone()
            m.linear.weight.copy_((m.kept.float() + m.update()).to(m.kept.dtype))

@torch.no_grad()
def unmerge(model):
    """Put the kept weights back, bit for bit."""
    for _, m in adapters(model):
        if m.kept is not None:
            m.linear.weight.copy_(m.kept)
            m.kept = None

@torch.no_grad()
def drift(model, bases=None):
    """How far each adapter is from a subspace: dicts name, side, overlap, energy.
    bases    {SAE layer: V (D, k)} to compare with (the nearest); None: the subspace each adapter started in
    overlap  ||P_V P_now||_F^2 / rank, P_now the span of the factor that faces the residual stream; 1: unmoved
    energy   share of ||dW||_F^2 that reads from, or writes to, span(V); chance is k / D; None while dW = 0"""
    rows = []
    for name, m in adapters(model):
        V = m.start if bases is None else bases[nearest(bases, m.layer)]
        if V is None:
            continue
        Q = torch.linalg.qr(V.to(m.A.device).double())[0]  # (D, k)
        A, B = (m.A.double(), m.B.double()) if m.side == "read" else (m.B.T.double(), m.A.T.double())
        total = ((B.T @ B) * (A @ A.T)).sum()  # ||B A||_F^2 without making B A, which is (out, in)
        inside = ((B.T @ B) * (A @ Q @ Q.T @ A.T)).sum()
        share = (Q.T @ torch.linalg.qr(A.T)[0]).square().sum() / min(Q.shape[1], m.r)
        rows.append(dict(name=name, side=m.side, overlap=float(share) if bool(A.any()) else None,
                         energy=float(inside / total) if total > 0 else None))
    return rows

def mean_drift(rows):
    """{"read": {"overlap", "energy"}, "write": ...}: means of drift()'s rows, None left out."""
    values = lambda side, key: [r[key] for r in rows if r["side"] == side and r[key] is not None]
    mean = lambda x: sum(x) / len(x) if x else None
    sides = dict.fromkeys(r["side"] for r in rows)
    return {side: {key: mean(values(side, key)) for key in ("overlap", "energy")} for side in sides}

# ---- files, in PEFT's form ----
def save_adapter(model, folder, base="", provenance=None):
    """Write adapter_model.safetensors (fp32), adapter_config.json and, if given, sails.json."""
    folder, mods = Path(folder), adapters(model)
    one, layers = mods[0][1], sorted({m.layer for _, m in mods})
    name, revision = (str(base), None) if Path(base).exists() else (*str(base).split("@"), None)[:2]
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=name, revision=revision, r=one.r,
        lora_alpha=one.scale * one.r, target_modules=sorted({PLACES[m.place].split(".")[1] for _, m in mods}),
        lora_dropout=0.0, bias="none", use_rslora=False, use_dora=False, fan_in_fan_out=False,
        modules_to_save=None, layers_to_transform=None if len(layers) == model.config.n_layers else layers,
        # true: any other value makes loaders change the base weights again
        inference_mode=True, init_lora_weights=True)
    model_gemma.save_tensors(folder / "adapter_model.safetensors", _tensors(model))
    data.write_json(folder / "adapter_config.json", config)
    if provenance is not None:
        data.write_json(folder / "sails.json", provenance | dict(drifts=drift(model)))

def _tensors(model):
    name = "base_model.model.model.{}.lora_{}.weight"
    return {name.format(n, x): getattr(m, x) for n, m in adapters(model) for x in "AB"}

def read_adapter(folder):
    """(adapter_config.json, tensors by name) of a plain LoRA in PEFT's form."""
    path, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    need(path.is_file(), f"{folder}: no adapter_config.json in it; give the folder of a finished run")
    # other starts (pissa, olora, ...) change the base weights, which are not here
    starts, switch = (True, False, "gaussian", "orthogonal", "eva", None), (bool, None)
    c = data.read_json(path, peft_type="LORA", r=range(1, 2**20), lora_alpha=data.POSITIVE, use_rslora=switch,
                       bias=("none", None), init_lora_weights=starts, base_model_name_or_path=(str, None),
                       target_modules=(list, str, None), revision=(str, None))
    extras = ("rank_pattern alpha_pattern modules_to_save use_dora use_qalora fan_in_fan_out lora_bias "
              "alora_invocation_tokens layer_replication trainable_token_indices target_parameters "
              "arrow_config")
    special = [k for k in extras.split() if c.get(k)]
    need(not special, f"{folder}: not a plain LoRA adapter ({', '.join(special)})")
    shapes, swap = model_gemma.tensor_shapes(weights), str.maketrans("AB", "BA")
    known = shapes and all(map(TENSOR.fullmatch, shapes))
    need(known, f"{weights}: its tensors are not those of a LoRA on this model")
    wrong = [n for n, s in shapes.items() if len(s) != 2 or s[".lora_B.w" in n] != c["r"]]
    need(not wrong, f"{weights}: {wrong[:1]} is not of rank {c['r']}, which adapter_config.json says")
    lacks = {n[:-8] + n[-8:].translate(swap) for n in shapes} - shapes.keys()  # ..._A.weight, ..._B.weight
    need(not lacks, f"{weights}: lacks {sorted(lacks)[:1]}")
    return c, dict(model_gemma.read_tensors(weights))

TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.\w+\.(\w+)_proj\.lora_[AB]\.weight")

def load_adapter(model, folder):
    """Attach an adapter in PEFT's form; UserError for what PEFT would ignore or half use."""
    (c, tensors), path = read_adapter(folder), Path(folder) / "adapter_model.safetensors"
    found = [TENSOR.fullmatch(n) for n in tensors]
    alpha = c["lora_alpha"] * (c["r"] ** 0.5 if c.get("use_rslora") else 1)
    with data.expecting(path, UserError):
        attach(model, sorted({f[2] for f in found}), c["r"], alpha, sorted({int(f[1]) for f in found}))
    want = _tensors(model)
    try:
        model_gemma.check_shapes(path, {n: t.shape for n, t in tensors.items()},
                                 {n: p.shape for n, p in want.items()}, "made for another model?")
    except UserError:
        detach(model)
        raise
    for name, p in want.items():
        p.data.copy_(tensors[name])

def save_state(path, params, opt, step):
    """Write a checkpoint: trained tensors [(name, parameter)], Adam's moments and the step.
    They are whole, whatever ranks hold: it loads on another number of them."""
    tensors = {"p." + name: p for name, p in params}
    for key, moment in (("m.", "exp_avg"), ("v.", "exp_avg_sq")):
        tensors |= {key + name: opt.state[p][moment] for name, p in params}
    model_gemma.save_tensors(path, tensors, step=str(step))

@torch.no_grad()
def load_state(path, params, opt):
    """Put a checkpoint into parameters and optimizer; the next step, 0 without a checkpoint."""
    if not path.exists():
        return 0
    want = {x + name: p.shape for x in ("p.", "m.", "v.") for name, p in params}
    model_gemma.check_shapes(path, model_gemma.tensor_shapes(path), want, "another run's checkpoint?")
    with safe_open(path, "pt") as f:
        step = (f.metadata() or {}).get("step", "")
    need(step.isdecimal() and len(step) < 10, f"{path}: has no step, so is not a checkpoint")
    named, moments = dict(params), dict(m="exp_avg", v="exp_avg_sq")
    for key, t in model_gemma.read_tensors(path):
        kind, _, name = key.partition(".")
        need(kind != "v" or bool((t >= 0).all()), f"{path}: {key} is a mean of squares, but below 0")
        p = named[name]
        t = t.to(p.device)
        if hasattr(p, "device_mesh"):  # sharded. Each rank has read the whole: nothing is sent
            from torch.distributed.tensor import distribute_tensor  # a second to import
            t = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
        if kind == "p":
            p.copy_(t)
        else:
            opt.state[p] |= {moments[kind]: t, "step": torch.tensor(float(step), device=p.device)}
    return int(step)

def main():
    from benchmarks import merged
    merged.main()

if __name__ == "__main__":
    data.run_main(main)
