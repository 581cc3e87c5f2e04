"""The memory plan: counted bytes are those of real steps; what does not fit is refused, with a way out."""
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import lora
import model_gemma
import train
from benchmarks import count, plan
from conftest import NINE, RAW, TOP, command, go, random_gemma

def settings(more="", **changes):
    s = train.settings(f"--model M --method lora --r 4 --device cpu {more}".split())
    return SimpleNamespace(**vars(s) | dict(micro=3, replies=24) | changes)

def real_step(layers, dtype, checkpointing=False):
    """A step of 3 x 20 tokens on the CPU: (bytes that the blocks save, by autograd's hooks; all peaks)."""
    model, saved = random_gemma(dtype=dtype, num_hidden_layers=layers), {}
    lora.attach(model, r=4)
    lora.init_lora(model)
    model.checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    pack = lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    ids = torch.randint(3, 300, (3, 20))
    for _ in range(2):                                 # the second finds the gradients of the first
        saved.clear()
        with count.Live() as live:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                h, _ = model.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
            loss = model.nll(h.flatten(0, 1), ids.flatten()).sum()
            del h
            loss.backward()
    return sum(n for at, n in saved.items() if at not in own), max(live.peaks)

@pytest.mark.parametrize("dtype", model_gemma.DTYPES)
def test_a_block_saves_on_the_meta_device_what_autograd_saves_in_a_real_step(dtype):
    shape = plan.shape(settings(dtype=dtype), "lora", model_gemma.config_from_json(RAW))
    one, two = (count.step(count.bare(shape, n), 3, 20, 60)[0] for n in (1, 2))
    real = [real_step(n, model_gemma.DTYPES[dtype])[0] for n in (1, 2)]
    assert two - one == real[1] - real[0] > 0

@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_and_three_blocks_tell_the_peak_of_six(checkpointing):
    config = model_gemma.config_from_json(RAW | dict(num_hidden_layers=6))
    s = settings(checkpointing=checkpointing)
    _, *peaks = count.walked(count.step, plan.shape(s, "lora", config), 3, 20, 60)
    assert max(peaks) == pytest.approx(real_step(6, torch.float32, checkpointing)[1], rel=.02)

def test_phases_hold_what_the_objective_and_the_method_keep(home):
    config, size = model_gemma.load_config(home.model), plan.sizes(settings("--max-tokens 64"))
    of = lambda method, more="", world=1: plan.phases(settings(more), method, config, size, world)
    sft, dpo, rloo = (of("full", f"--objective {x}") for x in ("sft", "dpo", "rloo"))
    assert "reference" not in sft["training"] and dpo["training"]["reference"] == sft["training"]["weights"]
    assert dpo["training"]["activations"] == pytest.approx(2 * sft["training"]["activations"], rel=.1)
    assert "drawing" in rloo and set(of("base")) == {"evaluation"}
    assert of("lora", "--text T --replay .5")["training"]["work"] > of("lora")["training"]["work"]
    assert [of("lora", "", n)["training"]["trained"] for n in (1, 2)] == [1536 * 16] * 2   # whole on each
    sails = plan.phases(settings(layers=[0, 1], width="16k", sae="S"), "sails", config, size)
    assert sails["features"]["SAEs"] == 2 * 2 * 16384 * 24 * 4 and "SAEs" not in sails["training"]

def test_a_layer_of_the_9bs_shape_saves_at_most_300_mb_at_4_x_512_tokens():
    shape = plan.shape(settings("--r 16", dtype="bfloat16"), "lora", model_gemma.config_from_json(NINE))
    assert count.walked(count.step, shape, 4, 512, 1024)[0] / 42 < 300e6

def test_auto_takes_the_largest_that_fits_and_checkpointing_only_if_it_must(home, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda: 0)
    config, size = model_gemma.load_config(home.model), plan.sizes(settings())
    size.held, size.asked, size.pair = 8, 0, 256       # training is the largest phase
    ask = ["lora"], config, size
    total = lambda n, again: plan.peak(plan.trial(settings(), *ask, 0, 1, micro=n, checkpointing=again)[1])[1]
    four, two, one, less = total(4, False), total(2, False), total(1, False), total(1, True)
    assert less < one < two < four
    for limit, want in ((four, (4, False)), (two, (2, False)), (one, (1, False))):
        t, _, fits = plan.largest(settings(), *ask, limit, 1, 4)
        assert fits and (t.micro, t.checkpointing) == want
    assert plan.largest(settings(), *ask, (less + one) / 2, 1, 4)[0].checkpointing
    assert not plan.largest(settings(), *ask, 1e6, 1, 4)[2]

def test_the_choice_stands_in_run_json_and_a_resumed_run_takes_it_from_there(home, tmp_path, monkeypatch):
    auto = [x for x in command(home, tmp_path / "run", "--method lora") if x not in ("--micro", "3")]
    code, said, err = go(auto)
    assert code == 0 and "chosen: --micro 4, 32 replies at a time" in said, err
    kept = data.read_json(tmp_path / "run/run.json")["settings"]
    assert (kept["micro"], kept["replies"], kept["checkpointing"]) == (4, 32, False)
    (tmp_path / "run/results.json").unlink()
    monkeypatch.setattr(plan, "MOST_ON_A_CPU", 1)      # another machine would choose another
    code, said, err = go([*auto, "--resume"])
    assert code == 0 and "--micro 4, 32 replies" in said, err

def test_bfloat16_is_called_slow_on_a_cpu_without_fast_products_of_it(home, tmp_path, monkeypatch):
    for cpu in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
        said = go(command(home, tmp_path, "--dtype bfloat16 --dry-run"))
        assert ("trains slowly" in said[1]) == (cpu == "AVX2")

LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(TOP)!r})
import data, train
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {500 << 20}, -1))
data.run_main(train.main)"""

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's size of a process")
def test_under_a_memory_limit_a_run_is_refused_with_a_flag_before_weights_are_read(home, tmp_path):
    model = tmp_path / "model"
    for name in ("config.json", "tokenizer.json"):     # no weights: they are not even looked for
        data.write_text(model / name, (Path(home.model) / name).read_text())

    def run(*more):
        args = [*command(home, tmp_path / "run", "--method lora --batch 8192"), "--model", str(model), *more]
        return subprocess.run([sys.executable, "-c", LIMITED, *args], capture_output=True, text=True)
    done = run("--micro", "8192")
    found = re.search(r"error: .* GB are needed in training, .*; with (--micro \d+) it fits", done.stderr)
    assert found and done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    again = run(*found[1].split())                     # the way out leads on, to the weights
    assert again.returncode == 2 and "model.safetensors" in again.stderr and "needed in" not in again.stderr
    assert not (tmp_path / "run").exists()
