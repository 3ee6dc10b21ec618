"""What is seen of a run, step by step: figures, pictures, checkpoints, and reasons to end."""

from contextlib import contextmanager

from tqdm.auto import tqdm

from diff_instruct.evaluation.judge import WHILE_TRAINING
from diff_instruct.rewards.numbers import NoScores
from diff_instruct.terms import Alpha
from diff_instruct.training.checkpoints import save_checkpoint
from diff_instruct.training.endings import GO_ON_LATER, Ending
from diff_instruct.training.history import Averages, Speed, log_images
from diff_instruct.training.interrupts import Interrupts
from diff_instruct.training.nonfinite import NonFinite
from diff_instruct.training.reward_scale import validations_since_best
from diff_instruct.training.trackers import end_trackers


ON_THE_BAR = ("pair_loss", "reward", "ta_loss", "norm_divergence", "val_reward", "val_heldout", "val_diversity")


@contextmanager
def ending_where_rewards_fail(run):
    """Within: steps are taken. If a reward fails in the middle of one, the run ends there: what ψ has learnt in it is
    kept, and when the run goes on it takes the rest.

    Raises:
        Ending: then, after a checkpoint.
    """
    try:
        yield
    except NoScores as error:
        end(run, Ending(GO_ON_LATER, str(error)))


def end(run, ending):
    """Write a checkpoint, and raise the [`Ending`] with how to go on."""
    written = save_checkpoint(run.accelerator, run.args, run.state)
    end_trackers(run.accelerator)
    raise ending.after(written, run.state.step) from None


class Watch:
    """Goes through the steps of a [`Run`], and looks at each.

    `see` takes scalar tensors that nobody waits for; what is logged are their means over the passes of a step.
    """

    def __init__(self, run):
        args, accelerator, first = run.args, run.accelerator, run.state.step
        self.run, self.figures, self.judged = run, Averages(), {}
        self.bar = tqdm(
            range(first, run.total),
            initial=first - run.first_step,
            total=run.total - run.first_step,
            disable=not accelerator.is_main_process,
        )
        self.speed = Speed(accelerator.device, run.images_per_step)
        self.interrupts = Interrupts(accelerator)
        self.nonfinite = NonFinite(accelerator, args.output_dir, run.reward, args.max_nonfinite_steps)

    def steps(self):
        """Yield each step and its [`Alpha`], until the last, or until the held-out reward has fallen for too long. At
        negative steps pairs are learnt, then the TA warms up; before `--pretrain_steps` there is no reward."""
        args, state = self.run.args, self.run.state
        if state.unjudged:
            self.validate_or_end()
        for step in self.interrupts.listen(self.bar):
            if args.heldout_patience and validations_since_best(state.heldout_scores) >= args.heldout_patience:
                return
            self.figures = Averages()
            self.run.draws.prompts.clear()
            state.begun = state.sampler.state_dict()
            aligning = step - args.pretrain_steps
            cfg_scale = args.pretrain_cfg_scale if aligning < 0 else args.cfg_scale
            yield step, Alpha(cfg_scale, state.dial.scale(aligning), state.dial.measuring(aligning))

    def see(self, figures):
        """Scalar tensors of one pass, by name."""
        self.figures.add(figures)

    def ta_steps(self, step):
        """Yield 0, 1, ... for each step that ψ takes in this one: K_TA, and one in a warm-up. None if a run goes on
        where a reward had failed after them."""
        state, psi = self.run.state, self.run.state.psi
        if state.taught is None:
            yield from range(self.run.args.ta_steps if step >= 0 else 1)
            figures = self.figures.state_dict()
            state.taught = {"sampler": state.sampler.state_dict(), "figures": figures, "norm": psi.norm}
        else:
            state.sampler.load_state_dict(state.taught["sampler"])
            self.figures.load_state_dict(state.taught["figures"], self.run.accelerator.device)
            psi.norm = state.taught["norm"]

    def not_taken(self, step, trained):
        """A step whose gradient was not finite: see [`NonFinite`]."""
        self.nonfinite(step, trained, self.figures, self.run.draws.prompts)

    def after(self, step, alpha):
        """Log, judge, keep a checkpoint, as often as is asked for.

        Raises:
            Ending: if there is a reason to end, after a checkpoint.
        """
        args, state = self.run.args, self.run.state
        state.step, self.speed.steps = step + 1, self.speed.steps + 1
        state.begun = state.taught = None
        is_last = state.step == self.run.total
        self.log(alpha, state.step % args.logging_steps == 0 or is_last)
        self.speed.pause()
        if args.validation_steps and state.step % args.validation_steps == 0 and step >= 0:
            self.validate_or_end()
        phases = args.ta_steps + 1 + (state.phi is not None)
        self.interrupts.read_ahead(state.sampler, 0 if is_last else phases * self.run.draws.passes)
        ending = self.interrupts.agreed()  # of all processes
        if ending:
            end(self.run, ending)
        if args.checkpointing_steps and (state.step % args.checkpointing_steps == 0 or is_last):
            save_checkpoint(self.run.accelerator, args, state)
        self.speed.go_on()

    def log(self, alpha, is_due):
        """The figures of the step, if they are due; α_rew, while it is measured, looks at them in any case."""
        state, theta, psi = self.run.state, self.run.state.theta, self.run.state.psi
        row = self.figures.take(self.run.accelerator) if is_due or alpha.measuring else {}
        if alpha.measuring:
            state.dial.observe(row["norm_reward"], row["norm_divergence"])
        if not is_due:
            return
        on_pairs = state.step <= -self.run.args.ta_warmup_steps
        row |= {**self.speed.take(), **({} if on_pairs else {"grad_norm_ta": psi.norm})}
        row |= {"grad_norm_generator": theta.norm} if on_pairs or state.step > 0 else {}
        row |= {"reward_scale": alpha.rew} if state.step > 0 else {}
        row |= {"grad_norm_surrogate": state.phi.norm} if state.phi is not None and alpha.rew else {}
        row |= {"learning_rate": theta.learning_rate, "ta_learning_rate": psi.learning_rate}
        row["skipped_steps"] = state.skipped_steps
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in (row | self.judged).items() if k in ON_THE_BAR})
        if self.run.history is not None:
            self.run.history.log(self.run.accelerator, state.step, row)

    def validate_or_end(self):
        """Validate; if a judge says nothing, that is still due when the run goes on.

        Raises:
            Ending: then, after a checkpoint.
        """
        self.run.state.unjudged = True
        try:
            self.validate(self.run.state.step - 1)
        except NoScores as error:
            end(self.run, Ending(GO_ON_LATER, str(error)))
        self.run.state.unjudged = False

    def validate(self, step):
        """Scores and pictures of the generator as it is."""
        run, state = self.run, self.run.state
        scores, pictures = run.judge(run.reward, run.heldout, WHILE_TRAINING)
        means = {name: float(values.mean()) for name, values in scores.items()}
        earlier = [] if step < run.args.pretrain_steps else state.heldout_scores  # distillation is no measure for it
        state.heldout_scores = earlier + [mean for name, mean in means.items() if name == "heldout"]
        self.judged = {f"val_{name}": mean for name, mean in means.items()}
        if run.history is not None:
            run.history.log(run.accelerator, state.step, self.judged)
            log_images(run.accelerator, state.step, pictures, run.known.validation_prompts)
