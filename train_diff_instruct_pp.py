#!/usr/bin/env python
"""Diff-Instruct++: distil a text-to-image diffusion model into a one-step generator and align it, without images.

`accelerate launch train_diff_instruct_pp.py --reward_scale 10 --cfg_scale 4.5` runs it on the pocket reference.
Paper: Luo, "Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences",
arXiv 2410.18881. In the comments: g_θ generator, s_ref reference, s_ψ teaching assistant (TA), r reward; and, where r
has no gradient, p_φ, a surrogate that learns it.
"""

import sys

from diff_instruct.training.arguments import parse_args
from diff_instruct.training.ema import ema_decay
from diff_instruct.training.endings import run_to_the_end
from diff_instruct.training.finish import finish
from diff_instruct.training.optimizer import stage
from diff_instruct.training.pairs import pair_loss
from diff_instruct.training.set_up import set_up
from diff_instruct.training.steps import generated, ta_loss
from diff_instruct.training.watch import Watch, ending_where_rewards_fail


def main(args):
    run = set_up(args)
    if run is not None:  # else --dry_run has said it all
        with ending_where_rewards_fail(run):
            align(run)
        finish(run)


def align(run):
    """Algorithm 1. A generator that starts as the reference is distilled first (`--pretrain_steps`), in the same loop
    without reward; at negative steps it learns pairs (`--pair_steps`), then the TA alone warms up."""
    args, accelerator, watch = run.args, run.accelerator, Watch(run)
    generator, ta, theta, psi = run.actors.generator, run.actors.ta, run.state.theta, run.state.psi

    for step, alpha in watch.steps():
        if step < -args.ta_warmup_steps:
            learn_pairs(run, watch, step)
            watch.after(step, alpha)
            continue

        asked = ask_judge(run, alpha)  # where r has no gradient; it looks at pictures while ψ learns

        kept = []
        if args.reuse_generated and step >= 0:  # then ψ and θ learn from one x0, whose graph waits for θ's turn
            kept = [batch._replace(x0=generated(batch, generator)) for batch in run.draws.of_theta(step)]

        # θ is frozen; K_TA times ψ takes a step: min_ψ λ(t) ‖s_ψ(x_t, t, c) − ∇ log p(x_t | x0)‖².
        for k in watch.ta_steps(step):
            for batch in kept if kept and k == 0 else run.draws():  # c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I)
                loss = ta_loss(batch, generator, ta)  # x0 = g_θ(z, c), x_t = α_t x0 + σ_t ε
                accelerator.backward(loss / run.draws.passes)
                watch.see({"ta_loss": loss})
            if not psi.step():
                watch.not_taken(step, psi)

        if asked:
            learn_reward(run, watch, step, alpha, asked)

        # ψ is frozen; θ takes a step: min_θ −α_rew r(x0, c) + w(t) ⟨sg[s_ψ(x_t, t, c) − s̃_ref(x_t, t, c)], x_t⟩.
        if step >= 0:
            for batch in [batch.noised_again() for batch in kept] if kept else run.draws.of_theta(step):
                x0 = generated(batch, generator)  # g_θ(z, c)
                with psi.frozen():
                    dL_dx0, figures = run.gradient_at_x0(x0, batch, alpha)
                accelerator.backward(x0, gradient=dL_dx0 / (len(x0) * run.draws.passes))
                watch.see(figures | run.reward.take_parts(len(x0)))
            if theta.step():
                theta.update_average(ema_decay(args, step, run.images_per_step))
            else:
                watch.not_taken(step, theta)

        watch.after(step, alpha)


def learn_pairs(run, watch, step):
    """A step of regression: g_θ(z, c) becomes what the reference's own sampler makes of z. After the last one the
    average is where Algorithm 1 starts."""
    generator, theta = run.actors.generator, run.state.theta
    for pair in run.draws.of_pairs(step - run.first_step):
        loss = pair_loss(pair, generator)
        run.accelerator.backward(loss / run.draws.passes)
        watch.see({"pair_loss": loss})
    if theta.step():
        theta.update_average(ema_decay(run.args, step, run.images_per_step))
    else:
        watch.not_taken(step, theta)
    if step + 1 == -run.args.ta_warmup_steps:
        theta.begin_from_average(**stage(run.args))


def ask_judge(run, alpha):
    """Pictures of the generator that a judge is asked about; those of one prompt will be compared. An empty
    list without a surrogate."""
    if run.surrogate is None or not alpha.rew:
        return []
    return [run.surrogate.ask(batch) for batch in run.draws.groups(run.surrogate.group)]


def learn_reward(run, watch, step, alpha, asked):
    """A step of the surrogate φ: log p_φ(x0 | c) / p_ref(x0 | c) becomes α_rew r(x0, c), by comparing pictures of one
    prompt, of which the reward gives numbers alone."""
    phi = run.state.phi
    for pictures in asked:
        loss, figures = run.surrogate.loss(pictures, alpha.rew)
        run.accelerator.backward(loss / run.draws.passes)
        watch.see(figures)
    if not phi.step():
        watch.not_taken(step, phi)


if __name__ == "__main__":
    sys.exit(run_to_the_end(parse_args, main))
