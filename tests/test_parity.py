"""Our Gemma against transformers' Gemma2 and Gemma3 with eager attention, on make_golden.py's files and live.
Logits are compared, never generated text: most mistakes in a Gemma forward leave every greedy token as it is.
bf16 is compared bit by bit, because one misplaced cast moves logits no more than bf16 itself."""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import data
from benchmarks import make_golden
from model_gemma import additive, attend_mask, config_from_json, load_gemma, rope_table

both = pytest.mark.parametrize("kind", ("gemma2", "gemma3"))
sides = pytest.mark.parametrize("side", ("right", "left"))
dtypes = pytest.mark.parametrize("dtype, tol", ((torch.float32, 1e-4), (torch.bfloat16, 0)), ids=str)

class Golden:
    """One golden file: its tensors, its config.json, and our model loaded from its weights."""
    def __init__(self, kind):
        with safe_open(Path(__file__).parent / f"golden_{kind}.safetensors", "pt") as f:
            self.meta, self.tensors = f.metadata(), {n: f.get_tensor(n) for n in f.keys()}
        self.ids, self.config = self.tensors["ids"], json.loads(self.meta["config"])

    def model(self, folder, dtype):
        data.write_json(folder / "config.json", self.config)
        save_file({n: t for n, t in self.tensors.items() if "model." in n}, folder / "model.safetensors")
        return load_gemma(folder, dtype)

    def keep(self, side="right"):
        return self.tensors[f"keep_{side}"]

    def walk(self, dtype, side="right"):
        start = f"{dtype}.{side}.".removeprefix("torch.")
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

@torch.no_grad()
def our_walk(model, ids, keep):
    """{"embedding", "layer.0", ..., "logits"}, the names that make_golden.their_walk gives."""
    h, taps = model.hidden(ids, keep, taps=range(len(model.layers)))
    blocks = {f"layer.{i}": r for i, r in taps.items()}
    return {"embedding": model.embed(ids), **blocks, "logits": model.logits(h)}

def first_difference(ours, theirs, keep, tol=0.0):
    """The layer debugger: "layer.2: 0.031" for the first place that differs by more than tol, else None."""
    for name in sorted(theirs, key=list(ours).index):
        gap = (ours[name].float() - theirs[name].float())[keep].abs().max().item()
        if not gap <= tol:                             # also true for NaN
            return f"{name}: {gap:.3g}"

@torch.no_grad()
def equal_shares(model, ids, walk, keep):
    """Share of equal numbers after each block and the head, each given THEIR input: nothing accumulates."""
    c, at = model.config, (keep.long().cumsum(1) - 1).clamp(min=0)
    ours, h = {"embedding": model.embed(ids)}, walk["embedding"]
    for i, block in enumerate(model.layers):
        mask = additive(attend_mask(at, at, keep, c.window if c.local[i] else None), h.dtype)
        ours[f"layer.{i}"] = block(h, *rope_table(at, c.head_dim, c.theta[c.local[i]], h.dtype), mask, None)
        h = walk[f"layer.{i}"]
    ours["logits"] = model.logits(model.norm(h)).to(h.dtype)
    return {name: (t == walk[name])[keep].float().mean().item() for name, t in ours.items()}

@sides
@both
@dtypes
def test_logits_equal_transformers_in_bf16_bit_by_bit(kind, side, dtype, tol, tmp_path):
    g = Golden(kind)
    if not tol and g.meta["cpu"] != torch.backends.cpu.get_cpu_capability():
        pytest.skip(f"the golden file comes from an {g.meta['cpu']} CPU; others may round a sum otherwise")
    walk = our_walk(g.model(tmp_path, dtype), g.ids, g.keep(side))
    assert first_difference(walk, g.walk(dtype, side), g.keep(side), tol) is None

@both
def test_each_bf16_block_alone_rounds_like_transformers_on_any_cpu(kind, tmp_path):
    g = Golden(kind)
    shares = equal_shares(g.model(tmp_path, torch.bfloat16), g.ids, g.walk(torch.bfloat16), g.keep())
    assert min(shares.values()) > .95, shares          # a rare tie may differ; a wrong order moves far more

