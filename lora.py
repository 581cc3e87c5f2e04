"""lora.py - low-rank adapters by hand: attach, start them in a subspace, merge, save, load, measure their drift.

LoRA (arXiv 2106.09685): y = W x + (alpha / r) B A x, W frozen, A (r, in) and B (out, r) trained in fp32.
SAILS starts one factor in the safety subspace V (D, r) of the residual stream, the other at zero, so the adapted model
IS the base at step 0. Which factor depends on where a projection stands:
    q k v gate up   READ the residual stream (in = D):  A = V^T, B = 0
    o down          WRITE to it (out = D):              B = V,   A = 0
Files are PEFT's, so PEFT and vLLM load them without conversion.
Letters: D d_model, r rank, r_s columns of a basis.   Run it (`python lora.py RUN`) to see what an adapter holds.
"""
import argparse
import contextlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import data
from data import UserError

PLACES = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
              gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
WRITERS = ("o", "down")
# the norm between the residual stream and a projection: it scales what a reader sees, and what a writer's branch adds
NORMS = dict(q="input_layernorm", k="input_layernorm", v="input_layernorm", o="post_attention_layernorm",
             gate="pre_feedforward_layernorm", up="pre_feedforward_layernorm", down="post_feedforward_layernorm")


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter beside it. A (r, in) and B (out, r) are fp32 whatever the base's dtype:
    in bf16 an Adam step of 1e-4 on a weight of 1 is rounded away."""

    def __init__(self, base, place, layer, r, alpha):
        super().__init__()
        dev = base.weight.device
        self.base, self.place, self.layer, self.r, self.scale = base, place, layer, r, alpha / r
        self.A = nn.Parameter(torch.zeros(r, base.in_features, device=dev))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=dev))
        self.on, self.kept, self.start = True, None, None      # kept: the base weight while merged; start: V as set in

    side = property(lambda self: "write" if self.place in WRITERS else "read")

    def forward(self, x):
        y = self.base(x)
        if not self.on or self.kept is not None:
            return y
        return (y + F.linear(F.linear(x.float(), self.A) * self.scale, self.B)).to(y.dtype)

    def delta(self):
        """The weight change (out, in), fp32."""
        return self.scale * self.B @ self.A


def adapters(model):
    """[(name, LoRALinear)] in the model's order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


def trainable(model):
    """[(name, parameter)] of everything that gets a gradient."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------ attaching, starting
def attach(model, targets=("q", "k", "v", "o"), r=16, alpha=32, layers=None):
    """Put an adapter beside each target projection of the chosen layers (default: all). The base is frozen.

    Both factors are zero until one of the init functions is called. UserError for an unknown target or layer, r < 1.
    """
    unknown = set(targets) - set(PLACES)
    if unknown or not targets:
        raise UserError(f"targets {sorted(unknown) or 'empty'}: choose from {', '.join(PLACES)}")
    layers = range(model.config.n_layers) if layers is None else layers
    if r < 1 or any(not 0 <= i < model.config.n_layers for i in layers):
        raise UserError(f"rank {r}, layers {list(layers)}: the model has layers 0..{model.config.n_layers - 1}, rank is >= 1")
    model.requires_grad_(False)
    for i in layers:
        for place in targets:
            path, leaf = PLACES[place].split(".")
            parent = model.layers[i].get_submodule(path)
            setattr(parent, leaf, LoRALinear(getattr(parent, leaf), place, i, r, alpha))


def detach(model):
    """Take the adapters off again, leaving each base layer as it is now: merged if merge() was called, else untouched."""
    for name, m in adapters(model):
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, m.base)


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

    bases       {SAE layer: V (D, r_s), orthonormal, best direction first}; a layer takes the nearest one, the lower of a tie
    freeze      the factor that holds V does not train: the update stays in the subspace for good
    norm_aware  readers get v / (1 + w_in) and writers v / (1 + w_post), so that after (before) the block's norm exactly the
                residual direction v is read (written), up to one scalar for the matrix and but for dimensions that the norm
                all but shuts out; see NORMS
    sides       where V is used; adapters on the other side start as plain LoRA
    Returns {layer: {"basis": SAE layer, "kept": columns of V in use, "filled": random ones}}.
    """
    init_lora(model, seed)
    rng, told = torch.Generator().manual_seed(seed + 1), {}
    fitted = {i: fit_to_rank(V.float().cpu(), adapters(model)[0][1].r, rng) for i, V in sorted(bases.items())}
    for _, m in adapters(model):
        near = min(fitted, key=lambda i: (abs(i - m.layer), i))
        V = fitted[near].to(m.A.device)                                                        # (D, r)
        told[m.layer] = dict(basis=near, kept=min(bases[near].shape[1], m.r), filled=max(0, m.r - bases[near].shape[1]))
        if m.side not in sides:
            continue
        if norm_aware:
            gain = 1 + getattr(model.layers[m.layer], NORMS[m.place]).weight.float()            # (D,)
            # what the norm shuts out can be neither read nor written: real Gemmas have gains of exactly 0, and a few more
            # (1 to 3 % of Gemma 3 270M's) so small that 1 / gain would leave nothing but them in V
            open_to = gain.abs() > 0.05 * gain.abs().median()
            V = torch.where(open_to[:, None], V / gain[:, None], 0.0)
            V = V * (m.r ** 0.5 / V.norm())            # same total size as the raw basis, so that step sizes stay comparable
        m.start = V.clone()
        if m.side == "read":
            m.A.copy_(V.T), m.B.zero_(), m.A.requires_grad_(not freeze)
        else:
            m.B.copy_(V), m.A.zero_(), m.B.requires_grad_(not freeze)
    return told


