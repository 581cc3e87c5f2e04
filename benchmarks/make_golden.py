"""make_golden.py - write tests/golden_gemma2.safetensors and _gemma3, with transformers as the oracle.

    pip install -r requirements.txt -r tests/requirements.txt && python benchmarks/make_golden.py

A file holds a tiny random model and what transformers' eager attention makes of two padded rows, so that the
parity tests run without transformers. The configuration makes every usual mistake show: weights of standard
deviation 1, random norm weights, a window shorter than the text, a query scalar that is not head_dim, heads *
head_dim != D, fewer key/value heads than query heads, caps that bite.
Tensors: weights by their published names (bf16); ids, keep_right, keep_left (B, T); for float32 and bfloat16
DTYPE.SIDE.logits (B, T, V), DTYPE.right.embedding and .layer.i (B, T, D). Metadata: config, versions, CPU.
"""
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = dict(vocab_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
             query_pre_attn_scalar=12, initializer_range=1.0, max_position_embeddings=64)
KINDS = dict(
    gemma2=dict(SHAPE, hidden_size=20, intermediate_size=24, num_hidden_layers=3,
                attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    gemma3=dict(SHAPE, hidden_size=16, intermediate_size=20, num_hidden_layers=4,
                layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")]))
LENGTHS = 10, 6

def oracle(kind, **changes):
    """A transformers model of KINDS[kind] with random weights, norms included, that bf16 can hold exactly."""
    import transformers
    config, model = dict(gemma2=(transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
                         gemma3=(transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM))[kind]
    torch.manual_seed(0)
    model = model(config(**{**KINDS[kind], **changes}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((torch.randn_like(p) if "norm" in name else p).bfloat16().float())
    return model

def reload(model, folder, dtype):
    """The same weights in another dtype. Not model.bfloat16(), which would spoil RoPE's frequencies."""
    return type(model).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

def padded(lengths, side):
    """keep (B, T): which positions hold a token, for rows of these lengths padded on one side."""
    at = torch.arange(max(lengths))
    return torch.stack([at < n if side == "right" else at >= len(at) - n for n in lengths])

@torch.no_grad()
def their_walk(model, ids, keep):
    """{"embedding", "layer.0", ..., "logits"} of a transformers model."""
    walk, blocks = {}, {f"layer.{i}": m for i, m in enumerate(model.model.layers)}
    handles = [module.register_forward_hook(lambda _module, _args, out, name=name: walk.update({name: out}))
               for name, module in {"embedding": model.model.embed_tokens, **blocks}.items()]
    pos = (keep.long().cumsum(1) - 1).clamp(min=0)     # given, because the default positions count padding
    walk["logits"] = model(ids, attention_mask=keep.long(), position_ids=pos, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return walk

def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    for kind in KINDS:
        model, ids = oracle(kind), torch.randint(3, 40, (len(LENGTHS), max(LENGTHS)))
        tensors = {n: p.detach().bfloat16() for n, p in model.named_parameters() if n != "lm_head.weight"}
        tensors |= dict(ids=ids, **{f"keep_{side}": padded(LENGTHS, side) for side in ("right", "left")})
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = (Path(folder) / "config.json").read_text()
            for dtype in ("float32", "bfloat16"):
                again = reload(model, folder, getattr(torch, dtype))
                for side in ("right", "left"):
                    walk = their_walk(again, ids, tensors[f"keep_{side}"])
                    walk = walk if side == "right" else {"logits": walk["logits"]}
                    tensors |= {f"{dtype}.{side}.{name}": t.contiguous() for name, t in walk.items()}
        meta = dict(config=config, transformers=transformers.__version__, torch=torch.__version__,
                    cpu=torch.backends.cpu.get_cpu_capability(), made_by="benchmarks/make_golden.py")
        file = Path(__file__).resolve().parent.parent / "tests" / f"golden_{kind}.safetensors"
        save_file(tensors, file, metadata=meta)

if __name__ == "__main__":
    main()