def test_the_layer_debugger_names_the_first_layer_that_differs(tmp_path):
    g = Golden("gemma2")
    model = g.model(tmp_path, torch.float32)
    model.layers[1].mlp.up_proj.weight[0, 0] += 1
    found = first_difference(our_walk(model, g.ids, g.keep()), g.walk(torch.float32), g.keep(), 1e-4)
    assert found.startswith("layer.1: ")

@both
def test_old_and_new_config_spellings_mean_the_same(kind):
    new = Golden(kind).config
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    rope, first_global = new["rope_parameters"], new["layer_types"].index("full_attention")
    if kind == "gemma2":
        old |= dict(rope_theta=rope["rope_theta"])
    else:
        local, full = (rope[f"{x}_attention"]["rope_theta"] for x in ("sliding", "full"))
        old |= dict(rope_theta=full, rope_local_base_freq=local, sliding_window_pattern=first_global + 1)
    assert vars(config_from_json(new)) | {"raw": 0} == vars(config_from_json(old)) | {"raw": 0}

@pytest.mark.parametrize("kind, layers, full, caps, theta", [
    ("gemma3_text", 18, [5, 11, 17], (None, None), 1e6), ("gemma2", 42, [*range(1, 42, 2)], (50., 30.), 1e4)])
def test_published_270m_and_9b_configs_need_no_layer_types(kind, layers, full, caps, theta):
    c = config_from_json(dict(
        model_type=kind, hidden_size=640, num_hidden_layers=layers, intermediate_size=2048, head_dim=256,
        num_attention_heads=4, num_key_value_heads=1, vocab_size=262144, sliding_window=512))
    assert [i for i, local in enumerate(c.local) if not local] == full
    assert (c.attn_cap, c.final_cap) == caps
    assert c.theta == {True: 1e4, False: theta}
    assert c.qk_norm == (kind == "gemma3_text")

@pytest.mark.parametrize("kind, changes", [
    ("gemma2", {}), ("gemma2", dict(sliding_window=64, num_hidden_layers=4)), ("gemma3", {}),
    ("gemma2", dict(attn_logit_softcapping=50., num_attention_heads=5, num_key_value_heads=1)),
    ("gemma3", dict(num_key_value_heads=1, layer_types=None, num_hidden_layers=7))], ids=str)
@dtypes
def test_logits_equal_transformers_live(kind, changes, dtype, tol, tmp_path):
    pytest.importorskip("transformers")
    theirs = make_golden.oracle(kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_gemma(tmp_path, dtype), make_golden.reload(theirs, tmp_path, dtype)
    ids = torch.randint(3, 40, (4, 12))
    for lengths, side in (((12, 12, 12, 12), "right"), ((12, 9, 5, 1), "right"), ((12, 9, 5, 1), "left")):
        keep = make_golden.padded(lengths, side)
        walks = our_walk(ours, ids, keep), make_golden.their_walk(theirs, ids, keep)
        assert first_difference(*walks, keep, tol) is None

@pytest.mark.slow
@pytest.mark.skipif("SAILS_REAL" not in os.environ, reason="SAILS_REAL: a folder with gemma-3-270m/, text/")
def test_real_270m_loss_on_english_equals_transformers():
    transformers = pytest.importorskip("transformers")
    spec, texts = (Path(os.environ["SAILS_REAL"]) / name for name in ("gemma-3-270m", "text"))
    tokens = data.encode_plain(data.load_tokenizer(spec), data.read_texts(texts)[0])
    ids, ours = torch.tensor([[data.BOS] + tokens[:599]]), load_gemma(spec)            # 600 > window 512
    assert ids.shape == (1, 600)
    nll = ours.nll(ours.hidden(ids)[0][0, :-1], ids[0, 1:]).mean().item()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(spec, dtype=torch.float32)
    want = F.cross_entropy(theirs(ids).logits[0, :-1].double(), ids[0, 1:]).item()
    assert nll == pytest.approx(want, abs=1e-3)
    assert 2 < nll < 4                                 # about 12: no embedding scale on either side
