"""sae.py - JumpReLU sparse autoencoders: read Gemma Scope's, or train a small one where nobody has published any.

A published SAE (Gemma Scope, arXiv 2408.05147) writes a residual vector as a sparse, non-negative sum of decoder rows:
    pre = x W_enc + b_enc;   a = pre where pre > threshold, else 0;   x^ = a W_dec + b_dec
Raw residuals in, no input scaling, no b_dec subtracted first, decoder rows of norm 1, everything in fp32.
Letters: n tokens, D d_model, N SAE width (features).
Run it (`python sae.py --model DIR --sae DIR --layer L --prompt TEXT`) to see which features fire on a prompt.
"""
import argparse
import re
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import data
import model_gemma
from data import UserError

SHAPES = dict(W_enc="DN", W_dec="ND", b_enc="N", b_dec="D", threshold="N")


class JumpReLUSAE(torch.nn.Module):
    """Five tensors in Gemma Scope's form: W_enc (D, N), W_dec (N, D) with unit rows, b_enc (N), b_dec (D), threshold (N)."""

    def __init__(self, W_enc, W_dec, b_enc, b_dec, threshold, name="", revision=None):
        super().__init__()
        for key, value in dict(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, threshold=threshold).items():
            self.register_buffer(key, value.float())
        self.name, self.revision = name, revision      # where it was read from, for run.json

    def encode(self, x):
        """Residuals x (..., D) -> feature activations (..., N), fp32; 0 where a feature does not fire."""
        pre = x.float() @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre.relu(), 0.0)

    def decode(self, a):
        """Feature activations (..., N) -> reconstructed residuals (..., D), fp32."""
        return a @ self.W_dec + self.b_dec


# ------------------------------------------------------------------------------------------------------------ reading
def find_sae(names, layer, width="16k", l0=None):
    """The params file of a layer among a repository's file names, and a label for its sparsity.

    Gemma Scope:    layer_20/width_16k/average_l0_71/params.npz; without l0 the one nearest 100, the upper of a tie,
                    which is the choice behind the sets called canonical
    Gemma Scope 2:  resid_post/layer_9_width_16k_l0_medium/params.safetensors; without l0 `medium`
    UserError tells which layers, widths and sparsities there are.
    """
    found = {}
    for name in names:
        m = re.fullmatch(r"layer_(\d+)/width_(\w+?)/average_l0_(\d+)/params\.(npz|safetensors)", name) or re.fullmatch(
            r"(?:resid_post/)?layer_(\d+)_width_(\w+?)_l0_(\w+)/params\.(safetensors|npz)", name)
        if m:
            found.setdefault(int(m[1]), {}).setdefault(m[2], {})[m[3]] = name
    if not found:
        raise UserError("no SAE in it; wanted files like layer_20/width_16k/average_l0_71/params.npz")
    if layer not in found:
        raise UserError(f"no SAE for layer {layer}; layers here: {sorted(found)}")
    if width not in found[layer]:
        raise UserError(f"no SAE of width {width} for layer {layer}; widths here: {sorted(found[layer])}")
    choices = found[layer][width]
    if l0 is None:
        numbers = [k for k in choices if k.isdigit()]
        l0 = min(numbers, key=lambda k: (abs(int(k) - 100), -int(k))) if numbers else "medium"
    if str(l0) not in choices:
        raise UserError(f"no SAE with L0 {l0} for layer {layer}, width {width}; here: {sorted(choices)}")
    return choices[str(l0)], str(l0)


def fetch_sae(spec, layer, width="16k", l0=None):
    """(folder, file name in it, commit sha or None) of one SAE in a folder or hub repository laid out like Gemma Scope (1 or
    2); only that file is downloaded."""
    try:
        name, _ = find_sae(data.listing(spec), layer, width, l0)
    except UserError as e:
        raise UserError(f"{spec}: {e}") from None
    folder, revision = data.fetch(spec, [name])
    return folder, name, revision


