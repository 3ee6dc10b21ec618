"""From arguments to a run: mistakes first, then what is large, then the generator as it is before training."""

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import save_file

from diff_instruct.evaluation.judge import WHILE_TRAINING, Judge
from diff_instruct.evaluation.pictures import real_pictures
from diff_instruct.export.card import base_license
from diff_instruct.export.export import create_repository
from diff_instruct.files import whole
from diff_instruct.mistake import Mistake
from diff_instruct.models.actors import Actors, load_actors
from diff_instruct.models.lora import reach
from diff_instruct.models.published import check_rounding, rounding_of
from diff_instruct.models.reference import encode_null
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import Models, models_of
from diff_instruct.models.weight_files import check_weights
from diff_instruct.plan.advice import advice
from diff_instruct.plan.memory_plan import plan, table, words_of_rounding
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.prompts.cut import Cut
from diff_instruct.prompts.encoding import make_conditioning
from diff_instruct.prompts.files import prompt_sources
from diff_instruct.prompts.survey import load_prompts, prompts_to_draw
from diff_instruct.rewards.decoder import TinyDecoder
from diff_instruct.rewards.loading import DTYPES, load_mix, load_scorers
from diff_instruct.rewards.look import look_at_rewards
from diff_instruct.rewards.mix import Mix
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.surrogate import Surrogate
from diff_instruct.training.checkpoints import check_checkpoint, find_checkpoint, load_checkpoint, step_of
from diff_instruct.training.draws import Draws, images_per_step, make_draws
from diff_instruct.training.environment import (
    autocast_of,
    check_accelerations,
    check_engine,
    load_whole_everywhere,
    use_cores,
)
from diff_instruct.training.history import History
from diff_instruct.training.optimizer import make_trained
from diff_instruct.training.output_folder import prepare_output_dir
from diff_instruct.training.pairs import needs_pairs, plan_of_pairs
from diff_instruct.training.reward_scale import RewardDial
from diff_instruct.training.standards import standards_of, words_of_standards
from diff_instruct.training.state import LoopState
from diff_instruct.training.steps import GeneratorStep, generator_step
from diff_instruct.training.trackers import start_trackers


@dataclass
class Known:
    """What is known, and checked, before anything large loads.

    `checkpoint`: the folder to go on from, or None; `count`: what was counted of the prompts' rows; `real`: real
    pictures of the validation prompts; `repo` and `license`: of the export, on the main process.
    """

    models: Models
    checkpoint: Path | None
    train_prompts: object
    eval_prompts: list
    validation_prompts: list
    count: object
    real: list
    repo: str | None = None
    license: dict | None = None


@dataclass
class Run:
    """A run that is ready: all that Algorithm 1 works with."""

    args: Namespace
    accelerator: Accelerator
    known: Known
    actors: Actors
    reward: Mix  # r(x, c), trained on
    heldout: dict  # scorers by name, only reported
    encode: Conditioning
    draws: Draws
    gradient_at_x0: GeneratorStep
    state: LoopState
    judge: Judge
    history: History | None  # on the main process
    surrogate: Surrogate | None = None

    @property
    def first_step(self):
        """The first of the steps: at negative ones pairs are learnt, then the TA warms up."""
        return -self.args.pair_steps - self.args.ta_warmup_steps

    @property
    def total(self):
        """Steps of the generator, of both stages."""
        return self.args.pretrain_steps + self.args.max_train_steps

    @property
    def images_per_step(self):
        """Of all processes."""
        return images_per_step(self.args, self.accelerator)

    @property
    def before_file(self):
        """Scores and pictures of the generator before training: of the run that a resumed one goes on with."""
        checkpoint = self.known.checkpoint
        return Path(checkpoint.parent if checkpoint else self.args.output_dir) / "before.safetensors"


def set_up(args):
    """The [`Run`] of the arguments; None with `--dry_run`, which prints its plan.

    Raises:
        Mistake: in one line, before anything large loads.
    """
    started = time.time()
    accelerator = make_accelerator(args)
    known = check(args, accelerator)
    if args.dry_run:
        for unseen in look_at_rewards(args):
            accelerator.print(unseen)
        if args.memory_gib:
            accelerator.print(advice(args, known.models, args.memory_gib))
        return None
    claim(args, accelerator, known)
    run = load(args, accelerator, known, started)
    if known.checkpoint:
        load_checkpoint(accelerator, known.checkpoint, run.state)
        accelerator.print(f"Resumed at step {run.state.step} from {known.checkpoint}.")
    begin(run)
    return run


def make_accelerator(args):
    """Where it runs. `args.mixed_precision` becomes what accelerate is configured for, if it was not given."""
    check_engine(args)
    load_whole_everywhere()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
        step_scheduler_with_optimizer=False,
    )
    args.mixed_precision = accelerator.mixed_precision
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.device.type == "cpu":
        use_cores(accelerator.num_processes)
    set_seed(args.seed)
    return accelerator


