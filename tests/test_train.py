"""train.py, the command: schedule, a whole run, kill and resume, several processes, what a dry run says, and what it refuses.

Most runs are in this process; a process of its own only where it is killed, measured or one of several.
"""
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import model_gemma
import sae as sae_module
import train
from conftest import RAW, random_gemma, random_sae, write_pairs

TOP = Path(train.__file__).resolve().parent
ENV = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
QUICK = dict(layers="0,1", width=40, k=6, tau=1, r=4, steps=6, batch=8, micro=3, warmup=2, lr=1e-2, template="tiny", contrast_pairs=16, device="cpu")

def command(home, out, **changes):
    """A command line: QUICK on the tiny folders, changed; True is a bare switch, None leaves an option out."""
    s = dict(model=home.model, sae=home.sae, data=home.data, out=str(out), **QUICK) | changes
    return [x for k, v in s.items() if v is not None for x in (["--" + k.replace("_", "-")] + [str(v)] * (v is not True))]

def here(monkeypatch, args, main=None):
    """Run the command (or another script's main) in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["a script", *args])
    with pytest.raises(SystemExit) as e:
        data.run_main(main or train.main)
    return e.value.code or 0

def start(args, *launcher):
    return subprocess.Popen([sys.executable, *launcher, "train.py", *args], cwd=TOP, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def steps_of(folder):
    return [json.loads(line)["step"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]

# ------------------------------------------------------------------------------------------------ schedule and batches
def test_learning_rate_warms_up_then_falls_linearly_and_never_reaches_zero():
    s = SimpleNamespace(lr=2., steps=10, warmup=4)
    rates = [train.lr_at(step, s) for step in range(10)]
    assert rates == pytest.approx([.5, 1., 1.5, 2., 2., 5 / 3, 4 / 3, 1., 2 / 3, 1 / 3])
    for s in (SimpleNamespace(lr=2., steps=3, warmup=0), SimpleNamespace(lr=2., steps=3, warmup=50)):
        assert all(0 < train.lr_at(step, s) <= 2 for step in range(3))
    assert train.lr_at(0, SimpleNamespace(lr=2., steps=3, warmup=0)) == 2

def test_a_batch_is_a_function_of_seed_and_step_and_every_epoch_sees_each_example_once():
    for n, size in ((7, 3), (5, 8), (1, 4)):
        drawn = [data.batch_at(n, size, 3, step) for step in range(n)]
        assert drawn == [data.batch_at(n, size, 3, step) for step in range(n)] and all(len(b) == size for b in drawn)
        flat = sum(drawn, [])
        assert all(sorted(flat[e * n:(e + 1) * n]) == list(range(n)) for e in range(size))
    assert data.batch_at(50, 8, 0, 0) != data.batch_at(50, 8, 1, 0) and data.batch_at(50, 50, 0, 0) != data.batch_at(50, 50, 0, 1)

def test_examples_longer_than_the_limit_are_left_out_and_counted(world, split):
    longer = dict(split["train"][0], rejected="sure " * 40)
    rows, dropped = train.encode(world.tok, split["train"][:5] + [longer], "tiny", 30)
    assert (len(rows), dropped) == (5, 1)
    ids, mask = rows[0]["chosen"]
    assert ids[:len(rows[0]["prompt"])] == rows[0]["prompt"] and sum(mask) == len(ids) - len(rows[0]["prompt"])

# ---------------------------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """(the folder of a finished sails run, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "sails"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        assert here(patch, command(home, out, test=home.test, max_new=6)) == 0
    return out, said.getvalue()

def test_a_run_leaves_all_its_files_and_nothing_half_written(run):
    names = {"run.json", "features.json", "features.md", "subspace.safetensors", "adapter_model.safetensors", "adapter_config.json", "sails.json",
             "log.jsonl", "state.safetensors", "responses.jsonl", "results.json", "table.md"}
    assert {p.name for p in run[0].iterdir()} == names
    told = data.read_json(run[0] / "run.json")
    assert told["settings"]["k"] == 6 and told["settings"]["seed"] == 0 and told["versions"]["torch"] == torch.__version__
    assert steps_of(run[0]) == list(range(6))
    first = json.loads((run[0] / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "lr", "loss", "tokens", "tokens_per_s", "grad_norm"} <= set(first) and first["lr"] == pytest.approx(.005)
    listed = data.read_json(run[0] / "features.json")
    assert len(listed) == 12 and {"layer", "feature", "delta", "mu_aligned", "mu_unaligned", "t", "promotes", "fires_on", "columns", "link"} <= set(listed[0])
    assert set(data.read_json(run[0] / "results.json")) == {"base", "aligned", "test"}

def test_a_run_says_what_it_decided(run):
    for words in ("the tiny world's words", "width 40, layers 0,1", "6 features -> 6 directions for rank 4", "training 1,536 of", "held out", "saved in"):
        assert words in run[1], words
    assert run[0].joinpath("table.md").read_text().strip() in run[1]

def test_the_saved_adapter_is_what_was_trained_from_the_saved_subspace(run, home):
    model = model_gemma.load_gemma(home.model)
    lora.load_adapter(model, run[0])
    state, V = load_file(run[0] / "state.safetensors"), load_file(run[0] / "subspace.safetensors")
    for name, m in lora.adapters(model):
        assert torch.equal(state[f"p.{name}.A"], m.A) and torch.equal(state[f"p.{name}.B"], m.B)
    assert lora.mean_drift(lora.drift(model, {i: V[f"V.{i}"][:, :4] for i in (0, 1)})) == {
        side: pytest.approx(d, abs=1e-4) for side, d in data.read_json(run[0] / "sails.json")["drift"].items()}
    for i in (0, 1):
        assert sorted(V[f"features.{i}"].tolist()) == sorted(f["feature"] for f in data.read_json(run[0] / "features.json") if f["layer"] == i)

def test_lora_py_tells_what_the_adapter_holds(run, home, monkeypatch, capsys):
    assert here(monkeypatch, [str(run[0])], lora.main) == 0
    said = capsys.readouterr().out
    model = model_gemma.load_gemma(home.model)
    lora.load_adapter(model, run[0])
    assert "rank 4, alpha 8.0, on k_proj, o_proj, q_proj, v_proj" in said and "1,536 parameters" in said and "method: sails" in said
    for name, m in lora.adapters(model):
        [line] = [line for line in said.splitlines() if line.startswith(name + " ")]
        assert float(line.split("|dW|")[1].split()[0]) == pytest.approx(float(m.delta().detach().norm()), abs=1e-3)
    assert here(monkeypatch, [home.model], lora.main) == 2 and "no adapter_config.json" in capsys.readouterr().err

def test_sae_py_shows_the_features_that_fire_on_a_prompt(home, monkeypatch, capsys):
    assert here(monkeypatch, ["--model", home.model, "--sae", home.sae, "--layer", "1", "--width", "40", "--prompt", "hey how make", "--top", "3"], sae_module.main) == 0
    said = capsys.readouterr().out.splitlines()
    model = model_gemma.load_gemma(home.model)
    ids = data.load_tokenizer(home.model).encode("hey how make").ids
    best = sae_module.load_sae(home.sae, 1, "40").encode(model.residuals(torch.tensor([[2] + ids]), [1])[1][0, 1:]).max(0)
    assert len(said) == 4 and [int(line.split()[1]) for line in said[1:]] == best.values.argsort(descending=True)[:3].tolist()
    assert here(monkeypatch, ["--model", home.model, "--sae", home.sae, "--layer", "7", "--prompt", "hey"], sae_module.main) == 2

def test_training_lowers_the_loss_and_the_held_out_loss(run):
    losses = [json.loads(line)["loss"] for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - .2
    told = data.read_json(run[0] / "results.json")
    assert told["aligned"]["NLL of chosen, nats per token"] < told["base"]["NLL of chosen, nats per token"] - .2

def test_base_weights_are_bit_identical_after_a_run(run, home):
    with_adapter, fresh = model_gemma.load_gemma(home.model), random_gemma()
    assert all(torch.equal(p, dict(fresh.named_parameters())[n]) for n, p in with_adapter.named_parameters())

@pytest.mark.parametrize("method, objective, more", (("lora", "sft", {}), ("random", "dpo", {}), ("mean-diff", "sft", dict(replay=.5)), ("random-features", "sft", dict(freeze_basis=True)),
                                                      ("raw-pca", "sft", dict(standardise=True, norm_aware=True)), ("full", "rloo", dict(samples=2, max_new=3)), ("sails", "rloo", dict(samples=2, max_new=3))))
def test_every_method_and_objective_runs_and_moves_only_what_it_trains(home, tmp_path, monkeypatch, method, objective, more):
    seen, before = {}, random_gemma().state_dict()
    align = train.align

    def watched(model, *args):
        seen["model"], seen["trained"] = model, {n for n, _ in lora.trainable(model)}
        align(model, *args)
    monkeypatch.setattr(train, "align", watched)
    monkeypatch.setattr(train, "judge_reward", lambda tok, stop: lambda row, ids: ids[0] % 2)      # a random model never refuses
    assert here(monkeypatch, command(home, tmp_path / "run", method=method, objective=objective, steps=3, **more)) == 0
    model = seen["model"]
    if method == "full":
        assert seen["trained"] == set(before) and (tmp_path / "run" / "model.safetensors").exists()
        moved = model_gemma.load_gemma(tmp_path / "run")
        assert not torch.equal(moved.norm.weight, before["norm.weight"])
        assert data.load_tokenizer(tmp_path / "run").get_vocab_size() == 286
    else:
        assert len(seen["trained"]) == (8 if more.get("freeze_basis") else 16)
        lora.detach(model)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert (tmp_path / "run" / "adapter_model.safetensors").exists()

def test_a_run_that_had_nothing_to_learn_ends_with_a_table_all_the_same(home, tmp_path, monkeypatch, capsys):
    """Every reply of a prompt gets the same reward, so no gradient, no update, and no share of it inside the subspace."""
    assert here(monkeypatch, command(home, tmp_path / "run", objective="rloo", steps=2, samples=2, max_new=2)) == 0
    said = capsys.readouterr().out
    assert "readers: overlap with the starting subspace 1.000, share of the update inside it none was made" in said and "writers: " in said
    told = data.read_json(tmp_path / "run/results.json")
    assert told["base"] == told["aligned"]

def test_sae_fit_trains_saves_and_resumes_its_own_saes(home, tmp_path, monkeypatch, capsys):
    fit = dict(sae="fit", fit_width=32, fit_active=4, fit_tokens=400, fit_steps=20, k=4)
    assert here(monkeypatch, command(home, tmp_path / "run", **fit)) == 0
    assert "fitted on 400 tokens" in capsys.readouterr().out
    assert sorted(p.parent.parent.parent.name for p in tmp_path.glob("run/sae/**/params.npz")) == ["layer_0", "layer_1"]
    V = load_file(tmp_path / "run/subspace.safetensors")
    # killed before the subspace was written, after one of two SAEs: the other is fitted again and the result is the same
    shutil.rmtree(tmp_path / "run/sae/layer_1")
    (tmp_path / "run/subspace.safetensors").unlink(), (tmp_path / "run/state.safetensors").unlink()
    assert here(monkeypatch, command(home, tmp_path / "run", resume=True, **fit)) == 0
    assert all(torch.equal(t, V[n]) for n, t in load_file(tmp_path / "run/subspace.safetensors").items())

def test_checkpointing_changes_memory_and_not_the_adapter(home, tmp_path, monkeypatch):
    for name, on in (("plain", None), ("again", True)):
        assert here(monkeypatch, command(home, tmp_path / name, method="lora", checkpointing=on)) == 0
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "again"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)

# ------------------------------------------------------------------------------------------------- kill and resume
@pytest.mark.slow
def test_killed_and_resumed_run_is_byte_identical_to_an_undisturbed_one(home, tmp_path, monkeypatch):
    long = dict(steps=150, save_every=10, micro=8, seed=4)
    hurt = start(command(home, tmp_path / "hurt", **long))
    state = tmp_path / "hurt" / "state.safetensors"
    while not state.exists() and hurt.poll() is None:
        time.sleep(.002)
    hurt.send_signal(signal.SIGKILL)
    hurt.communicate()                                 # too late if it had ended by itself: the next line would tell
    assert hurt.returncode == -signal.SIGKILL
    assert not (tmp_path / "hurt" / "adapter_model.safetensors").exists() and 10 <= len((tmp_path / "hurt/log.jsonl").read_text().splitlines()) < 150
    again = start(command(home, tmp_path / "hurt", resume=True, **long))
    assert here(monkeypatch, command(home, tmp_path / "whole", **long)) == 0
    assert again.communicate(timeout=120) and again.returncode == 0
    for name in ("adapter_model.safetensors", "state.safetensors", "sails.json", "results.json", "table.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "hurt" / name).read_bytes(), name
    assert steps_of(tmp_path / "hurt") == list(range(150))
    drop = lambda folder: [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in (folder / "log.jsonl").read_text().splitlines()]
    assert drop(tmp_path / "hurt") == drop(tmp_path / "whole")

@pytest.mark.parametrize("objective", ("dpo", "rloo"))
def test_a_run_stopped_between_checkpoints_resumes_exactly(home, tmp_path, monkeypatch, objective):
    """The same in this process, stopped by an error two steps after a checkpoint, for the objectives that draw or compare."""
    s = dict(objective=objective, steps=9, save_every=3, samples=2, max_new=3, replay=.1, method="sails", norm_aware=True)
    assert here(monkeypatch, command(home, tmp_path / "whole", **s)) == 0
    backward = train.backward

    def stops(model, batch, s, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return backward(model, batch, s, step, *rest)
    monkeypatch.setattr(train, "backward", stops)
    assert here(monkeypatch, command(home, tmp_path / "hurt", **s)) == 130
    monkeypatch.setattr(train, "backward", backward)
    assert steps_of(tmp_path / "hurt") == [0, 1, 2, 3, 4]
    assert here(monkeypatch, command(home, tmp_path / "hurt", resume=True, **s)) == 0
    assert (tmp_path / "whole/adapter_model.safetensors").read_bytes() == (tmp_path / "hurt/adapter_model.safetensors").read_bytes()
    assert steps_of(tmp_path / "hurt") == list(range(9))

def test_a_run_goes_on_only_when_asked_and_only_with_its_own_settings(home, tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, command(home, tmp_path / "run", method="lora")) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert here(monkeypatch, command(home, tmp_path / "run", method="lora")) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert here(monkeypatch, command(home, tmp_path / "run", method="lora", resume=True, lr=3e-3, seed=1)) == 2
    said = capsys.readouterr().err
    assert "was started with another" in said and "lr" in said and "seed" in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert here(monkeypatch, command(home, tmp_path / "run", method="lora", resume=True)) == 0         # a finished run just finishes again
    assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == before["adapter_model.safetensors"]

# ------------------------------------------------------------------------------------------------- several processes
@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_does(home, tmp_path, monkeypatch):
    """micro 3 of batch 7: the processes get 4 and 3 examples."""
    s = dict(batch=7, steps=5, method="sails", objective="dpo", replay=.1, lr=1e-3, r=None, rank=4)     # torchrun would take --r for its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = start(command(home, tmp_path / "two", **s), "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    assert here(monkeypatch, command(home, tmp_path / "one", **s)) == 0
    said, wrong = two.communicate(timeout=120)
    assert two.returncode == 0, wrong
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert said.count("training 1,536 of") == 1        # one voice
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for x, y in zip(*logs):
        assert all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5) for k in ("step", "loss", "margin", "grad_norm", "tokens"))

# --------------------------------------------------------------------------------------------------------- dry run
BIG = dict(model_type="gemma2", vocab_size=256000, num_hidden_layers=42, hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8,
           head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)
SMALL = dict(BIG, num_hidden_layers=26, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4)

def test_a_dry_run_of_the_9b_counts_parameters_without_allocating_them(tmp_path):
    (tmp_path / "gemma-2-9b").mkdir()
    (tmp_path / "gemma-2-9b/config.json").write_text(json.dumps(BIG))
    measured = ("import resource, subprocess, sys; p = subprocess.run([sys.executable, 'train.py', '--model', sys.argv[1], '--dry-run'], text=True, capture_output=True); "
                "print(p.stdout, p.stderr, p.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", measured, str(tmp_path / "gemma-2-9b")], cwd=TOP, env=ENV, text=True, capture_output=True, timeout=60)
    *said, code, kib = done.stdout.split()
    assert "trainable 17,891,328 = 0.19 %" in done.stdout and "base 9,241,705,984 parameters" in done.stdout
    assert code == "0" and int(kib) < 700 * 1024
    assert not list(tmp_path.rglob("run.json")) and not (TOP / "runs" / "gemma-2-9b-sails-0").exists()

def test_a_dry_run_of_the_2b_and_of_full_fine_tuning(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert here(monkeypatch, ["--model", str(tmp_path), "--dry-run", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "trainable 6,389,760 = 0.24 %" in said and "google/gemma-scope-2b-pt-res, width 16k, layers 5,10,15,20" in said
    assert here(monkeypatch, ["--model", str(tmp_path), "--dry-run", "--device", "cpu", "--method", "full", "--objective", "dpo"]) == 0
    said = capsys.readouterr().out
    assert "= 100.00 %" in said and "the same base again as the reference" in said

def test_a_models_family_is_known_by_name_or_by_shape():
    config = lambda raw: model_gemma.config_from_json(raw)
    assert train.family("google/gemma-2-9b-it@abc", config(RAW))[0] == "gemma-2-9b"
    assert train.family("/somewhere/renamed/", config(BIG))[0] == "gemma-2-9b" and train.family("/somewhere/gemma-2-2b", config(SMALL))[0] == "gemma-2-2b"
    assert train.family("tiny", config(RAW)) is None

# ------------------------------------------------------------------------------------------------------- bad input
def broken(home, tmp_path, what):
    """Settings that meet a fault, and words of the one line that should tell of it."""
    model, pairs, bad = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "sae"
    lines = Path(home.data).read_text().splitlines()
    if what == "no model folder":
        return dict(model=str(tmp_path / "nowhere")), "no such folder"
    if what == "no data file":
        return dict(data=str(tmp_path / "nowhere.jsonl")), "no such file or folder"
    if what == "no data named":
        return dict(data=None), "give --data FILE"
    if what == "no published sae":
        return dict(sae=None), "give --sae DIR, or --sae fit"
    if what == "malformed line":
        pairs.write_text("\n".join(lines[:2] + [lines[2][:-9]] + lines[3:]))
        return dict(data=str(pairs)), "pairs.jsonl line 3: not JSON"
    if what == "wrong keys":
        pairs.write_text("\n".join(lines[:4] + ['{"question": "a"}']))
        return dict(data=str(pairs)), "pairs.jsonl line 5: keys ['question']"
    if what == "empty data":
        pairs.write_text("\n\n")
        return dict(data=str(pairs)), "no usable example"
    if what == "one example":
        pairs.write_text(lines[0] + "\n")
        return dict(data=str(pairs)), "too few usable examples"
    if what == "labels missing":
        pairs.write_text("\n".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "label"}) for line in lines))
        return dict(data=str(pairs), contrast="prompts"), '"label": "harmful"'
    if what == "bad test file":
        pairs.write_text(json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "label"}))
        return dict(test=str(pairs)), 'every row needs "label"'
    if what == "sae of another width":
        return dict(width="65k"), "no SAE of width 65k for layer 0; widths here: ['40']"
    if what == "sae without the layer":
        shutil.copytree(Path(home.sae) / "layer_0", bad / "layer_0")
        return dict(sae=str(bad)), "no SAE for layer 1; layers here: [0]"
    if what == "sae of another model":
        for layer in (0, 1):
            sae_module.save_sae(random_sae(D=32), bad, layer, 20)
        return dict(sae=str(bad)), "reads vectors of 32 numbers, but the model's residual stream has 24"
    if what == "truncated sae":
        for layer in (0, 1):
            path = bad / sae_module.save_sae(random_sae(), bad, layer, 20)
        path.write_bytes(path.read_bytes()[:3000])
        return dict(sae=str(bad)), "not a whole SAE file"
    if what == "a layer too deep":
        return dict(layers="0,2"), "the model has layers 0..1"
    if what == "too many features":
        return dict(k=41), "--k asks for 41"
    if what == "a feature that is not there":
        return dict(drop="40"), "the SAE has features 0..39"
    if what == "one sample":
        return dict(objective="rloo", samples=1), "at least 2 replies a prompt"
    if what == "diverges":
        return dict(lr=1e30, method="lora", clip=1e30), "lower --lr"
    if what == "no gpu":
        return dict(device="cuda"), "torch sees no GPU"
    shutil.copytree(home.model, model)
    weights = model / "model.safetensors"
    if what == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return dict(model=str(model)), "not a whole safetensors file"
    if what == "weights of another shape":
        data.write_json(model / "config.json", dict(RAW, intermediate_size=41))
        return dict(model=str(model)), "config.json asks for (24, 41)"
    if what == "missing shard":
        weights.unlink()
        data.write_json(model / "model.safetensors.index.json", dict(weight_map={"model.norm.weight": "model-00002-of-00002.safetensors"}))
        return dict(model=str(model)), "model-00002-of-00002.safetensors"
    if what == "no tokenizer":
        (model / "tokenizer.json").unlink()
        return dict(model=str(model)), "tokenizer.json"
    raise AssertionError(what)

