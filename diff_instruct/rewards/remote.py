"""A judge elsewhere, as `http://host:port/path`: pictures and prompts go there, numbers come back.

A request is a POST of `{"prompts": [...], "images": [...]}` in JSON, the images as PNG in base64, 8 bits; the answer
is `{"scores": [...]}`, one number for each. `examples/reward_server.py` is the other end.
"""

import base64
import io
import os
import threading
from concurrent.futures import Future

import torch
import urllib3

from diff_instruct.rewards.numbers import NoScores, pictures_of, scores_of
from diff_instruct.rewards.urls import TOKEN


BUSY = (429, 502, 503, 504)  # answers after which asking again may help


class RemoteReward(torch.nn.Module):
    """Scores of a judge elsewhere, without gradient.

    A call is one request: `--reward_batch_size` images at most. `ask` does not wait for it.

    Args:
        url (`str`): without user, password or query.
        timeout: seconds that it may take to answer a request.
        retries (`int`): how often it is asked again when it does not, or is busy, after pauses that double from 2
            seconds to 60.
    """

    def __init__(self, url, timeout=60.0, retries=5):
        super().__init__()
        again = urllib3.Retry(
            retries,
            redirect=False,
            other=0,
            allowed_methods=None,
            status_forcelist=BUSY,
            raise_on_status=False,
            backoff_factor=1,
            backoff_max=60,
        )
        self.url, self.http = url, urllib3.PoolManager(timeout=timeout, retries=again)
        self.last = None  # the request before: one at a time, in order

    def forward(self, pixels, prompts):
        """Scores (B,), float32, of pixels (B, 3, H, W) in [0, 1] for B prompts.

        Raises:
            NoScores: in one line, if no numbers come back.
        """
        return self.ask(pixels, prompts)()

    def ask(self, pixels, prompts):
        """Send the request, and return at once: a function that waits for the answer, and gives or raises what
        `forward` does. Nothing is computed in the other thread but PNG files."""
        n, device = len(pixels), pixels.device
        before, self.last = self.last, Future()
        coming = self.last

        def run(*asked):
            try:
                coming.set_result(self.request(*asked))
            except BaseException as error:  # whoever waits raises it
                coming.set_exception(error)

        # A thread that an ending process does not wait for: Ctrl-C ends it at once, whatever the judge does.
        threading.Thread(target=run, args=(pictures_of(pixels), list(prompts), before), daemon=True).start()

        def answer():
            try:
                return scores_of(coming.result(), n, self.url, device)
            except NoScores:
                self.last = None  # who asks after that asks anew
                raise

        return answer

    def request(self, pictures, prompts, before=None):
        """What the judge says of pictures of PIL. Raises NoScores, at once where the request before it has."""
        if before is not None and before.exception() is not None:
            raise before.exception()
        token = os.environ.get(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = {"prompts": prompts, "images": [png(picture) for picture in pictures]}
        try:
            answer = self.http.request("POST", self.url, json=body, headers=headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise NoScores(f"reward `{self.url}` does not answer: {line(str(reason))}") from None
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.status != 200 or not isinstance(found, dict) or "scores" not in found:
            why = (
                found["error"]
                if isinstance(found, dict) and "error" in found
                else answer.data.decode(errors="replace")
            )
            raise NoScores(f"reward `{self.url}` gave no scores, but answered {answer.status}: {line(str(why))}")
        return found["scores"]

    def check(self, device, trained):
        """Asks for the scores of two random pictures.

        Raises:
            NoScores: see `forward`; or if they are not finite.
        """
        r = self(torch.rand(2, 3, 224, 224), ["a red apple", "a blue cat"])
        if not torch.isfinite(r).all():
            raise NoScores(f"reward `{self.url}` returned NaN or infinity for two random pictures")


def png(picture):
    """A picture of PIL as PNG in base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def line(text):
    """The first line of what others say, and not too much of it; never a token that they repeat."""
    token = os.environ.get(TOKEN)
    first = (text.strip() or "nothing").splitlines()[0][:200]
    return first.replace(token, "...") if token else first
