"""hub_server.py - a hub on loopback for tests: answers what huggingface_hub's client asks, as the real one does.

Serves a folder: ROOT/models/owner/name/FILES and ROOT/datasets/owner/name/FILES; a folder `name@rev` beside `name` is
another revision of it. What is copied from the real hub, checked against the client's code (huggingface_hub 2.4):
    GET  /api/models/ID[/revision/REV]            sha and siblings
    GET  /api/models/ID/tree/SHA?recursive=True   entries with oid, size, lfs; in pages joined by a Link header
    HEAD /ID/resolve/SHA/FILE                     small file: a relative redirect to /api/resolve-cache/...; large file:
                                                  302 to another host with X-Linked-Etag and X-Linked-Size
    GET  of both redirect targets                 with Range, ETag, Content-Length
    401 / 403 / 404                               X-Error-Code GatedRepo, RepoNotFound, RevisionNotFound, EntryNotFound
Not copied: the bytes in Xet storage. With hub.xet = True large files are said to lie there and the storage refuses, so a
test sees what a firewall in front of it does; otherwise no file carries an X-Xet-Hash and all goes by plain HTTP.
"""
import hashlib
import http.server
import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

LARGE = (".safetensors", ".npz", ".gz")                # what the hub would keep in LFS and serve from its CDN


class HubServer(http.server.ThreadingHTTPServer):
    """Serve `root` from a thread: `with HubServer(root) as hub: ... hub.url`. Faults are switched by the methods."""
    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = Path(root), f"http://127.0.0.1:{self.server_port}"
        # another host name, so that a client which sends its token on to the CDN is found out
        self.cdn = f"http://localhost:{self.server_port}"
        self.log = []                                  # (method, path, status, headers) of every request
        self.tokens, self.gated, self.gone, self.cuts, self.broken = {"hf_good"}, {}, set(), {}, {}
        # broken: repository or file -> (status, X-Error-Code or None, message)
        self.xet = False
        self.page = 20                                 # entries in a page of a tree; the real hub's are 1000

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):     # a client that hangs up is no fault of ours
            super().handle_error(request, client_address)

    def gate(self, repo, allowed=(), api=False):
        """Let only the tokens `allowed` read a repository's files; with api=True its listing too."""
        self.gated[repo] = (set(allowed), api)

    def cut_once(self, file):
        """Hang up in the middle of the next download of this file name."""
        self.cuts[file] = 1

    def cut_always(self, file):
        """Hang up before the first byte of this file's body, every time."""
        self.cuts[file] = -1

    def downloads(self):
        """Names of the files whose bytes went out, in order."""
        return [h["x-file"] for method, _, status, h in self.log if method == "GET" and status in (200, 206) and "x-file" in h]

    def folder(self, kind, repo, rev):
        """(folder, sha) of a repository at a branch, tag or sha; (None, None) if there is none."""
        base = self.root / f"{kind}s" / repo
        for path in [base, *base.parent.glob(base.name + "@*")] if base.is_dir() else []:
            sha = sha_of(path)
            if rev in (sha, path.name.partition("@")[2] or "main"):
                return path, sha
        return None, None


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def sha_of(folder):
    """A stand-in for the commit: changes with the names and the sizes of the files."""
    return hashlib.sha1(repr([(n, p.stat().st_size) for n, p in files_of(folder).items()]).encode()).hexdigest()


