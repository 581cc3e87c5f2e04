"""sae.py - JumpReLU sparse autoencoders: read Gemma Scope's, or train one where nobody has published any.

Gemma Scope's SAEs (arXiv 2408.05147) write a residual vector as a sparse, non-negative sum of rows:
    pre = x W_enc + b_enc;   a = pre where pre > threshold, else 0;   x^ = a W_dec + b_dec
Raw residuals in, no input scaling, no b_dec subtracted first, decoder rows of norm 1, all in fp32.
Letters: n tokens, B batch, T tokens of a text, D d_model, N SAE width, k chosen features.
Run it (`python sae.py --model DIR --sae DIR --layer L --prompt TEXT`) to see which features fire on a prompt.
"""
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import model_gemma
from data import UserError, expecting, need

SHAPES = dict(W_enc="DN", W_dec="ND", b_enc="N", b_dec="D", threshold="N")
# Published SAEs by the model's name or, for renamed folders, by its shape: repository, width, layers
FAMILIES = {
    ("gemma-2-2b", "gemma2", 26, 2304): ("google/gemma-scope-2b-pt-res", "16k", [5, 10, 15, 20]),
    ("gemma-2-9b", "gemma2", 42, 3584): ("google/gemma-scope-9b-pt-res", "16k", [10, 15, 20, 25, 30]),
    ("gemma-2-27b", "gemma2", 46, 4608): ("google/gemma-scope-27b-pt-res", "131k", [10, 22, 34]),
    ("gemma-3-270m", "gemma3_text", 18, 640): ("google/gemma-scope-2-270m-pt", "16k", [5, 9, 12, 15]),
    ("gemma-3-1b", "gemma3_text", 26, 1152): ("google/gemma-scope-2-1b-pt", "16k", [7, 13, 17, 22]),
}

class JumpReLUSAE(torch.nn.Module):
    """An SAE as W_enc (D, N), W_dec (N, D), b_enc (N), b_dec (D), threshold (N), all fp32."""
    def __init__(self, W_enc, W_dec, b_enc, b_dec, threshold, name=""):
        super().__init__()
        for key, value in zip(SHAPES, (W_enc, W_dec, b_enc, b_dec, threshold)):
            self.register_buffer(key, value.float())
        self.name = name  # the file it was read from

    def encode(self, x):
        """Residuals x (..., D) -> activations a (..., N), fp32; 0 where a feature does not fire."""
        pre = x.float() @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre.relu(), 0.0)

    def decode(self, a):
        """Feature activations (..., N) -> reconstructed residuals (..., D), fp32."""
        return a @ self.W_dec + self.b_dec

# ---- reading and writing ----
def find_sae(names, layer, width="16k", l0=None):
    """The params file of one layer among a repository's file names; UserError lists what exists.
    Gemma Scope:    layer_20/width_16k/average_l0_71/params.npz; without l0 the one nearest 100, the upper of
                    a tie, as in the sets called canonical
    Gemma Scope 2:  resid_post/layer_9_width_16k_l0_medium/params.safetensors; without l0 `medium`"""
    forms = (r"layer_(\d+)/width_(\w+?)/average_l0_(\d+)/params\.(?:npz|safetensors)",
             r"(?:resid_post/)?layer_(\d+)_width_(\w+?)_l0_(\w+)/params\.(?:npz|safetensors)")
    found = [(int(m[1]), m[2], m[3], m[0]) for n in names for f in forms if (m := re.fullmatch(f, n))]
    need(found, "no SAE in it; wanted files like layer_20/width_16k/average_l0_71/params.npz")
    layers, widths = {f[0] for f in found}, {f[1] for f in found if f[0] == layer}
    need(layer in layers, f"no SAE for layer {layer}; layers here: {sorted(layers)}")
    need(width in widths, f"no SAE of width {width} for layer {layer}; widths here: {sorted(widths)}")
    here = {f[2]: f[3] for f in found if f[:2] == (layer, width)}
    numbers = [k for k in here if k.isdecimal()]
    if l0 is None:
        l0 = min(numbers, key=lambda k: (abs(int(k) - 100), -int(k))) if numbers else "medium"
    need(str(l0) in here, f"no SAE with L0 {l0} for layer {layer}, width {width}; here: {sorted(here)}")
    return here[str(l0)]

def sae_file(spec, layer, width="16k", l0=None):
    """The name of one SAE's file in a folder or hub repository laid out like Gemma Scope."""
    names = data.listing(spec)
    with expecting(spec, UserError):
        return find_sae(names, layer, width, l0)

