"""The training script with other ways to a reward that is only numbers: the surrogate's rivals of `black_box.py`.

`python experiments/rivals.py --rival critic ...` takes the training script's arguments, with `--reward none
--reward_scale 0 --heldout_reward pocket_truth`: the numbers are the first held-out scorer's. Two rivals, each a term
of dL/dx0 that pulls as hard as the integral KL with `dmd` does, ‖dL/dx0‖ = κ in the mean over a batch:

- `critic`: a small head learns the number from latents and prompt, and lends its gradient;
- `smoothing`: ∇ E_u r(x0 + s u), u ~ N(0, I), by finite differences along a few draws of u.

A checkpoint does not hold the critic: such a run is made in one go.
"""

import argparse
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from diff_instruct.objectives import KAPPA
from diff_instruct.terms import mean_norm
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.endings import run_to_the_end
from diff_instruct.training.finish import finish
from diff_instruct.training.set_up import set_up
from train_diff_instruct_pp import align


class Pull:
    """−∇r, as `slope(noised)` estimates it, in the size of the divergence's gradient."""

    through = ()

    def __init__(self, score, decode):
        self.score, self.decode = score, decode

    def acts(self, alpha):
        return True

    @torch.no_grad()
    def numbers(self, x0, prompts):
        return self.score(self.decode(x0), prompts)

    def gradient(self, noised):
        slope = self.slope(noised)
        return {"reward": -KAPPA * slope / (mean_norm(slope) + 1e-8)}


class Smoothing(Pull):
    """(r(x0 + s u) − r(x0 − s u)) u / (2 s), the mean over `draws` of u."""

    s, draws = 0.3, 4

    def slope(self, noised):
        x0, prompts, total = noised.x0.detach(), noised.batch.prompts, 0
        for _ in range(self.draws):
            u = torch.randn_like(x0)
            up, down = (self.numbers(x0 + sign * self.s * u, prompts) for sign in (1, -1))
            total = total + (up - down).view(-1, 1, 1, 1) * u
            noised.figures["reward"] = (up + down).mean() / 2
        return total / (2 * self.s * self.draws)


class Head(torch.nn.Module):
    """r̂, (B,), of latents (B, C, H, W) and a prompt's mean embedding (B, D)."""

    def __init__(self, channels, text, width=96):
        super().__init__()
        self.look = torch.nn.Conv2d(channels, width, 3, padding=1)
        self.read = torch.nn.Linear(text, 4 * width)
        self.deeper = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, 2, padding=1) for _ in range(2))
        self.tell = torch.nn.Linear(width, 1)

    def forward(self, x0, text):
        h, film = F.silu(self.look(x0)), self.read(text)[:, :, None, None].chunk(4, dim=1)
        for layer, scale, shift in zip(self.deeper, film[::2], film[1::2]):
            h = F.silu(layer(h * (1 + scale) + shift))
        return self.tell(h.mean(dim=(2, 3)))[:, 0]


class Critic(Pull):
    """∇ of a [`Head`], which takes `steps` steps on all that has been scored so far before it is asked."""

    steps, batch_size = 20, 128

    def __init__(self, score, decode):
        super().__init__(score, decode)
        self.head, self.seen = None, []

    def slope(self, noised):
        x0, batch = noised.x0.detach(), noised.batch
        text = batch.c["encoder_hidden_states"].mean(dim=1)
        r = self.numbers(x0, batch.prompts)
        if self.head is None:
            self.head = Head(x0.shape[1], text.shape[1]).to(x0.device)
            self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=2e-3, weight_decay=0.01)
        self.seen.append((x0, text, r))
        loss = self.learn()
        leaf = x0.requires_grad_()
        noised.figures |= {"reward": r.mean(), "critic_loss": loss}
        return torch.autograd.grad(self.head(leaf, text).sum(), leaf)[0]

    def learn(self):
        """The mean squared error of the last step."""
        x0, text, r = (torch.cat(parts) for parts in zip(*self.seen))
        for _ in range(self.steps):
            rows = torch.randint(len(r), (self.batch_size,), device=r.device)
            loss = F.mse_loss(self.head(x0[rows], text[rows]), r[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()


RIVALS = {"critic": Critic, "smoothing": Smoothing}


def main(args, rival):
    run = set_up(args)
    divergence, _, *others = run.gradient_at_x0.terms
    term = RIVALS[rival](next(iter(run.heldout.values())), run.actors.pipe.decode)
    run.gradient_at_x0 = replace(run.gradient_at_x0, terms=(divergence, term, *others))
    align(run)
    finish(run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rival", choices=RIVALS, required=True)
    mine, rest = parser.parse_known_args()
    sys.exit(run_to_the_end(lambda: parse_args(rest), lambda args: main(args, mine.rival)))
