"""merged.py - `python lora.py RUN` shows an adapter; --merge OUT makes it and its base one, for the hub."""
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lora
import model_gemma
from data import need

def main():
    ap = data.Arguments(description="Show what an adapter holds, or merge it into its base.")
    ap.add_argument("run", type=Path, help="a folder with adapter_model.safetensors and adapter_config.json")
    ap.add_argument("--merge", metavar="OUT", type=Path, help="write base and adapter as one model there")
    ap.add_argument("--model", help="the base (as adapter_config.json says)")
    ap.add_argument("--dtype", choices=model_gemma.DTYPES, help="of the merged weights (the base's)")
    args = ap.parse_args()
    ap.refuse_unread((args.merge, "--merge", "model dtype"))
    if args.merge:
        save_merged(args.run, args.merge, args.model, args.dtype)
    else:
        show(args.run)

def show(run):
    """Print an adapter: a line a layer, Frobenius norms of its change dW (out, in) and of A and B."""
    c, tensors = lora.read_adapter(run)
    base, count = c.get("base_model_name_or_path"), sum(t.numel() for t in tensors.values())
    print(f"rank {c['r']}, alpha {c['lora_alpha']}, on {base!r}; {count:,} parameters")
    for name in sorted((n for n in tensors if ".lora_A." in n), key=lambda n: (len(n), n)):
        A, B = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        size = c["lora_alpha"] / c["r"] ** (.5 if c.get("use_rslora") else 1) * (B @ A).norm()
        short = name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        print(f"{short:32s} |dW| {size:9.4f}   |A| {A.norm():8.4f}   |B| {B.norm():8.4f}")
    if (run / "sails.json").is_file():
        for key, value in data.read_json(run / "sails.json", method=str, drifts=(list, None)).items():
            print(" ".join(f"{key}: {value if key != 'drifts' else 'a row an adapter'}".split()))

def save_merged(run, out, base=None, dtype=None, shard_bytes=5 * 10 ** 9):
    """Write base and adapter as one model in the hub's layout, with tokenizer and model card."""
    (c, _), run, out = lora.read_adapter(run), Path(run), Path(out)
    base = str(base or "@".join(filter(None, (c.get("base_model_name_or_path"), c.get("revision")))))
    need(base, f"{run}: adapter_config.json names no base; add --model")
    raw = model_gemma.load_config(base).raw
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype")
    need(dtype in model_gemma.DTYPES, f"{base}: its config.json has dtype {dtype}; add --dtype")
    with data.expecting(f"{run}: damaged run.json", AttributeError, TypeError, ValueError):
        card = model_card(run, base, dtype)
    with data.owned(out, "a new folder's name"):  # so a new or an empty one
        model = model_gemma.load_gemma(base, model_gemma.DTYPES[dtype])
        lora.load_adapter(model, run)
        lora.merge(model)
        lora.detach(model)
        model_gemma.save_gemma(model, out, shard_bytes)
        copied = re.compile(r"(tokenizer|special|generation|chat)[^/]*").fullmatch
        for name in filter(copied, data.listing(base)):
            shutil.copy(data.fetch(base, [name])[0] / name, out / name)
        data.write_text(out / "README.md", card)
    print(f"{out}: {base} with the adapter of {run} merged into it, in {dtype}")

def model_card(run, base, dtype):
    """README.md of a merged model: model_card.md, filled from the run's folder."""
    read = lambda name: data.read_json(run / name) if (run / name).is_file() else {}
    s = read("adapter_config.json") | read("run.json").get("settings", {}) | dict(base=base, dtype=dtype)
    name = lambda x: Path(x).resolve().name if isinstance(x, str) and Path(x).exists() else x
    s = {k: name(x) for k, x in s.items() if x is not None}  # a reader has no use for this machine's folders
    results = data.read_text(run / "table.md") if (run / "table.md").is_file() else "-"
    card = data.read_text(Path(__file__).with_name("model_card.md"))
    return card.format_map(defaultdict(lambda: "-", s, hub_id=s["base"].split("@")[0], results=results))