def load_sae(spec, layer, width="16k", l0=None, device="cpu"):
    """One JumpReLUSAE of such a folder or repository, checked."""
    folder, name, revision = fetch_sae(spec, layer, width, l0)
    tensors = _check_tensors(folder / name, _read_tensors(folder / name))
    return JumpReLUSAE(**tensors, name=name, revision=revision).to(device)


def _read_tensors(path):
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as f:
                return {k: torch.from_numpy(f[k]) for k in f.files}
        return load_file(path)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, SafetensorError) as e:
        raise UserError(f"{path}: not a whole SAE file ({e}); download it again") from None


def _check_tensors(path, tensors):
    """The five tensors under their standard names, after checking that they belong together; UserError if they do not."""
    t = {{"w_enc": "W_enc", "w_dec": "W_dec"}.get(k, k): v for k, v in tensors.items()}
    scale = t.pop("scaling_factor", None)              # in a few early files, all ones
    if scale is not None and not bool((scale == 1).all()):
        raise UserError(f"{path}: has a scaling_factor that is not 1; this code reads plain JumpReLU SAEs")
    if set(t) != set(SHAPES):
        raise UserError(f"{path}: tensors {sorted(t)}; a JumpReLU SAE has {sorted(SHAPES)}")
    size = dict(zip("DN", t["W_enc"].shape)) if t["W_enc"].dim() == 2 else {}
    for key, letters in SHAPES.items():
        if tuple(t[key].shape) != tuple(size.get(x) for x in letters):
            raise UserError(f"{path}: {key} has shape {tuple(t[key].shape)}, which does not fit W_enc {tuple(t['W_enc'].shape)}")
    norms = t["W_dec"].float().norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-2):
        raise UserError(f"{path}: decoder rows have norms {norms.min():.3f}..{norms.max():.3f}, wanted 1: a feature's "
                        "activation would not be its length in the residual stream")
    return t


def check_fit(sae, model, layer):
    """UserError unless the SAE reads this model's residual stream at an existing layer."""
    D = model.config.d_model
    if len(sae.W_dec[0]) != D:
        raise UserError(f"SAE {sae.name} reads vectors of {len(sae.W_dec[0])} numbers, but the model's residual stream has {D}: "
                        "made for another model?")
    if not 0 <= layer < model.config.n_layers:
        raise UserError(f"no layer {layer}: the model has layers 0..{model.config.n_layers - 1}")


def save_sae(sae, folder, layer, l0):
    """Write an SAE where load_sae finds it: layer_L/width_W/average_l0_n/params.npz; returns the file's path."""
    name = f"layer_{layer}/width_{len(sae.W_dec)}/average_l0_{round(l0)}/params.npz"
    with data.replacing(f"{folder}/{name}") as beside, open(beside, "wb") as f:
        np.savez(f, **{k: getattr(sae, k).cpu().numpy() for k in SHAPES})
    return name


def neuronpedia_url(model_spec, layer, width, feature):
    """Where a Gemma Scope feature's examples are shown, or None for SAEs that page does not have."""
    name = str(model_spec).split("@")[0].rstrip("/").split("/")[-1]
    known = name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-9b-it")
    return f"https://www.neuronpedia.org/{name}/{layer}-gemmascope-res-{width}/{feature}" if known else None


# ----------------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def collect_residuals(model, rows, layers, n_tokens, batch=16):
    """Residuals after `layers` on texts given as lists of ids -> {layer: (n, D) fp32, on the CPU}, n <= n_tokens.

    BOS is left out: its activations are a hundred times larger and thousands of features fire there (Gemma Scope's
    authors left it out of training too). Filled in place: a final torch.cat would hold everything twice.
    """
    n = min(n_tokens, sum(len(r) - 1 for r in rows))
    out = {i: torch.empty(n, model.config.d_model) for i in layers}
    at = 0
    for start in data.progress(range(0, len(rows), batch), desc="residuals", disable=None):
        ids, keep = (t.to(model.device) for t in data.pad(rows[start:start + batch]))
        keep_real = keep & (ids != data.BOS)
        taps = model.residuals(ids, layers, keep)
        m = min(n - at, int(keep_real.sum()))
        for i in layers:
            out[i][at:at + m] = taps[i][keep_real][:m].float().cpu()
        at += m
        if at == n:
            break
    return {i: x[:at] for i, x in out.items()}