def published(spec, config):
    """(repository, width, layers) of the SAEs that are published for a model, or None."""
    name, shape = data.model_name(spec), (config.raw["model_type"], config.n_layers, config.d_model)
    named = [FAMILIES[f] for f in FAMILIES if name == f[0] or name.startswith(f[0] + "-")]
    found = named + [FAMILIES[f] for f in FAMILIES if f[1:] == shape]
    return found[0] if found and max(found[0][2]) < config.n_layers else None

def load_sae(spec, layer, width="16k", l0=None, device="cpu"):
    """One JumpReLUSAE; UserError for a broken file or tensors that do not belong together."""
    name = sae_file(spec, layer, width, l0)
    path = data.fetch(spec, [name])[0] / name
    tensors = {{"w_enc": "W_enc", "w_dec": "W_dec"}.get(k, k): v for k, v in _read_tensors(path).items()}
    scale = tensors.pop("scaling_factor", torch.ones(1))  # in a few early files, all ones
    need(bool((scale == 1).all()), f"{path}: has a scaling_factor that is not 1, so is no plain JumpReLU SAE")
    size = dict(zip("DN", tensors["W_enc"].shape if "W_enc" in tensors else ()))
    want = {key: tuple(size.get(x) for x in letters) for key, letters in SHAPES.items()}
    found = {key: t.shape for key, t in tensors.items()}
    model_gemma.check_shapes(path, found, want, f"a JumpReLU SAE has {', '.join(SHAPES)}")
    norms = tensors["W_dec"].float().norm(dim=1)
    need(len(norms), f"{path}: no feature in it")
    need(torch.allclose(norms, torch.ones_like(norms), atol=1e-2), f"{path}: decoder rows have norms "
         f"{norms.min():.3f}..{norms.max():.3f}, wanted 1: an activation would be no length in the stream")
    return JumpReLUSAE(**tensors, name=name).to(device)

def _read_tensors(path):
    if path.suffix == ".npz":
        with expecting(f"{path}: not a whole SAE file; {data.damaged(path)}", Exception):  # of many kinds
            with zipfile.ZipFile(path) as z:
                size, unpacked = path.stat().st_size, sum(part.file_size for part in z.infolist())
            need(unpacked < 10 * size, f"unpacks to {unpacked:,} bytes, so it holds no weights")
            with np.load(path, allow_pickle=False) as f:
                found = {k: torch.from_numpy(f[k]) for k in f.files}
        for name, t in found.items():
            need(t.is_floating_point(), f"{path}: {name} is {t.dtype}, wanted floating point")
            model_gemma.finite(t, f"{path}: {name}")
        return found
    model_gemma.tensor_shapes(path)
    return dict(model_gemma.read_tensors(path))

def check_fit(sae, model, layer):
    """UserError unless the SAE reads this model's residual stream at an existing layer."""
    D, reads, n = model.config.d_model, sae.W_dec.shape[1], model.config.n_layers
    need(reads == D, f"SAE {sae.name} reads vectors of {reads} numbers, but the model's residual stream has "
         f"{D}: made for another model?")
    need(0 <= layer < n, f"no layer {layer}: the model has layers 0..{n - 1}")

def save_sae(sae, folder, layer, l0):
    """Write layer_L/width_W/average_l0_n/params.npz, where load_sae finds it; the name."""
    name = f"layer_{layer}/width_{len(sae.W_dec)}/average_l0_{round(l0)}/params.npz"
    with data.replacing(f"{folder}/{name}") as beside, open(beside, "wb") as f:
        np.savez(f, **{k: model_gemma.finite(getattr(sae, k), name).cpu().numpy() for k in SHAPES})
    for other in Path(folder, name).parents[1].glob("*/params.npz"):
        if other != Path(folder, name):  # load_sae would have to choose
            other.unlink()
    return name

# ---- training ----
@torch.no_grad()
def collect_residuals(model, rows, layers, n_tokens, batch=16):
    """Residuals after `layers` on texts (lists of ids): {layer: (n <= n_tokens, D) fp32, CPU}.
    BOS is left out, as in Gemma Scope's training: its activations are a hundred times larger and thousands of
    features fire there. Each rank fills in its share, all get the whole."""
    parts, n = [], 0
    for at in range(0, len(rows), batch):
        if n < n_tokens:
            parts.append((n, rows[at:at + batch]))
            n += sum(t != data.BOS for r in parts[-1][1] for t in r)
    out = {i: torch.zeros(min(n, n_tokens), model.config.d_model) for i in layers}
    for (at, some), counts in data.share(parts, "residuals"):
        ids, keep = (t.to(model.device) for t in data.pad(some))
        taps = model.residuals(ids, layers, keep)
        counted = keep & (ids != data.BOS)
        for i in layers if counts else ():
            x = taps[i][counted].float().cpu()
            out[i][at:at + len(x)] = x[:len(out[i]) - at]
    data.add_up(*out.values())
    return out

