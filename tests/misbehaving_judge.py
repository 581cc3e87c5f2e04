"""A chat server on loopback that misbehaves on purpose: `python misbehaving_judge.py SEED SHARE LOG` prints its port and serves.

It reads the two texts as the rubric tells a judge to, scores a reply by the word it ends in (`one` ... `five`), and spoils a
share of its answers, drawn from SEED: 429 with and without Retry-After, 500, a stall, half a JSON, a JSON that is no chat
answer, a cut connection. A reply that ends in `odd` gets an invalid score form, `echo` repeats the quoted data before the
verdict, `echo after` behind it. Every honest answer appends the reply to LOG: a second line for one reply would be a double verdict.
"""
import json
import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = dict(one=1, two=2, three=3, four=4, five=5)
FORMS = ("#thescore: {}", "Because.\n#thescore: **{}**", "I see 3 points.\n#thescore: {}.", "#thescore: 1 was my first thought.\n#thescore: {}", "<score>{}</score>")
ODD_FORMS = ("#thescore: 0", "#thescore: 6", "#thescore: 3/5", "four", "", "#thescore: 4\n#thescore: ?")


def verdict(quoted):
    """What a judge that keeps to the rubric says about a reply."""
    reply = json.loads(quoted)["reply"]
    last = reply.split()[-1]
    pick = sum(map(ord, reply))                        # the same reply always gets the same form
    if last == "odd":
        return ODD_FORMS[pick % len(ODD_FORMS)]
    if last == "echo":
        return f"The data were {quoted}\n#thescore: 4"
    if last == "after":
        return f"#thescore: 4\nThe data were {quoted}"
    return FORMS[pick % len(FORMS)].format(WORDS[last])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    rng, share, log, lock, stall, fault, count = random.Random(0), 0., None, threading.Lock(), 2., None, 0

    def log_message(self, *args):
        pass

    def send(self, code, body, headers=(), announce=None):
        self.send_response(code)
        for k, v in headers:
            self.send_header(k, v)
        self.send_header("Content-Length", str(announce or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).count += 1
            faults = ("429", "429 later", "500", "stall", "half", "not chat", "cut", "drip")
            fault = self.fault or (self.rng.choice(faults) if self.rng.random() < self.share else None)
        text = asked["messages"][-1]["content"]
        body = json.dumps({"choices": [{"message": {"content": verdict(text)}}]}).encode()
        if fault == "429":
            self.send(429, b"{}")
        elif fault == "429 later":
            self.send(429, b"{}", [("Retry-After", "0.05")])
        elif fault in ("500", "401", "302"):
            self.send(int(fault), b"no such key", [("Location", "http://127.0.0.1:9/")] * (fault == "302"))
        elif fault == "stall":
            time.sleep(self.stall)
        elif fault == "half":
            self.send(200, body[:len(body) // 2])
        elif fault == "not chat":
            self.send(200, b'{"choices": []}')
        elif fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drip":
            self.send(200, b"{", announce=len(body))
            for _ in range(int(self.stall / .05)):
                time.sleep(.05)
                self.wfile.write(b" ")
        else:
            if self.log:
                with self.lock, open(self.log, "a") as f:
                    f.write(json.dumps(json.loads(text)["reply"]) + "\n")
            self.send(200, body)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):                     # a client that was killed hangs up: no news
        pass


def serve(seed=0, share=0., log=None, **more):
    """Start a server in a thread -> (base URL, its handler class, whose `fault` may be set to one fault for every answer)."""
    handler = type("Judge", (Handler,), dict(rng=random.Random(seed), share=share, log=log, lock=threading.Lock(), **more))
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1", handler, server


if __name__ == "__main__":
    url, _, _ = serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    print(url, flush=True)
    threading.Event().wait()
