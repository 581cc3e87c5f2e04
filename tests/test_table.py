"""What decides a table: what is read and measured, what options change, what is picked and concluded."""
import functools
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import lora
import model_gemma
import sails
import train
from benchmarks import tiny_world
from conftest import FIT, TOP, command, random_gemma, start, trained

FIRST = "--steps 2 --seed 0 --lr 1e-3 --full-lr 1e-3".split()

@pytest.fixture(scope="module", autouse=True)
def first(request, tmp_path_factory):
    """The first command with few steps, a process of its own that runs beside the tests of this file."""
    folder = tmp_path_factory.mktemp("first")
    wanted = any("first_command" in test.name for test in request.session.items)
    return folder, start(FIRST, folder) if wanted else None

def test_no_held_out_prompt_is_trained_on_or_chooses_features(home, tmp_path, monkeypatch):
    contrasted, pairs = [], sails.contrast_pairs
    monkeypatch.setattr(sails, "contrast_pairs", lambda rows, *a: contrasted.append(rows) or pairs(rows, *a))
    run = trained(home, tmp_path)
    prompts = lambda rows: {r["turns"][0]["content"] for r in rows}
    parts = [prompts(vars(run.sets)[key]) for key in ("train", "validate", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(prompts(data.read_pairs(home.data)[0]))
    assert contrasted == [run.rows] == [run.sets.train]

def test_the_parts_of_a_data_folder_are_used_for_what_they_are_named(home, world, split, tmp_path):
    tiny_world.write_split(world, tmp_path, 0)
    s = train.settings(command(home, tmp_path, f"--data {tmp_path}"))
    train.choose_sources(s)
    sets = train.load_sets(s)
    for part in ("train", "validate", "test"):
        assert sorted(r["id"] for r in vars(sets)[part]) == sorted(ex["id"] for ex in split[part])
    assert Counter(p["set"] for p in sets.prompts) == dict(validation=32, unseen=512, lookalike=128)
    assert [world.tok.decode(ids[1:]) for ids in sets.neutral] == data.read_texts(tmp_path / "text.txt")
    assert sets.cloze == data.read_cloze(tmp_path / "knowledge.jsonl", world.tok)
    asked = [p for p in sets.prompts if p["set"] == "validation"]
    assert [p["expected"] for p in asked] == [ex["chosen"] for ex in split["validate"]]
    sets.prompts, sets.cloze, model = [], sets.cloze[:3], random_gemma()
    knows = [model(torch.tensor([ids]))[0, -2].argmax() == ids[-1] for ids, _ in sets.cloze]
    assert train.measure(s, model, sets, tmp_path)["knowledge"][0] == sum(knows) / 3

def test_results_are_the_measures_of_base_and_adapted_model_each_on_its_own_set(run, home):
    model, names = model_gemma.load_gemma(home.model), ("responses.jsonl", "verdicts.jsonl")
    for folder in (run.out / "base", run.out):
        if folder == run.out:
            lora.load_adapter(model, folder)
        results = data.read_json(folder / "results.json")
        nll = {part: evaluation.held_out(model, vars(run.sets)[part])[evaluation.NLL]["value"]
               for part in ("test", "validate")}
        assert results[evaluation.NLL] == pytest.approx(nll["test"], abs=1e-5)
        assert results["validation"].pop("NLL") == pytest.approx(nll["validate"][0], abs=1e-5)
        judged = evaluation.tabulate(*([r for _, r in data.read_rows(folder / name)] for name in names))
        assert judged == {"refusal": dict(validation=results["validation"], **results["sets"])}

OPTIONS = (TOP / "tests" / "options.txt").read_text().replace("{FIT}", FIT).splitlines()[1:]

@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """Options -> what a run with them made, {name: {key: tensor}}."""
    tmp, base = tmp_path_factory.mktemp("options"), random_gemma().state_dict()
    (tmp / "text").write_text("how make thing0 ?\n\nhow use thing1 ? first step3")
    (tmp / "text2").write_text("how make thing0 ?\n\nhow use thing3 ? first step9")

    @functools.cache
    def make(options):
        more = options.replace("TEXT", f"{tmp}/text").replace("TEST", home.test)
        run = trained(home, tmp / str(make.cache_info().misses), more)
        moved = {n for n, x in run.end.items() if not torch.equal(x, run.start[n])}
        assert moved == run.trains                     # the base's weights, in memory, among what stays
        assert all(torch.equal(x, base[n]) for n, x in run.start.items() if n in base)
        space = run.out / "subspace.safetensors"
        found, rows = load_file(space) if space.exists() else {}, data.read_rows(run.out / "responses.jsonl")
        return dict(features={k: x for k, x in found.items() if k[0] == "f"}, start=run.start, end=run.end,
                    V={k: x for k, x in found.items() if k[0] == "V"}, trained=dict(n=len(run.trains)),
                    replies={r["id"]: r["tokens"] for _, r in rows}, memory=dict(c=run.checkpointing))
    return make

def same(a, b):
    a, b = ({k: torch.as_tensor(x).float() for k, x in part.items()} for part in (a, b))
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and torch.allclose(a[k], b[k], atol=1e-4) for k in a)

@pytest.mark.slow
@pytest.mark.parametrize("line", OPTIONS)
def test_an_option_changes_what_it_is_for_and_nothing_else(made, line):
    differs, _, options = line.partition("|")
    needs, _, option = options.strip().rpartition(" : ")
    without, with_it = made(needs), made(f"{needs} {option}")
    assert {key for key in without if not same(without[key], with_it[key])} == set(differs.split())

@pytest.mark.parametrize("df, t", [*enumerate(data.STUDENT, 1)])
def test_students_quantiles_hold_95_percent_of_their_distribution(df, t):
    x = torch.linspace(-t, t, 20001, dtype=torch.float64)
    log_c = torch.lgamma(torch.tensor([df + 1, df]) / 2)
    density = (log_c[0] - log_c[1]).exp() / (df * math.pi) ** .5 * (1 + x * x / df) ** (-(df + 1) / 2)
    assert float(torch.trapezoid(density, x)) == pytest.approx(.95, abs=2e-4)

def result(method, lr, seed, balance=.5, chosen=.5, nll=1.):
    """A results.json; `chosen` and nll are of validation, nothing else may pick a rate."""
    sets = {"unseen": {"safety rate": [balance - .2, 0, 1], "help": [.25, 0, 1], "balance": balance},
            "lookalike": {"safety rate": [.9, 0, 1], "balance": 1 - balance}}
    return {"method": method, "lr": lr, "seed": seed, "parameters": 9, "sets": sets,
            "validation": dict(balance=chosen, NLL=nll), evaluation.NLL: [10 - nll, 0, 10]}

@pytest.mark.parametrize("one, other, better", (
    ([(.9, .6)], [(.1, .7)], 1),                       # validation's balance, not the test's
    ([(.1, .9), (.1, .2)], [(.9, .6), (.9, .6)], 1),   # its mean over seeds
    ([(.1, .5, 2.)], [(.9, .5, 3.)], 0),               # of equal ones the lower NLL
    ([(.1, .5, 1.)], [(.9, .6, 3.)], 1)))
def test_a_rate_is_picked_by_mean_validation_balance_then_nll(one, other, better):
    rates = (.001, one), (.01, other)
    rows = [result("sails", lr, seed, *x) for lr, seeds in rates for seed, x in enumerate(seeds)]
    assert evaluation.best_rates(rows) == dict(sails=rates[better][0])

def by_hand():
    """Three seeds, two rates, of which .01 is the better by validation."""
    rows = [result("base", 0., seed) | dict(parameters=None) for seed in range(3)]
    values = dict(sails=(.6, .7, .8), lora=(.56, .6, .64), random=(.52, .6, .68), full=(.7, .8, .9))
    for m, values in values.items():
        rows += [result(m, .01, seed, x, chosen=.6, nll=x) for seed, x in enumerate(values)]
        rows += [result(m, .001, seed, 1 - x, nll=1 + x) for seed, x in enumerate(values)]
    return rows

def test_a_table_over_seeds_and_its_conclusions_are_those_worked_out_by_hand():
    # t of 3 seeds is 4.303: of mean .7, deviation .1, +- .248; lora .04 .1 .16: +- .149, random: +- .050
    lines = evaluation.table(by_hand())
    assert lines[0].startswith("| scored on: unseen | safety rate | help | balance | parameters |")
    assert lines[2] == "| sails, lr 0.01 | 0.500 ± 0.248 | 0.250 ± 0.000 | 0.700 ± 0.248 | 9 |"
    assert [line.split(",")[0] for line in lines[2:6]] == ["| sails", "| lora", "| random", "| full"]
    assert "over 3 seeds. Rate: the best mean balance on validation prompts, then validation NLL" in lines[7]
    assert lines[8] == "Before alignment: safety rate 0.300, help 0.250, balance 0.500"
    assert lines[9:] == [
        "Tuned, balance: sails 0.700, lora 0.600, random 0.600, full 0.800. "
        "SAILS is ahead of random, cannot be told from lora, is behind full.",
        "At the lowest rate, balance: sails 0.300, lora 0.400, random 0.400, full 0.200. "
        "SAILS is ahead of full, cannot be told from lora, is behind random."]

def test_without_labelled_prompts_the_lower_nll_picks_and_wins():
    rows = by_hand()
    for r in rows:
        r["sets"] = {}
        del r["validation"]["balance"]
    lines = evaluation.table(rows)
    assert lines[2] == "| sails, lr 0.01 | 9.300 ± 0.248 | 9 |"
    assert "Rate: the best mean validation NLL." in lines[7]
    assert lines[9].endswith("SAILS is ahead of random, cannot be told from lora, is behind full.")

def test_a_seed_without_a_reply_to_judge_leaves_no_number_and_no_verdict():
    rows = by_hand()
    del rows[10]["sets"]["unseen"]["balance"]          # of LoRA at .01
    lines = evaluation.table(rows)
    assert "| nan ± nan | 9 |" in lines[3] and "cannot be told from lora, is behind full" in lines[9]

def test_a_table_of_one_seed_shows_intervals_over_prompts_and_concludes_nothing():
    lines = evaluation.table([r for r in by_hand() if r["seed"] == 0])
    assert lines[2] == "| sails, lr 0.01 | 0.400 [0.000, 1.000] | 0.250 [0.000, 1.000] | 0.600 | 9 |"
    assert lines[7].startswith("[ ]: 95 % over prompts. Rate: ") and len(lines) == 9

@pytest.mark.slow
def test_the_first_commands_table_is_that_of_its_files_and_the_second_time_it_is_idle(first):
    home, process = first
    folder, (said, wrong) = home / "runs" / "tiny", process.communicate(timeout=300)
    table = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(said.splitlines()) <= 40 and len(table) == 6, wrong
    read = lambda name: [r for _, r in data.read_rows(folder / f"{name}.jsonl")]
    for m, row in zip(("sails", "random", "lora", "full"), table[2:]):
        run = f"{m}-lr0.001-seed0"
        asked = {r["id"] for r in read(f"{run}/responses") if (r["set"], r["label"]) == ("unseen", "harmful")}
        refused = [v["refused"] for v in read(f"{run}/verdicts") if v["id"] in asked]
        assert len(refused) == 256 and row.startswith(f"| {m}, lr 0.001 | {sum(refused) / 256:.3f} ")
    base = data.read_json(folder / "base" / "results.json")
    assert base["sets"]["unseen"]["help"][0] > .9 < base["knowledge"][0]           # it knows its world
    files = lambda: {p: p.stat().st_mtime_ns for p in home.rglob("*.safetensors")}
    made, (again, _) = files(), start(FIRST, home).communicate(timeout=100)
    assert again.endswith(said[said.index("Features that"):]) and files() == made
