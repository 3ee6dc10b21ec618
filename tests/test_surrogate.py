"""The surrogate of a reward that is only numbers: closed forms of the Gaussian world, and runs.

Per element p_ref(x0) = N(μ, S) and p_φ = N(μ + δ, S), both denoisers exact, r(x) = k · sum(x) seen as a number. Then
log p_φ − log p_ref is linear in x, and δ = α_rew k S makes p_φ = p_ref exp(α_rew r).
"""

import contextlib
import gc
import json
import threading

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.remote import RemoteReward
from diff_instruct.surrogate import LOWEST, Surrogate, bradley_terry, level_timesteps, levels, log_ratio
from diff_instruct.terms import IKL, Alpha, Batch, SurrogateReward
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.endings import Ending
from diff_instruct.training.optimizer import Trained
from diff_instruct.training.steps import GeneratorStep
from examples.reward_server import serve
from experiments.exact import Exact
from pipeline_one_step import Schedule
from tests.runs import checkpoints, history, run, same, trained, weights
from tests.test_black_box import running


S, MU, K, ALPHA = 0.6, 0.8, 0.05, 3.0
SHAPE, D, GROUP, LOW, HIGH = (1, 4, 4), 16, 4, 0.02, 0.98
DELTA = ALPHA * K * S
SCHEDULES = {
    "variance-preserving": Schedule(DDPMScheduler(beta_schedule="linear")),
    "flow": Schedule(FlowMatchEulerDiscreteScheduler(shift=1.0)),
}