def fit_to_rank(V, r, rng):
    """V (D, r_s) -> (D, r) orthonormal: the first r columns, or V and a random orthonormal complement from `rng`."""
    D, have = V.shape
    if r > D:
        raise UserError(f"rank {r} is more than the residual stream's {D} dimensions")
    if have >= r:
        return V[:, :r]
    fill = torch.randn(D, r - have, generator=rng, dtype=torch.float64)
    for _ in range(2):                                 # projected out twice: once leaves 1e-8 of V in it
        fill = torch.linalg.qr(fill - V.double() @ (V.double().T @ fill))[0]
    return torch.cat([V, fill.float()], 1)


# ----------------------------------------------------------------------------------------------- off, merged, drifted
@contextlib.contextmanager
def adapter_off(model):
    """Inside, the model is the base: the reference model of DPO and of KL terms, without a second copy."""
    mods = [m for _, m in adapters(model)]
    assert all(m.kept is None for m in mods), "merged: the base is not there; call unmerge() first"
    try:
        for m in mods:
            m.on = False
        yield
    finally:
        for m in mods:
            m.on = True


@torch.no_grad()
def merge(model):
    """Add each adapter into its base weight, keeping a copy: subtracting it again would leave 5 % of bf16 entries changed."""
    for _, m in adapters(model):
        if m.kept is None:
            m.kept = m.base.weight.detach().clone()
            m.base.weight.copy_((m.kept.float() + m.delta()).to(m.kept.dtype))


@torch.no_grad()
def unmerge(model):
    """Put the kept base weights back, bit for bit."""
    for _, m in adapters(model):
        if m.kept is not None:
            m.base.weight.copy_(m.kept)
            m.kept = None


@torch.no_grad()
def drift(model, bases=None):
    """How far adapters went from a subspace: rows of dicts name, side, overlap, energy, in [0, 1] or None.

    bases    {SAE layer: V (D, k)} to compare with (nearest layer's); None: the subspace each adapter started in
    overlap  ||P_V P_now||_F^2 / rank, P_now the span of the factor that faces the residual stream; 1 = has not moved
    energy   share of ||dW||_F^2 that reads from, or writes into, span(V); chance is k / D; None while dW = 0
    """
    rows = []
    for name, m in adapters(model):
        V = m.start if bases is None else bases[min(bases, key=lambda i: (abs(i - m.layer), i))]
        if V is None:
            continue
        Q = torch.linalg.qr(V.to(m.A.device).double())[0]                                       # (D, k)
        A, B = (m.A.double(), m.B.double()) if m.side == "read" else (m.B.T.double(), m.A.T.double())
        total = ((B.T @ B) * (A @ A.T)).sum()          # ||B A||_F^2 without making B A, which is (out, in)
        inside = ((B.T @ B) * (A @ Q @ Q.T @ A.T)).sum()
        now = torch.linalg.qr(A.T)[0] if bool(A.any()) else None
        rows.append(dict(name=name, side=m.side, overlap=None if now is None else float((Q.T @ now).square().sum() / min(Q.shape[1], m.r)),
                         energy=float(inside / total) if total > 0 else None))
    return rows


