"""pages.py - a run's page, or a comparison's: report.html, one file that opens anywhere, without a network.

train.py makes it at the end from the run's own files; nothing is measured again. Every text is escaped as it
is read, because a token or a topic may be <script>. pages.html is what stands around the numbers.
"""
import html
import json
import math
import re
import string
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model_gemma
from benchmarks import explain
from benchmarks.pictures import svg_lines, ticks
from eval import NLL, best_rates, markdown, table

NEURONPEDIA = re.compile(r"https://www\.neuronpedia\.org/[\w/.-]+")
RATES = {"safety rate": "Safety rate", "over-refusal": "Over-refusal", "help": "Help, harmless requests done"}
LOGGED = {"loss": "Loss", "safety rate": "Safety rate, validation prompts",
          "over-refusal": "Over-refusal, validation prompts", "lr": "Learning rate",
          "grad_norm": "Gradient norm, before clipping", "margin": "DPO margin, nats", "reward": "Reward",
          "kl": "KL from the base, nats"}
SETS = {"replies": ("chosen", "rejected", "replies"), "prompts": ("harmful", "benign", "prompts")}
FIRST = 6  # features shown at once, of every layer; the others unfold

def report(folder, runs):
    """Write and print the table of runs, read from their folders; then their pages."""
    if not data.lead():
        return
    paths = [Path(r.out) / "results.json" for r in runs]
    kinds = dict(method=str, lr=float, seed=int, validation=dict, sets=dict)
    with data.expecting(f"a damaged file below {folder}", LookupError, TypeError, AttributeError, ValueError):
        lines = table([data.read_json(path, **kinds) for path in paths])
        data.write_text(folder / "table.md", "\n".join(lines) + "\n")
        chosen = [Path(r.out) / "features.json" for r in runs if r.method == "sails"]
        if chosen and len(runs) > 2:  # a single run has printed them
            shown = explain.feature_lines(data.read_json(chosen[0]))
            data.say(f"Features that SAILS chose ({chosen[0].with_suffix('.md')}):", *shown, "")
        data.say(*lines)
        beside = "; a folder a run beside it" if len(runs) > 2 else ""
        data.say(f"Open {write_pages(folder, runs)} in a browser{beside}")

def write_pages(folder, runs):
    """Write a report.html in the folder of every run and, of several, one in FOLDER; return FOLDER's.
    runs: their settings, as train.combinations gives them."""
    results = {Path(r.out): read(Path(r.out) / "results.json") for r in runs}
    bases = {r["seed"]: path for path, r in results.items() if r["method"] == "base"}
    alone = [path for path, r in results.items() if r["method"] != "base"]
    for path in alone:
        write_page(path, {p: results[p] for p in (bases[results[path]["seed"]], path)})
    if len(alone) > 1:
        write_page(folder, results)
    return folder / "report.html"

def write_page(folder, results):
    """Write FOLDER/report.html about these runs, {their folder: results.json}."""
    best = best_rates(results.values())
    tuned = {m: [path for path, r in results.items() if (r["method"], r["lr"]) == (m, best[m])]
             for m in best if m != "base"}                     # a folder a seed
    shown = tuned["sails" if "sails" in tuned else next(iter(tuned))][0]
    run, lines, several = read(shown / "run.json"), table(list(results.values())), len(results) > 2
    parts = dict(
        title=title(run["settings"], best), sentence=sentence(run["settings"], results, best, shown),
        table=html_table(lines) + "".join(f"<p>{line}</p>\n" for line in lines if line and line[0] != "|"),
        rates=rates(results) if several else "", runs=every_run(folder, results) if several else "",
        curves=curves(tuned), settings=settings(run), shown=html.escape(shown.name), **words(run["settings"]),
        averaged="Means over seeds and over neighbouring steps, at each method's best rate; a line may hide "
                 "an equal one." if several else "")
    page, card = data.read_text(Path(__file__).with_suffix(".html")).split("<!-- a feature -->\n")
    parts |= subspace(shown, run["settings"]) | drift(shown)
    parts |= dict(features=features(shown, card, SETS[run["settings"]["contrast"]]), explain=explained(shown))
    for key in [key for key, part in parts.items() if not part]:  # a section without content goes
        page = re.sub(rf'<section id="{key}">.*?</section>\n', "", page, flags=re.S)
    data.write_text(folder / "report.html", string.Template(page).substitute(parts))

def read(path):
    """A JSON file, every text in it escaped for HTML; None if the run has no such file."""
    if path.exists():
        text = json.dumps(data.read_json(path), ensure_ascii=False)
        return json.loads(html.escape(text, quote=False).replace("|", "&#124;"))  # else a cell would end

