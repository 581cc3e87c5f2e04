"""pictures.py - lines with intervals as SVG, for a run's page, the theorem's figure and the studies.

The ink is currentColor, so that the page around a picture sets light or dark.
"""
import html
import math
import re

COLOURS = ("#1a7abf", "#d55e00", "#009e73", "#c28f00", "#b5598d", "#4a9bc9", "#7d7d7d")  # for all eyes

def ticks(values):
    """Two to six round numbers, the first and last not inside the values."""
    low, high = min(values), max(values)
    least = (high - low or abs(high) or 1) / 5
    unit = 10 ** math.floor(math.log10(least))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n > least - 1e-12)
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, max(first + 1, math.ceil(high / step - 1e-9)) + 1)]

def svg_lines(curves, title, xlabel, xs=None, ys=None, log=False, dashed=(), scatter=False):
    """A picture, 360 pixels wide, of lines {name: [(x, y) or (x, y, low, high)]}.
    xs: every x, at equal distances, with dots and intervals; without them x is linear and lines are bare.
    ys: ticks of y, whose ends cut the lines; log: their axis. dashed: names that are no measurements.
    scatter: dots alone, at their x."""
    points, scale = [p for curve in curves.values() for p in curve], math.log if log else float
    cols, ys = xs or ticks([p[0] for p in points]), ys or ticks([y for p in points for y in p[1:]])
    left, right, top, bottom = 12 + 7 * max(len(f"{y:g}") for y in ys), 350, 32, 190
    share = lambda v, at, f=float: (f(min(max(v, at[0]), at[-1])) - f(at[0])) / (f(at[-1]) - f(at[0]))
    at_x = lambda x: left + (right - left) * ((cols.index(x) + .5) / len(cols) if xs else share(x, cols))
    at_y = lambda y: bottom - (bottom - top) * share(y, ys, scale)
    across = 0 if len(curves) == 1 else 1 if max(map(len, curves)) > 18 else 2  # names in a row below
    out = [_text(0, 13, title, "start"), _text((left + right) / 2, bottom + 34, xlabel)]
    out += [_text(at_x(x), bottom + 17, f"{x:g}") for x in cols[::-(-len(cols) // 10)]]
    for y in ys:
        out += [_text(left - 6, at_y(y) + 4, f"{y:g}", "end")]
        out += [_path(f"M{left} {at_y(y):.1f}H{right}", "#8884")]
    for j, (name, curve) in enumerate(curves.items()):
        bound, aside = name in dashed, 4 * (j - len(curves) / 2 + .5)  # so that intervals stand side by side
        look = COLOURS[j % len(COLOURS)], 2
        dot, wide = ("m-2 -2h4v4h-4z", 2) if j // 2 % 2 else ("h0", 6)  # some readers see fewer colours
        if bound:
            look = "currentColor", 1.5, ("7 5", "1 4")[list(dashed).index(name) % 2]
        spots = [(at_x(x) + (aside if ends else 0), *map(at_y, (y, *ends))) for x, y, *ends in curve]
        if not scatter:
            out.append(_path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in spots), *look))
        for x, y, *ends in spots if scatter or xs and not bound else ():
            out.append(_path(f"M{x:.1f} {y:.1f}{dot}", look[0], wide))
            if ends:
                out.append(_path(f"M{x - 3:.1f} {ends[0]:.1f}h6m-3 0V{ends[1]:.1f}m-3 0h6", look[0]))
        if across:
            x, y = left + 155 * (j % across), bottom + 56 + 18 * (j // across)
            out += [_path(f"M{x} {y}h22", *look), _text(x + 28, y + 4, name, "start")]
            out += [_path(f"M{x + 11} {y}{dot}", look[0], wide)] if xs and not bound else []
    high = bottom + 46 + (18 * math.ceil(len(curves) / across) if across else 0)
    look = 'role="img" fill="currentColor" font-family="system-ui, sans-serif" font-size="12"'
    size = f'viewBox="0 0 360 {high}" width="360" height="{high}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{"".join(out)}</svg>\n'

def svg_sheet(pictures, across=3):
    """Pictures of svg_lines side by side on white paper, as a file of its own."""
    heights = [int(re.search(r' height="(\d+)"', p)[1]) for p in pictures]
    wide, high = 380 * min(across, len(pictures)) + 20, 20 + max(heights)
    out = [p.replace("<svg ", f'<svg x="{20 + 380 * (i % across)}" y="{20 + high * (i // across)}" ', 1)
           for i, p in enumerate(pictures)]
    size = f'viewBox="0 0 {wide} {20 + high * -(-len(pictures) // across)}" color="#1c2026"'
    paper = '<rect width="100%" height="100%" rx="14" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{paper}\n{"".join(out)}</svg>\n'

def _path(d, colour, width=1, dash="none"):
    look = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}" stroke-linecap="round"'
    return f'<path d="{d}" fill="none" {look}/>'

def _text(x, y, words, anchor="middle"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