@pytest.fixture(params=list(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


SHIFT = {  # α and σ of γ = α² / σ²
    "epsilon": lambda gamma: ((gamma / (1 + gamma)) ** 0.5, (1 / (1 + gamma)) ** 0.5),
    "flow": lambda gamma: (gamma**0.5 / (1 + gamma**0.5), 1 / (1 + gamma**0.5)),
}


def covered(schedule):
    """The share of ∫ S dγ / (1 + S γ)² = 1 that lies in the range of the levels."""
    _, log_snr = levels(schedule, LOW, HIGH)
    low, high = (1 / (1 + torch.exp(-(end + torch.tensor(S).log()))) for end in (log_snr[-1], log_snr[0]))
    return (high - low).item()


def posterior(x_t, mean, alpha, sigma):
    """E[x0 | x_t] of x0 ~ N(mean, S)."""
    return mean + alpha * S / (alpha**2 * S + sigma**2) * (x_t - alpha * mean)


class Shifted(Exact):
    """The exact denoiser of N(mean, S); `mean` may carry gradient."""

    def __init__(self, schedule, mean):
        super().__init__(schedule, lambda x_t, t: posterior(x_t, mean, *schedule(t)))


class Given:
    """A generator that draws x0 = a z + b."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def generate(self, z, c, noise=(), step=None):
        return self.a * z + self.b


def batch_of(schedule, n, rng):
    """As `Draws.groups` makes it."""
    z, eps = torch.randn(2, n, *SHAPE, generator=rng)
    groups = n // GROUP
    u = (torch.arange(GROUP).repeat_interleave(groups) + torch.rand(groups, generator=rng).repeat(GROUP)) / GROUP
    t = level_timesteps(u, schedule, LOW, HIGH)
    return Batch(["c"] * n, {}, z, z[:0], torch.zeros(n, dtype=torch.long), t, eps)


def reward(pixels, prompts):
    return K * pixels.sum(dim=(1, 2, 3))


def learn(loss, steps=200, rate=0.03):
    """The shift at which a stochastic loss is least, by Adam; the mean over the last third of the way."""
    delta, found = torch.zeros((), requires_grad=True), []
    optimizer = torch.optim.Adam([delta], lr=rate)
    rng = torch.Generator().manual_seed(0)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - i / steps))
        optimizer.zero_grad()
        loss(delta, rng).backward()
        optimizer.step()
        found.append(delta.item())
    return sum(found[-steps // 3 :]) / len(found[-steps // 3 :])


@pytest.mark.parametrize("a, b", [(S**0.5, MU), (0.5, -0.4)])
def test_phi_learns_the_tilted_reference(schedule, a, b):
    """δ = α_rew k S over the share of the log-likelihood in the range, whoever draws the pictures."""

    def loss(delta, rng):
        phi, ref = Shifted(schedule, MU + delta), Shifted(schedule, MU)
        surrogate = Surrogate(Given(a, b), phi, ref, reward, lambda x: x, GROUP, LOW, HIGH, batch_size=100)
        return surrogate.loss(surrogate.ask(batch_of(schedule, 512, rng)), ALPHA)[0]

    assert covered(schedule) > 0.98
    assert learn(loss) == pytest.approx(DELTA / covered(schedule), rel=0.04)


def test_reward_weighted_denoising_tilts_what_it_is_shown(schedule):
    """The fast wrong answer beside the test above: exp(α_rew r) as weights of a denoising loss on the same pictures,
    of q = N(b, a²), make q exp(α_rew r), which has the mean b + α_rew k a², wherever p_ref is."""
    a, b = 0.5, -0.4

    def loss(mean, rng):
        batch = batch_of(schedule, 2048, rng)
        x0 = a * batch.z + b
        alpha, sigma = schedule(batch.t)
        x_t = alpha * x0 + sigma * batch.eps
        x0_hat = mean + alpha * a**2 / (alpha**2 * a**2 + sigma**2) * (x_t - alpha * mean)
        weights = torch.softmax(ALPHA * reward(x0, None), dim=0)
        return (weights * (x0_hat - x0).square().sum(dim=(1, 2, 3))).sum()

    assert learn(loss) == pytest.approx(b + ALPHA * K * a**2, abs=0.01)  # and not μ + α_rew k S = 0.89


def test_the_log_ratio_is_that_of_the_densities(schedule):
    """With every level of the range: log N(x; μ + δ, S) − log N(x; μ, S), in the mean over ε, but for the range."""
    t, log_snr = levels(schedule, LOW, HIGH)
    u = (torch.arange(2000) + 0.5) / 2000
    t = level_timesteps(u, schedule, LOW, HIGH)
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).double().expand(len(t), *SHAPE)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).double()
    alpha, sigma = (v.double() for v in schedule(t))
    delta, span = 0.3, float(log_snr[0] - log_snr[-1])
    means = []
    for sign in (1, -1):  # antithetic: linear in ε, so its mean is exact
        x_t = alpha * x0 + sign * sigma * eps
        estimates = (posterior(x_t, mean, alpha, sigma) for mean in (MU + delta, MU))
        means.append(log_ratio(x0, *estimates, alpha, sigma, span).mean().item())
    x = x0[0]
    exact = (((x - MU) ** 2 - (x - MU - delta) ** 2) / (2 * S)).sum().item()
    assert sum(means) / 2 == pytest.approx(exact * covered(schedule), rel=5e-3)


def test_levels_are_uniform_in_log_snr(schedule):
    t, log_snr = levels(schedule, LOW, HIGH)
    assert (log_snr.diff() < 0).all() and log_snr[-1] >= LOWEST and t[0] == 20
    drawn = level_timesteps(torch.linspace(0, 1, 1001)[:-1], schedule, LOW, HIGH)
    alpha, sigma = schedule(drawn)
    got = 2 * (alpha / sigma).log().flatten()
    even = torch.linspace(float(log_snr[0]), float(log_snr[-1]), 1001)[:-1]
    assert (got - even).abs().max() < 0.7 * log_snr.diff().abs().max()


def comparisons(delta, rng, schedule, weights, per_pair):
    """Bradley–Terry on weighted ε errors with `per_pair` levels in the sigmoid, t uniform: logits are E-exact in ε, as
    the shared noise cancels."""
    n = 2048
    x = S**0.5 * torch.randn(n, 2, D, generator=rng) + MU
    t = schedule.timesteps(torch.rand(n * per_pair, generator=rng), LOW, HIGH)
    alpha, sigma = schedule(t)
    v = alpha**2 * S + sigma**2
    level = (2 * weights(alpha, sigma) * (alpha * sigma / v) ** 2).view(n, per_pair).mean(dim=1)
    y = (x[:, 0] - x[:, 1]).sum(dim=1)
    logits = torch.stack([level * delta * y, torch.zeros(n)], dim=1)
    return bradley_terry(logits, torch.stack([K * y, torch.zeros(n)], dim=1), ALPHA)


def constant(schedule, weights, power=1):
    """The mean of (2 w (α σ / v)²)^power over π(t); C of the spec is half of it."""
    t = schedule.timesteps(torch.linspace(0, 1, 5001)[:-1], LOW, HIGH)
    alpha, sigma = schedule(t)
    return ((2 * weights(alpha, sigma) * (alpha * sigma / (alpha**2 * S + sigma**2)) ** 2) ** power).mean().item()


def test_another_weighting_gives_a_tilt_of_another_size(schedule):
    """w = 1 for t ~ π(t), the loss that networks are trained with: δ = α k / (2 C), many levels in the sigmoid."""
    one = lambda alpha, sigma: torch.ones_like(alpha)  # noqa: E731
    wrong = ALPHA * K / constant(schedule, one)
    found = learn(lambda delta, rng: comparisons(delta, rng, schedule, one, 64))
    assert found == pytest.approx(wrong, rel=0.05) and abs(wrong / DELTA - 1) > 0.5


def test_one_level_in_the_sigmoid_shrinks_the_tilt(schedule):
    """By E[g²] / E[g]² where logits are small, g a level's share: its spread acts as noise on the logit. With L levels
    by 1 + CV² / L."""
    slope = lambda alpha, sigma: (alpha / sigma) ** -1  # noqa: E731
    g, g2 = constant(schedule, slope), constant(schedule, slope, 2)
    for per_pair in (1, 8):
        found = learn(lambda delta, rng: comparisons(delta, rng, schedule, slope, per_pair))
        shrunk = 1 + (g2 / g**2 - 1) / per_pair
        assert found == pytest.approx(ALPHA * K / g / shrunk, rel=0.06)


@pytest.mark.parametrize("weighting", ["score", "x0"])
def test_the_generator_ends_at_the_tilted_reference(schedule, weighting):
    """b* = μ + α_rew k S and a*² = S for any w(t): with TA and φ exact, closed form 5 (DIDR)."""
    ref, phi = Shifted(schedule, MU), Shifted(schedule, MU + DELTA)
    rng, a, b = torch.Generator().manual_seed(1), torch.tensor(1.2), torch.tensor(-0.5)
    size = None
    for i in range(300):
        z, eps = torch.randn(2, 512, *SHAPE, generator=rng)
        t = schedule.timesteps(torch.rand(512, generator=rng), 0.2, 0.8)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        var, mean = a.item() ** 2, b.item()
        ta = Exact(
            schedule,
            lambda x, s: mean + (lambda al, si: al * var / (al**2 * var + si**2) * (x - al * mean))(*schedule(s)),
        )
        step = GeneratorStep(ta, ref, {}, (IKL(), SurrogateReward(phi)), weighting)
        batch = Batch(["c"] * 512, {}, z, z[:0], torch.zeros_like(t), t, eps)
        x0 = a * z + b
        gradient, figures = step(x0, batch, Alpha(1.0, ALPHA))
        x0.backward(gradient / 512)
        if size is None:
            alpha, sigma = schedule(schedule.timesteps(torch.linspace(0, 1, 601)[:-1], 0.2, 0.8))
            w = 2.5 * (alpha / sigma) ** (-2 if weighting == "x0" else 0)
            size = (w * alpha**2 / (alpha**2 * S + sigma**2)).mean().item() * D
        rate = (0.2 if i < 220 else 0.03) / size
        a, b = a - rate * a.grad, b - rate * b.grad
        assert figures["norm_surrogate"] > 0
    assert b.item() == pytest.approx(MU + DELTA, abs=0.02)
    assert a.item() == pytest.approx(S**0.5, abs=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_free_levels(prediction):
    """Where each level has a shift of its own, the comparisons fix but a sum of them. Gradient descent on an ε
    network's outputs finds those of one density, p_φ = N(μ + δ, S), and the generator's optimum is μ + δ for any w(t);
    on a flow network's it finds α² times as much at each level, up to a factor: the optimum then depends on w(t)."""
    log_snr = torch.linspace(LOWEST, 8, 281, dtype=torch.float64)
    gamma = log_snr.exp()
    alpha, sigma = SHIFT[prediction](gamma)
    shrunk = sigma**2 / (alpha**2 * S + sigma**2)  # of a shift of the mean, in x̂0
    to_x0 = {"epsilon": sigma / alpha, "flow": sigma}[prediction]
    y = torch.linspace(-30, 30, 61, dtype=torch.float64)
    output, pairs = torch.zeros_like(gamma, requires_grad=True), K * y
    for _ in range(400):
        slope = (log_snr[-1] - log_snr[0]) * (gamma * shrunk * to_x0 * output).mean()
        loss = bradley_terry(torch.stack([slope * y, 0 * y], 1), torch.stack([pairs, 0 * y], 1), ALPHA)
        (gradient,) = torch.autograd.grad(loss, output)
        output = (output - 0.05 * gradient).detach().requires_grad_()
    assert loss < 1e-6
    shift = (to_x0 * output).detach()
    optimum = [(w * gamma * shift).sum() / (w * gamma * shrunk).sum() for w in (sigma / alpha, (sigma / alpha) ** 2)]
    if prediction == "epsilon":
        torch.testing.assert_close(shift, DELTA * shrunk, rtol=0.02, atol=1e-4)
        assert optimum == pytest.approx([DELTA] * 2, rel=0.02)
    else:
        torch.testing.assert_close(shift / shrunk / alpha**2, (shift / shrunk / alpha**2)[:1].expand(281))
        assert optimum[0] > 1.2 * optimum[1]


def test_levels_at_equal_distances_leave_the_tilt_as_it_is(schedule):
    """The table in docs/rewards.md: what is found is 1 / (1 + CV²) of the tilt, CV that of a level sum, if logits are
    small."""
    rng = torch.Generator().manual_seed(0)

    def shrink(per_pair, draw):
        u = draw(20_000, per_pair)
        alpha, sigma = schedule(level_timesteps(u.flatten(), schedule, LOW, HIGH))
        g = (alpha * sigma / (alpha**2 * S + sigma**2)).square().view(u.shape).mean(dim=1)
        return 1 / (1 + (g.var() / g.mean() ** 2).item())

    uniform = lambda n, per_pair: torch.rand(n, per_pair, generator=rng)  # noqa: E731
    even = lambda n, per_pair: (torch.arange(per_pair) + torch.rand(n, 1, generator=rng)) / per_pair  # noqa: E731
    stratified = lambda n, per_pair: (torch.arange(per_pair) + uniform(n, per_pair)) / per_pair  # noqa: E731
    expected = (0.53, 0.82, 0.96) if schedule is SCHEDULES["variance-preserving"] else (0.44, 0.75, 0.89)
    assert (shrink(1, uniform), shrink(4, uniform), shrink(4, stratified)) == pytest.approx(expected, abs=0.015)
    assert shrink(4, even) > 0.995


# Runs.


JUDGE = """
import os

def count(pixels, prompts):
    if os.environ.get("JUDGE") == "gone":
        raise RuntimeError("the judge has left")
    return [round(100 * float(p[0].mean())) for p in pixels]

def heldout(pixels, prompts):
    return count(pixels, prompts)
"""


@pytest.fixture
def command(quick_args, tmp_path):
    """A run with a judge whose scores are whole numbers."""
    (tmp_path / "judge.py").write_text(JUDGE)
    words = [str(word) for word in quick_args]
    words[words.index("--reward") + 1] = f"{tmp_path / 'judge.py'}:count"
    return [*words, "--reward_mode", "surrogate", "--train_batch_size", 4, "--surrogate_group", 2, "--reward_scale", 2]


LORA = ["--lora_rank", 2, "--ta_lora_rank", 2, "--surrogate_lora_rank", 2]


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(LORA, marks=pytest.mark.slow),
        ["--generator_steps", 2, "--gradient_accumulation_steps", 2, *LORA],
    ],
)
def test_a_run_learns_and_is_resumed_exactly(command, tmp_path, options):
    options = [*command, *options, "--checkpointing_steps", 1]
    run([*options, "--max_train_steps", 3, "--output_dir", tmp_path / "whole"])
    rows = [row for row in history(tmp_path / "whole") if "ta_loss" in row]
    assert all(row["surrogate_loss"] >= 0 and row["grad_norm_surrogate"] > 0 for row in rows)
    assert all(row["norm_surrogate"] > 0 and "norm_reward" not in row for row in rows)  # after its first step
    run([*options, "--max_train_steps", 2, "--output_dir", tmp_path / "parts"])
    run([*options, "--max_train_steps", 3, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"])
    for name in ("generator", "teaching_assistant", "surrogate"):
        first, whole, parts = (
            trained(tmp_path / folder, n, name) for folder, n in (("whole", 1), ("whole", 3), ("parts", 3))
        )
        assert same(whole, parts) and not same(first, whole)
    assert "2603.07700" in (tmp_path / "whole" / "README.md").read_text()
    assert history(tmp_path / "whole")[-1] == history(tmp_path / "parts")[-1]


def test_a_judge_that_leaves_ends_the_run_after_a_checkpoint(command, tmp_path, monkeypatch):
    """In step 3 of 4; what was written goes on to the same weights."""
    options = [*command, "--max_train_steps", 4, "--checkpointing_steps", 0]
    run([*options, "--output_dir", tmp_path / "whole"])
    ask, calls = Surrogate.ask, []

    def leaves(self, batch):
        calls.append(1)
        monkeypatch.setenv("JUDGE", "gone" if len(calls) == 3 else "here")
        return ask(self, batch)

    monkeypatch.setattr(Surrogate, "ask", leaves)
    with pytest.raises(
        Ending, match="failed: RuntimeError: the judge has left .line 6 of judge.py. after step 2; .*checkpoint-2 is w"
    ) as end:
        run([*options, "--output_dir", tmp_path / "parts"])
    assert end.value.code == 75 and checkpoints(tmp_path / "parts") == ["checkpoint-2"]
    again = [*options, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    monkeypatch.delenv("JUDGE")
    monkeypatch.setattr(Surrogate, "ask", ask)
    run(again)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def served(command, url):
    words = [str(word) for word in command]
    words[words.index("--reward") + 1] = f"{url}/count"
    return [*words, "--max_train_steps", 3, "--checkpointing_steps", 0, "--reward_batch_size", 2, "--ta_steps", 2]


def brightness(pixels, prompts):
    return (100 * pixels.mean(dim=(1, 2, 3))).round()


@pytest.mark.parametrize("passes, options", [(1, []), (2, ["--reuse_generated", *LORA])])
def test_a_judge_elsewhere_looks_while_the_ta_learns(command, tmp_path, monkeypatch, passes, options):
    """A judge that answers no sooner than the TA has taken its steps holds nothing up; the run is the same as one that
    waits for each answer at once, and no thread is left."""
    told, taught = [], threading.Event()
    ask, step, judged, threads = Surrogate.ask, Trained.step, RemoteReward.ask, threading.active_count()

    def judge(pixels, prompts):
        told.append("answer" if taught.wait(30) else "it waits for ever")
        return brightness(pixels, prompts)

    def asks(self, batch):
        taught.clear()
        told.append("ask")
        return ask(self, batch)

    def steps(self):
        told.append(self.name)
        if told[-2:] == ["teaching assistant"] * 2:
            taught.set()
        return step(self)

    with running(serve({"count": judge})) as url:
        words = [*served(command, url), *options, "--gradient_accumulation_steps", passes]
        taught.set()  # whoever asks outside of the steps is answered at once
        with monkeypatch.context() as m:
            m.setattr(Surrogate, "ask", asks)
            m.setattr(Trained, "step", steps)
            run([*words, "--output_dir", tmp_path / "meanwhile"])
        at_once = lambda *args: (lambda answer: lambda: answer)(judged(*args)())  # noqa: E731
        monkeypatch.setattr(RemoteReward, "ask", at_once)
        of_steps = " ".join(told).removeprefix("answer ").split("ask", 1)[1].rpartition("generator")[0]
        run([*words, "--output_dir", tmp_path / "waits"])
    one = ["ask"] * passes + ["teaching assistant"] * 2 + ["answer"] * 2 * passes + ["surrogate", "generator"]
    assert f"ask{of_steps}generator" == " ".join(one * 3)
    gc.collect()
    assert threading.active_count() == threads
    assert same(weights(tmp_path / "meanwhile"), weights(tmp_path / "waits"))
    assert history(tmp_path / "meanwhile") == history(tmp_path / "waits")


def test_a_judge_elsewhere_that_goes_away_and_comes_back(command, tmp_path, monkeypatch):
    """In the second step, as a run of two passes asks; that shows after the TA's steps, which are not taken again."""
    asks, calls = Surrogate.ask, []

    with contextlib.ExitStack() as server, monkeypatch.context() as m:
        url = server.enter_context(running(serve({"count": brightness})))
        words = [*served(command, url), "--reward_retries", 0, "--gradient_accumulation_steps", 2]
        run([*words, "--output_dir", tmp_path / "whole"])

        def goes_away(self, batch):
            calls.append(1)
            if len(calls) == 3:
                server.close()
                self.reward.rewards[0].http.clear()
            return asks(self, batch)

        m.setattr(Surrogate, "ask", goes_away)
        with pytest.raises(Ending, match=f"`{url}/count` does not answer: .* after step 1; .*checkpoint-1 is w"):
            run([*words, "--output_dir", tmp_path / "parts"])
    again = [*words, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    with pytest.raises(Mistake, match="does not answer"):
        run(again)
    with running(serve({"count": brightness}, port=int(url.rpartition(":")[2]))):
        run(again)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_a_validation_without_scores_is_made_up_for(command, tmp_path, monkeypatch):
    """A held-out judge leaves: the run ends after a checkpoint, judges first when it goes on, and ends as it would."""
    options = [*command, "--reward_scale", 0, "--heldout_reward", f"{tmp_path / 'judge.py'}:heldout"]
    options += ["--max_train_steps", 2, "--validation_steps", 1, "--checkpointing_steps", 0]
    run([*options, "--output_dir", tmp_path / "whole"])
    step = GeneratorStep.__call__

    def leaves(self, *args):
        monkeypatch.setenv("JUDGE", "gone")
        return step(self, *args)

    with monkeypatch.context() as m:
        m.setattr(GeneratorStep, "__call__", leaves)
        with pytest.raises(Ending, match="the judge has left .* after step 1; .*checkpoint-1 is written"):
            run([*options, "--output_dir", tmp_path / "parts"])
    again = [*options, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    with pytest.raises(Mistake, match="the judge has left"):
        run(again)
    monkeypatch.delenv("JUDGE")
    run(again)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    summary = json.loads((tmp_path / "parts" / "training_summary.json").read_text())
    assert summary["heldout_after"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_batch_size", 5], "--train_batch_size 5 must be a multiple of --surrogate_group 2"),
        (["--divergence", "score"], "--reward_mode surrogate needs --divergence ikl"),
        (["--reward_ratio", 1], "--reward_ratio needs --reward_mode clean: a surrogate reward"),
        (["--surrogate_group", 1], "must be a whole number of at least 2"),
    ],
)
def test_arguments_that_cannot_work(command, options, message):
    words = [str(word) for word in [*command, *options]]
    if "--reward_ratio" in words:
        del words[words.index("--reward_scale") : words.index("--reward_scale") + 2]
    with pytest.raises(Mistake, match=message):
        parse_args(words)


def test_the_plan_counts_the_surrogate(command, capsys):
    run([*command, *LORA, "--dry_run", "--memory_gib", 1])
    out = capsys.readouterr().out
    assert "\nsurrogate" in out and "Predicted peak" in out
    run([*command, "--reward_scale", 0, "--dry_run"])
    assert "\nsurrogate" not in capsys.readouterr().out
