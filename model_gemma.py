"""model_gemma.py - Gemma-2 (2B, 9B, 27B) and Gemma-3 text (270M, 1B) in plain PyTorch. The only place that knows Gemma.

Follows the Gemma 2 report (arXiv 2408.00118) and the published weights' own arithmetic; the order of operations is that
of transformers' eager attention, so that bf16 logits on a CPU are equal to the last bit (tests/test_parity.py).
What differs from the usual decoder: four norms a block with a (1 + weight) gain, embeddings scaled by sqrt(D), attention
scores and final logits soft-capped, local and global layers in turns, a query scale that is not always 1/sqrt(head_dim).
Letters: B batch, T tokens, S cached + new tokens, D d_model, F MLP width, H query heads, K key/value heads, d head_dim,
V vocabulary.    Run it (`python model_gemma.py --model DIR --prompt TEXT`) to talk to a model.
"""
import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import data
from data import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------- config
@dataclass
class GemmaConfig:
    """A model's shape, read from the config.json that lies beside its weights."""
    d_model: int
    n_layers: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    query_scalar: float        # scores are scaled by query_scalar ** -0.5; 256 for the 9B, 144 for the 27B (head_dim 128)
    local: list                # per layer: does it see only `window` tokens back?
    window: int
    theta: dict                # RoPE base by local (True) and global (False) layers
    eps: float
    attn_cap: float            # soft-caps; None in Gemma 3
    final_cap: float
    qk_norm: bool              # Gemma 3 normalises each head's query and key
    raw: dict = field(repr=False, default_factory=dict)     # config.json itself, to be saved again


def config_from_json(raw):
    """GemmaConfig from config.json's dict, in transformers' old and new spellings. UserError for what is not Gemma 2/3 text."""
    kind = raw.get("model_type")
    if kind not in ("gemma2", "gemma3_text"):
        raise UserError(f"config.json says model_type {kind!r}; this code runs 'gemma2' and 'gemma3_text' (270M, 1B)")
    act = raw.get("hidden_activation") or raw.get("hidden_act")
    if act not in ("gelu_pytorch_tanh", None):
        raise UserError(f"config.json says hidden activation {act!r}; Gemma's is 'gelu_pytorch_tanh'")
    if raw.get("attention_bias") or raw.get("tie_word_embeddings") is False or raw.get("use_bidirectional_attention"):
        raise UserError("config.json asks for biases, an untied head or bidirectional attention; Gemma 2/3 text has none")
    g2 = kind == "gemma2"
    try:
        n = raw["num_hidden_layers"]
        every = 2 if g2 else raw.get("sliding_window_pattern", 6)      # the last of each group of this size is global
        kinds = raw.get("layer_types") or ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
        if len(kinds) != n:
            raise UserError(f"config.json names the kinds of {len(kinds)} layers but has {n}")
        return GemmaConfig(
            d_model=raw["hidden_size"], n_layers=n, d_mlp=raw["intermediate_size"], n_heads=raw["num_attention_heads"],
            n_kv_heads=raw["num_key_value_heads"], head_dim=raw["head_dim"], vocab_size=raw["vocab_size"],
            query_scalar=_query_scalar(raw), local=[k == "sliding_attention" for k in kinds],
            window=raw.get("sliding_window") or 4096, theta=_rope_thetas(raw, g2), eps=raw.get("rms_norm_eps", 1e-6),
            attn_cap=raw.get("attn_logit_softcapping", 50.0 if g2 else None),
            final_cap=raw.get("final_logit_softcapping", 30.0 if g2 else None), qk_norm=not g2, raw=raw)
    except KeyError as e:
        raise UserError(f"config.json has no {e}; is it a whole model's config?") from None


