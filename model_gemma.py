"""model_gemma.py - Gemma-2 (2B, 9B, 27B) and Gemma-3 text (270M, 1B) in plain PyTorch.

Follows the Gemma 2 report (arXiv 2408.00118) and the published weights' own arithmetic, in the order of
operations of transformers' eager attention: bf16 logits on a CPU are equal to the last bit. What differs
from the usual decoder: four norms a block with a (1 + weight) gain, embeddings scaled by sqrt(D),
soft-capped scores and logits, local and global layers in turns.
Letters: B batch, T tokens, S cached + new tokens, D d_model, H query heads, K key/value heads, d head_dim,
V vocabulary.   Run it (`python model_gemma.py --model DIR`) to talk to a model, adapted or steered.
"""
import contextlib
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import data
from data import UserError, expecting, need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# the norm between the residual stream and a projection: it scales what is read and what is written
NORMS = dict.fromkeys("qkv", "input_layernorm") | dict(
    o="post_attention_layernorm", gate="pre_feedforward_layernorm", up="pre_feedforward_layernorm",
    down="post_feedforward_layernorm")

# ---- config ----
def config_from_json(raw):
    """A model's shape from config.json's dict, in transformers' old and new spellings.
    UserError for what this forward does not compute: another family, biases, an untied head, scaled RoPE."""
    data.check(raw, "config.json", **KINDS)
    g2, heads, shared = raw["model_type"] == "gemma2", raw["num_attention_heads"], raw["num_key_value_heads"]
    whole = heads % shared == 0 and raw["head_dim"] % 2 == 0
    need(whole, f"config.json: {heads} heads cannot share {shared}, or head_dim {raw['head_dim']} is odd")
    scalar = raw.get("query_pre_attn_scalar") or 256
    if g2 and raw["num_hidden_layers"] == 42 and scalar == 224:
        data.note("warning: this 9B config has query_pre_attn_scalar 224; it was corrected to 256")
    return SimpleNamespace(
        d_model=raw["hidden_size"], n_layers=raw["num_hidden_layers"], d_mlp=raw["intermediate_size"],
        n_heads=heads, n_kv_heads=shared,
        head_dim=raw["head_dim"], vocab_size=raw["vocab_size"], eps=raw.get("rms_norm_eps") or 1e-6,
        query_scalar=scalar,  # scores times its ** -.5: 256 for the 9B, 144 for the 27B
        local=_local_layers(raw, g2),  # per layer: does it see only `window` tokens back?
        window=raw.get("sliding_window") or 4096,
        theta=_rope_thetas(raw, g2),  # RoPE base of local (True) and global (False) layers
        attn_cap=raw.get("attn_logit_softcapping", 50.0 if g2 else None),
        final_cap=raw.get("final_logit_softcapping", 30.0 if g2 else None),
        qk_norm=not g2,  # Gemma 3 normalises each head's query and key
        raw=raw)  # config.json itself, to be saved again

# What config.json may say. Sizes have ends: none is allocated before weights are seen
KINDS = dict(model_type=("gemma2", "gemma3_text"), num_hidden_layers=range(1, 1001), layer_types=(list, None),
             tie_word_embeddings=(True, None), rope_parameters=(dict, None), rope_scaling=(dict, None),
             dtype=(str, None), torch_dtype=(str, None))
KINDS |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), range(1, 2**24))
KINDS |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), range(1, 2**12))
KINDS |= dict.fromkeys(("sliding_window", "sliding_window_pattern"), (range(1, 2**31), None))
KINDS |= dict.fromkeys(("hidden_activation", "hidden_act"), ("gelu_pytorch_tanh", None))
KINDS |= dict.fromkeys(("attention_bias", "use_bidirectional_attention"), (False, None))
KINDS |= dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "rope_theta",
                        "final_logit_softcapping", "rope_local_base_freq"), (data.POSITIVE, None))

def _local_layers(raw, g2):
    """Per layer, is it local? By default even layers in Gemma 2, all but every sixth in Gemma 3."""
    n, kinds, every = raw["num_hidden_layers"], raw.get("layer_types"), raw.get("sliding_window_pattern")
    if kinds is None:
        return [(i + 1) % (2 if g2 else every or 6) != 0 for i in range(n)]
    known = len(kinds) == n and all(k in ("sliding_attention", "full_attention") for k in kinds)
    need(known, f"config.json: layer_types must name {n} layers, each sliding_attention or full_attention")
    return [k == "sliding_attention" for k in kinds]