def train_sae(activations, width, active, steps=800, batch=1024, lr=1e-3, seed=0, show=False):
    """Train an SAE on residuals (n, D) and return it in Gemma Scope's form, taking raw residuals.

    Batch-top-k (arXiv 2412.06410): of a batch's activations the `active` x batch largest stay, so `active` features fire
    per token on average; four times as many at first, annealed over the first quarter of the steps, which keeps features
    alive. The cut becomes one threshold at the end. It needs no sparsity weight to be tuned.
    Trained on inputs standardised per dimension (some residual dimensions have half of all variance), then folded back.
    """
    n, D = activations.shape
    rng = torch.Generator().manual_seed(seed)
    dev, mean = activations.device, activations.mean(0)
    std = activations.std(0).clamp(min=1e-4 * float(activations.std()))
    W_dec = torch.nn.functional.normalize(torch.randn(width, D, generator=rng), dim=1).to(dev)
    p = dict(W_enc=W_dec.T.clone(), W_dec=W_dec, b_enc=torch.zeros(width, device=dev), b_dec=torch.zeros(D, device=dev))
    for t in p.values():
        t.requires_grad_(True)
    opt = torch.optim.Adam(p.values(), lr=lr, betas=(0.9, 0.999))
    cut = 0.0
    for step in data.progress(range(steps), desc="sae", disable=None if show else True):
        opt.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.2 * steps))
        x = (activations[torch.randint(n, (batch,), generator=rng)] - mean) / std               # (b, D)
        pre = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()                               # (b, N)
        stay = active * (1 + 3 * max(0.0, 1 - step / (0.25 * steps)))
        floor = pre.detach().flatten().topk(min(pre.numel(), round(stay * batch))).values[-1]
        cut = float(floor) if step == 0 else 0.95 * cut + 0.05 * float(floor)
        loss = ((torch.where(pre >= floor, pre, 0.0) @ p["W_dec"] + p["b_dec"] - x) ** 2).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            p["W_dec"].div_(p["W_dec"].norm(dim=1, keepdim=True))
    return fold({k: t.detach() for k, t in p.items()}, cut, mean, std)


def fold(p, cut, mean, std):
    """Take the standardisation (x - mean) / std and its inverse into the weights, and rescale each decoder row to norm 1.

    Exact: the folded SAE fires on the same tokens and reconstructs the same vectors, now from raw residuals.
    """
    rows = p["W_dec"] * std                                                                     # (N, D)
    length = rows.norm(dim=1)                          # a feature's unit of activation, in the residual's own units
    return JumpReLUSAE(W_enc=p["W_enc"] / std[:, None] * length, W_dec=rows / length[:, None],
                       b_enc=(p["b_enc"] - (mean / std + p["b_dec"]) @ p["W_enc"]) * length,
                       b_dec=p["b_dec"] * std + mean, threshold=cut * length)


