"""talk.py - `python model_gemma.py`: one reply, or a chat, by a model as it is, with an adapter, or steered.

    python model_gemma.py --model M [--adapter RUN] [--steer LAYER:FEATURE=STRENGTH --sae S] [--prompt TEXT]
"""
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lora
import model_gemma
import sae as sae_module
from data import need

def steer(model, sae, layer, feature, strength):
    """Add strength times a feature's decoder row after a block, everywhere, until .remove()."""
    sae_module.check_fit(sae, model, layer)
    need(feature < len(sae.W_dec), f"{sae.name}: no feature {feature}; it has 0..{len(sae.W_dec) - 1}")
    row = (strength * sae.W_dec[feature]).to(model.device, model.dtype)  # (D,)
    return model.layers[layer].register_forward_hook(lambda block, args, h: h + row)

def parser():
    """Every setting."""
    ap = data.Arguments(description="Let a Gemma answer a prompt or, without --prompt, chat line by line.")
    a = ap.add_argument
    a("--model", required=True, help="folder in the hub's layout, or hub id")
    a("--adapter", help="a finished run's folder, or any plain LoRA in PEFT's form")
    a("--steer", metavar="LAYER:FEATURE=STRENGTH", action="append", default=[], help="may be repeated")
    a("--sae", help="for --steer: folder or hub id laid out like Gemma Scope")
    a("--width", default="16k", help="of that SAE")
    a("--prompt", help="default: every line of the terminal is a turn of a chat")
    a("--template", choices=data.TEMPLATES, help="default: by the model's name")
    a("--max-new", type=data.at_least(1), default=64)
    a("--temperature", type=data.at_least(0, float), default=0.)
    a("--dtype", choices=model_gemma.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    a("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    return ap

def main():
    ap = parser()
    args = ap.parse_args()
    ap.refuse_unread((args.steer, "--steer", "sae width"))
    steering = [re.fullmatch(r"(\d{1,6}):(\d{1,9})=(-?\d+(?:\.\d+)?)", text) for text in args.steer]
    need(all(steering) and (args.sae or not steering), "--steer wants LAYER:FEATURE=STRENGTH and --sae")
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    model = model_gemma.load_gemma(args.model, model_gemma.DTYPES[dtype], args.device)
    tok = data.load_tokenizer(args.model, model.config.vocab_size)
    template = args.template or data.default_template(args.model, tok)
    if args.adapter:
        lora.load_adapter(model, args.adapter)
    for layer, feature, strength in (m.groups() for m in steering):
        sae = sae_module.load_sae(args.sae, int(layer), args.width, device=args.device)
        steer(model, sae, int(layer), int(feature), float(strength))
    if args.prompt is None:
        data.note(f"{args.model}: template {template}; each line is a turn, Ctrl-D ends")
    turns, stop = [], data.stop_ids(tok, template)
    for line in filter(str.strip, sys.stdin if args.prompt is None else [args.prompt]):
        with data.expecting("this line is not UTF-8 text", UnicodeEncodeError):
            line.encode()
        turns.append(dict(role="user", content=line))
        ids, _ = data.render_chat(tok, turns, None, template)
        [new] = model_gemma.generate(model, [ids], args.max_new, stop, args.temperature, [len(turns)])
        turns.append(dict(role="assistant", content=data.own_turn(tok.decode(new), template)))
        print(turns[-1]["content"], flush=True)

if __name__ == "__main__":
    data.run_main(main)