def mean_drift(rows):
    """{"read": {"overlap", "energy"}, "write": ...}: means of drift()'s rows, leaving out what is None."""
    def mean(xs):
        xs = [x for x in xs if x is not None]
        return sum(xs) / len(xs) if xs else None
    return {side: {k: mean([r[k] for r in rows if r["side"] == side]) for k in ("overlap", "energy")}
            for side in ("read", "write") if any(r["side"] == side for r in rows)}


# ---------------------------------------------------------------------------------------------- files, in PEFT's form
def save_adapter(model, folder, base="", provenance=None):
    """Write adapter_model.safetensors (fp32), adapter_config.json and, with where it came from, sails.json."""
    folder, mods = Path(folder), adapters(model)
    tensors = {}
    for name, m in mods:
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = m.A.detach().contiguous()
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = m.B.detach().contiguous()
    one = mods[0][1]
    layers = sorted({m.layer for _, m in mods})
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=one.r, lora_alpha=one.scale * one.r,
        target_modules=sorted({PLACES[m.place].split(".")[1] for _, m in mods}), lora_dropout=0.0, bias="none",
        use_rslora=False, use_dora=False, fan_in_fan_out=False, modules_to_save=None, inference_mode=True,
        # true although the start was special: any other value makes the loader change the base weights again
        init_lora_weights=True,
        layers_to_transform=None if len(layers) == model.config.n_layers else layers)
    with data.replacing(folder / "adapter_model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    data.write_json(folder / "adapter_config.json", config)
    if provenance is not None:
        data.write_json(folder / "sails.json", provenance)


def read_adapter(folder):
    """(adapter_config.json as a dict, tensors by name) of a plain LoRA in PEFT's form; UserError for anything else."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json in it; give the folder of a finished run")
    c = data.read_json(folder / "adapter_config.json")
    odd = [k for k in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "fan_in_fan_out") if c.get(k)]
    if c.get("peft_type") != "LORA" or odd or c.get("bias", "none") != "none" or not {"r", "lora_alpha"} <= set(c):
        raise UserError(f"{folder}: not a plain LoRA adapter ({', '.join(odd) or c.get('peft_type')})")
    path = folder / "adapter_model.safetensors"
    try:
        return c, load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e})") from None


def load_adapter(model, folder):
    """Attach an adapter in PEFT's form. Strict: what would be ignored or half used is a UserError, for PEFT only warns."""
    path, (c, tensors) = Path(folder) / "adapter_model.safetensors", read_adapter(folder)
    found = [re.fullmatch(r"base_model\.model\.model\.(layers\.(\d+)\.\w+\.(\w+)_proj)\.lora_([AB])\.weight", n) for n in tensors]
    if not tensors or None in found:
        raise UserError(f"{path}: tensor names are not those of a LoRA on this model, for example {next(iter(tensors), 'none')}")
    alpha = c["lora_alpha"] * (c["r"] ** 0.5 if c.get("use_rslora") else 1)
    attach(model, sorted({f[3] for f in found}), c["r"], alpha, sorted({int(f[2]) for f in found}))
    want = {f"base_model.model.model.{n}.lora_{x}.weight": getattr(m, x) for n, m in adapters(model) for x in "AB"}
    for name in sorted(set(want) | set(tensors)):
        if name not in want or name not in tensors or want[name].shape != tensors[name].shape:
            detach(model)
            raise UserError(f"{path}: {name} is missing or has another shape; was the adapter made for another model?")
        want[name].data.copy_(tensors[name])


def main():
    ap = argparse.ArgumentParser(description="Show what an adapter holds.")
    ap.add_argument("run", help="a folder with adapter_model.safetensors and adapter_config.json")
    args = ap.parse_args()
    c, tensors = read_adapter(args.run)
    print(f"rank {c['r']}, alpha {c['lora_alpha']}, on {', '.join(c['target_modules'])} of {c['base_model_name_or_path'] or 'an unnamed base'}; "
          f"{sum(t.numel() for t in tensors.values()):,} parameters")
    for name in sorted((n for n in tensors if ".lora_A." in n), key=lambda n: (int(re.search(r"layers\.(\d+)", n)[1]), n)):
        A, B = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        size = c["lora_alpha"] / c["r"] * float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
        print(f"{name.removeprefix('base_model.model.model.').removesuffix('.lora_A.weight'):32s} |dW| {size:9.4f}   |A| {A.norm():8.4f}   |B| {B.norm():8.4f}")
    if (Path(args.run) / "sails.json").is_file():
        for key, value in data.read_json(Path(args.run) / "sails.json").items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    data.run_main(main)
