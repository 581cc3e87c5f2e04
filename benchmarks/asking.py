"""asking.py - a language model behind an OpenAI-compatible URL as judge: ask, retry, time out, stop.

eval.py asks through it; the rubric, the question's wording and how a score is read are there.
"""
import contextlib
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException

import data
from data import UserError, need

def judges(args, phrase_judges):
    """(phrase judges' names, a model judge's dict for ask_judge or None) of eval.py's --judge."""
    urls = [j for j in args.judge if re.match("https?://", j)]
    names = [j for j in args.judge if j not in urls] or ([] if urls else ["refusal"])
    need(set(names) <= phrase_judges.keys() and len(urls) == bool(args.judge_model), "--judge: choose from "
         f"{', '.join(phrase_judges)}, and at most one URL, http(s)://..., with its --judge-model NAME")
    if not urls:
        return names, None
    with data.expecting(f"--judge {urls[0]}", ValueError):
        u = urllib.parse.urlsplit(urls[0])
    plain = u.hostname and not (u.query or u.fragment or u.username)
    need(plain, "--judge: wanted a plain http(s)://HOST[:PORT]/PATH, the key in an environment variable")
    url = re.sub(r"(/chat/completions)?/*$", "/chat/completions", urls[0], count=1)
    settings = {k: getattr(args, "judge_" + k) for k in ("timeout", "tries", "pause", "parallel", "key_env")}
    key = os.environ.get(args.judge_key_env) or ""
    need(re.fullmatch("[!-~]*", key), f"the key in {args.judge_key_env} holds a blank or a line end")
    return names, dict(name=args.judge_model, url=url, key=key, **settings)

class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # urllib would carry the key on to any other host

def ask_judge(judge, messages, stop):
    """One question to a chat URL; the text that came back.
    Rate limits, 5xx, time-outs, broken connections and answers are tried again after doubling pauses, until
    `stop` is set; what stays broken, and any other refusal, is a UserError. judge: a dict, see judges()."""
    body = json.dumps(dict(model=judge["name"], messages=messages, temperature=0)).encode()
    headers = {"Content-Type": "application/json"}
    if judge["key"]:
        headers["Authorization"] = f"Bearer {judge['key']}"
    for attempt in range(judge["tries"]):
        if stop.is_set():
            break
        wait = judge["pause"] * 2 ** attempt * random.uniform(.5, 1)
        try:
            return _post(urllib.request.Request(judge["url"], body, headers), judge["timeout"])
        except urllib.error.HTTPError as e:
            why = f"HTTP {e.code}"
            if e.code not in (408, 429) and e.code < 500:
                with contextlib.suppress(OSError, HTTPException):
                    why += " " + " ".join(e.read(300).decode(errors="replace").split())
                raise UserError(f"the judge at {judge['url']} refused: {why} (URL, model name, or key in "
                                f"{judge['key_env']}?)") from None
            later = e.headers.get("Retry-After") or ""
            wait = max(wait, min(float(later), 120) if later.isdigit() else 0)
        except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError) as e:
            why = f"{type(e).__name__}: {e}"
        if attempt + 1 < judge["tries"]:
            stop.wait(wait)
    else:
        raise UserError(f"the judge at {judge['url']} can't be reached or doesn't answer properly "
                        f"({judge['tries']} tries, the last: {why})")
    raise UserError("stopped")

def _post(request, timeout):
    """The text of one chat answer, read in pieces so that a dripping server times out too."""
    deadline, raw = time.monotonic() + timeout, b""
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as r:
        while piece := r.read1(1 << 16):
            raw += piece
            if time.monotonic() > deadline or len(raw) > 1 << 20:
                raise TimeoutError("the answer dripped in too slowly, or is longer than 1 MiB")
    content = json.loads(raw)["choices"][0]["message"]["content"]
    if not isinstance(content, (str, type(None))):
        raise TypeError("the answer's content is not a text")
    return (content or "").encode(errors="replace").decode()  # half a character can't be saved

def ask_all(todo, judge, parse_score, path):
    """Ask a model about all (verdict begun, messages), several at a time; saves each answer at `path`.
    Returns the verdicts; UserError once the judge fails for good, when what came back is kept."""
    stop, out, failure = threading.Event(), [], None
    with ThreadPoolExecutor(judge["parallel"]) as pool:
        try:
            jobs = {pool.submit(ask_judge, judge, messages, stop): verdict for verdict, messages in todo}
            for job in data.progress(as_completed(jobs), total=len(jobs), desc="judged", disable=None):
                try:
                    answer = job.result()
                except UserError as e:
                    failure = failure or e
                    stop.set()  # those under way still come back, and are kept
                    continue
                score = parse_score(answer)
                found = dict(score=score) if score else dict(reason="unparsed")
                out.append(jobs[job] | found | dict(answer=answer[-4000:]))
                data.append_rows(path, out[-1:])
        except BaseException:  # Ctrl-C: do not wait for the pauses of those under way
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    need(not failure, f"{failure}; {len(out)} new verdicts are kept in {path}: run the same again")
    return out
