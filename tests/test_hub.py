"""The hub road, walked by subprocesses against a hub on loopback: nothing is replaced inside the program under test.

Every fault must end in exit code 2 and ONE clear line, never a traceback.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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
        base |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
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


def test_one_run_reads_one_commit_though_somebody_pushes_meanwhile(go, hub, tmp_path):
    """The branch moves between two fetches of one run: both come from the commit that was seen first."""
    hub.root = tmp_path / "moving"
    repo, new = (hub.root / "models/some-lab" / name for name in ("moving", "new"))
    repo.mkdir(parents=True), new.mkdir()
    for folder, text in ((repo, "a"), (new, "other")):
        for name in ("one.json", "two.json"):
            (folder / name).write_text(text)
    done = go(f"import os; one = data.fetch('some-lab/moving', ['one.json']); os.rename({str(repo)!r}, {str(repo) + '@old'!r}); "
              f"os.rename({str(new)!r}, {str(repo)!r}); two = data.fetch('some-lab/moving', ['two.json']); "
              "print(one == two, (two[0] / 'two.json').read_text())")
    assert done.stdout.split() == ["True", "a"], done.stderr


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
    assert online.returncode == 0 and hub.downloads() == [], online.stderr
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