def etag_of(path):
    data = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()         # git's own


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if parts[0] not in ("cdn", "v2") and token and token not in self.server.tokens:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if parts[0] == "cdn":                          # /cdn/models/owner/name@rev/FILE: a large file's bytes
            return self.send_file(self.server.root / "/".join(parts[1:]), "/".join(parts[4:]))
        if parts[:2] == ["api", "resolve-cache"]:
            kind, repo, rev, rest = parts[2][:-1], "/".join(parts[3:5]), parts[5], parts[6:]
            folder, sha = self.server.folder(kind, repo, rev)
            return self.send_file(folder / "/".join(rest), "/".join(rest), sha)
        if parts[:2] == ["v2", "reconstructions"]:     # Xet's own server
            return self.refuse(401, None, "no Xet storage here")
        if parts[0] == "api" and parts[1] not in ("models", "datasets"):
            return self.refuse(404, None, "not here")  # the client asks for more on the side; nothing depends on it
        if parts[0] == "api":
            return self.api(parts[1][:-1], "/".join(parts[2:4]), parts[4:], token, urllib.parse.parse_qs(url.query))
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        return self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)

    def api(self, kind, repo, rest, token, query):
        """Model or data set info, or its tree page by page."""
        if repo in self.server.broken:
            return self.refuse(*self.server.broken[repo])
        what, rev = (rest + ["main"])[:2] if rest else ("revision", "main")
        found = self.find(kind, repo, rev, token, api=True)
        if not found:
            return None
        folder, sha = found
        files = files_of(folder)
        if what == "xet-read-token":
            return self.answer(200, {"X-Xet-Cas-Url": self.server.url, "X-Xet-Access-Token": "xet", "Content-Length": "0",
                                     "X-Xet-Token-Expiration": str(int(time.time()) + 3600)})
        if what == "revision":
            return self.send_json(dict(_id="0", id=repo, sha=sha, private=False, tags=[], downloads=0, likes=0,
                                       siblings=[{"rfilename": n} for n in files]))
        rows = [dict(type="file", path=n, size=p.stat().st_size, oid=etag_of(p),
                     **(dict(lfs=dict(oid=etag_of(p), size=p.stat().st_size, pointerSize=134)) if n.endswith(LARGE) else {}),
                     **(dict(xetHash=etag_of(p)) if n.endswith(LARGE) and self.server.xet else {}))
                for n, p in files.items()]
        rows += [dict(type="directory", path=d, size=0, oid="0" * 40)
                 for d in sorted({str(Path(n).parent) for n in files} - {"."})]
        at = int(query.get("cursor", ["0"])[0])
        link = f"<{self.server.url}{urllib.parse.urlsplit(self.path).path}?recursive=True&cursor={at + self.server.page}>; rel=\"next\""
        return self.send_json(rows[at:at + self.server.page], {"Link": link} if at + self.server.page < len(rows) else {})

    def resolve(self, kind, repo, rev, file, token):
        """Where a file's bytes are: the answer to HEAD and GET of /ID/resolve/REV/FILE."""
        found = self.find(kind, repo, rev, token)
        if not found:
            return None
        folder, sha = found
        path = folder / file
        if file in self.server.broken:
            return self.refuse(*self.server.broken[file])
        if not path.is_file() or file in self.server.gone:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        if not file.endswith(LARGE):
            return self.answer(307, {"Location": f"/api/resolve-cache/{kind}s/{repo}/{sha}/{urllib.parse.quote(file)}",
                                     "X-Repo-Commit": sha, "Content-Length": "0"})
        xet = {"X-Xet-Hash": etag_of(path), "Link": f'<{self.server.url}/api/{kind}s/{repo}/xet-read-token/{sha}>; rel="xet-auth"'}
        return self.answer(302, {**(xet if self.server.xet else {}), "Location": f"{self.server.cdn}/cdn/{path.relative_to(self.server.root).as_posix()}",
                                 "X-Repo-Commit": sha, "X-Linked-Etag": f'"{etag_of(path)}"',
                                 "X-Linked-Size": str(path.stat().st_size), "Content-Length": "0"})

    def find(self, kind, repo, rev, token, api=False):
        """(folder, sha), or None after an error has been answered."""
        folder, sha = self.server.folder(kind, repo, rev)
        allowed, gate_api = self.server.gated.get(repo, ({token}, False))
        if folder is None:
            if self.server.folder(kind, repo, "main")[0]:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            else:                                      # the real hub hides a missing repository from strangers
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif token not in allowed and (gate_api or not api):
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted and you are not in the "
                        "authorized list.", {"X-Repo-Commit": sha})
        else:
            return folder, sha

    def send_file(self, path, name, sha=None):
        data = path.read_bytes()
        start = int(self.headers["Range"][len("bytes="):].split("-")[0]) if self.headers.get("Range") else 0
        headers = {"ETag": f'"{etag_of(path)}"', "Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}
        headers |= {"X-Repo-Commit": sha} if sha else {}
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut = self.server.cuts.get(name, 0) if self.command == "GET" else 0
        if cut == 1:
            del self.server.cuts[name]
        self.answer(206 if start else 200, headers, note={"x-file": name, "x-start": start})
        if self.command == "GET":
            self.wfile.write(data[start:][:len(data) // 2 if cut == 1 else 0 if cut else None])
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def send_json(self, value, headers={}):
        body = json.dumps(value).encode()
        self.answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def refuse(self, status, code, message, headers={}):
        body = json.dumps({"error": message}).encode()
        self.answer(status, {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message,
                             "Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, status, headers, note={}):
        sent = {"authorization": self.headers.get("Authorization"), "range": self.headers.get("Range"), **note}
        self.server.log.append((self.command, self.path, status, sent))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


# ------------------------------------------------------------------------------- quick processes that are the client
# Importing torch takes 1.2 s of a process's 1.6. A fork server that has torch, and nothing of huggingface_hub (which
# reads its environment variables while it is imported), starts thirty clean clients in the time of ten. A module that is not installed is passed over.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "numpy", "tokenizers", "safetensors.torch", "httpx2", "httpx", "requests", "yaml", "filelock"])


def run_script(folder, args, env, out):
    """Run `python ARGS` (a script and its arguments, or -c CODE) in a new process -> (exit code, stdout, stderr)."""
    child = processes.Process(target=_script, args=(str(folder), [str(a) for a in args], env, str(out)))
    child.start()
    child.join(120)
    assert child.exitcode is not None, f"still running after two minutes: {args}"
    return child.exitcode, *(Path(f"{out}.{name}").read_text() for name in ("out", "err"))


def _script(folder, args, env, out):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.path.insert(0, folder)
    assert "huggingface_hub" not in sys.modules and "data" not in sys.modules
    if args[0] == "-c":
        exec(compile(args[1], "<command>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