def html_table(lines, kind=""):
    """The Markdown table among these lines, escaped already, as HTML; kind "heat" shades numbers 0..1."""
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "| ---" not in line]
    shade = lambda x: f' style="--v:{x}"' if kind and re.fullmatch(r"[01]\.\d+", x) else ""
    cells = lambda tag, row: "".join(f"<{tag}{shade(x)}>{x}</{tag}>" for x in row)
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows[1:])
    head = f'<table class="{kind}">\n<tr>{cells("th", rows[0])}</tr>'
    return f'<div class="box">{head}\n{body}\n</table></div>\n'

# ---- the head ----
def title(s, best):
    """What was done to which model."""
    methods = ", ".join(m for m in best if m != "base")
    return f"{methods} on {data.model_name(s['model'])}"

def sentence(s, results, best, shown):
    """The run, or the comparison, in one sentence or two."""
    names = sorted({Path(read(path / "run.json")["settings"]["data"]).name for path in results})
    steps = f"{s['objective']} on {', '.join(names)}, {s['steps']} steps of {s['batch']}"
    if len(results) > 2:
        seeds, lrs = (len({r[key] for r in results.values()}) for key in ("seed", "lr"))  # the base's lr is 0
        return (f"{len(best) - 1} methods on {data.model_name(s['model'])}: {steps}; {len(results)} runs, "
                f"{plural(seeds, 'seed')}, {plural(lrs - 1, 'learning rate')}. Features, subspace and "
                f"settings below are those of <code>{html.escape(shown.name)}</code>.")
    after, before = results[shown], next(r for r in results.values() if r["method"] == "base")
    where, rates = next(iter(after["sets"].items()), ("", {}))
    moved = [f"{key} {before['sets'][where][key][0]:.3f} &rarr; <b>{rates[key][0]:.3f}</b>"
             for key in RATES if rates.get(key) and before["sets"][where].get(key)]
    moved += [f"NLL of held-out replies {before[NLL][0]:.3f} &rarr; <b>{after[NLL][0]:.3f}</b>"]
    rank = "" if s["method"] == "full" else f", rank {s['r']} on {','.join(s['targets'])}"
    trained = f"{s['method']} trained {after['parameters']:,} parameters{rank}"
    return (f"{trained}: {steps} at learning rate {s['lr']:g}. "
            f"{f'On {where} prompts: ' * bool(where)}{', '.join(moved)}.")

def words(s):
    """{choice, texts}: what this run's features are and where they are shown."""
    one, other, kind = SETS[s["contrast"]]
    means = f"E[a | {one}] &minus; E[a | {other}]"
    rule = dict(absolute="|&Delta;|", relative=f"&Delta; / E[a | {other}]", t="|t|")[s["score"]]
    choice = f"The SAE features that tell {one} from {other} {kind} best, by {rule}, best first"
    if s["method"] == "random-features":
        choice = f"SAE features drawn at random among those that fire on {one} or {other} {kind}"
    texts = f"plain text (with <code>--show-texts</code>: in the {kind})"
    texts = f"the {kind} themselves" if s["show_texts"] else texts
    return dict(choice=f"{choice}. &Delta; = {means}, t is &Delta; over its standard error", texts=texts)

def plural(n, word):
    """A number and its noun."""
    return f"{n} {word}{'s' * (n != 1)}"

def settings(run):
    """All of run.json, a name and a value each."""
    every = run["settings"] | dict(git=run["git"]) | run["versions"]
    return "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>\n" for key, value in every.items())

def every_run(folder, results):
    """A table of all runs, each with the address of its own page."""
    rows = {}
    for path, r in results.items():
        where = next(iter(r["sets"]), None)
        measured = {**r, **r["sets"].get(where, {})}
        name = html.escape(str(path.relative_to(folder)))
        linked = name if r["method"] == "base" else f'<a href="{name}/report.html">{name}</a>'
        rows[linked] = {key: measured.get(key) for key in (*RATES, "balance", "knowledge", NLL)}
    return html_table(markdown("run", rows))