def _rope_thetas(raw, g2):
    """{local: theta}: transformers 5's rope_parameters, or rope_theta and rope_local_base_freq."""
    new = raw.get("rope_parameters") or {}
    if "rope_theta" in new:  # Gemma 2: one base for all layers
        new = {"sliding_attention": new, "full_attention": new}
    for part in (*new.values(), raw.get("rope_scaling") or {}):
        data.check(part, "config.json: RoPE", rope_theta=(data.POSITIVE, None))
        plain = part.get("rope_type", part.get("type", "default")) == "default"
        plain = plain and not part.get("factor") and part.get("partial_rotary_factor") in (None, 1)
        need(plain, f"config.json asks for RoPE scaling {part}; Gemma 2 and Gemma 3 270M / 1B have none")
    old = {"full_attention": raw.get("rope_theta") or (1e4 if g2 else 1e6),
           "sliding_attention": (raw.get("rope_theta") if g2 else raw.get("rope_local_base_freq")) or 1e4}
    return {k == "sliding_attention": float(new.get(k, {}).get("rope_theta") or old[k]) for k in old}

def load_config(spec):
    """The config of a local folder or hub id; only config.json is read or downloaded."""
    return config_from_json(data.read_json(data.fetch(spec, ["config.json"])[0] / "config.json"))

# ---- the parts ----
def by_hand(function, *args):
    """An operation with a gradient of its own; without gradients its forward alone.
    apply costs 14 us a call, which a small model's decoding feels."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(SimpleNamespace(save_for_backward=lambda *kept: None), *args)

def softcap(x, cap):
    """cap * tanh(x / cap): almost x while |x| << cap, never beyond cap. None: no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap

def softcap_(x, cap):
    """softcap() in x's own memory, which autograd would miss."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)

class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in fp32, cast last; Llama's cast before the gain moves logits."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))  # stored as an offset: 0 is the identity
        self.eps = eps

    def forward(self, x):
        return by_hand(_Norm, x, self.weight, self.eps)

class _Norm(torch.autograd.Function):
    """RMSNorm's arithmetic and its gradient by hand: autograd would walk through seven tensors."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()
        inv = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inv)
        return (y * inv).mul_(1.0 + weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, inv = ctx.saved_tensors  # read once: under checkpointing reading makes them again
        y, g = x.float(), g.float()
        slope = g * (1.0 + weight.float())
        along = (slope * y).mean(-1, keepdim=True) * inv.square()  # along x, which the norm takes out
        grad_x = torch.addcmul(slope, y, along, value=-1).mul_(inv).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, (g * y * inv).flatten(0, -2).sum(0).to(weight.dtype), None

def rope_table(positions, head_dim, theta, dtype):
    """cos and sin (B, 1, T, d), made in fp32 each time: model.bfloat16() would spoil a buffer."""
    even = torch.arange(0, head_dim, 2, device=positions.device).float()
    inv_freq = 1.0 / theta ** (even / head_dim)  # (d/2,)
    angle = positions[:, None, :, None].float() * inv_freq  # (B, 1, T, d/2)
    angle = torch.cat([angle, angle], -1)  # half-split, not interleaved: dimension i turns with i + d/2
    return angle.cos().to(dtype), angle.sin().to(dtype)

def rotate(x, cos, sin):
    """RoPE on x (B, heads, T, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin

def attend_mask(pos_q, pos_k, keep_k, window=None):
    """Whether query i sees key j, (B, 1, Tq, S) bool: j <= i, no padding, i - j < window.
        window 3:  q\\k 0 1 2 3 4          a query sees itself and the window - 1 tokens before it
                   2    x x x . .
                   3    . x x x .
                   4    . . x x x"""
    back = pos_q[:, None, :, None] - pos_k[:, None, None, :]
    see = (back >= 0) & keep_k[:, None, None, :]
    return see if window is None else see & (back < window)

def additive(see, dtype):
    """0 where a query sees a key, the least finite number elsewhere: what is added to its score.
    With -inf a row that is all padding would become NaN and poison the batch."""
    return torch.zeros_like(see, dtype=dtype).masked_fill_(~see, torch.finfo(dtype).min)

class KVCache(UserDict):  # no dict: on a GPU FSDP2 would hand hidden() a copy
    """Of all tokens so far: "pos", "keep" (B, S); ("k", layer), ("v", layer) (B, K, S, d)."""
    def add(self, key, new, dim=1):
        """Append what belongs to the new tokens; that of all tokens."""
        self[key] = torch.cat([self[key], new], dim) if key in self else new
        return self[key]

class Linear(nn.Linear):
    """x W^T by product()."""
    def forward(self, x):
        return product(x, self.weight)

def product(x, W):
    """x (..., in) W^T, W (out, in); on a CPU a step's few rows as (W x^T)^T.
    Kernels take up to twice as long for 5 to 64 rows on the left as on the right."""
    decoding = x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()  # x (B, 1, in)
    if decoding and 4 < len(x) <= 64 and x.dtype == torch.float32 and x.device.type == "cpu":
        return (W @ x[:, 0].T).T[:, None]
    return F.linear(x.contiguous(), W)  # else bf16 copies W for each row

class Attention(nn.Module):
    """Grouped-query attention with RoPE and soft-capped scores; Gemma 3 norms queries and keys."""
    def __init__(self, c, layer):
        super().__init__()
        self.c, self.layer = c, layer
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, bias=False)  # H d != D in general
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.eps)
            self.k_norm = RMSNorm(c.head_dim, c.eps)

    def forward(self, x, cos, sin, mask, cache, want=None):
        c, (B, T, _) = self.c, x.shape
        split = lambda y: y.view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))  # (B, H or K, T, d)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.add(("k", self.layer), k, 2), cache.add(("v", self.layer), v, 2)  # (B, K, S, d)
        out = by_hand(_Attend, q, k, v, mask, c.query_scalar ** -0.5, c.attn_cap)  # (B, H, T, d)
        out = out.transpose(1, 2).reshape(B, T, -1)  # (B, T, H d)
        return self.o_proj(out if want is None else out[want])

class _Attend(torch.autograd.Function):
    """softmax(cap(scale q k^T) + mask) v, in the published order of operations; keeps only q, k and v.
    Autograd would keep the scores thrice, 134 MB a layer of the 9B at 4 x 512; backward() makes them
    again. q (B, H, T, d), k and v (B, K, S, d): a key/value head serves H / K neighbouring query heads, taken
    as one block of rows, (B, K, H / K * T, d)."""
    @staticmethod
    def forward(ctx, q, k, v, mask, scale, cap):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.cap = scale, cap
        weights, _ = _Attend.weights(q, k, mask, scale, cap)
        return (weights @ v).view(q.shape)

    @staticmethod
    def weights(q, k, mask, scale, cap, slope=False):
        """What each query takes from each key (B, K, H / K * T, S); the cap's slope there, if asked for."""
        rows = q.reshape(*k.shape[:2], -1, q.shape[3])  # (B, K, H / K * T, d)
        scores = (rows @ k.transpose(2, 3)).mul_(scale)
        if cap is not None:
            scores.div_(cap).tanh_()
            slope = 1 - scores.square() if slope else None
            scores.mul_(cap)
        by_head = scores.view(*q.shape[:3], -1)  # (B, H, T, S)
        by_head += mask  # after the cap: a capped -inf would be a visible -50
        return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), slope

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, mask = ctx.saved_tensors
        w, slope = _Attend.weights(q, k, mask, ctx.scale, ctx.cap, True)
        rows, g = (x.reshape(*k.shape[:2], -1, q.shape[3]) for x in (q, g))
        grad_v = w.transpose(2, 3) @ g  # (B, K, S, d): the query heads of a group add up
        d = (g @ v.transpose(2, 3)).mul_(w)
        d = d.addcmul_(w, d.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)  # through the softmax
        if ctx.cap is not None:
            d.mul_(slope)
        return (d @ k).view(q.shape), d.transpose(2, 3) @ rows, grad_v, None, None, None