def train_sae(activations, width, active, steps=800, batch=1024, lr=1e-3, seed=0, show=False):
    """An SAE trained on residuals (n, D), in Gemma Scope's form.
    Batch-top-k (arXiv 2412.06410), without a sparsity weight to tune: of a batch's activations the `active` x
    batch largest stay; four times as many at first, annealed over a quarter of the steps, against dying.
    The cut becomes one threshold. Inputs are standardised per dimension (some hold half of all variance)."""
    n, D = activations.shape
    rng = torch.Generator().manual_seed(seed)
    dev, mean = activations.device, activations.mean(0)
    std = activations.std(0).clamp(min=1e-4 * float(activations.std()))
    W_dec = F.normalize(torch.randn(width, D, generator=rng), dim=1).to(dev)
    p = dict(W_enc=W_dec.T.clone(), W_dec=W_dec, b_enc=mean.new_zeros(width), b_dec=mean.new_zeros(D))
    for t in p.values():
        t.requires_grad_(True)
    opt = torch.optim.Adam(p.values(), lr=lr, betas=(0.9, 0.999))
    cut = 0.0
    for step in data.progress(range(steps), desc="sae", disable=None if show else True):
        opt.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.2 * steps))
        x = (activations[torch.randint(n, (batch,), generator=rng)] - mean) / std  # (b, D)
        pre = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()  # (b, N)
        stay = active * (1 + 3 * max(0.0, 1 - step / (0.25 * steps)))
        floor = pre.detach().flatten().topk(min(pre.numel(), round(stay * batch))).values[-1]
        cut = float(floor) if step == 0 else 0.95 * cut + 0.05 * float(floor)
        again = torch.where(pre >= floor, pre, 0.0) @ p["W_dec"] + p["b_dec"]
        opt.zero_grad()
        ((again - x) ** 2).sum(1).mean().backward()
        opt.step()
        with torch.no_grad():
            p["W_dec"].div_(p["W_dec"].norm(dim=1, keepdim=True))
    return fold({k: t.detach() for k, t in p.items()}, cut, mean, std)

def fold(p, cut, mean, std):
    """An SAE that reads raw x, from weights that read (x - mean) / std; exact, rows of norm 1."""
    rows = p["W_dec"] * std  # (N, D)
    length = rows.norm(dim=1)  # a feature's unit of activation, in the residual's own units
    return JumpReLUSAE(W_enc=p["W_enc"] / std[:, None] * length, W_dec=rows / length[:, None],
                       b_enc=(p["b_enc"] - (mean / std + p["b_dec"]) @ p["W_enc"]) * length,
                       b_dec=p["b_dec"] * std + mean, threshold=cut * length)

# ---- looking at ----
@torch.no_grad()
def sae_quality(sae, x, chunk=4096):
    """An SAE's fit to residuals x (n, D): fve, fve_standardised, l0 (a token), dead (share).
    fve is the fraction of CENTRED variance explained: most of a Gemma's residual energy is its mean.
    Standardised is harder: few outlier dimensions rule the raw one."""
    mean, var = x.mean(0), x.var(0, unbiased=False).clamp(min=1e-12)
    fired, l0 = torch.zeros(len(sae.W_dec), dtype=torch.bool, device=x.device), 0
    lost, total = torch.zeros(2, *var.shape, device=x.device)
    for rows in x.split(chunk):
        a = sae.encode(rows)
        lost += ((sae.decode(a) - rows) ** 2).sum(0)
        total += ((rows - mean) ** 2).sum(0)
        fired |= (a > 0).any(0)
        l0 += int((a > 0).sum())
    standardised = 1 - float((lost / var).sum() / (total / var).sum())
    return dict(fve=1 - float(lost.sum() / total.sum()), fve_standardised=standardised, l0=l0 / len(x),
                dead=1 - float(fired.float().mean()))

def main():
    from benchmarks import explain
    explain.fires()

if __name__ == "__main__":
    data.run_main(main)