# ---- pictures ----
def rates(results):
    """Safety rate, over-refusal and help of every method over its rates, with 95 % intervals."""
    runs = list(results.values())
    where = next(iter(runs[0]["sets"]), None)
    if where is None:
        return ""
    out, lrs = "", sorted({r["lr"] for r in runs if r["method"] != "base"})
    for key, name in RATES.items():
        found = {}
        for m, lr in dict.fromkeys((r["method"], r["lr"]) for r in runs):
            values = [r["sets"][where][key] for r in runs if (r["method"], r["lr"]) == (m, lr)]
            if None not in values:
                mean, half = data.t_interval([v[0] for v in values])
                point = (mean, mean - half, mean + half) if len(values) > 1 else tuple(values[0])
                found.setdefault(m, []).append((lr, *point))
        before = found.pop("base", [])[:1]
        found = {m: sorted(points) for m, points in found.items()}
        if found:
            found["before"] = [(lr, y) for lr in lrs for _, y, *_ in before]
            out += svg_lines(found, f"{name}, {where} prompts", "learning rate", lrs, [0, .25, .5, .75, 1],
                             dashed=["before"])
    return out

def curves(tuned):
    """What log.jsonl holds, over the steps, of every method at its best rate."""
    read_log = lambda folder: [row for _, row in data.read_rows(folder / "log.jsonl")]
    logs, out = {m: [read_log(p) for p in paths] for m, paths in tuned.items()}, ""
    for key, name in LOGGED.items():
        found = {m: curve(runs, key) for m, runs in logs.items() if any(key in row for row in runs[0])}
        out += svg_lines(found, name, "step") if found else ""
    return out

def curve(logs, key, points=80):
    """[(step, value)]: means over runs and over so many windows of steps."""
    steps = [row["step"] for row in logs[0] if key in row]
    values = np.mean([[row[key] for row in log if key in row] for log in logs], 0)
    n = math.ceil(len(steps) / points)
    return [(float(np.mean(steps[i:i + n])), float(values[i:i + n].mean())) for i in range(0, len(steps), n)]

def subspace(folder, s):
    """{spectrum, overlap}: what subspace.safetensors holds; {chance, alone}: what random ones would have."""
    path = folder / "subspace.safetensors"
    if not path.exists():
        return dict(spectrum="", overlap="", chance="", alone="")
    tensors = dict(model_gemma.read_tensors(path))
    layers = sorted(int(key[2:]) for key in tensors if key.startswith("V."))
    V = {i: tensors[f"V.{i}"].double() for i in layers}
    rows = {i: tensors[f"rows.{i}"].double() for i in V if f"rows.{i}" in tensors}
    if s["subspace"] == "global" and rows:
        rows = {"all": torch.cat(list(rows.values()))}
    pictures = ""
    for i, x in rows.items():
        size = torch.linalg.svdvals(x - x.mean(0) if s["center"] else x).numpy()
        kept = V[i if i in V else next(iter(V))].shape[1]
        held = (size[:kept] ** 2).sum() / (size ** 2).sum()
        points = [(n, float(y)) for n, y in enumerate(size, 1)]
        lines = {f"kept: {held:.0%} of the energy": points[:kept],
                 f"cut by tau = {s['tau']:g}": points[kept:]}
        pictures += svg_lines({name: line for name, line in lines.items() if line},
                              f"Layer {i}: singular values, {kept} of {len(points)} kept",
                              "direction, largest first", list(range(1, len(points) + 1)), ticks([0, *size]))
    share = lambda U, W: float((U.T @ W).square().sum() / min(U.shape[1], W.shape[1]))
    several = len(V) > 1 and s["subspace"] != "global"
    overlap = {f"{i}": {f"{j}": share(V[i], V[j]) for j in V} for i in V} if several else {}
    D, most = len(V[layers[0]]), max(v.shape[1] for v in V.values())
    return dict(spectrum=pictures, chance=f"{most / D:.3f}", alone=f"{s['r'] / D:.3f}",
                overlap=html_table(markdown("layer", overlap), "heat") if overlap else "")

def drift(folder):
    """{drift}: two heat maps of sails.json's numbers, a row a projection, a column a layer."""
    rows, out = (read(folder / "sails.json") or {}).get("drifts", []), {}
    for key in ("overlap", "energy"):
        cells = {}
        for row in rows:
            _, layer, _, place = row["name"].split(".")
            cells.setdefault(place.removesuffix("_proj"), {})[layer] = row[key]
        if rows:
            out[key] = html_table(markdown(key, cells), "heat")
    return dict(drift="".join(out.values()))

# ---- features ----
def features(folder, template, sets):
    """A card for every feature of features.json, the best of each layer open."""
    layers, shares, out = {}, {}, ""
    for e in (read(folder / "explain.json") or dict(sums=[]))["sums"]:
        for c in e["chosen"]:
            shares.setdefault((e["sae_layer"], c["feature"]), []).append(f"{c['share']:.1%} {e['side']}")
    for f in read(folder / "features.json") or []:
        share = ", ".join(shares.get((f["layer"], f["feature"]), []))
        layers.setdefault(f["layer"], []).append(card(f, template, sets, share))
    for layer, cards in layers.items():
        more = f"<details><summary>{len(cards) - FIRST} more of layer {layer}</summary>\n"
        out += f'<div class="grid">{"".join(cards[:FIRST])}</div>\n'
        out += f'{more}<div class="grid">{"".join(cards[FIRST:])}</div></details>\n' if cards[FIRST:] else ""
    return out