class MLP(nn.Module):
    """GeGLU with the tanh approximation of gelu."""
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = Linear(c.d_mlp, c.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(by_hand(_Gated, self.gate_proj(x), self.up_proj(x)))

class _Gated(torch.autograd.Function):
    """gelu(gate) * up; keeps the two alone, not gelu(gate) as well."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        grad_up = F.gelu(gate, approximate="tanh").mul_(g)
        return torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh"), grad_up

class Block(nn.Module):
    """Norm before and after each branch; the second acts on the branch before it is added.
    want (B, T) bool: what follows attention is done for these positions only and comes back as (n, D)."""
    def __init__(self, c, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.d_model, c.eps)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.eps)
        self.pre_feedforward_layernorm = RMSNorm(c.d_model, c.eps)
        self.post_feedforward_layernorm = RMSNorm(c.d_model, c.eps)

    def forward(self, h, cos, sin, mask, cache, want=None):
        branch = self.self_attn(self.input_layernorm(h), cos, sin, mask, cache, want)
        h = (h if want is None else h[want]) + self.post_attention_layernorm(branch)
        branch = self.mlp(self.pre_feedforward_layernorm(h))
        return h + self.post_feedforward_layernorm(branch)  # (B, T, D)

# ---- the model ----
class Gemma(nn.Module):
    """The whole decoder. Parameter names are the published ones without their leading `model.`"""
    def __init__(self, c):
        super().__init__()
        self.config = c
        # also the output head: tied; not drawn at random, which takes 2 s
        size = c.vocab_size, c.d_model
        self.embed_tokens = nn.Embedding(*size, _weight=torch.zeros(size))
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.eps)
        self.checkpointing = False  # recompute blocks in the backward pass: a third more time
        self.sharded = False  # see shard_model

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.embed_tokens.weight.dtype)

    def embed(self, ids):
        """ids (B, T), or one-hot rows (B, T, V), -> (B, T, D) scaled by sqrt(D)."""
        table = self.embed_tokens.weight
        h = ids @ table if ids.is_floating_point() else F.embedding(ids, table)
        # rounded to the dtype, as the model was trained: in bf16 59.87 becomes 59.75
        return h * torch.tensor(self.config.d_model ** 0.5, dtype=table.dtype)

    def hidden(self, ids=None, keep=None, cache=None, taps=(), embeds=None, last=None, want=None,
               first=0):
        """Run the blocks: h (B, T, D) after the final norm, and {layer: residual (B, T, D)} of taps.
        ids     (B, T) token ids, or embeds (B, T, D) as embed() gives them
        keep    (B, T) bool, False on padding (either side); None: no padding
        cache   KVCache to read from and append to
        taps    layers whose output is wanted: the residual stream after that block, as SAEs read it
        last    stop after this layer and return its residual, not normed
        first   start at this layer, with embeds as what it reads: the residual after the one below
        want    (B, T) bool: only these positions come back, (n, D); the last block's MLP skips all others"""
        c = self.config
        h = self.embed(ids) if embeds is None else embeds
        keep = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if keep is None else keep
        seen = cache["keep"].sum(1, keepdim=True) if cache else 0
        pos = (keep.long().cumsum(1) - 1 + seen).clamp(min=0)  # (B, T): padding takes no position
        pos_k, keep_k = (pos, keep) if cache is None else (cache.add("pos", pos), cache.add("keep", keep))
        rope = {theta: rope_table(pos, c.head_dim, theta, h.dtype) for theta in set(c.theta.values())}
        masks = {x: attend_mask(pos, pos_k, keep_k, c.window if x else None) for x in set(c.local)}
        masks = {x: additive(see, h.dtype) for x, see in masks.items()}
        residuals = {}
        for i, block in enumerate(self.layers[first:], first):
            cos, sin = rope[c.theta[c.local[i]]]
            args = h, cos, sin, masks[c.local[i]], cache, want if i == c.n_layers - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                # the reentrant kind drops LoRA's gradients when the embedding is frozen
                h = checkpoint(block, *args, use_reentrant=False)
            else:
                h = block(*args)
            if i in taps:
                residuals[i] = h
            if i == last:
                return h, residuals
        return self.norm(h), residuals

    def residuals(self, ids, layers, keep=None):
        """{layer: residual after that block (B, T, D)}; blocks above the deepest are not run."""
        return self.hidden(ids, keep, taps=layers, last=max(layers))[1]

    def logits(self, h):
        """h (..., D) after the final norm -> logits (..., V), fp32; the cap is on logits, not on h."""
        cap = softcap if torch.is_grad_enabled() else softcap_
        return cap(product(h, self.embed_tokens.weight), self.config.final_cap).float()

    def nll(self, h, targets, chunk=256):
        """-log p(target) (n,), nats, fp32, of h (n, D), with `chunk` rows of logits at a time."""
        return _NLL.apply(h, self.embed_tokens.weight, targets, self.config.final_cap, chunk)

    def reply_nll(self, rows):
        """-log p (n,), nats, of the masked tokens of texts (ids, mask), and each one's text (n,).
        Position t - 1 predicts token t, so a reply's first token is scored at the prompt's last; logits are
        made for scored positions only."""
        ids, keep = (t.to(self.device) for t in data.pad([ids for ids, _ in rows]))
        want = data.pad([mask for _, mask in rows])[0].to(self.device)[:, 1:].bool()  # (B, T-1)
        h, _ = self.hidden(ids[:, :-1], keep[:, :-1], want=want)  # (n, D)
        return self.nll(h, ids[:, 1:][want]), want.nonzero()[:, 0]

    def forward(self, ids, keep=None):
        """ids (B, T) -> logits (B, T, V), fp32."""
        return self.logits(self.hidden(ids, keep)[0])

class _NLL(torch.autograd.Function):
    """Head, cap, cross-entropy by chunks: 4 x 512 positions of a 256,000-word head are 2 GB.
    With a frozen head the gradient of h is made beside a chunk's logits; a trainable one
    (tied) is worked out in the backward pass."""
    @staticmethod
    def forward(ctx, h, table, targets, cap, chunk):
        ctx.cap, ctx.chunk, ctx.head_trains = cap, chunk, table.requires_grad
        nll = torch.empty(len(h), device=h.device)
        grad_h = torch.empty_like(h) if h.requires_grad and not table.requires_grad else None
        for a in range(0, len(h), chunk):
            rows = slice(a, a + chunk)
            nll[rows], d = _NLL.scored(h[rows], table, targets[rows], cap, grad_h is not None)
            if grad_h is not None:
                grad_h[rows] = d @ table
        ctx.save_for_backward(*((grad_h,) if grad_h is not None else (h, table, targets)))
        return nll

    @staticmethod
    def scored(h, table, targets, cap, slopes=True):
        """-log p (n,); with slopes its d / d head output, (softmax - onehot) (1 - (z / cap)^2), (n, V).
        Slopes overwrite the logits, 16 rows at a time: a CPU's cache holds what is fp32."""
        z, logp = softcap_(F.linear(h, table), cap), []  # (n, V)
        for part, target in zip(z.split(16), targets[:, None].split(16)):
            y = part.float()
            p = F.log_softmax(y, -1)
            logp.append(p.gather(1, target))
            if slopes:
                p.exp_().scatter_(1, target, -1, reduce="add")
                part.copy_(p if cap is None else p.addcmul_(p, y.square_(), value=-cap ** -2))
        return -torch.cat(logp)[:, 0], z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if not ctx.head_trains:
            [grad_h] = ctx.saved_tensors
            return grad_h * g[:, None].to(grad_h.dtype), None, None, None, None
        h, table, targets = ctx.saved_tensors
        grad_h, grad_table = torch.empty_like(h), None
        for a in range(0, len(h), ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            d = _NLL.scored(h[rows], table, targets[rows], ctx.cap)[1].mul_(g[rows, None])
            grad_h[rows] = d @ table
            # zeros to add to would cost a GB
            grad_table = d.T @ h[rows] if grad_table is None else grad_table.addmm_(d.T, h[rows])
        return grad_h, grad_table, None, None, None

# ---- one model on many devices ----
def shard_model(model, device):
    """A model on the CPU -> a part of each tensor on each rank's device (FSDP2).
    A block is gathered where it is used; embedding and final norm, if they train, for the rest of a step: the
    head reads them after hidden(). What is frozen and read in other places stays whole: gains, and the
    embedding. Gradients are added up."""
    from torch.distributed.device_mesh import init_device_mesh  # a second to import, so not at every start
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(torch.device(device).type, (data.ranks()[1],))
    # no list of the others: whole blocks are freed as they are cut
    stay = {p for p in model.parameters()
            if not p.requires_grad and (p.dim() == 1 or p is model.embed_tokens.weight)}
    for part in (*model.layers, model):
        block = part is not model
        fully_shard(part.to(device), mesh=mesh, ignored_params=stay, reshard_after_forward=block)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, "hidden")
    model.sharded = True
    return model

def same_bits(tensors, what):
    """UserError unless all ranks hold the same; bits are added up, which is exact anywhere."""
    if data.ranks()[1] > 1:
        kinds = {4: torch.int32, 2: torch.int16}
        bits = (t.view(kinds[t.element_size()]) for t in tensors)
        sums = str([sum(int(x.sum()) for x in pieces(t)) for t in bits])
        same = len({*data.gather(sums)}) == 1
        need(same, f"{what}: not every process holds the same weights; do their machines' files differ?")

def pieces(tensor):
    """Its numbers, 2^24 at a time: sum() copies what it adds up, wider."""
    return tensor.flatten().split(2 ** 24)

def whole(tensor):
    """A tensor as it is, a sharded one gathered: all ranks call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

# ---- loading and saving ----
def load_gemma(spec, dtype=torch.float32, device="cpu", cut=None):
    """A Gemma, frozen, from a folder in the hub's layout or a hub id; the same on all ranks.
    Built on the meta device and filled one tensor at a time, each read straight to its dtype and device. A
    missing, an extra or a misshapen tensor is a UserError.
    cut: "frozen" or "trained", for shard_model. Each rank then reads all into its machine's RAM first."""
    config, (folder, shards) = load_config(spec), weight_files(spec)
    with torch.device("meta"):
        model = Gemma(config)
    want = _published(model)
    found = {}
    for shard in shards:
        part = tensor_shapes(folder / shard)
        need(not found.keys() & part, f"{folder}: {shard} and another file hold {[*found.keys() & part][:1]}")
        found |= part
    if "lm_head.weight" in found:  # in some merged checkpoints
        want["lm_head.weight"] = want["model.embed_tokens.weight"]
    check_shapes(folder, found, want, "config.json and weights do not belong together")
    tensors = {}
    for shard in data.progress(shards, desc="weights", disable=None if len(shards) > 1 else True):
        for name, t in read_tensors(folder / shard):
            tensors[name.removeprefix("model.")] = t.to(device="cpu" if cut else device, dtype=dtype)
    head = tensors.pop("lm_head.weight", tensors["embed_tokens.weight"])
    tied = torch.equal(head, tensors["embed_tokens.weight"])
    need(tied, f"{folder}: lm_head.weight differs from the embedding; Gemma's head is tied")
    model.load_state_dict(tensors, assign=True)
    same_bits(tensors.values(), folder)
    model.requires_grad_(cut == "trained")
    return shard_model(model, device) if cut else model

def _published(model):
    return {"model." + name: p.shape for name, p in model.named_parameters()}

def weight_files(spec):
    """(folder, names of the safetensors files): one file, or the shards that the index names."""
    shards, index = ["model.safetensors"], "model.safetensors.index.json"
    if index in data.listing(spec):
        path = data.fetch(spec, [index])[0] / index
        parts = data.read_json(path, weight_map=dict)["weight_map"]
        good = parts and all(isinstance(x, str) and x.endswith(".safetensors") for x in parts.values())
        need(good, f"{path}: weight_map must name a .safetensors file for every tensor; {data.damaged(path)}")
        shards = sorted(set(parts.values()))
        with expecting(f"{path}: weight_map", UserError):
            return data.fetch(spec, shards)[0], shards
    return data.fetch(spec, shards)[0], shards

@contextlib.contextmanager
def _opened(path):
    need(Path(path).is_file(), f"no such file: {path}")
    with expecting(f"{path}: not a whole safetensors file; {data.damaged(path)}", SafetensorError, OSError):
        with safe_open(path, "pt", device="cpu") as f:
            yield f

def tensor_shapes(path, kinds=("F64", "F32", "F16", "BF16")):
    """{name: shape} of a safetensors file, by its header; UserError for tensors of no such kind."""
    with _opened(path) as f:
        parts = {name: f.get_slice(name) for name in f.keys()}
    for name, part in parts.items():
        need(part.get_dtype() in kinds, f"{path}: tensor {name}: {part.get_dtype()}, wanted one of {kinds}")
    return {name: tuple(part.get_shape()) for name, part in parts.items()}

def read_tensors(path):
    """Yield (name, tensor) of a safetensors file, each looked at by finite()."""
    with _opened(path) as f:
        for name in f.keys():
            yield name, finite(f.get_tensor(name), f"{path}: tensor {name}")

def finite(tensor, what):
    """The tensor; UserError if a NaN or inf is in it."""
    fine = all(torch.isfinite(x.sum(dtype=torch.float32)) for x in pieces(tensor))  # they reach the sum
    need(fine, f"{what} holds NaN or inf")
    return tensor

def check_shapes(path, found, want, advice):
    """UserError, ending in `advice`, unless both {name: shape} are equal."""
    for name in [*found, *sorted(want)]:
        have, wanted = (tuple(part[name]) if name in part else "missing" for part in (found, want))
        need(have == wanted, f"{path}: tensor {name}: here {have}, wanted {wanted}; {advice}")

def save_tensors(path, tensors, **metadata):
    """Write a safetensors file whole or not at all; UserError for NaN or inf.
    All ranks call it, for sharded tensors are gathered, one at a time; rank 0 holds them and writes."""
    plain = {}
    for n, t in tensors.items():
        t = whole(t.detach())
        if data.lead():
            plain[n] = finite(t.cpu().contiguous(), f"{path} is not written: {n}")
    if data.lead():
        with data.replacing(path) as beside, expecting(f"cannot write {path}", SafetensorError):
            save_file(plain, beside, metadata={"format": "pt", **metadata})

def save_gemma(model, folder, shard_bytes=5 * 10 ** 9):
    """Write config.json and weights in the hub's layout, in files of shard_bytes; no tokenizer.
    All ranks call it, see save_tensors."""
    folder, dtype = Path(folder), str(model.dtype).removeprefix("torch.")
    with torch.device("meta"):
        like = Gemma(model.config).to(model.dtype)
    check_shapes(folder, _published(model), _published(like), "merge and detach its adapters first")
    # both spellings of the dtype: transformers would cast to the one that it finds
    data.write_json(folder / "config.json", {**model.config.raw, "dtype": dtype, "torch_dtype": dtype})
    tensors = {"model." + n: p for n, p in model.named_parameters()}
    sizes = {"model." + n: p for n, p in like.named_parameters()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for name, inside in split.filename_to_tensors.items():
        save_tensors(folder / name, {n: tensors[n] for n in inside})
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        data.write_json(folder / "model.safetensors.index.json", index)

# ---- talking ----
@torch.no_grad()
def generate(model, prompts, max_new, stop=(data.EOS,), temperature=0.0, seeds=None):
    """Continuations of prompts (lists of ids): lists of new ids, a stop token included.
    temperature 0 is greedy. Otherwise `seeds` holds a number per prompt from which its tokens are drawn,
    whatever the other rows of the batch and the global generator are."""
    ids, keep = (t.to(model.device) for t in data.pad(prompts, "left"))  # left: last tokens in one column
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds or []]
    cache, out, live = KVCache(), [[] for _ in prompts], list(range(len(prompts)))
    for _ in range(max_new):
        logits = model.logits(model.hidden(ids, None if cache else keep, cache)[0][:, -1:])[:, 0]  # (B, V)
        finite(logits, "what the model says of the next token")
        greedy = temperature == 0
        ids = logits.argmax(-1) if greedy else _draw(logits / temperature, [rngs[i] for i in live])  # (B,)
        for i, token in zip(live, ids.tolist()):
            if not out[i] or out[i][-1] not in stop:
                out[i].append(token)
        going = [n for n, i in enumerate(live) if out[i][-1] not in stop]
        # a sharded model's rank that has ended goes along until all have
        if not any(data.gather(going) if model.sharded else [going]):
            break
        if 0 < len(going) < len(live):  # rows that have ended leave the batch
            live, ids = [live[n] for n in going], ids[going]
            cache.update({key: x[going] for key, x in cache.items()})
        ids = ids[:, None]
    return out

def _draw(logits, rngs):
    """A token per row (B,) of logits (B, V), drawn by inverting the cumulated softmax."""
    total = F.softmax(logits.double(), -1).cumsum(-1)  # (B, V)
    u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in rngs]).to(total.device)
    at = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
    return at.clamp(max=logits.shape[1] - 1)

def main():
    from benchmarks import talk
    talk.main()

if __name__ == "__main__":
    data.run_main(main)