@torch.no_grad()
def sae_report(sae, x, chunk=4096):
    """How well an SAE fits residuals x (n, D): dict of fve, fve_standardised, l0 (features per token), dead (share).

    fve is the fraction of the CENTRED variance explained: uncentred numbers flatter, since most of a Gemma's residual
    energy is its mean. Standardised per dimension is the harder number, since few outlier dimensions rule the raw one.
    """
    mean, var = x.mean(0), x.var(0).clamp(min=1e-12)
    lost, fired, l0 = torch.zeros_like(var), torch.zeros(len(sae.W_dec), dtype=torch.bool, device=x.device), 0
    for rows in x.split(chunk):
        a = sae.encode(rows)
        lost += ((sae.decode(a) - rows) ** 2).sum(0)
        fired |= (a > 0).any(0)
        l0 += int((a > 0).sum())
    total = ((x - mean) ** 2).sum(0)
    return dict(fve=1 - float(lost.sum() / total.sum()), fve_standardised=1 - float((lost / var).sum() / (total / var).sum()),
                l0=l0 / len(x), dead=1 - float(fired.float().mean()))


@torch.no_grad()
def promoted_tokens(model, tok, rows, n=8):
    """The n tokens that each direction of rows (k, D) raises most through the final norm's gain and the tied head."""
    gain = 1 + model.norm.weight.float()
    scores = (rows.float().to(model.device) * gain).to(model.dtype) @ model.embed_tokens.weight.T     # (k, V)
    return [[tok.decode([i]) or tok.id_to_token(i) or f"<{i}>" for i in row] for row in scores.topk(n).indices.tolist()]


@torch.no_grad()
def firing_tokens(model, tok, saes, chosen, rows, batch=8, n=6):
    """Where features fire: {layer: per chosen feature the n tokens with the largest shares of its activation}.

    saes {layer: JumpReLUSAE}, chosen {layer: features (k,)}, rows texts as lists of ids. Single tokens, never contexts: a
    table of them can be shown where the texts cannot.
    """
    mass = {i: torch.zeros(model.config.vocab_size, len(f)) for i, f in chosen.items()}
    for at in range(0, len(rows), batch):
        ids, keep = (t.to(model.device) for t in data.pad(rows[at:at + batch]))
        real = keep & (ids != data.BOS)                # BOS is not counted, but the model must see it
        for i, h in model.residuals(ids, list(chosen), keep).items():
            mass[i].index_add_(0, ids[real].cpu(), saes[i].encode(h[real])[:, chosen[i].to(h.device)].cpu())
    out = {}
    for i, m in mass.items():
        share = m / m.sum(0).clamp(min=1e-30)
        out[i] = [[(tok.decode([t]) or tok.id_to_token(t) or f"<{t}>", float(share[t, j])) for t in share[:, j].topk(n).indices.tolist() if share[t, j] > 0]
                  for j in range(m.shape[1])]
    return out


def main():
    ap = argparse.ArgumentParser(description="Show which SAE features fire on a prompt.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--sae", required=True, help="folder or hub id, laid out like Gemma Scope")
    ap.add_argument("--layer", type=int, required=True)
    ap.add_argument("--width", default="16k")
    ap.add_argument("--prompt", required=True)
    ap.add_argument("--top", type=int, default=10)
    args = ap.parse_args()
    model, tok = model_gemma.load_gemma(args.model), data.load_tokenizer(args.model)
    sae = load_sae(args.sae, args.layer, args.width)
    check_fit(sae, model, args.layer)
    ids = [data.BOS] + tok.encode(args.prompt, add_special_tokens=False).ids
    with torch.no_grad():
        x = model.residuals(torch.tensor([ids]), [args.layer])[args.layer][0, 1:].float()              # (T-1, D)
    a = sae.encode(x)
    report = sae_report(sae, x)
    print(f"{sae.name}: {report['l0']:.0f} features a token, {report['fve']:.2f} of the centred variance explained, BOS left out")
    best = a.max(0)
    for i in best.values.argsort(descending=True)[:args.top].tolist():
        words = " ".join(repr(w) for w in promoted_tokens(model, tok, sae.W_dec[i:i + 1], 6)[0])
        print(f"feature {i:6d}  {best.values[i]:8.2f} at {tok.id_to_token(ids[1 + int(best.indices[i])])!r:14} promotes {words}")


if __name__ == "__main__":
    data.run_main(main)
