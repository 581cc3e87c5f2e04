"""The hub road, walked by subprocesses against a hub on loopback: nothing is replaced inside the program under test.

Every fault must end in exit code 2 and ONE clear line, never a traceback.
"""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import data
from hub_server import HubServer, run_script
from test_tokens import small_tokenizer

TOP = Path(__file__).resolve().parent.parent
REPO = "some-lab/gemma-2-tiny"
SHOW = ["data.py", "--model", REPO]
# what a script's main() does with the two functions, for what data.py's own main does not reach
CALL = "import data, sys\ndef main():\n    {}\ndata.run_main(main)"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What the hub serves: a model with a tokenizer and other files, a second revision of it, and a data set."""
    root = tmp_path_factory.mktemp("hub")
    for rev in ("", "@v2"):
        repo = root / "models" / (REPO + rev)
        repo.mkdir(parents=True)
        small_tokenizer().save(str(repo / "tokenizer.json"))
        for i in range(1, 3):
            (repo / f"model-{i:05}-of-00002.safetensors").write_bytes(f"{i}{rev}".encode() * 100_000)
        for layer in (10, 20):
            for l0 in range(30, 150, 10):              # more files than one page of the tree holds
                path = repo / f"layer_{layer}/width_16k/average_l0_{l0}/params.npz"
                path.parent.mkdir(parents=True)
                path.write_bytes(b"%d" % l0 * 100)
    pairs = root / "datasets/some-lab/pairs/harmless-base"
    pairs.mkdir(parents=True)
    (pairs / "train.jsonl.gz").write_bytes(b"not opened here")
    return root


@pytest.fixture
def hub(root):
    with HubServer(root) as hub:
        yield hub


@pytest.fixture
def go(hub, tmp_path):
    """Run a script, or code that calls data.py, as a user of this hub with an empty cache."""
    def run(*args, **env):
        args = args if args[0].endswith(".py") else ("-c", CALL.format(args[0]))
        base = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        base |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
        code, out, err = run_script(TOP, args, base | env, tmp_path / "run")
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return run


def refused(done, *words):
    """The run ended with exit code 2 and one line on stderr (progress bars aside), which holds every word."""
    lines = [x for x in done.stderr.replace("\r", "\n").splitlines() if x.strip() and "it/s]" not in x and "?B/s" not in x]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_only_the_named_files_are_downloaded_and_the_commit_is_told(go, hub):
    done = go(f"print(*data.fetch('{REPO}', ['model-*.safetensors', 'layer_20/width_16k/average_l0_70/params.npz'])[::-1])")
    assert done.returncode == 0, done.stderr
    sha, folder = done.stdout.split()
    assert len(sha) == 40 and folder.endswith(f"hub/models--some-lab--gemma-2-tiny/snapshots/{sha}")
    assert sorted(hub.downloads()) == ["layer_20/width_16k/average_l0_70/params.npz", "model-00001-of-00002.safetensors",
                                       "model-00002-of-00002.safetensors"]
    assert "Fetching 3 files" in done.stderr           # the hub's own progress bars show


def test_listing_reads_every_page_and_downloads_nothing(go, hub):
    done = go(f"print(len(data.listing('{REPO}')), sum('cursor' in n for n in data.listing('{REPO}')))")
    assert done.stdout.split() == ["27", "0"], done.stderr
    assert hub.downloads() == [] and sum("cursor" in path for _, path, _, _ in hub.log) == 2


def test_a_star_stays_inside_one_folder_level(go, hub):
    done = go(f"print(data.fetch('{REPO}', ['*.json', '*.npz'])[1])")
    assert done.returncode == 0 and hub.downloads() == ["tokenizer.json"], done.stderr


def test_a_revision_is_used_and_data_sets_have_their_own_addresses(go, hub):
    done = go(f"print(data.fetch('{REPO}@v2', ['tokenizer.json'])[1], data.fetch('{REPO}', ['tokenizer.json'])[1], "
              "data.fetch('some-lab/pairs', ['harmless-base/*'], 'dataset')[0])")
    v2, main, folder = done.stdout.split()
    assert v2 != main and "datasets--some-lab--pairs" in folder
    assert any(path.startswith(f"/{REPO}/resolve/{v2}/") for _, path, _, _ in hub.log)


@pytest.fixture
def moving(hub, tmp_path):
    """A repository with one.json and two.json in two versions, and the code that pushes the second: v1 until then, v2 after."""
    hub.root = tmp_path / "moving"
    repo, new = (hub.root / "models/some-lab" / name for name in ("moving", "new"))
    for folder, text in ((repo, "v1"), (new, "later: v2")):
        folder.mkdir(parents=True)
        for name in ("one.json", "two.json"):
            (folder / name).write_text(text)
    return f"os.rename({str(repo)!r}, {str(repo) + '@old'!r}); os.rename({str(new)!r}, {str(repo)!r})"


def test_one_run_reads_one_commit_though_somebody_pushes_meanwhile(go, moving):
    done = go(f"import os; one = data.fetch('some-lab/moving', ['one.json']); {moving}; "
              "two = data.fetch('some-lab/moving', ['two.json']); print(one == two, (two[0] / 'two.json').read_text())")
    assert done.stdout.split() == ["True", "v1"], done.stderr


def test_the_next_run_sees_a_new_commit_though_the_old_one_is_cached(go, moving):
    look = "folder, sha = data.fetch('some-lab/moving', ['one.json']); print(sha, (folder / 'one.json').read_text())"
    before = go(look + f"; import os; {moving}").stdout.split()
    after = go(look).stdout.split()
    assert before[1:] == ["v1"] and after[1:] == ["later:", "v2"] and before[0] != after[0]
    assert go(look, HF_HUB_OFFLINE="1").stdout.split() == after


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(go, hub):
    hub.gate(REPO, allowed=["hf_good"])
    done = go(f"print(data.fetch('{REPO}', ['model-00001-of-00002.safetensors']))", HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    sent = {path.split("/")[1]: h["authorization"] for _, path, _, h in hub.log}
    assert sent["api"] == sent["some-lab"] == "Bearer hf_good" and sent["cdn"] is None


def test_second_run_is_quiet_to_the_cdn_and_offline_needs_no_hub(go, hub):
    assert go(*SHOW).returncode == 0
    hub.log.clear()
    online = go(*SHOW)
    assert online.returncode == 0 and hub.downloads() == [] and "Fetching" not in online.stderr, online.stderr
    hub.log.clear()
    offline = go(*SHOW, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == online.stdout and hub.log == [], offline.stderr


def test_without_a_network_the_cached_copy_is_used_and_that_is_said(go, hub):
    assert go(*SHOW).returncode == 0
    done = go(*SHOW, HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 0 and f"note: no answer from http://127.0.0.1:1" in done.stderr and REPO in done.stderr


def test_a_download_cut_in_the_middle_goes_on_where_it_broke(go, hub, tmp_path):
    """24 MB, cut at 12: the client writes pieces of 10 MB, so it has one piece and asks for the rest, by itself or (before
    huggingface_hub 1.1) when the command is run again, as the line on stderr says."""
    hub.root, name = tmp_path / "large", "model.safetensors"
    file = hub.root / "models/some-lab/large" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(np.arange(6_000_000, dtype=np.int32).tobytes())
    hub.cut_once(name)
    want = f"print(data.fetch('some-lab/large', ['{name}'])[0])"
    done = go(want)
    if done.returncode:
        refused(done, "run the same command again")
        done = go(want)
    assert done.returncode == 0, done.stderr
    asked = [(status, h["range"]) for method, _, status, h in hub.log if method == "GET" and h.get("x-file") == name]
    assert asked == [(200, None), (206, "bytes=10485760-")]
    assert (Path(done.stdout.strip()) / name).read_bytes() == file.read_bytes()


# ------------------------------------------------------------------------------------------------------ the faults
def test_gated_without_login_names_the_page_and_the_login(go, hub):
    hub.gate(REPO)
    refused(go(*SHOW), "gated", f"{hub.url}/{REPO}", "hf auth login")


def test_gated_listing_too_and_a_token_that_was_not_let_in(go, hub):
    hub.gate(REPO, api=True)
    refused(go(*SHOW, HF_TOKEN="hf_good"), "gated", f"{hub.url}/{REPO}", "accept", "not in the authorized list")


def test_a_bad_token_is_told_from_a_missing_repository(go, hub):
    done = go(*SHOW, HF_TOKEN="hf_expired")
    refused(done, "token", "401", "hf auth login", "HF_TOKEN")
    assert "hf_expired" not in done.stderr


def test_a_malformed_token_is_not_printed(go, hub):
    done = go(*SHOW, HF_TOKEN="hf_secret\x0bword")
    refused(done, "your", "token", "HF_TOKEN")
    assert "secret" not in done.stderr


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_good"}], ids=["stranger", "logged in"])
def test_no_such_repository(go, hub, token):
    refused(go("data.py", "--model", "some-lab/gemma-2-typo", **token), f"{hub.url}/some-lab/gemma-2-typo", "no such", "spelling")


def test_no_such_revision(go, hub):
    refused(go("data.py", "--model", REPO + "@v3"), REPO, "no revision v3", "tree/main")


def test_no_network_and_not_cached(go, hub):
    refused(go(*SHOW, HF_ENDPOINT="http://127.0.0.1:1"), "http://127.0.0.1:1", REPO, "check the network")


def test_offline_and_not_cached(go, hub):
    refused(go(*SHOW, HF_HUB_OFFLINE="1"), REPO, "not in the cache", "HF_HUB_OFFLINE")


def test_offline_and_only_another_file_cached(go, hub):
    assert go(f"data.fetch('{REPO}', ['model-00001-of-00002.safetensors'])").returncode == 0
    refused(go(*SHOW, HF_HUB_OFFLINE="1"), "cached copy", "no file tokenizer.json", "HF_HUB_OFFLINE")


def test_a_file_gone_though_still_listed(go, hub):
    hub.gone.add("tokenizer.json")
    refused(go(*SHOW), REPO, "gone from the hub")


def test_a_file_the_repository_never_had(go, hub):
    refused(go(f"data.fetch('{REPO}', ['config.json'])"), REPO, "no file config.json", "it holds layer_10/")
    refused(go(f"data.fetch('{REPO}', ['*.bin', '*.pt'])"), REPO, "no file like *.bin or *.pt")


def test_an_error_of_the_hub_itself(go, hub):
    hub.broken[REPO] = (500, None, "out of order")
    refused(go(*SHOW), "answered 500", "out of order", "later")


def test_a_token_without_the_right_says_what_the_hub_says(go, hub):
    """A fine-grained token: the listing is allowed, the file is not, and only the hub's own words tell why."""
    hub.broken["tokenizer.json"] = (403, None, "Please enable access to public gated repositories in your token settings")
    refused(go(*SHOW, HF_TOKEN="hf_good"), "answered 403", f"{hub.url}/{REPO}", "enable access to public gated repositories")