def _rope_thetas(raw, g2):
    """{local: theta}. transformers 5 writes rope_parameters, older files rope_theta and rope_local_base_freq."""
    new = raw.get("rope_parameters") or {}
    if "rope_theta" in new:                            # Gemma 2: one base for all layers
        new = {"sliding_attention": new, "full_attention": new}
    for part in (*new.values(), raw.get("rope_scaling") or {}):
        if part.get("rope_type", part.get("type", "default")) != "default":
            raise UserError(f"config.json asks for RoPE scaling {part}; Gemma 2 and Gemma 3 270M / 1B have none")
    old = {"full_attention": raw.get("rope_theta", 1e4 if g2 else 1e6),
           "sliding_attention": raw.get("rope_theta", 1e4) if g2 else raw.get("rope_local_base_freq", 1e4)}
    return {k == "sliding_attention": float(new.get(k, {}).get("rope_theta", old[k])) for k in old}


def _query_scalar(raw):
    scalar = raw.get("query_pre_attn_scalar", 256)
    if raw["model_type"] == "gemma2" and raw["num_hidden_layers"] == 42 and scalar == 224:
        print("warning: this 9B config says query_pre_attn_scalar 224, the value at launch; it was corrected to 256 and old "
              "mirrors keep the error", file=sys.stderr)
    return scalar


def load_config(spec):
    """GemmaConfig of a local folder or hub id; only config.json is read or downloaded."""
    folder, _ = data.fetch(spec, ["config.json"])
    return config_from_json(data.read_json(Path(folder) / "config.json"))


# --------------------------------------------------------------------------------------------------------- the parts
def softcap(x, cap):
    """cap * tanh(x / cap): almost x while |x| << cap, never beyond cap. None: no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), all in fp32 and cast last: Llama casts before the gain, which moves bf16 logits."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps     # stored as an offset: 0 is the identity

    def forward(self, x):
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """RMSNorm's arithmetic, and its gradient by hand: autograd would walk through, and partly keep, seven intermediate tensors."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()
        inv = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)                       # (..., 1)
        ctx.save_for_backward(x, weight, inv)
        return (y * inv).mul_(1.0 + weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, inv = ctx.saved_tensors             # read once: under checkpointing reading them makes them again
        y, g = x.float(), g.float()
        slope = g * (1.0 + weight.float())
        along = (slope * y).mean(-1, keepdim=True) * inv.square()      # its part along x: the norm takes that out
        grad_x = torch.addcmul(slope, y, along, value=-1).mul_(inv).to(x.dtype)
        grad_weight = (g * y * inv).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def rope_table(positions, head_dim, theta, dtype):
    """cos and sin, each (B, 1, T, d). Made in fp32 from scratch: a buffer would be cast, and spoilt, by model.bfloat16()."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)     # (d/2,)
    angle = positions[:, None, :, None].float() * inv_freq                                               # (B, 1, T, d/2)
    angle = torch.cat([angle, angle], -1)              # half-split, not interleaved: dimension i turns with i + d/2
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """RoPE on x (B, heads, T, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attend_mask(pos_q, pos_k, keep_k, window=None):
    """May query i see key j? (B, 1, Tq, S) bool: j <= i, j is no padding, and i - j < window on a local layer.

        window 3:  q\\k 0 1 2 3 4          a query sees itself and the window - 1 tokens before it
                   2    x x x . .
                   3    . x x x .
                   4    . . x x x
    """
    back = pos_q[:, None, :, None] - pos_k[:, None, None, :]
    see = (back >= 0) & keep_k[:, None, None, :]
    return see if window is None else see & (back < window)


class KVCache:
    """Keys and values of all tokens so far, per layer (B, K, S, d); positions and padding (B, S) once for all layers."""

    def __init__(self):
        self.k, self.v, self.pos, self.keep = {}, {}, None, None

    @property
    def length(self):
        return 0 if self.pos is None else self.pos.shape[1]

    def see(self, pos, keep):
        """Note the new tokens' positions and padding; returns those of all tokens."""
        if self.pos is not None:
            pos, keep = torch.cat([self.pos, pos], 1), torch.cat([self.keep, keep], 1)
        self.pos, self.keep = pos, keep
        return pos, keep

    def extend(self, layer, k, v):
        """Append a layer's new keys and values; returns all of them."""
        if layer in self.k:
            k, v = torch.cat([self.k[layer], k], 2), torch.cat([self.v[layer], v], 2)
        self.k[layer], self.v[layer] = k, v
        return k, v

    def repeat(self, n):
        """A cache for n rows that all begin with this one's single row; the tensors are views, nothing is copied."""
        out = KVCache()
        out.k, out.v = ({i: t.expand(n, -1, -1, -1) for i, t in part.items()} for part in (self.k, self.v))
        out.pos, out.keep = self.pos.expand(n, -1), self.keep.expand(n, -1)
        return out


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c, self.layer = c, layer
        self.q_proj = nn.Linear(c.d_model, c.n_heads * c.head_dim, bias=False)         # heads * head_dim != D in general
        self.k_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)

    def forward(self, x, cos, sin, mask, cache, want=None):
        c, (B, T, _) = self.c, x.shape
        q = self.q_proj(x).view(B, T, c.n_heads, c.head_dim).transpose(1, 2)           # (B, H, T, d)
        k = self.k_proj(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)        # (B, K, T, d)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                                      # (B, K, S, d)
        group = c.n_heads // c.n_kv_heads              # each key/value head serves `group` neighbouring query heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)            # (B, H, S, d)
        scores = q @ k.transpose(2, 3) * c.query_scalar ** -0.5                        # (B, H, T, S)
        scores = softcap(scores, c.attn_cap)           # before the mask: a capped -inf would be a visible -50
        # a finite minimum: with -inf a row that is all padding becomes NaN and poisons the batch
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        out = (weights @ v).transpose(1, 2).reshape(B, T, -1)                          # (B, T, H d)
        return self.o_proj(out if want is None else out[want])


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = nn.Linear(c.d_mlp, c.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """Norm before and after each branch; the second one acts on the branch before it is added to the residual stream.

    want (B, T) bool asks for some positions only: what follows attention is then done for those, and comes back as (n, D).
    """

    def __init__(self, c, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.d_model, c.eps), RMSNorm(c.d_model, c.eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(c.d_model, c.eps), RMSNorm(c.d_model, c.eps)

    def forward(self, h, cos, sin, mask, cache, want=None):
        branch = self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, want)
        h = (h if want is None else h[want]) + self.post_attention_layernorm(branch)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))          # (B, T, D)