def card(f, template, sets, share=""):
    """One feature of features.json, escaped, as HTML; runs made before a key existed lack it."""
    words = lambda key, form: " ".join(
        f"<code>{token(w)}<i>{format(x, form)}</i></code>" for w, x in f.get(key, ()))
    known, fires = NEURONPEDIA.fullmatch(f["link"] or ""), ""
    if "fires_aligned" in f:
        fires = (f"fires in {f['fires_aligned']:.0%} of {sets[0]}, {f['fires_unaligned']:.0%} of {sets[1]} "
                 f"{sets[2]}, typically {f['typical']:.2f}")
    return string.Template(template).substitute(
        layer=f["layer"], feature=f["feature"], delta=f"{f['delta']:+.3f}", t=f"{f['t']:+.1f}", fires=fires,
        link=f'<a href="{f["link"]}">Neuronpedia</a>' if known else "",
        share=f"of the update: {share}" if share else "",
        raises=words("raises", "+.2f"), lowers=words("lowers", "+.2f"), fires_on=words("fires_on", ".0%"),
        promotes=" ".join(f"<code>{token(w)}</code>" for w in f["promotes"]),
        contexts="".join(context(**c) for c in f.get("contexts", ())),
        histogram=histogram(f["histogram"], f["maximum"]) if "histogram" in f else "")

def visible(word):
    """A token's text with its line breaks shown."""
    return word.replace("\n", "&crarr;").replace("\t", "&rarr;")

def token(word):
    """A token's text by itself: a space in front is a word's beginning, so it is shown too."""
    return visible("&middot;" + word[1:] if word.startswith(" ") else word)

def context(tokens, at, activation):
    """The tokens around a strong activation, the one that it is on marked, and how strong it is."""
    glue = "" if any(" " in token for token in tokens) else " "  # the tiny world's tokens are words
    around = tokens[max(0, at - 24):at], tokens[at + 1:at + 13]
    before, after = (glue.join(map(visible, part)) for part in around)
    mark = f'<mark>{visible(tokens[at])}</mark>'
    return f'<p class="context">{glue.join((before, mark, after))} <i>{activation:.2f}</i></p>'

def histogram(counts, maximum):
    """Counts of equal bins from 0 to the maximum as bars."""
    bars = " ".join(f"M{6 * j + 4} 34V{34 - 32 * n / max(counts):.1f}" for j, n in enumerate(counts) if n)
    size = f'viewBox="0 0 {6 * len(counts) + 2} 34" preserveAspectRatio="none" role="img"'
    return (f'<svg class="histogram" {size}><path d="{bars}"/></svg>'
            f'<div class="note">0 to {maximum:.2f}, {sum(counts):,} active tokens</div>')

def explained(folder):
    """explain.json's sums as a table, features with the tokens that they raise, and its baseline in words."""
    found = read(folder / "explain.json")
    if not found:
        return ""
    known = {(f["layer"], f["feature"]): f.get("raises", ()) for f in read(folder / "features.json") or ()}

    def named(shares, layer):
        lines = []
        for o in shares[:4]:
            raises = o.get("words") or [w for w, _ in known.get((layer, o["feature"]), ())]
            tokens = " ".join(f"<code>{token(w)}</code>" for w in raises[:4])
            lines.append(f"<b>{o['feature']}</b> {o['share']:.1%} {tokens}")
        return "<br>".join(lines) or "none"
    rows = {}
    for e in found["sums"]:
        top = sorted((c for c in e["chosen"] if c["share"] > e["baseline"]), key=lambda c: -c["share"])
        rows[e["name"]] = {
            "inside": e["inside"], "by chance": e["chance"],
            "baseline of one feature": f"{e['baseline']:.1%}",
            "chosen features above it, and what they raise": named(top, e["sae_layer"]),
            "others above it": named(e["others"], e["sae_layer"])}
    baseline = (f"Baseline: with a probability of at least {1 - found['alarm']:g} random adapters with equal "
                "singular values have no larger share along any feature (benchmarks/explain.py). At most "
                "four are listed; explain.json has all, and those of every adapter.")
    return html_table(markdown("side and SAE layer", rows)) + f'<p class="note">{baseline}</p>'
