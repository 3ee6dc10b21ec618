#!/usr/bin/env python
"""Diff-Instruct++: distil a text-to-image diffusion model into a one-step generator and align it, without images.

`accelerate launch train_diff_instruct_pp.py --reward_scale 10 --cfg_scale 4.5` runs it on the pocket reference.
Paper: Luo, "Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences",
arXiv 2410.18881. In the comments: g_θ generator, s_ref reference, s_ψ teaching assistant (TA), r reward.
"""

import gc
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diff_instruct.evaluation.judge import WHILE_TRAINING, Judge, diversity_features
from diff_instruct.evaluation.pictures import REFERENCE_STEPS, draw_reference, image_grid, measured, real_pictures
from diff_instruct.evaluation.statistics import compare, interval
from diff_instruct.export.card import base_license, figure_names
from diff_instruct.export.export import create_repository, export, save_generator, upload
from diff_instruct.files import whole
from diff_instruct.models.actors import load_actors
from diff_instruct.models.reference import encode_null
from diff_instruct.models.roles import roles_of
from diff_instruct.models.sources import models_of
from diff_instruct.plan.advice import advice
from diff_instruct.plan.memory_plan import plan, table
from diff_instruct.prompts.encoding import fill_cache, make_conditioning
from diff_instruct.prompts.files import prompt_sources
from diff_instruct.prompts.stream import PromptStream, Sampler
from diff_instruct.prompts.survey import load_prompts, rows_read
from diff_instruct.rewards.decoder import TinyDecoder
from diff_instruct.rewards.loading import DTYPES, load_mix, load_scorers, truncated_prompts
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.terms import Alpha, Batch
from diff_instruct.training.arguments import parse_args
from diff_instruct.training.checkpoints import check_checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from diff_instruct.training.ema import ema_decay
from diff_instruct.training.endings import run_to_the_end, writing_export
from diff_instruct.training.environment import check_accelerations, check_engine, use_cores
from diff_instruct.training.history import Averages, History, Speed, log_images
from diff_instruct.training.interrupts import Interrupts
from diff_instruct.training.nonfinite import NonFinite
from diff_instruct.training.optimizer import Trained
from diff_instruct.training.output_folder import prepare_output_dir
from diff_instruct.training.record import record_of
from diff_instruct.training.reward_scale import RewardDial, validations_since_best
from diff_instruct.training.steps import generator_step, ta_loss
from diff_instruct.training.trackers import end_trackers, start_trackers


ON_THE_BAR = ("reward", "ta_loss", "norm_divergence", "val_reward", "val_heldout", "val_diversity")