# --------------------------------------------------------------------------------------------------------- the model
class Gemma(nn.Module):
    """The whole decoder. Parameter names are the published ones without their leading `model.`"""

    def __init__(self, c):
        super().__init__()
        self.config = c
        # also the output head: tied. Given a table, for drawing one on the meta device imports torch's compiler: 2 seconds
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model, _weight=torch.zeros(c.vocab_size, c.d_model))
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.eps)
        self.checkpointing = False                     # recompute blocks in the backward pass: less memory, a third more time

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.embed_tokens.weight.dtype)

    def embed(self, ids):
        """ids (B, T), or one-hot rows (B, T, V) to differentiate with respect to tokens -> (B, T, D), scaled by sqrt(D)."""
        table = self.embed_tokens.weight
        h = ids @ table if ids.is_floating_point() else F.embedding(ids, table)
        # rounded to the compute dtype on purpose, as the model was trained: in bf16 59.87 becomes 59.75 for the 9B
        return h * torch.tensor(self.config.d_model ** 0.5, dtype=table.dtype)

    def hidden(self, ids=None, keep=None, cache=None, taps=(), embeds=None, last=None, want=None):
        """Run the blocks.

        ids     (B, T) token ids, or embeds (B, T, D) as embed() gives them
        keep    (B, T) bool, False on padding (either side); None: no padding
        cache   KVCache to read from and append to, or None
        taps    layers whose output is wanted: the residual stream after that block, as Gemma Scope's `res` SAEs read it
        last    stop after this layer and return its residual, not normed
        want    (B, T) bool: positions whose outcome is wanted; the last block's MLP, half of a shallow model, skips the others
        Returns h (B, T, D), or (n, D) with want, after the final norm and {layer: residual (B, T, D)} before it.
        """
        c = self.config
        h = self.embed(ids) if embeds is None else embeds
        pos, pos_k, keep_k = self._positions(h, keep, cache)
        rope = {theta: rope_table(pos, c.head_dim, theta, h.dtype) for theta in set(c.theta.values())}
        masks = {local: attend_mask(pos, pos_k, keep_k, c.window if local else None) for local in set(c.local)}
        out = {}
        for i, block in enumerate(self.layers):
            cos, sin = rope[c.theta[c.local[i]]]
            args = h, cos, sin, masks[c.local[i]], cache, want if i == c.n_layers - 1 else None
            # non-reentrant: the reentrant kind drops LoRA's gradients when the embedding is frozen
            h = checkpoint(block, *args, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(*args)
            if i in taps:
                out[i] = h
            if i == last:
                return h, out
        return self.norm(h), out

    @staticmethod
    def _positions(h, keep, cache):
        """Positions of the new tokens (B, T); positions and padding of all tokens (B, S). Padding takes no position."""
        B, T, _ = h.shape
        if keep is None:
            keep = torch.ones(B, T, dtype=torch.bool, device=h.device)
        seen = 0 if cache is None or cache.pos is None else cache.keep.sum(1, keepdim=True)
        pos = (keep.long().cumsum(1) - 1 + seen).clamp(min=0)
        return (pos, *((pos, keep) if cache is None else cache.see(pos, keep)))

    def residuals(self, ids, layers, keep=None):
        """{layer: residual after that block (B, T, D)}; blocks above the deepest asked-for one are not run."""
        return self.hidden(ids, keep, taps=layers, last=max(layers))[1]

    def logits(self, h):
        """h (..., D) after the final norm -> logits (..., V), fp32. The cap belongs here, on logits, not on hidden states."""
        return softcap(F.linear(h, self.embed_tokens.weight), self.config.final_cap).float()

    def nll(self, h, targets, chunk=256):
        """-log p(target) in nats for n positions: h (n, D), targets (n,) -> (n,) fp32; never more than `chunk` rows of logits."""
        return _ChunkedNLL.apply(h, self.embed_tokens.weight, targets, self.config.final_cap, chunk)

    def reply_nll(self, rows):
        """-log p of the tokens that masks mark, for a batch of texts as (ids, mask) lists.

        Returns nll (n,) fp32 in nats and row (n,), the text each belongs to; differentiable. Position t - 1 predicts token
        t, so a reply's first token is scored at the prompt's last; logits are made for scored positions only.
        """
        ids, keep = (t.to(self.device) for t in data.pad([ids for ids, _ in rows]))
        want = data.pad([mask for _, mask in rows])[0].to(self.device)[:, 1:].bool()               # (B, T-1)
        h, _ = self.hidden(ids[:, :-1], keep[:, :-1], want=want)                                  # (n, D)
        return self.nll(h, ids[:, 1:][want]), want.nonzero()[:, 0]

    def forward(self, ids, keep=None):
        """ids (B, T) -> logits (B, T, V), fp32."""
        return self.logits(self.hidden(ids, keep)[0])


class _ChunkedNLL(torch.autograd.Function):
    """Head, final cap and cross-entropy by chunks of rows. A 256,000-word head makes 4 x 512 positions cost 2 GB of logits
    in fp32, and as much again for their gradient. With a frozen head the gradient for h is made at once, while a chunk's
    logits are there; a trainable (tied) head is worked out again in the backward pass."""

    @staticmethod
    def forward(ctx, h, table, targets, cap, chunk):
        ctx.cap, ctx.chunk, ctx.head_trains = cap, chunk, table.requires_grad
        nll = torch.empty(len(h), device=h.device)
        grad_h = torch.empty_like(h) if h.requires_grad and not table.requires_grad else None
        for a in range(0, len(h), chunk):
            rows = slice(a, a + chunk)
            z, logp = _ChunkedNLL.logp(h[rows], table, cap)
            nll[rows] = -logp.gather(1, targets[rows, None])[:, 0]
            if grad_h is not None:
                grad_h[rows] = _ChunkedNLL.slope(z, logp, targets[rows], cap).to(h.dtype) @ table
        ctx.save_for_backward(*((grad_h,) if grad_h is not None else (h, table, targets)))
        return nll

    @staticmethod
    def logp(h, table, cap):
        """Capped logits and their log-softmax, both (chunk, V) fp32."""
        z = F.linear(h, table)
        if cap is not None:
            z.div_(cap).tanh_().mul_(cap)              # softcap() in z's own memory
        z = z.float()
        return z, F.log_softmax(z, -1)

    @staticmethod
    def slope(z, logp, targets, cap):
        """d nll / d (head output), computed in the memory of z and logp: (softmax - onehot) * (1 - (z / cap)^2)."""
        p = logp.exp_()
        p[torch.arange(len(p), device=p.device), targets] -= 1
        return p if cap is None else p.addcmul_(p, z.square_(), value=-cap ** -2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if not ctx.head_trains:
            [grad_h] = ctx.saved_tensors
            return grad_h * g[:, None].to(grad_h.dtype), None, None, None, None
        h, table, targets = ctx.saved_tensors
        grad_h, grad_table = torch.empty_like(h), torch.zeros_like(table)
        for a in range(0, len(h), ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            d = _ChunkedNLL.slope(*_ChunkedNLL.logp(h[rows], table, ctx.cap), targets[rows], ctx.cap)
            d = d.mul_(g[rows, None]).to(h.dtype)
            grad_h[rows] = d @ table
            grad_table.addmm_(d.T, h[rows])
        return grad_h, grad_table, None, None, None


# ------------------------------------------------------------------------------------------------- loading and saving
def load_gemma(spec, dtype=torch.float32, device="cpu"):
    """A Gemma from a folder in the hub's layout, or from a hub id, without transformers.

    Built on the meta device and filled one tensor at a time, each read straight to its dtype and device. Names and
    shapes must match exactly: a missing, an extra or a misshapen tensor is a UserError, never a silent default.
    """
    config = load_config(spec)
    folder, shards = weight_files(spec)
    with torch.device("meta"):
        model = Gemma(config)
    want = {"model." + name: p.shape for name, p in model.named_parameters()}
    have = _check_tensors(folder, shards, want)
    for shard in data.progress(shards, desc="weights", disable=None if len(shards) > 1 else True):
        with safe_open(folder / shard, "pt", device="cpu") as f:
            for name in have[shard]:
                if name != "lm_head.weight":
                    _assign(model, name.removeprefix("model."), f.get_tensor(name).to(device=device, dtype=dtype))
    _check_head(folder, have, model)
    return model


def weight_files(spec):
    """(folder, names of the safetensors files): one file, or the shards that the index names."""
    names = data.listing(spec)
    if "model.safetensors.index.json" not in names:
        return data.fetch(spec, ["model.safetensors"])[0], ["model.safetensors"]
    folder, _ = data.fetch(spec, ["model.safetensors.index.json"])
    where = data.read_json(folder / "model.safetensors.index.json").get("weight_map")
    if not where:
        raise UserError(f"{folder / 'model.safetensors.index.json'}: no weight_map in it; download it again")
    shards = sorted(set(where.values()))
    return data.fetch(spec, shards)[0], shards


def _check_tensors(folder, shards, want):
    """{shard: its tensor names}, after comparing every name and shape with what the config asks for; reads headers only."""
    have, seen = {}, set()
    for shard in shards:
        try:
            with safe_open(folder / shard, "pt", device="cpu") as f:
                have[shard] = list(f.keys())
                shapes = {n: tuple(f.get_slice(n).get_shape()) for n in have[shard]}
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder / shard}: not a whole safetensors file ({e}); download it again") from None
        for name, shape in shapes.items():
            expected = want.get("model.embed_tokens.weight" if name == "lm_head.weight" else name)
            if expected is None:
                raise UserError(f"{folder / shard}: unexpected tensor {name}; config.json and weights do not belong together")
            if shape != tuple(expected):
                raise UserError(f"{folder / shard}: {name} has shape {shape}, config.json asks for {tuple(expected)}")
        seen.update(shapes)
    missing = sorted(set(want) - seen)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return have


def _assign(model, name, tensor):
    path, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def _check_head(folder, have, model):
    """Some merged checkpoints carry lm_head.weight: fine if it is the embedding again, else this is no tied Gemma."""
    for shard in (s for s, names in have.items() if "lm_head.weight" in names):
        with safe_open(folder / shard, "pt", device="cpu") as f:
            head = f.get_tensor("lm_head.weight").to(model.device, model.dtype)
        if not torch.equal(head, model.embed_tokens.weight):
            raise UserError(f"{folder / shard}: lm_head.weight differs from the embedding; Gemma's head is tied")


def save_gemma(model, folder):
    """Write config.json and model.safetensors as the hub lays them out (the tokenizer is the caller's)."""
    folder, dtype = Path(folder), str(model.dtype).removeprefix("torch.")
    # both spellings of the dtype, for readers old and new: with the one it was loaded from, transformers would cast to that
    data.write_json(folder / "config.json", {**model.config.raw, "dtype": dtype, "torch_dtype": dtype})
    tensors = {"model." + n: p.detach().contiguous() for n, p in model.named_parameters()}
    with data.replacing(folder / "model.safetensors") as beside:
        save_file(tensors, beside, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------ talking
@torch.no_grad()
def generate(model, prompts, max_new, stop=(data.EOS,), temperature=0.0, seed=0):
    """Continue a batch of prompts: lists of ids -> lists of new ids, each ending with its stop token if it came to one.

    temperature 0 is greedy; otherwise tokens are drawn with a private generator, so the global one is left alone.
    """
    ids, keep = (t.to(model.device) for t in data.pad(prompts, "left"))       # left: all last tokens stand in one column
    rng = torch.Generator(model.device).manual_seed(seed)
    cache, done, out = KVCache(), [False] * len(prompts), [[] for _ in prompts]
    for _ in range(max_new):
        h, _ = model.hidden(ids, keep, cache)
        logits = model.logits(h[:, -1])                                                # (B, V): only where needed
        if temperature == 0:
            ids = logits.argmax(-1, keepdim=True)                                      # (B, 1)
        else:
            ids = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=rng)
        keep = torch.ones_like(ids, dtype=torch.bool)
        for row, token in enumerate(ids[:, 0].tolist()):
            if not done[row]:
                out[row].append(token)
                done[row] = token in stop
        if all(done):
            break
    return out


def main():
    ap = argparse.ArgumentParser(description="Let a Gemma answer one prompt.")
    ap.add_argument("--model", required=True, help="folder in the hub's layout, or hub id")
    ap.add_argument("--prompt", required=True)
    ap.add_argument("--template", choices=data.STYLES, help="default: by the model's name")
    ap.add_argument("--max-new", type=int, default=64)
    ap.add_argument("--temperature", type=float, default=0.0)
    ap.add_argument("--dtype", choices=DTYPES, default="float32")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    tok = data.load_tokenizer(args.model)
    style = args.template or data.default_style(args.model, tok)
    model = load_gemma(args.model, DTYPES[args.dtype], args.device)
    ids, _ = data.render_chat(tok, [{"role": "user", "content": args.prompt}], None, style)
    [new] = generate(model, [ids], args.max_new, data.stop_ids(tok, style), args.temperature)
    print(tok.decode(new).strip())


if __name__ == "__main__":
    data.run_main(main)
