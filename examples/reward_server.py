#!/usr/bin/env python
"""Serve rewards to runs elsewhere: `python examples/reward_server.py image_reward my_judge.py:count --port 8000`.

A run on another machine, or in another environment, then takes `--reward http://host:8000/image_reward`, or
`.../count`: the name of a reward, or of a function. A POST of `{"prompts": [...], "images": [PNG in base64, ...]}` in
JSON gets `{"scores": [...]}`; what goes wrong gets `{"error": "..."}`.

It listens on this machine alone unless `--host` says otherwise. With the environment variable REWARD_TOKEN it answers
those who know the token, no others; it sends nothing, and keeps nothing.
"""

import argparse
import base64
import hmac
import io
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diff_instruct.mistake import Mistake  # noqa: E402
from diff_instruct.rewards.loading import load_scorers  # noqa: E402
from diff_instruct.rewards.numbers import pixels_of  # noqa: E402
from diff_instruct.rewards.specs import RewardSpec, read_checkpoints  # noqa: E402
from diff_instruct.rewards.urls import TOKEN  # noqa: E402


MOST_BYTES = 2**29  # of a request


class Refused(Exception):
    """A request that gets no scores: the status of the answer, and why."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. The server's `scorers` are by name; one request is scored at a time."""

    protocol_version = "HTTP/1.1"
    timeout = 300  # seconds without a word

    def do_POST(self):  # noqa: N802
        try:
            status, answer = 200, {"scores": self.scores()}
        except Refused as error:
            status, answer = error.args[0], {"error": error.args[1]}
        except Exception as error:  # a judge may raise anything
            status, answer = 500, {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @torch.no_grad()
    def scores(self):
        """A list of numbers for the request."""
        body = self.body()
        scorer = self.server.scorers.get(self.path.strip("/"))
        if scorer is None:
            raise Refused(404, f"there is no {self.path}, but {', '.join(f'/{name}' for name in self.server.scorers)}")
        try:
            request = json.loads(body)
            prompts, images = list(request["prompts"]), list(request["images"])
            pictures = [
                Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"]) for image in images
            ]
            pixels = pixels_of(pictures, self.server.device)
        except Exception as error:  # of whoever sent it
            raise Refused(400, f"not a request for scores: {type(error).__name__}: {error}".split("\n")[0]) from None
        if len(prompts) != len(pictures):
            raise Refused(400, f"{len(prompts)} prompts for {len(pictures)} images")
        with self.server.lock:
            return scorer(pixels, prompts).float().tolist()

    def body(self):
        """What was sent, read to its end, so that the connection can go on."""
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            self.close_connection = True
            raise Refused(413, f"a request has at most {MOST_BYTES} bytes, and says how many")
        body = self.rfile.read(int(size))
        token = os.environ.get(TOKEN)
        if token and not hmac.compare_digest(
            self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
        ):
            raise Refused(401, f"{TOKEN} is another one, or is missing")
        return body

    def log_message(self, *args):
        """Prompts and addresses are nobody's business."""


def serve(scorers, host="127.0.0.1", port=0, device="cpu"):
    """A server of scorers (a `dict` by name) that is ready for `serve_forever`; port 0: any that is free."""
    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads, server.scorers, server.device, server.lock = True, scorers, device, Lock()
    return server


def main():
    parser = argparse.ArgumentParser(description="Serve rewards to runs elsewhere.")
    parser.add_argument("rewards", nargs="+", help="names as of --reward, or path/to/file.py:function")
    parser.add_argument("--reward_checkpoint", nargs="+", metavar="NAME=PATH", help="instead of the Hub's")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all of this machine's")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    checkpoints = read_checkpoints(args.reward_checkpoint)
    specs = [RewardSpec(name, checkpoint=checkpoints.get(name)) for name in args.rewards]
    server = serve(load_scorers(specs, args.device), args.host, args.port, args.device)
    print(*(f"http://{args.host}:{server.server_port}/{name}" for name in server.scorers), sep="\n", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    try:
        main()
    except Mistake as error:
        sys.exit(f"error: {error}")