def main(args):
    started = time.time()

    # 1. Where it runs.
    check_engine(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
        step_scheduler_with_optimizer=False,
    )
    device, processes, is_main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    args.mixed_precision = accelerator.mixed_precision  # or what accelerate is configured for
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if device.type == "cpu":
        use_cores(processes)
    set_seed(args.seed)

    # 2. Mistakes show here, before anything large loads.
    models = models_of(args)
    accelerator.print(table(plan(args, models, accelerator.mixed_precision)))
    checkpoint = args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint:
        check_checkpoint(checkpoint, args, processes)
    sources = prompt_sources(args)
    train_prompts, eval_prompts, count = load_prompts(*sources, args.num_eval_prompts, accelerator.print)
    validation_prompts = args.validation_prompts or eval_prompts[: args.num_validation_prompts]
    real = real_pictures(args.validation_images, validation_prompts)
    if args.dry_run:
        if args.memory_gib:
            accelerator.print(advice(args, models, args.memory_gib))
        return
    check_accelerations(args, models, accelerator)
    repo = create_repository(args) if args.push_to_hub and is_main else None
    license = base_license(args.pretrained_model_name_or_path) if is_main else None
    if args.resume_from_checkpoint and not checkpoint:
        accelerator.print(f"There is no checkpoint in {args.output_dir} yet: starting afresh.")

    # 3. The actors: reward; generator (in `pipe`, which is what is shipped), teaching assistant, reference.
    trained_on, reported = read_rewards(args)
    reward = load_mix(trained_on, device, DTYPES[args.reward_dtype], args.cache_dir)
    heldout = load_scorers(reported, device, args.cache_dir)
    actors = load_actors(models, roles_of(args, models), device, dtype, accelerator.autocast, args)
    pipe, generator, ta, ref = actors.pipe, actors.generator, actors.ta, actors.ref
    latent_shape = pipe.latent_shape(args.resolution, args.resolution)
    decode = pipe.decode  # of the reward's gradient; figures always use the VAE
    if args.reward_decoder:
        decode = TinyDecoder(args.reward_decoder, models.grid.channels, args.cache_dir).to(device)

    # 4. What is trained, and what is drawn.
    total, warmup = args.pretrain_steps + args.max_train_steps, args.ta_warmup_steps
    accumulation = args.gradient_accumulation_steps
    rising, ta_rate = args.lr_warmup_steps, args.ta_learning_rate or args.learning_rate
    theta = Trained(accelerator, args, "generator", generator, args.learning_rate, total, rising, args.use_ema)
    psi = Trained(
        accelerator, args, "teaching assistant", ta, ta_rate, warmup + args.ta_steps * total, args.ta_steps * rising
    )
    encode = make_conditioning(args, pipe, device)
    place = accelerator.process_index, processes, device
    stream = PromptStream(train_prompts, args.seed, args.shuffle_buffer_size, *place[:2], args.allow_bad_rows)
    sampler = Sampler(stream, latent_shape, args.train_batch_size, args.seed, *place, steps=len(pipe.timesteps))
    images_per_step = args.train_batch_size * accumulation * processes
    if args.prompt_cache:
        most = images_per_step * (warmup + (args.ta_steps + 1) * total)
        others = ["", *eval_prompts, *validation_prompts]
        fill_cache(args, encode, train_prompts, others, most, accelerator.process_index, processes)
    null = encode_null(models.family, actors.stock, pipe, encode)
    null = {k: v.expand(args.train_batch_size, *v.shape[1:]) for k, v in null.items()}
    gradient_at_x0 = generator_step(args, ta, ref, null, reward, decode)

    prompts_of_step = []

    def batches():
        """c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I), for each forward and backward pass of an optimizer step."""
        for _ in range(accumulation):
            prompts, z, eps, u, noise, step = sampler()
            prompts_of_step.extend(prompts)
            t = pipe.schedule.timesteps(u, args.min_timestep, args.max_timestep).to(device)
            yield Batch(prompts, encode(prompts), z, noise, step, t, eps)

    dial = RewardDial(args.reward_scale, args.reward_warmup_steps, args.reward_ratio, args.reward_ratio_steps)
    first_step, spent, heldout_scores = -warmup, 0.0, []
    if checkpoint:
        state = load_checkpoint(accelerator, checkpoint, [theta, psi])
        first_step, spent, heldout_scores = state["step"], state["seconds"], state["heldout_scores"]
        sampler.load_state_dict(state["sampler"])
        dial.load_state_dict(state["dial"])
        accelerator.print(f"Resumed at step {first_step} from {checkpoint}.")

    # 5. The generator before, on fixed prompts and seeds that are never trained on.
    if is_main:
        prepare_output_dir(args)
    history = History(args.output_dir, first_step if checkpoint else None) if is_main else None
    if args.report_to != "none":
        start_trackers(accelerator, args, checkpoint)
    score_batch = args.reward_batch_size or args.train_batch_size
    to_judge = eval_prompts, validation_prompts, latent_shape, args.num_eval_images, score_batch
    judge = Judge(accelerator, generator, theta, encode, *to_judge)
    before_file = Path(checkpoint.parent if checkpoint else args.output_dir) / "before.safetensors"
    if not checkpoint:
        scores, pictures = judge(reward, heldout)
        heldout_scores = [float(v[:WHILE_TRAINING].mean()) for k, v in scores.items() if k == "heldout"]
        if is_main:
            with whole(before_file) as aside:
                save_file({"pictures": pictures.cpu(), **scores}, aside)
            history.log(accelerator, 0, {f"val_{k}": float(v[:WHILE_TRAINING].mean()) for k, v in scores.items()})

    # 6. Algorithm 1. At negative steps the TA alone warms up.
    bar = tqdm(range(first_step, total), initial=first_step + warmup, total=total + warmup, disable=not is_main)
    done, judged, speed = first_step, {}, Speed(device, images_per_step)
    interrupts = Interrupts(accelerator)
    nonfinite = NonFinite(accelerator, args.output_dir, reward, args.max_nonfinite_steps)
    for step in interrupts.listen(bar):
        if args.heldout_patience and validations_since_best(heldout_scores) >= args.heldout_patience:
            break
        pretraining, figures = step < args.pretrain_steps, Averages()
        prompts_of_step.clear()
        alpha_cfg, aligning = args.pretrain_cfg_scale if pretraining else args.cfg_scale, step - args.pretrain_steps
        alpha = Alpha(alpha_cfg, dial.scale(aligning), dial.measuring(aligning))

        for _ in range(args.ta_steps if step >= 0 else 1):  # θ is frozen; K_TA times ψ takes a step
            for batch in batches():
                loss = ta_loss(batch, generator, ta)
                figures.add({"ta_loss": loss})
                accelerator.backward(loss / accumulation)
            if not psi.step():
                nonfinite(step, psi, figures, prompts_of_step)

        if step >= 0:  # ψ is frozen; θ takes a step
            for batch in batches():
                x0 = generator.generate(batch.z, batch.c, batch.noise, batch.step)
                with psi.frozen():
                    dL_dx0, seen = gradient_at_x0(x0, batch, alpha)
                figures.add(seen | reward.take_parts(len(x0)))
                accelerator.backward(x0, gradient=dL_dx0 / (args.train_batch_size * accumulation))
            if theta.step():
                theta.update_average(ema_decay(args, pretraining, images_per_step, (step + 1) * images_per_step))
            else:
                nonfinite(step, theta, figures, prompts_of_step)

        # 7. What happened.
        done, speed.steps = step + 1, speed.steps + 1
        logging = done % args.logging_steps == 0 or done == total
        row = figures.take(accelerator) if logging or alpha.measuring else {}
        if alpha.measuring:
            dial.observe(row["norm_reward"], row["norm_divergence"])
        if logging:
            row |= {**speed.take(), "grad_norm_ta": psi.norm}
            row |= {"grad_norm_generator": theta.norm, "reward_scale": alpha.rew} if step >= 0 else {}
            row |= {"learning_rate": theta.learning_rate, "ta_learning_rate": psi.learning_rate}
            row["skipped_steps"] = theta.skipped + psi.skipped
            bar.set_postfix({k: f"{v:.3g}" for k, v in (row | judged).items() if k in ON_THE_BAR})
            if is_main:
                history.log(accelerator, done, row)
        speed.pause()
        if args.validation_steps and done % args.validation_steps == 0 and step >= 0:
            scores, pictures = judge(reward, heldout, WHILE_TRAINING)
            earlier = [] if pretraining else heldout_scores  # distillation is no measure for alignment
            heldout_scores = earlier + [float(v.mean()) for k, v in scores.items() if k == "heldout"]
            judged = {f"val_{k}": float(v.mean()) for k, v in scores.items()}
            if is_main:
                history.log(accelerator, done, judged)
                log_images(accelerator, done, pictures, validation_prompts)
        interrupts.read_ahead(sampler, (args.ta_steps + 1) * accumulation if done < total else 0)
        ending = interrupts.agreed()  # of all processes
        if ending or args.checkpointing_steps and (done % args.checkpointing_steps == 0 or done == total):
            state = {"step": done, "seconds": spent + time.time() - started, "sampler": sampler.state_dict()}
            state |= {"heldout_scores": heldout_scores, "dial": dial.state_dict()}
            written = save_checkpoint(accelerator, args, max(done, 0), state, [theta, psi])
        if ending:
            end_trackers(accelerator)
            raise ending.after(written, done)
        speed.go_on()

    # 8. The generator after: scores, pictures, curves, and the pipeline that is shipped.
    scores, pictures = judge(reward, heldout)
    summary = {
        "seconds": round(spent + time.time() - started, 1),
        "steps": done,
        "stopped_early": done < total,
        "n_prompts": len(eval_prompts),
        "n_images": len(eval_prompts) * args.num_eval_images,
        "prompt_rows": rows_read(count, stream),
        "truncated_prompts": truncated_prompts(reward, heldout),
        "diversity_by": diversity_features(reward, heldout)[0],
        "skipped_steps": theta.skipped + psi.skipped,
        "reward_scale": dial.reward_scale,
        **record_of(args, accelerator),
    }
    size = [n * models.grid.factor for n in latent_shape[1:]]
    with ref.act(), encode.encoding():  # on all processes: a sharded network is whole on none
        drawn = draw_reference(models, actors.stock, validation_prompts, judge.noise, size, args.cfg_scale)
    if is_main:
        before = load_file(before_file)
        columns = {"real": real} if real else {}
        columns |= {f"reference, {REFERENCE_STEPS} steps": drawn}
        columns |= {"generator before": before.pop("pictures"), "generator after": pictures}
        sheet = image_grid(columns, validation_prompts, measured(heldout, columns, validation_prompts))
        summary = {**compare(before, scores), **summary}
        with theta.averaged(), writing_export(args) as folder:
            sheet.save(folder / "samples.png")
            history.plot(folder / "curves.png")
            export(args, models, pipe, summary, validation_prompts, pictures, license, folder)
        report(args, summary)
    else:
        with theta.averaged():
            save_generator(args, models, pipe)  # gives its share of a sharded one
    accelerator.wait_for_everyone()  # no process leaves while another still writes
    accelerator.free_memory()
    gc.collect()
    end_trackers(accelerator)
    if repo:
        upload(args, repo, pipe)  # no process waits for the network


def report(args, summary):
    """Print what came out and how to use it."""
    for key in figure_names(summary):
        before, after, gain = (summary[f"{key}_{what}"] for what in ("before", "after", "gain"))
        print(f"{key:>10}: {before:.3f} -> {after:.3f} (gain {gain:+.3f}{interval(summary[f'{key}_gain_ci95'])})")
    if summary["stopped_early"]:
        print(f"Stopped after step {summary['steps']}: the held-out reward was below its best (--heldout_patience).")
    print(f"""
Wrote {args.output_dir}: pipeline, README.md, samples.png, curves.png, training_summary.json. Use it with

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{args.output_dir}", trust_remote_code=True)
    image = pipe("a red apple").images[0]
""")


if __name__ == "__main__":
    sys.exit(run_to_the_end(parse_args, main))
