"""Files from the hub: whole programs, of which only pauses are cut short, against a hub on loopback."""
import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import data
import model_gemma
import sae as sae_module
from conftest import TOP, random_gemma, random_sae
from hub_server import NEEDED, HubServer, run_script
from test_tokens import hh, small_tokenizer

# A tiny Gemma-2 behind the 9B's name: 32 layers for the paper's SAE layers 10 .. 30, in three shards.
MODEL, SAES, PAIRS = "google/gemma-2-9b", "google/gemma-scope-9b-pt-res", "Anthropic/hh-rlhf"
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"
SHARD, *_ = SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
# per layer the published choices of L0: first the wanted one, the nearest to 100, the upper of a tie
L0S = {10: (113, 30, 220), 15: (136, 64), 20: (68, 40, 20), 25: (114, 61), 30: (120, 60)}
SHORT = "--steps 2 --batch 4 --micro 4 --warmup 1 --contrast-pairs 8 --k 4 --r 4".split()
QUIET, NOBODY = dict(HF_HUB_DISABLE_PROGRESS_BARS="1"), "http://127.0.0.1:1"
SHOW = "print(data.load_tokenizer('{}').get_vocab_size())".format
LOAD = f"data.fetch('{MODEL}', ['{SHARD}'])"
# a script whose main() calls data.py, for what data.py's own main does not reach
CALL = "import data\ndef main():\n    {}\ndata.run_main(main)"

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What the hub holds behind the names of the paper's run, and much that the run does not need."""
    root = tmp_path_factory.mktemp("hub")
    folder, pairs = root / "models" / MODEL, root / "datasets" / PAIRS
    model_gemma.save_gemma(random_gemma(num_hidden_layers=32), folder, shard_bytes=300_000)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    others = pairs / "helpful-base/train.jsonl.gz"
    for waste in (folder / "pytorch_model.bin", folder / "old/old.json", others):
        data.write_text(waste, "not needed")
    for name in (MODEL + "-it", MODEL + "@v2"):
        shutil.copytree(folder, root / "models" / name)
    data.write_text(root / "models" / (MODEL + "@v2") / "README.md", "new")
    for seed, (i, w, l0) in enumerate([(i, w, l0) for i in L0S for w in ("16k", "131k") for l0 in L0S[i]]):
        path = root / "models" / SAES / f"layer_{i}/width_{w}/average_l0_{l0}/params.npz"
        sae = random_sae(seed)                         # each another: the client fetches equal files once
        path.parent.mkdir(parents=True)
        np.savez(path, **{name: getattr(sae, name).numpy() for name in sae_module.SHAPES})
    (pairs / "harmless-base").mkdir()
    for part, n in (("train", 40), ("test", 12)):      # HH-RLHF's rows with harmless text
        asks = [f"Where do I put box {n}{i}?" for i in range(n)]
        lines = [json.dumps(dict(chosen=hh(ask, "There."), rejected=hh(ask, "No idea."))) for ask in asks]
        (pairs / f"harmless-base/{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    data.write_text(root / "datasets/some-lab/tables/rows.csv", "a,b\n1,2\n")
    for name in ("category_1.csv", "data/more.txt", "old/more.txt", "README.md"):
        data.write_text(root / "datasets" / HEX_PHI / name, f"Where is {name}?\nWhy?\n")
    return root

@pytest.fixture
def hub(root):
    with HubServer(root) as hub:
        yield hub

@pytest.fixture
def go(hub, tmp_path):
    """Run a script, or code that calls data.py, as a user of this hub with an empty cache and no bars."""
    def run(*args, **env):
        if not args[0].endswith(".py"):
            (home / "call.py").write_text(CALL.format(args[0]))
            args = [home / "call.py"]
        return run_script(TOP, args, home, **QUIET | dict(HF_ENDPOINT=hub.url) | env)
    home = tmp_path / "home"
    home.mkdir()
    return run

def said(done):
    """What a run that succeeded without a word on stderr printed, as words."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()

def refused(done, *words):
    """The run ended with exit code 2 and one line on stderr, which holds every word and no token."""
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert not re.search("hf_|secret", done.stdout + done.stderr)

def test_only_what_is_named_is_downloaded_a_star_stays_in_one_folder_level_and_bars_show(go, hub):
    done = go(f"print(*data.fetch('{MODEL}', ['model-*', '*.json']))", HF_HUB_DISABLE_PROGRESS_BARS="0")
    folder, sha = done.stdout.split()
    assert re.fullmatch("[0-9a-f]{40}", sha) and folder.endswith(f"google--gemma-2-9b/snapshots/{sha}")
    assert hub.downloads() == ["config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"]
    assert "Fetching 6 files" in done.stderr

def test_a_revision_is_used_and_data_sets_have_their_own_addresses(go, hub):
    names, pairs = ["tokenizer.json"], f"data.fetch('{PAIRS}', ['harmless-base/*'], 'dataset')[0]"
    code = f"print(data.fetch('{MODEL}@v2', {names})[1], data.fetch('{MODEL}', {names})[1], {pairs})"
    v2, main, folder = said(go(code))
    assert v2 != main and "datasets--Anthropic--hh-rlhf" in folder
    assert any(path.startswith(f"/{MODEL}/resolve/{v2}/") for _, path, _, _ in hub.log)

@pytest.fixture
def moving(hub, tmp_path):
    """A repository with one.json and two.json in version v1, and the code that pushes v2."""
    hub.root = tmp_path / "moving"
    repo, new = (str(hub.root / "models/some-lab" / name) for name in ("moving", "new"))
    for name in ("one.json", "two.json"):
        data.write_text(f"{repo}/{name}", "v1")
        data.write_text(f"{new}/{name}", "later:v2")
    return f"import os; os.rename({repo!r}, {repo + '@old'!r}); os.rename({new!r}, {repo!r})"

def test_one_run_reads_one_commit_though_somebody_pushes_meanwhile(go, moving):
    one, two = (f"data.fetch('some-lab/moving', ['{name}.json'])" for name in ("one", "two"))
    code = f"one = {one}; {moving}; two = {two}; print(one == two, (two[0] / 'two.json').read_text())"
    assert said(go(code)) == ["True", "v1"]

def test_the_next_run_sees_a_new_commit_though_the_old_one_is_cached(go, moving):
    look = "at, sha = data.fetch('some-lab/moving', ['one.json']); print(sha, (at / 'one.json').read_text())"
    before, after = said(go(f"{look}; {moving}")), said(go(look))
    assert before[1] == "v1" and after[1] == "later:v2" and before[0] != after[0]
    assert said(go(look, HF_HUB_OFFLINE="1")) == after

def test_the_token_goes_to_the_hub_and_not_to_its_cdn(go, hub):
    said(go(LOAD, HF_TOKEN="hf_good"))
    assert hub.downloads() == [SHARD]
    sent = {(path.split("/")[1], asked["token"]) for _, path, _, asked in hub.log if "harnesses" not in path}
    assert sent == {("api", "Bearer hf_good"), ("google", "Bearer hf_good"), ("cdn", None)}

def test_a_second_run_downloads_nothing_and_without_the_hub_takes_what_is_cached(go, hub):
    first = said(go(SHOW(MODEL)))
    hub.log.clear()
    assert said(go(SHOW(MODEL))) == first and hub.downloads() == []
    hub.log.clear()
    assert said(go(SHOW(MODEL), HF_HUB_OFFLINE="1")) == first and hub.log == []
    refused(go(LOAD, HF_HUB_OFFLINE="1"), MODEL, "cached", f"no file {SHARD}", "HF_HUB_OFFLINE")
    unplugged = go(SHOW(MODEL), HF_ENDPOINT=NOBODY)
    assert unplugged.stdout.split() == first
    assert re.fullmatch(f"note: no answer .* cached copy of {MODEL}\n", unplugged.stderr)

def test_a_download_cut_in_the_middle_goes_on_where_it_broke(go, hub, tmp_path):
    """12 MB, cut after 10.8; before huggingface_hub 1.1 only a second run asks for the rest."""
    hub.root, hub.cut, numbers = tmp_path / "large", {SHARD}, np.arange(3_000_000, dtype=np.int32)
    (hub.root / "models/some-lab/large").mkdir(parents=True)
    numbers.tofile(hub.root / "models/some-lab/large" / SHARD)
    code = f"print(data.fetch('some-lab/large', ['{SHARD}'])[0])"
    done = go(code)
    if done.returncode:
        refused(done, "check the network", "again")
        done = go(code)
    asked = [(status, h["range"]) for method, _, status, h in hub.log if method == "GET" and h["file"]]
    assert asked == [(200, None), (206, "bytes=10485760-")]
    assert np.array_equal(np.fromfile(Path(done.stdout.strip()) / SHARD, dtype=np.int32), numbers)

def test_a_busy_hub_is_asked_again_and_one_out_of_order_is_done_without_if_all_is_cached(go, hub):
    hub.broken = {MODEL: (503, None, "busy")}
    busy = lambda: data.time.sleep(.01) or sum(status == 503 for _, _, status, _ in hub.log)
    mend = lambda: any(n > 1 for n in iter(busy, -1)) and hub.broken.clear()
    threading.Thread(target=mend, daemon=True).start()
    first = said(go(SHOW(MODEL)))
    assert 1 < busy() < 4
    hub.broken = {MODEL: (500, None, "out of order")}
    again = go(SHOW(MODEL))
    assert again.stdout.split() == first and f"cached copy of {MODEL}" in again.stderr

FAULTS = (TOP / "tests" / "hub_faults.txt").read_text().splitlines()[1:]

@pytest.mark.parametrize("script, env, fault, words", [line.split(" | ") for line in FAULTS])
def test_a_fault_ends_in_one_line_that_names_the_place_and_the_way_out(
        go, hub, tmp_path, script, env, fault, words):
    if fault:
        where, status, code, message = shlex.split(fault)
        hub.broken = {where: (int(status), code, message)}
    training = [*script.split(), *SHORT, "--out", tmp_path / "out"]
    env = dict(x.split("=") for x in env.encode().decode("unicode_escape").split(" ") if x)
    done = go(*(training if script.startswith("train.py") else [script]), **env)
    refused(done, *shlex.split(words.format(url=hub.url)))
    assert not (tmp_path / "out").exists()

def test_a_blocked_xet_storage_says_how_to_go_around_it_and_that_way_works(go, hub):
    pytest.importorskip("hf_xet")
    hub.xet = True
    refused(go(LOAD), MODEL, "HF_HUB_DISABLE_XET=1")
    said(go(LOAD, HF_HUB_DISABLE_XET="1"))
    assert hub.downloads() == [SHARD]

def test_prompts_come_from_a_hub_data_set_by_its_id_or_from_a_folder_of_that_name(go, hub, monkeypatch):
    code = f"print(*(p['id'] for p in data.read_prompts(['{HEX_PHI}'])))"
    ids = ["HEx-PHI/category_1-1", "HEx-PHI/category_1-2", "more/1", "more/2"]
    hub.broken = {"category_1.csv": (403, "GatedRepo", "not in the list")}     # the list of files is public
    refused(go(code, HF_TOKEN="hf_good"), f"{hub.url}/datasets/{HEX_PHI}", "gated")
    hub.broken = {}
    assert said(go(code)) == ids and hub.downloads() == ["category_1.csv", "data/more.txt"]
    monkeypatch.chdir(hub.root / "datasets")
    assert [p["id"] for p in data.read_prompts([HEX_PHI])] == ids
    with pytest.raises(data.UserError, match="no such file: some-lab/prompts.csv"):
        data.read_prompts(["some-lab/prompts.csv"])

@pytest.mark.slow
def test_a_full_disk_says_so(hub, tmp_path):
    """A cache of 64 kB, in a mount namespace of its own; skipped where the system allows none."""
    space = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k none {tmp_path} && exec "$0" "$@"']
    if not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("no private mount to be had here")
    command = [sys.executable, "-W", "ignore", "-c", CALL.format(LOAD)]
    env = NEEDED | QUIET | dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    done = subprocess.run([*space, *command], env=env, capture_output=True, text=True, cwd=TOP, timeout=120)
    refused(done, MODEL, "No space left", str(tmp_path), "HF_HOME")

def test_local_folders_and_files_need_no_hub_and_have_a_fingerprint_of_their_contents(tmp_path):
    file = tmp_path / "a.json"
    for path in (file, tmp_path / "sub/b.json"):
        data.write_text(path, "{}")
    assert (data.listing(tmp_path), data.listing(file, "dataset")) == (["a.json", "sub/b.json"], ["a.json"])
    assert data.fetch(tmp_path, ["*.json"]) == data.fetch(file, ["*"], "dataset") == (tmp_path, None)
    for path, name, says in ((tmp_path, "c.json", "no file c.json; it holds a.json"),
                             (file, "a.json", "is a file; give the folder")):
        with pytest.raises(data.UserError, match=says):
            data.fetch(path, [name])
    before = data.fingerprint(tmp_path, ["*.json"])
    assert data.fingerprint(tmp_path / "sub", ["*.json"]) != before == data.fingerprint(tmp_path, ["a.json"])
    file.write_text("[]")
    assert data.fingerprint(tmp_path, ["*.json"]) != before

def test_the_papers_command_runs_whole_from_the_hub_and_again_offline(go, hub, tmp_path):
    command = ["train.py", "--model", MODEL, *SHORT, "--out"]
    text = " ".join(said(go(*command, tmp_path / "first")))
    saes = [f"layer_{i}/width_16k/average_l0_{l0s[0]}/params.npz" for i, l0s in L0S.items()]
    pairs = ["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"]
    about = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert hub.downloads() == sorted([*about, *SHARDS, *saes, *pairs])
    assert all(word in text for word in (MODEL, "template hh", PAIRS, SAES, "16k", "10,15,20,25,30"))
    commits = [hub.folder(*repo)[1] for repo in (("model", MODEL), ("dataset", PAIRS), ("model", SAES))]
    sources = dict(model=commits[0], data=commits[1], sae=[commits[2]] * 5)
    assert data.read_json(tmp_path / "first/run.json")["settings"]["sources"] == sources
    hub.log.clear()
    said(go(*command, tmp_path / "second", HF_HUB_OFFLINE="1"))
    assert hub.log == []
    for name in ("run.json", "results.json", "adapter_model.safetensors", "subspace.safetensors", "table.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name

def test_an_it_model_takes_chat_turns_and_a_dry_run_downloads_its_config_alone(go, hub, tmp_path):
    text = " ".join(said(go("train.py", "--model", MODEL + "-it", "--dry-run", "--out", tmp_path / "out")))
    assert all(word in text for word in (MODEL + "-it", "template gemma", SAES, "16k", "10,15,20,25,30"))
    assert hub.downloads() == ["config.json"] and not (tmp_path / "out").exists()