FAULTS = ("no model folder", "no data file", "no data named", "no published sae", "malformed line", "wrong keys", "empty data", "one example", "labels missing", "bad test file",
          "sae of another width", "sae without the layer", "sae of another model", "truncated sae", "a layer too deep", "too many features", "a feature that is not there", "one sample",
          "diverges", "no gpu", "truncated weights", "weights of another shape", "missing shard", "no tokenizer")

@pytest.mark.parametrize("what", FAULTS)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(home, tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes, said = broken(home, tmp_path, what)
    assert here(monkeypatch, command(home, tmp_path / "run", **changes)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line and "?it" not in line]
    assert len(told) == 1 and told[0].startswith("error: ") and said in told[0], told
    if what == "diverges":                             # it began to train: what it did stays to be looked at
        assert not (tmp_path / "run" / "run.json").exists()
    else:
        assert not (tmp_path / "run").exists()

def test_after_a_refusal_the_mended_command_runs_without_resume(home, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(Path(home.data).read_text()[:-20])
    assert here(monkeypatch, command(home, tmp_path / "run", data=str(pairs))) == 2
    pairs.write_text(Path(home.data).read_text())
    assert here(monkeypatch, command(home, tmp_path / "run", data=str(pairs), steps=2)) == 0

@pytest.mark.parametrize("option, value", (("r", 0), ("steps", 0), ("tau", 0), ("tau", 1.5), ("batch", -1), ("save_every", 0)))
def test_settings_out_of_range_are_refused(home, tmp_path, monkeypatch, capsys, option, value):
    assert here(monkeypatch, command(home, tmp_path / "run", **{option: value})) == 2
    assert f"--{option.replace('_', '-')} {value}" in capsys.readouterr().err and not (tmp_path / "run").exists()

def test_full_fine_tuning_in_bf16_is_refused(home, tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, command(home, tmp_path / "run", method="full", dtype="bfloat16")) == 2
    assert "add --dtype float32" in capsys.readouterr().err
