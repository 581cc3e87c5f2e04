"""train.py, the command: what a run leaves, what each option does, kill and resume, refusals."""
import functools
import io
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import lora
import model_gemma
import sae as sae_module
import sails
import train
from conftest import FIT, NINE, command, go, log, parity, random_gemma, random_sae, trained

def same_files(a, b, *names):
    return [(a / name).read_bytes() == (b / name).read_bytes() for name in names] == [True] * len(names)

def test_learning_rate_warms_up_then_falls_linearly_and_never_reaches_zero():
    rates = lambda **s: [train.lr_at(i, SimpleNamespace(lr=2., **s)) for i in range(s["steps"])]
    assert rates(steps=8, warmup=4) == pytest.approx([.5, 1., 1.5, 2., 2., 1.5, 1., .5])
    assert rates(steps=3, warmup=0) == pytest.approx([2., 4 / 3, 2 / 3])
    assert rates(steps=2, warmup=50) == pytest.approx([.04, .08])

def test_a_gpu_takes_published_models_in_bfloat16_the_tiny_world_in_float32_and_one_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = [train.settings(x.split()).dtype for x in ("", "--model tiny", "--model M")]
    monkeypatch.setattr("sys.argv", "eval.py --model M --prompts P --out O".split())
    assert [*found, evaluation.settings().dtype] == ["float32", "float32", "bfloat16", "bfloat16"]
    [monkeypatch.setenv(key, "1") for key in "WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()]
    with pytest.raises(data.UserError, match="more processes than GPUs, 1"):
        data.join("cuda")

def test_the_reason_of_a_failure_outlives_what_another_run_began_beside_it(tmp_path):
    with pytest.raises(data.UserError, match="the reason"), data.owned(tmp_path / "runs/a", "run.json"):
        (tmp_path / "runs/b").mkdir()
        raise data.UserError("the reason")

def test_a_bar_may_go_up_a_line_and_other_control_characters_are_spelt_out():
    out = io.StringIO()
    print("\x1b[A", "\x1b[2J", sep="", end="", file=data._Stream(out))
    assert out.getvalue() == "\x1b[A\\x1b[2J"

def test_labels_where_they_are_known_are_enough(home, tmp_path):
    rows = [row | (dict(label=None) if n % 5 == 0 else {}) for n, row in data.read_rows(home.data)]
    data.write_rows(tmp_path / "some.jsonl", rows)
    assert go(command(home, tmp_path / "run", f"--data {tmp_path}/some.jsonl"))[0] == 0

@pytest.mark.parametrize("n, size", ((7, 3), (5, 8), (1, 4)))
def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_sees_each_example_once(n, size):
    drawn = [data.batch_at(n, size, 3, step) for step in range(n)]
    assert drawn == [data.batch_at(n, size, 3, step) for step in range(n)]
    flat = sum(drawn, [])
    assert [sorted(flat[e * n:e * n + n]) for e in range(size)] == [[*range(n)]] * size
    assert len({str(data.batch_at(50, 50, seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4

def test_a_run_leaves_its_files_and_nothing_half_written(run):
    names = lambda folder: {p.name for p in folder.iterdir()}
    measured = {"run.json", "results.json", *(f"{x}.jsonl" for x in (
        "heldout-validate", "heldout-test", "responses", "verdicts"))}
    assert names(run.out / "base") == measured
    assert names(run.out) == measured | {"report.html",
        "base", "features.json", "features.md", "subspace.safetensors", "adapter_model.safetensors",
        "adapter_config.json", "sails.json", "explain.json", "log.jsonl", "state.safetensors", "table.md"}

def test_a_run_notes_its_settings_and_a_line_a_step_and_prints_its_table(run, home):
    noted, rows = data.read_json(run.out / "run.json"), log(run.out)
    assert [noted["settings"][key] for key in ("k", "seed", "lr", "method")] == [6, 0, .01, "sails"]
    assert torch.__version__.startswith(noted["versions"]["torch"])    # less +cpu or +cu130
    assert [*noted["settings"]["sources"]] == ["model", "data", "sae", home.test]
    assert [(r["step"], r["lr"]) for r in rows] == [*enumerate([.005, .01, .01, .005])]
    drawn = [[run.rows[i] for i in data.batch_at(len(run.rows), 8, 0, step)] for step in range(4)]
    assert [r["tokens"] for r in rows] == [sum(sum(r["chosen_tokens"][1]) for r in batch) for batch in drawn]
    assert rows[-1]["loss"] < rows[0]["loss"] - .2
    assert data.read_json(run.out / "results.json")["parameters"] == 1536
    assert "training 1,536 parameters" in run.said and (run.out / "table.md").read_text() in run.said

def test_the_adapter_starts_in_the_saved_subspace_and_is_saved_as_trained(run):
    V, saved = load_file(run.out / "subspace.safetensors"), load_file(run.out / "adapter_model.safetensors")
    for name in run.trains:
        now, writes, side = run.start[name], "o_proj" in name, name[-1]
        if side == ("B" if writes else "A"):
            assert torch.equal(now if writes else now.T, V[f"V.{name.split('.')[1]}"][:, :4])
        else:
            assert not now.any()
        assert torch.equal(saved[f"base_model.model.model.{name[:-1]}lora_{side}.weight"], run.end[name])

def test_lora_py_and_sae_py_show_what_they_hold(run, home):
    _, said, _ = go([run.out], lora.main)
    assert all(words in said for words in ("rank 4, alpha 8.0", "1,536 parameters", "method: sails"))
    B, A = (run.end[f"layers.0.self_attn.q_proj.{x}"] for x in "BA")
    assert f"layers.0.self_attn.q_proj        |dW| {2 * (B @ A).norm():9.4f}" in said
    more = f"--model {home.model} --sae {home.sae} --layer 1 --width 40 --top 3 --prompt"
    _, said, _ = go([*more.split(), "hey how make"], sae_module.main)
    ids = torch.tensor([[2, *data.encode_plain(data.load_tokenizer(home.model), "hey how make")]])
    best = random_sae(1).encode(random_gemma().residuals(ids, [1])[1][0, 1:]).max(0).values.topk(3).indices
    assert [int(line.split()[1]) for line in said.splitlines()[1:]] == best.tolist()

def test_full_fine_tuning_leaves_a_model_and_its_reference_is_the_one_it_began_with(home, tmp_path):
    run = trained(home, tmp_path, "--method full --objective rloo --samples 2")
    first, *_, last = [r["kl"] for r in log(tmp_path)]
    assert first == pytest.approx(0, abs=1e-5) and abs(last) > 1e-3
    left = dict(model_gemma.load_gemma(tmp_path).named_parameters())
    assert run.trains == left.keys()
    assert all(torch.equal(left[n], x) for n, x in run.end.items()) and data.load_tokenizer(tmp_path)

def test_a_run_that_has_nothing_to_learn_ends_with_a_table_all_the_same(home, tmp_path):
    code, _, _ = go(command(home, tmp_path, "--objective rloo --samples 2"))           # no draw refuses
    results = [data.read_json(folder / "results.json") for folder in (tmp_path, tmp_path / "base")]
    assert code == 0 and results[0][evaluation.NLL] == results[1][evaluation.NLL]

def test_own_saes_are_fitted_where_they_are_missing(home, tmp_path):
    (tmp_path / "text").write_text("how make thing0 ?")  # the dialogues go on where the text ends
    code, said, _ = go(command(home, tmp_path / "a", f"{FIT} --text {tmp_path}/text"))
    assert code == 0 and "SAEs are fitted to 400 tokens" in said
    for name in ("run.json", "base/run.json", "sae/layer_0"):  # as a kill leaves it
        copy = shutil.copytree if name.endswith("0") else shutil.copy
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(tmp_path / "a" / name, tmp_path / "b" / name)
    assert go(command(home, tmp_path / "b", f"{FIT} --text {tmp_path}/text --resume"))[0] == 0
    assert same_files(tmp_path / "a", tmp_path / "b", "subspace.safetensors", "adapter_model.safetensors")

@pytest.mark.parametrize("more", (
    "--objective dpo --norm-aware --freeze-basis", "--objective rloo --samples 2"))
def test_a_run_stopped_between_checkpoints_resumes_exactly(home, tmp_path, monkeypatch, more):
    backward, steps, whole, hurt = train.backward, [], tmp_path / "whole", tmp_path / "hurt"
    more += " --steps 6 --save-every 3"

    def stops(model, batch, s, loss, step, stop):
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return backward(model, batch, s, loss, step, stop)
    monkeypatch.setattr(train, "judge_reward", parity)
    assert go(command(home, whole, more))[0] == 0
    monkeypatch.setattr(train, "backward", stops)
    assert go(command(home, hurt, more))[0] == 130
    assert go(command(home, hurt, more + " --resume"))[0] == 0
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert same_files(whole, hurt, "adapter_model.safetensors", "results.json") and log(whole) == log(hurt)

def test_resuming_a_finished_run_changes_nothing(run, home):
    content = lambda: {p: p.read_bytes() for p in run.out.rglob("*") if p.is_file()}
    before = content()
    assert go(command(home, run.out, f"--test {home.test} --resume"))[0] == 0 and content() == before

@pytest.mark.slow
def test_a_dry_run_counts_the_9b_under_any_name_and_makes_no_folder(tmp_path):
    data.write_json(tmp_path / "config.json", NINE)
    args = f"--model {tmp_path} --dry-run --device cpu --out {tmp_path}/run".split()
    _, said, _ = go(args)
    assert "base 9,241,705,984 parameters" in said and "trainable 17,891,328 = 0.19%" in said
    assert "google/gemma-scope-9b-pt-res, width 16k, layers 10,15,20,25,30" in said
    _, said, _ = go([*args, "--method", "full", "--objective", "dpo"])
    assert "= 100.00%" in said and "and again as the reference" in said and not (tmp_path / "run").exists()

def test_after_a_refusal_the_mended_command_runs_without_resume(home, tmp_path):
    _, said, _ = go(command(home, tmp_path, "--max-tokens 9"))
    assert "64 longer than 9 tokens" in said
    code, _, err = go(command(home, tmp_path, "--method lora --lr 1e18 --alpha 1e6 --steps 8"))
    assert code == 2 and "the loss or its gradient is not finite; lower --lr" in err
    assert go(command(home, tmp_path, "--method lora"))[0] == 0

@pytest.fixture(scope="module")
def compared(home, tmp_path_factory):
    """A comparison: its folder, its options, how often what runs can share was made."""
    counts, out = Counter(), tmp_path_factory.mktemp("runs") / "all"
    more = "--method sails,random-features,lora,full --lr 1e-3,1e-2 --full-lr 1e-3,1e-2 --seed 0,1"
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((train, "load_sets"), (train, "load_saes"), (sails, "contrast_means"),
                             (model_gemma, "load_gemma"), (train, "align"), (train.explain, "describe")):
            counted = lambda f, name, *a: counts.update([name]) or f(*a)
            patch.setattr(module, name, functools.partial(counted, getattr(module, name), name))
        assert "warning: it explains next to nothing" in go(command(home, out, more))[2]
    return out, more, counts

def test_a_comparison_makes_a_folder_a_run_and_what_runs_share_once(compared):
    out, _, counts = compared
    want = {f"base-seed{seed}": ("base", 0, seed) for seed in (0, 1)} | {
        f"{m}-lr{lr:g}-seed{seed}": (m, lr, seed) for m in ("sails", "random-features", "lora", "full")
        for lr in (.001, .01) for seed in (0, 1)}
    for file in ("run.json", "results.json"):
        rows = {p.parent.name: data.read_json(p) for p in out.glob(f"*/{file}")}
        rows = {name: r.get("settings", r) for name, r in rows.items()}
        assert {name: (r["method"], r["lr"], r["seed"]) for name, r in rows.items()} == want
    # stage 1 is made once a seed, words once a choice; full moves the model: the next run loads it again
    assert counts == dict(load_sets=1, load_saes=8, contrast_means=2, load_gemma=4, align=16, describe=4)

def test_a_comparison_does_what_is_missing_and_reads_its_table_from_the_folders(compared, home, monkeypatch):
    (out, more, _), done, align = compared, [], train.align
    table, lost = (out / "table.md").read_text(), out / "lora-lr0.01-seed1"
    monkeypatch.setattr(train, "align", lambda *a: done.append(a[2].out) or align(*a))
    shutil.rmtree(lost)
    data.write_text(lost / ".run.json.7.part", "{")    # of a process that was killed
    assert go(command(home, out, more))[0] == 0
    assert done == [str(lost)] and (out / "table.md").read_text() == table
    assert "steps was 4, now 3" in go(command(home, out, f"{more} --steps 3"))[2]
    data.write_json(lost / "results.json", data.read_json(lost / "results.json") | dict(method="read back"))
    assert "| read back, lr 0.01 |" in go(command(home, out, more))[1]

def test_the_look_at_the_last_step_sees_the_rates_that_are_measured_after_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "starts_with_refusal", lambda reply: "1" in reply)
    assert go(command(home, tmp_path, "--method lora --watch 2 --lr 1e-3"))[0] == 0
    now, keys = data.read_json(tmp_path / "results.json")["validation"], ("safety rate", "over-refusal")
    looks = [[r.get(key) for key in keys] for r in log(tmp_path)]
    assert looks[::2] == [[None] * 2] * 2 and looks[3] == [now[key][0] for key in keys] != [0, 0]
