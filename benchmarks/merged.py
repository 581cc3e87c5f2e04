"""merged.py - `python lora.py RUN --merge OUT`: base and adapter as one model, ready for the hub."""
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