def test_a_blocked_xet_storage_says_how_to_go_around_it_and_that_way_works(go, hub):
    """New files of the hub lie in Xet storage on other hosts, which a firewall may block while the hub answers."""
    hub.xet = True
    want = f"print(data.fetch('{REPO}', ['model-00001-of-00002.safetensors'])[1])"
    refused(go(want), REPO, "failed", "HF_HUB_DISABLE_XET=1")
    assert go(want, HF_HUB_DISABLE_XET="1").returncode == 0 and hub.downloads() == ["model-00001-of-00002.safetensors"]


@pytest.mark.slow
def test_a_download_that_keeps_breaking_ends_with_a_line(go, hub):
    hub.cut_always("model-00001-of-00002.safetensors")
    done = go(f"data.fetch('{REPO}', ['model-00001-of-00002.safetensors'])", HF_HUB_VERBOSITY="critical")
    refused(done, REPO, "failed", "run the same command again")


def test_a_full_disk_says_so(go, hub, tmp_path):
    """A cache of 64 kB, in a mount namespace of its own; skipped where the system allows none."""
    unshare, small = shutil.which("unshare"), tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {small}"
    if not unshare or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no private mount to be had here")
    code = CALL.format(f"data.fetch('{REPO}', ['model-00001-of-00002.safetensors'])")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(small), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([unshare, "-rm", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", code], cwd=TOP,
                          env=env, capture_output=True, text=True, timeout=120)
    refused(done, "disk full", REPO, "HF_HOME")


@pytest.mark.parametrize("spec", ["no-such-folder", "./no/such", "/no/such", "a/b/c", "some-lab/", "some-lab/x@", "../up/x"])
def test_what_is_neither_a_path_nor_a_hub_id_is_said_without_asking_the_hub(spec):
    with pytest.raises(data.UserError, match="no such folder: .*owner/name"):
        data.listing(spec)


def test_local_folders_and_files_need_no_hub(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text("{}"), (tmp_path / "sub/b.json").write_text("{}")
    assert data.listing(tmp_path) == ["a.json", "sub/b.json"]
    assert data.fetch(tmp_path, ["*.json"]) == (tmp_path, None)
    assert data.listing(tmp_path / "a.json", "dataset") == ["a.json"]
    assert data.fetch(tmp_path / "a.json", ["*"], "dataset") == (tmp_path, None)
    with pytest.raises(data.UserError, match="no file config.json; it holds a.json"):
        data.fetch(tmp_path, ["config.json"])
    with pytest.raises(data.UserError, match="is a file; give the folder"):
        data.fetch(tmp_path / "a.json", ["a.json"])


# -------------------------------------------------------------------------------- the paper's command, from end to end
# A tiny Gemma-2 behind the 9B's name: 32 layers so that the paper's SAE layers 10 .. 30 exist, in three shards.
SHAPE = dict(model_type="gemma2", vocab_size=128, hidden_size=24, intermediate_size=40, num_hidden_layers=32, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12, sliding_window=64, hidden_activation="gelu_pytorch_tanh")
MODEL, SAES, PAIRS = "google/gemma-2-9b", "google/gemma-scope-9b-pt-res", "Anthropic/hh-rlhf"
LAYERS = (10, 15, 20, 25, 30)
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
# per layer the published choices of L0; the one nearest 100 is wanted, the upper of a tie
L0S = {10: (30, 113, 220), 15: (64, 136), 20: (68, 40, 20), 25: (114, 61), 30: (120, 60)}
NEAREST = {10: 113, 15: 136, 20: 68, 25: 114, 30: 120}
SHORT = ["--steps", 2, "--batch", 4, "--micro", 4, "--warmup", 1, "--contrast-pairs", 8, "--k", 4, "--r", 4]


def write_model(folder):
    """config.json, tokenizer.json and weights in three shards with an index, under the published names; and files nobody needs."""
    rng, D, heads, kv = np.random.default_rng(0), 24, 32, 16
    block = {f"self_attn.{x}_proj": s for x, s in dict(q=(heads, D), k=(kv, D), v=(kv, D), o=(D, heads)).items()}
    block |= {"mlp.gate_proj": (40, D), "mlp.up_proj": (40, D), "mlp.down_proj": (D, 40)}
    block |= {f"{x}_layernorm": (D,) for x in ("input", "post_attention", "pre_feedforward", "post_feedforward")}
    shapes = {"model.embed_tokens.weight": (128, D), "model.norm.weight": (D,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in block.items()}
    names = list(shapes)
    parts = [names[:100], names[100:200], names[200:]]
    folder.mkdir(parents=True)
    for shard, part in zip(SHARDS, parts):
        save_file({n: (.3 * rng.standard_normal(shapes[n])).astype(np.float32) for n in part}, folder / shard, metadata={"format": "pt"})
    data.write_json(folder / "config.json", SHAPE)
    data.write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map={n: s for s, p in zip(SHARDS, parts) for n in p}))
    small_tokenizer().save(str(folder / "tokenizer.json"))
    for waste in ("README.md", "tokenizer.model", "pytorch_model.bin", "original/consolidated.safetensors"):
        (folder / waste).parent.mkdir(exist_ok=True)
        (folder / waste).write_bytes(b"not needed")


def write_sae(path, seed):
    """params.npz as Gemma Scope publishes it: five float32 arrays, W_enc (D, N), W_dec (N, D) with rows of norm 1."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((64, 24)).astype(np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    path.parent.mkdir(parents=True)
    np.savez(path, W_enc=W.T.copy(), W_dec=W, b_enc=np.zeros(64, np.float32), b_dec=np.zeros(24, np.float32),
             threshold=np.full(64, .1, np.float32))


def write_dialogues(path, n, first):
    """HH-RLHF's rows with made-up, harmless text: chosen and rejected share all but the last reply."""
    rows = []
    for i in range(first, first + n):
        ask = f"\n\nHuman: Where do I put box {i}?\n\nAssistant: Which floor?\n\nHuman: Floor {i % 7}.\n\nAssistant:"
        rows.append(dict(chosen=f"{ask} Put it beside shelf {i % 5}.", rejected=f"{ask} No idea."))
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What the hub holds behind the names of the paper's run, and much that the run does not need."""
    root = tmp_path_factory.mktemp("published")
    write_model(root / "models" / MODEL)
    shutil.copytree(root / "models" / MODEL, root / "models" / (MODEL + "-it"))
    for layer, choices in L0S.items():
        for width in ("16k", "131k"):
            for l0 in choices:
                write_sae(root / "models" / SAES / f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz", 1000 * layer + l0)
    for part in ("harmless-base", "helpful-base"):
        write_dialogues(root / "datasets" / PAIRS / part / "train.jsonl.gz", 40, 0)
        write_dialogues(root / "datasets" / PAIRS / part / "test.jsonl.gz", 12, 100)
    return root


@pytest.fixture
def paper(published, hub):
    hub.root = published
    return hub


def trained(out):
    """What a run left: run.json, results.json and the adapter's bytes."""
    return data.read_json(out / "run.json"), data.read_json(out / "results.json"), (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_papers_command_runs_whole_from_the_hub_and_again_offline(go, paper, tmp_path):
    """Only what is needed is downloaded, run.json tells the commits, and an offline run gives the same adapter bit for bit."""
    env = dict(os.environ, HF_ENDPOINT=paper.url, HF_HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
    command = [sys.executable, "train.py", "--model", MODEL, *map(str, SHORT)]
    done = subprocess.run(command + ["--out", str(tmp_path / "first")], cwd=TOP, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saes = [f"layer_{i}/width_16k/average_l0_{NEAREST[i]}/params.npz" for i in LAYERS]
    assert sorted(paper.downloads()) == sorted(["config.json", "model.safetensors.index.json", "tokenizer.json", *SHARDS, *saes,
                                                "harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"])
    assert "HH-RLHF's Human/Assistant form" in done.stdout and SAES in done.stdout and "10,15,20,25,30" in done.stdout
    assert "Fetching" in done.stderr
    run, results, adapter = trained(tmp_path / "first")
    commits = {what: paper.folder(kind, repo, "main")[1] for what, kind, repo in
               (("model", "model", MODEL), ("sae", "model", SAES), ("data", "dataset", PAIRS))}
    assert run["sources"] == commits
    paper.log.clear()
    again = subprocess.run(command + ["--out", str(tmp_path / "second")], cwd=TOP, env=env | {"HF_HUB_OFFLINE": "1"},
                           capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert paper.log == [] and trained(tmp_path / "second")[1:] == (results, adapter)
    assert trained(tmp_path / "second")[0]["sources"] == commits


def test_an_it_model_takes_chat_turns_and_the_base_models_saes_and_says_so_in_a_line(go, paper, tmp_path):
    done = go("train.py", "--model", MODEL + "-it", "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert any(SAES in line and "base model's SAEs on Gemma's chat turns" in line for line in done.stdout.splitlines()), done.stdout


def faulty(go, tmp_path, *args, **env):
    return go("train.py", *(args if "--model" in args else ("--model", MODEL, *args)), *SHORT, "--out", tmp_path / "out", **env)


def test_train_names_the_page_of_a_gated_model(go, paper, tmp_path):
    paper.gate(MODEL)
    refused(faulty(go, tmp_path), "gated", f"{paper.url}/{MODEL}", "hf auth login")


def test_train_says_that_a_token_is_bad(go, paper, tmp_path):
    refused(faulty(go, tmp_path, HF_TOKEN="hf_old"), "refused your token", "hf auth login")


def test_train_without_network_and_offline_without_cache(go, paper, tmp_path):
    refused(faulty(go, tmp_path, HF_ENDPOINT="http://127.0.0.1:1"), "check the network")
    refused(faulty(go, tmp_path, HF_HUB_OFFLINE="1"), "not in the cache", "HF_HUB_OFFLINE")


def test_train_says_which_layers_and_widths_of_saes_exist(go, paper, tmp_path):
    refused(faulty(go, tmp_path, "--layers", "11"), SAES, "layer 11", "[10, 15, 20, 25, 30]")
    refused(faulty(go, tmp_path, "--width", "65k"), SAES, "width 65k", "['131k', '16k']")


def test_train_says_that_a_weight_file_or_an_sae_is_gone(go, paper, tmp_path):
    paper.gone.add(SHARDS[1])
    refused(faulty(go, tmp_path), MODEL, "gone from the hub")
    paper.gone.clear(), paper.gone.add("layer_20/width_16k/average_l0_68/params.npz")
    refused(faulty(go, tmp_path), SAES, "gone from the hub")
    assert not (tmp_path / "out").exists()             # no half-begun run for the next try to stumble over


def test_train_says_what_a_dataset_without_the_wanted_files_holds(go, paper, tmp_path):
    refused(faulty(go, tmp_path, "--data", "some-lab/typo"), "no such local path and no such dataset", f"{paper.url}/datasets/some-lab/typo")


def test_train_says_no_such_model_or_revision(go, paper, tmp_path):
    refused(faulty(go, tmp_path, "--model", "google/gemma-2-9c"), "no such model", f"{paper.url}/google/gemma-2-9c")
    refused(faulty(go, tmp_path, "--model", MODEL + "@v9"), "no revision v9")
