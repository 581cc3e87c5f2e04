"""choices.py - multiple choice: what alignment left of a model's knowledge, on questions as MMLU lists them.

    python benchmarks/choices.py --model M [--adapter RUN] --choices FILE
FILE: JSONL {"question", "choices", "answer": the right one's letter or index}, or MMLU's csv.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import model_gemma
from data import need

LETTERS = "ABCDEFGHIJ"

def read_choices(path):
    """[(question, choices, index of the right one)]; UserError for a row that is none."""
    if Path(path).suffix == ".csv":  # question, choices, the right letter, with or without a header
        table = [row for row in data.csv_table(path) if row[-1] != "answer"]
        need(table and len(table[0]) > 3, f"{path}: wanted rows of question, choices, right letter")
        rows = [dict(question=q, choices=c, answer=a.strip()) for q, *c, a in table]
    else:
        rows = [row for _, row in data.read_rows(path)]
    out = []
    for n, row in enumerate(rows, 1):
        question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
        if isinstance(answer, str):
            answer = LETTERS.find(answer) if len(answer) == 1 else -1
        good = isinstance(question, str) and isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS)
        good = good and all(isinstance(c, str) for c in choices)
        good = good and type(answer) is int and 0 <= answer < len(choices)
        wanted = f"a question, 2 to {len(LETTERS)} choices, the right letter or index"
        need(good, f"{path}: row {n}: wanted {wanted}")
        out.append((question.strip(), choices, answer))
    need(out, f"{path}: no question in it")
    return out

def choice_accuracy(model, tok, path, template, batch_size=16):
    """Share of questions whose right letter is the likeliest reply, dict n, value (an interval)."""
    questions, texts = read_choices(path), []
    for question, choices, _ in questions:
        listed = [question, *(f"{x}. {c}" for x, c in zip(LETTERS, choices)), "Answer with the letter alone."]
        for x in LETTERS[:len(choices)]:
            ids, mask = data.render_chat(tok, data.as_turns("\n".join(listed)), x, template)
            n = len(ids) - mask[::-1].index(1) - 1  # where the end token stands: not asked about
            texts.append((ids[:n], mask[:n]))
    lp, _ = evaluation.logprobs(model, texts, batch_size, "choices")
    at = np.cumsum([0] + [len(choices) for _, choices, _ in questions])
    right = [int(lp[a:b].argmax()) == answer for a, b, (_, _, answer) in zip(at, at[1:], questions)]
    return dict(n=len(right), value=evaluation.interval(right))

def main():
    ap = data.Arguments(description="Multiple choice by the likeliest letter.")
    a = ap.add_argument
    a("--model", required=True, help="folder or hub id")
    a("--adapter", help="a finished run's folder, or any plain LoRA in PEFT's form")
    a("--merged", action="store_true", help="merge --adapter into the weights first")
    a("--choices", required=True, help="JSONL or MMLU's csv")
    a("--template", choices=data.TEMPLATES, help="default: by the model's name")
    a("--batch-size", type=data.at_least(1), default=16)
    a("--dtype", choices=model_gemma.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    a("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    ap.refuse_unread((args.adapter, "--adapter", "merged"))
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    model, tok, _ = evaluation.load(args, args.model, args.adapter)
    template = args.template or data.default_template(args.model, tok)
    found = choice_accuracy(model, tok, args.choices, template, args.batch_size)
    print("\n".join(evaluation.markdown("measure", {"multiple choice, accuracy": found})))

if __name__ == "__main__":
    data.run_main(main)