def check(args, accelerator):
    """What is [`Known`]; mistakes show here, and the plan of memory is printed."""
    models = models_of(args)
    if args.timestep_shift != 1 and not models.family.flow:
        raise Mistake("--timestep_shift is of flow matching, and the reference has a schedule of betas: leave it out")
    check_weights(models, config_suffices=args.dry_run)
    check_rounding(args, models, roles_of(args, models))
    accelerator.print(table(plan(args, models, accelerator.mixed_precision)))
    if args.lora_rank or args.ta_lora_rank:
        layers, share = reach(models.networks[models.denoiser], models.lora_targets)
        accelerator.print(f"LoRA reaches {layers} layers, {share:.0%} of the {models.denoiser}'s parameters.")
    if rounding_of(models, args.base_quantization):
        accelerator.print(words_of_rounding(args, models))
    if needs_pairs(args):
        accelerator.print(plan_of_pairs(args, models))
    checkpoint = args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint:
        check_checkpoint(checkpoint, args, accelerator.num_processes)
    train, judged = prompt_sources(args)
    to_judge, cut = args.num_eval_prompts, Cut.of(models, args)
    train_prompts, eval_prompts, count = load_prompts(train, judged, to_judge, accelerator.print, cut)
    validation_prompts = prompts_to_draw(args, eval_prompts)
    real = real_pictures(args.validation_images, validation_prompts)
    return Known(models, checkpoint or None, train_prompts, eval_prompts, validation_prompts, count, real)


def claim(args, accelerator, known):
    """What only a run that trains needs: packages, a GPU, and a place on the Hub."""
    check_accelerations(args, known.models, accelerator)
    if accelerator.is_main_process:
        known.repo = create_repository(args) if args.push_to_hub else None
        known.license = base_license(args.pretrained_model_name_or_path)
    if args.resume_from_checkpoint and not known.checkpoint:
        accelerator.print(f"There is no checkpoint in {args.output_dir} yet: starting afresh.")


def load(args, accelerator, known, started):
    """The [`Run`], with its actors: reward; generator (in the pipeline that is shipped), teaching assistant,
    reference."""
    device, models = accelerator.device, known.models
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    trained_on, reported = read_rewards(args)
    reward = load_mix(trained_on, device, DTYPES[args.reward_dtype], args.cache_dir, args.reward_mode != "surrogate")
    heldout = load_scorers(reported, device, args.cache_dir)
    roles = roles_of(args, models)
    where = known.checkpoint is None, accelerator.is_main_process
    actors = load_actors(models, roles, device, dtype, autocast_of(accelerator), args, *where)
    for line in actors.start:
        accelerator.print(line)
    decode = actors.pipe.decode  # of the reward's gradient; figures always use the VAE
    if args.reward_decoder:
        decode = TinyDecoder(args.reward_decoder, models.grid.channels, args.cache_dir).to(device)

    first = step_of(known.checkpoint) if known.checkpoint else -args.pair_steps - args.ta_warmup_steps
    on_pairs = first < -args.ta_warmup_steps
    theta, psi, phi = make_trained(args, accelerator, roles, actors, on_pairs)
    encode = make_conditioning(args, actors.pipe, device, actors.networks)
    draws = make_draws(args, accelerator, known, actors, encode, with_pairs=on_pairs or args.anchor_scale > 0)
    null = encode_null(models.family, actors.stock, actors.pipe, encode)
    null = {k: v.expand(args.train_batch_size, *v.shape[1:]) for k, v in null.items()}
    most = max(args.reward_ratio_steps, args.max_train_steps // 4)
    dial = RewardDial(args.reward_scale, args.reward_warmup_steps, args.reward_ratio, args.reward_ratio_steps, most)
    return Run(
        args=args,
        accelerator=accelerator,
        known=known,
        actors=actors,
        reward=reward,
        heldout=heldout,
        encode=encode,
        draws=draws,
        gradient_at_x0=generator_step(
            args, actors.ta, actors.ref, null, reward, decode, actors.surrogate, accelerator
        ),
        state=LoopState(theta, psi, draws.sampler, dial, step=first, started=started, phi=phi),
        judge=Judge(
            accelerator,
            actors.generator,
            theta,
            encode,
            prompts=known.eval_prompts,
            pictures=known.validation_prompts,
            latent_shapes=draws.sampler.latent_shapes,
            n_images=args.num_eval_images,
            batch_size=args.reward_batch_size or args.train_batch_size,
        ),
        history=None,
        surrogate=surrogate_of(args, actors, reward, decode, accelerator),
    )


def surrogate_of(args, actors, reward, decode, accelerator):
    """The [`Surrogate`] of a run; None where there is none."""
    if actors.surrogate is None:
        return None
    return Surrogate(
        actors.generator,
        actors.surrogate,
        actors.ref,
        reward,
        decode,
        args.surrogate_group,
        args.min_timestep,
        args.max_timestep,
        args.reward_batch_size,
        accelerator,
    )


def begin(run):
    """The output folder, the history, the trackers; and the generator before training, on fixed prompts and seeds that
    are never trained on."""
    args, accelerator, state, checkpoint = run.args, run.accelerator, run.state, run.known.checkpoint
    if accelerator.is_main_process:
        prepare_output_dir(args)
        run.history = History(args.output_dir, state.step if checkpoint else None)
    if args.report_to != "none":
        start_trackers(accelerator, args, checkpoint)
    if not checkpoint:
        state.standards = standards_of(run)
    run.reward.standards = state.standards
    if checkpoint:
        return
    if state.standards:
        accelerator.print(words_of_standards(state.standards))
    scores, pictures = run.judge(run.reward, run.heldout)
    means = {name: float(values[:WHILE_TRAINING].mean()) for name, values in scores.items()}
    state.heldout_scores = [mean for name, mean in means.items() if name == "heldout"]
    if run.history is not None:
        with whole(run.before_file) as aside:
            save_file({"pictures": pictures.cpu(), **scores}, aside)
        run.history.log(accelerator, 0, {f"val_{name}": mean for name, mean in means.items()})
