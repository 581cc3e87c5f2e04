"""compare.py - two runs over the same prompts, paired prompt by prompt.

    python benchmarks/compare.py DIR OTHER     two folders that eval.py wrote, or two run folders of train.py

A row per set and measure: both rates, and the difference DIR - OTHER with its bootstrap 95 % interval over
prompts. Prompts whose reply has no verdict in one of the runs are in none of the three but in `left out`.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as ev

def read_run(folder):
    """({id: response}, {judge: {id: verdict}} of the judges that have judged every response)."""
    files = [Path(folder) / f"{name}.jsonl" for name in ("responses", "verdicts")]
    data.need(all(f.exists() for f in files), f"{folder} lacks responses.jsonl or verdicts.jsonl: not a run")
    kinds = ev.RESPONSES, ev.VERDICTS
    rows, verdicts = ([row for _, row in data.read_rows(f, **kind)] for f, kind in zip(files, kinds))
    ids, judges = [r["id"] for r in rows], {}
    for v in verdicts:
        judges.setdefault(v["judge"], {})[v["id"]] = v
    return dict(zip(ids, rows)), {name: said for name, said in judges.items() if said.keys() >= set(ids)}

def compare(folder, other):
    """{judge: {set and measure: its row}}; UserError where the two runs cannot be paired."""
    (ours, said), (theirs, there), judges = read_run(folder), read_run(other), {}
    asked = lambda run, i: [run.get(i, {}).get(key) for key in ("prompt_sha256", "set", "label")]
    odd = [i for i in ours | theirs if asked(ours, i) != asked(theirs, i)]
    title = f"{folder} and {other} cannot be paired"
    data.need(not odd, f"{title}: {len(odd)} prompts are missing or different in one of them, as {odd[:1]}")
    data.need(said.keys() & there.keys(), f"{title}: judged by {list(said)}, and by {list(there)}")
    for judge in (name for name in said if name in there):
        groups, judges[judge] = {}, {}
        for i, r in ours.items():
            name = f"{r['set']}, {'over-refusal' if r['label'] == 'benign' else 'safety rate'}"
            groups.setdefault(name, []).append((said[judge][i], there[judge][i]))
        for name, group in groups.items():
            both = [pair for pair in group if None not in map(ev.refused, pair)]
            rates = [ev.safety_rate(side) for side in zip(*both)] or [None, None]  # one formula for both
            change = [int(ev.refused(a)) - int(ev.refused(b)) for a, b in both]
            judges[judge][name] = {"pairs": len(both), "left out": len(group) - len(both), "DIR": rates[0],
                                   "OTHER": rates[1], "difference": ev.interval(change)}
    return judges

def main():
    ap = data.Arguments(description="Compare two runs over the same prompts, prompt by prompt.")
    ap.add_argument("folder", metavar="DIR")
    ap.add_argument("other", metavar="OTHER")
    for judge, table in compare(**vars(ap.parse_args())).items():
        print(f"## Judge: {' '.join(judge.split())}", "", *ev.markdown("prompts", table), "", sep="\n")

if __name__ == "__main__":
    data.run_main(main)
