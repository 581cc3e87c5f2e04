"""The page of a run and of a comparison: closed, self-contained, escaped, with the numbers of the files."""
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
from benchmarks import pages
from conftest import command, go, trained
from benchmarks.pictures import svg_lines

HOSTILE, URL = "<script>alert('&amp; | \"')</script>", "https://www.neuronpedia.org/gemma-2-2b/1-res-16k/7"
FULL = dict(raises=[[HOSTILE, 1.25]], lowers=[[" no", -.5]], typical=2., maximum=4., fires_aligned=.8125,
            fires_unaligned=.0625, histogram=[3, 0, 1], promotes=[HOSTILE], link=URL,
            contexts=[dict(tokens=[" x"] * 40 + [HOSTILE, " y"], at=40, activation=3.)])

class Page(HTMLParser):                                # an error if it closes what it has not opened
    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.targets, said = [], set(), [], []
        self.handle_data = said.append
        self.feed(path.read_text(encoding="utf-8"))
        self.words = "".join(said)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [tag] * (tag != "meta")
        self.targets += [value for key, value in attributes if key.endswith(("src", "href"))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

@pytest.fixture(scope="module")
def both(home, tmp_path_factory):
    """Folder, words printed and page of a run, its features as hostile as can be, and of a comparison."""
    many, more = tmp_path_factory.mktemp("many"), f"--test {home.test}"
    run = trained(home, tmp_path_factory.mktemp("one"), f"{more} --tau .7")
    best, second, *rest = data.read_json(run.out / "features.json")
    data.write_json(run.out / "features.json", [best | FULL, second | dict(link="javascript:a"), *rest])
    e = dict(name="read", side="read", sae_layer=0, inside=.625, chance=.25, baseline=.04, chosen=[dict(
        feature=best["feature"], share=.375)], others=[dict(feature=3, share=.1, words=[HOSTILE])])
    data.write_json(run.out / "explain.json", dict(alarm=.001, sums=[e]))
    runs = [SimpleNamespace(out=run.out / name) for name in ("base", "")]
    said = go(command(home, many, f"{more} --method lora,sails --seed 0,1"))[1]
    return [(run.out, run.said, Page(pages.write_pages(run.out, runs))),
            (many, said, Page(many / "report.html"))]

def test_every_tag_is_closed_nothing_is_loaded_and_a_hostile_token_is_shown_but_not_run(both):
    for _, _, page in both:
        assert page.open == [] and not {"script", "link", "img", "iframe"} & page.tags
    assert both[0][2].words.count(HOSTILE) == 5        # raised, promoted, in a context, twice in the update
    assert both[0][2].targets == [URL] and len(both[1][2].targets) == 4
    assert all((both[1][0] / target).is_file() for target in both[1][2].targets)

def test_a_page_holds_the_numbers_of_its_files_and_the_line_after_the_table_names_it(both):
    for out, said, page in both:
        table = (out / "table.md").read_text()
        cells = {x for line in table.splitlines()[::2] for x in line.strip("| ").split(" | ")}
        assert [x for x in cells if x not in page.words] == []
        assert said.split(table)[1].startswith(f"Open {out / 'report.html'} in a browser")
    wanted = [f"{row['energy']:.3f}" for row in data.read_json(both[0][0] / "sails.json")["drifts"]]
    wanted += [f"feature {f['feature']}" for f in data.read_json(both[0][0] / "features.json")]
    wanted += "+1.25;·no-0.50;81% of chosen, 6% of rejected;y 3.00;.625;37.5% read;10.0%;4 active".split(";")
    assert len(wanted) == 8 + 12 + 8 and [x for x in wanted if x not in both[0][2].words] == []

def test_the_spectrum_is_that_of_the_chosen_rows_cut_by_tau(both):
    kept, words = load_file(both[0][0] / "subspace.safetensors"), both[0][2].words
    size, r = torch.linalg.svdvals(kept["rows.1"]).square(), kept["V.1"].shape[1]
    assert f"Layer 1: singular values, {r} of 6 kept" in words and r < 6
    assert f"kept: {float(size[:r].sum() / size.sum()):.0%} of the energy" in words

def test_a_line_runs_through_the_pixels_that_its_axes_give():
    picture = svg_lines({"a": [(0, 0.), (5, 2.5), (10, 99.)]}, "t", "x", ys=[0, 5])
    assert 'd="M19.0 190.0L184.5 111.0L350.0 32.0"' in picture     # half way; cut at the top
    picture = svg_lines({"a": [(1, .1, .01, 1.)], "b": [(1, 1.)]}, "t", "x", [1], [.01, .1, 1], True, ["b"])
    assert 'd="M193.0 111.0h0"' in picture and 'd="M190.0 190.0h6m-3 0V32.0m-3 0h6"' in picture
