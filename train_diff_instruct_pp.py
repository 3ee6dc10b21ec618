#!/usr/bin/env python
"""Diff-Instruct++: distil a text-to-image diffusion model into a one-step generator and align it, without images.

`accelerate launch train_diff_instruct_pp.py --reward_scale 10 --cfg_scale 4.5` runs it on the pocket reference.
Paper: Luo, "Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences",
arXiv 2410.18881. In the comments: g_θ generator, s_ref reference, s_ψ teaching assistant (TA), r reward.
"""

import gc
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from diff_instruct.evaluation.judge import diversity_features, evaluate
from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.pictures import REFERENCE_STEPS, draw, draw_reference, image_grid
from diff_instruct.evaluation.statistics import compare
from diff_instruct.export.card import figure_names
from diff_instruct.export.export import export
from diff_instruct.mistake import Mistake
from diff_instruct.models.loading import load_generator, load_reference, null_condition
from diff_instruct.models.lora import checkpoint_block, trainable
from diff_instruct.models.memory_plan import plan, table
from diff_instruct.models.schedule import NoiseSchedule
from diff_instruct.models.sources import read_models
from diff_instruct.models.teaching_assistant import frozen, make_teaching_assistant, reference_mode
from diff_instruct.objectives import (
    denoise,
    denoising_loss,
    diffused_reward_gradient,
    guide,
    ikl_gradient,
    reward_gradient,
    score_gradient,
    weight,
)
from diff_instruct.prompts.conditioning import Conditioning
from diff_instruct.prompts.files import load_prompts
from diff_instruct.prompts.stream import PromptStream, Sampler
from diff_instruct.rewards.decoder import TinyDecoder
from diff_instruct.rewards.loading import cut_prompts, load_heldout, load_mix
from diff_instruct.training.arguments import parse_args, trackable
from diff_instruct.training.brakes import validations_since_best, warmed_up
from diff_instruct.training.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_trained_weights_only,
)
from diff_instruct.training.ema import averaged, ema_decay
from diff_instruct.training.environment import check_accelerations, use_cores
from diff_instruct.training.history import History, log_images
from diff_instruct.training.optimizer import Stepper, make_optimizer


ON_THE_BAR = ("reward", "ta_loss", "norm_divergence", "val_reward", "val_heldout", "val_diversity")


def main(args):
    started = time.time()

    # 1. Where it runs.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    device, processes = accelerator.device, accelerator.num_processes
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if device.type == "cpu":
        use_cores(processes)
    set_seed(args.seed)

    # 2. Mistakes show here, before anything large loads.
    models = read_models(args)
    accelerator.print(table(plan(args, models, accelerator.mixed_precision)))
    checkpoint = args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    train_prompts, eval_prompts = load_prompts(args)
    validation_prompts = args.validation_prompts or eval_prompts[:8]
    if args.dry_run:
        return
    check_accelerations(args, device)

    # 3. The actors: reward, generator (in `pipe`, which is what is shipped), reference, teaching assistant.
    reward, heldout = load_mix(args, device), load_heldout(args, device)
    if args.reward_decoder:
        latent_channels = models.networks["vae"].config.latent_channels
        tiny_decoder = TinyDecoder(args.reward_decoder, latent_channels, args.cache_dir).to(device)
    stock = load_reference(args, models, dtype)
    pipe = load_generator(args, models, stock)
    latent_shape = pipe.latent_shape(args.resolution, args.resolution)
    reference = getattr(stock, models.denoiser)
    ta = make_teaching_assistant(reference, args.ta_lora_rank, args.ta_lora_alpha)
    if args.gradient_checkpointing:
        pipe.denoiser.enable_gradient_checkpointing()
        for network in (ta, reference):
            network.enable_gradient_checkpointing(checkpoint_block)
        stock.vae.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        for network in (pipe.denoiser, ta, reference):
            network.enable_xformers_memory_efficient_attention()
    pipe.denoiser.train()
    ta.train()
    stock.to(device)
    decode = tiny_decoder if args.reward_decoder else pipe.decode  # of the reward's gradient; figures use the VAE

    # 4. Optimizers, average, data.
    total_steps = args.pretrain_steps + args.max_train_steps
    theta, theta_lr = make_optimizer(args, pipe.denoiser, args.learning_rate, 1, total_steps)
    ta_rate = args.learning_rate if args.ta_learning_rate is None else args.ta_learning_rate
    psi, psi_lr = make_optimizer(args, ta, ta_rate, args.ta_steps, total_steps)
    ema = EMAModel(trainable(pipe.denoiser.to(device))) if args.use_ema else None
    generator, ta, theta, psi, theta_lr, psi_lr = accelerator.prepare(pipe.denoiser, ta, theta, psi, theta_lr, psi_lr)
    step_theta = Stepper(accelerator, "generator", generator, theta, theta_lr, args.max_grad_norm)
    step_psi = Stepper(accelerator, "teaching assistant", ta, psi, psi_lr, args.max_grad_norm)

    schedule = NoiseSchedule(pipe.scheduler, device)
    encode = Conditioning(pipe.encode_prompt, device)
    stream = PromptStream(train_prompts, args.seed, args.shuffle_buffer_size, accelerator.process_index, processes)
    place = accelerator.process_index, processes, device
    sampler = Sampler(stream, latent_shape, args.train_batch_size, args.seed, *place, steps=len(pipe.timesteps))
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * processes

    save_trained_weights_only(accelerator)
    first_step, spent, heldout_scores = 0, 0.0, []
    if checkpoint:
        state = load_checkpoint(accelerator, checkpoint, ema)
        first_step, spent = state["step"], state["seconds"]
        sampler.load_state_dict(state["sampler"])
        step_theta.skipped, step_psi.skipped = state["skipped"]
        heldout_scores = state["heldout_scores"]

    # 5. The functions in Algorithm 1.
    score_based, diffused = args.divergence == "score", args.reward_mode == "diffused"
    distance = args.score_distance, args.huber_c, args.score_guidance
    reward_batch, steps_k = args.reward_batch_size or args.train_batch_size, args.diffused_reward_steps
    null = {k: v.expand(args.train_batch_size, *v.shape[1:]) for k, v in null_condition(stock, encode).items()}

    def sample():
        """c ~ prompts, z ~ N(0, I), t ~ π(t), ε ~ N(0, I); beside z what the generator's further steps draw, if any"""
        prompts, z, eps, u, *further = sampler()
        t = schedule.timesteps(u, args.min_timestep, args.max_timestep)
        return prompts, encode(prompts), (z, *further), t, eps

    def g(z, c):
        """g_θ(z, c); of several steps, x0 of the one that was drawn, with θ's gradient through that one alone"""
        return pipe.generate(generator, z[0], c, *z[1:])

    def x0_ta(x_t, t, c):
        """x̂0 of s_ψ(x_t, t, c); not through DDP, which waits for gradients of ψ"""
        return schedule.x0(pipe.denoise(accelerator.unwrap_model(ta), x_t, t, c), x_t, t)

    def x0_ref(x_t, t, c):
        """x̂0 of s_ref(x_t, t, c)"""
        with reference_mode(reference, args.ta_lora_rank > 0):
            return schedule.x0(pipe.denoise(reference, x_t, t, c), x_t, t)

    def x0_guided(x_t, t, c, alpha_cfg):
        """x̂0 of s_ref(x_t, t, c), of s_ref(x_t, t, ∅) and of the guided s̃_ref(x_t, t, c)"""
        from_ref = x0_ref(x_t, t, c)
        from_null = from_ref if alpha_cfg == 1 else x0_ref(x_t, t, null)
        return from_ref, from_null, guide(from_ref, from_null, alpha_cfg)

    def forward_passes(network):
        """The forward and backward passes of one optimizer step; processes exchange gradients in the last one."""
        for i in range(args.gradient_accumulation_steps):
            last = i == args.gradient_accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(network):
                yield

    # 6. The generator before, on fixed prompts and seeds that are never trained on.
    history = History(args.output_dir, first_step) if accelerator.is_main_process else None
    if args.report_to != "none":
        accelerator.init_trackers(args.tracker_project_name, config=trackable(args))
    noise = fixed_noise(latent_shape, 0, len(validation_prompts)).to(device)

    def judge(prompts):
        """Scores and pictures of the generator, averaged if there is an average."""
        with averaged(ema, pipe.denoiser):
            scores = evaluate(accelerator, pipe, encode, prompts, args.num_eval_images, latent_shape, reward, heldout)
            return scores, draw(pipe, encode, validation_prompts, noise)

    before_file = Path(checkpoint.parent if checkpoint else args.output_dir) / "before.safetensors"
    if not checkpoint:
        scores, pictures = judge(eval_prompts)
        heldout_scores = [float(v[:16].mean()) for k, v in scores.items() if k == "heldout"]
        if accelerator.is_main_process:
            save_file({"pictures": pictures.cpu(), **scores}, before_file)
            history.log(accelerator, 0, {f"val_{k}": float(v[:16].mean()) for k, v in scores.items()})

    # 7. Algorithm 1.
    bar = tqdm(
        range(first_step, total_steps), initial=first_step, total=total_steps, disable=not accelerator.is_main_process
    )
    done, judged = first_step, {}
    for step in bar:
        if args.heldout_patience and validations_since_best(heldout_scores) >= args.heldout_patience:
            break
        pretraining = step < args.pretrain_steps
        alpha_rew = warmed_up(args.reward_scale, step - args.pretrain_steps, args.reward_warmup_steps)
        alpha_cfg = args.pretrain_cfg_scale if pretraining else args.cfg_scale

        # θ is frozen; K_TA times: ψ takes a step on λ(t) ‖s_ψ(x_t, t, c) − ∇ log p(x_t | x0)‖², x0 = g_θ(z, c).
        for _ in range(args.ta_steps + (args.ta_warmup_steps if step == 0 else 0)):
            for _ in forward_passes(ta):
                _, c, z, t, eps = sample()
                with torch.no_grad():
                    x0 = g(z, c)
                x_t = schedule.add_noise(x0, eps, t)
                eps_hat = schedule.epsilon(pipe.denoise(ta, x_t, t, c), x_t, t)
                ta_loss = denoising_loss(eps_hat, eps)
                accelerator.backward(ta_loss / args.gradient_accumulation_steps)
            step_psi()

        # ψ is frozen; θ takes a step on −α_rew r(x0, c) + w(t) ⟨sg[s_ψ(x_t, t, c) − s̃_ref(x_t, t, c)], x_t⟩, or, with
        # the score-based divergence of y_t = s_ψ − s̃_ref, + w(t) ⟨−d'(y_t), s_ψ(x_t, t, c) − ∇ log p(x_t | x0)⟩.
        for _ in forward_passes(generator):
            prompts, c, z, t, eps = sample()
            x0 = g(z, c)
            with frozen(ta):
                cut = x0.detach().requires_grad_()  # what follows gives dL/dx0, and θ's gradient starts from it
                alpha, sigma = schedule(t)
                x_t = schedule.add_noise(cut, eps, t)
                with torch.set_grad_enabled(score_based):
                    from_ta = x0_ta(x_t, t, c)
                with torch.set_grad_enabled(score_based or (diffused and alpha_rew != 0)):
                    from_ref, from_null, guided = x0_guided(x_t, t, c, alpha_cfg)
                w = weight(args.weighting, alpha, sigma, cut, guided)
                scores = from_ta, from_ref, from_null, alpha_cfg, w, alpha, sigma
                grad_div, grad_cfg = score_gradient(cut, *scores, *distance) if score_based else ikl_gradient(*scores)
                r, grad_r = torch.zeros(len(x0), device=device), torch.zeros_like(cut)
                if alpha_rew != 0 and diffused:  # r(D_k(x_t, c), c) at every noise level instead of r(x0, c)
                    d_k = denoise(guided, x_t, t, lambda x, s: x0_guided(x, s, c, alpha_cfg)[2], schedule, steps_k)
                    r, grad_r = diffused_reward_gradient(cut, d_k, w, prompts, reward, decode, reward_batch)
                elif alpha_rew != 0:
                    r, grad_r = reward_gradient(cut, prompts, reward, decode, reward_batch)
            dL_dx0 = -alpha_rew * grad_r + grad_div + grad_cfg
            accelerator.backward(x0, gradient=dL_dx0 / (args.train_batch_size * args.gradient_accumulation_steps))
        if step_theta() and ema is not None:
            ema.decay = ema.min_decay = ema_decay(args, pretraining, images_per_step, (step + 1) * images_per_step)
            ema.step(trainable(pipe.denoiser))

        # 8. What happened.
        done = step + 1
        if done % args.logging_steps == 0 or done == total_steps:
            figures = {
                "ta_loss": ta_loss.detach(),
                "reward": r.mean(),
                **reward.take_parts(len(x0)),
                "norm_reward": alpha_rew * grad_r.flatten(1).norm(dim=1).mean(),
                "norm_divergence": grad_div.flatten(1).norm(dim=1).mean(),
                "norm_cfg": grad_cfg.flatten(1).norm(dim=1).mean(),
                "x0_mean": x0.detach().mean(),
                "x0_std": x0.detach().std(),
            }
            figures = {k: accelerator.reduce(v, "mean").item() for k, v in figures.items()}
            figures["skipped_steps"] = step_theta.skipped + step_psi.skipped
            figures["learning_rate"] = theta_lr.get_last_lr()[0]
            bar.set_postfix({k: f"{v:.3g}" for k, v in (figures | judged).items() if k in ON_THE_BAR})
            if history:
                history.log(accelerator, done, figures)
        if args.validation_steps and done % args.validation_steps == 0:
            scores, pictures = judge(eval_prompts[:16])
            earlier = [] if pretraining else heldout_scores  # distillation is no measure for alignment
            heldout_scores = earlier + [float(v.mean()) for k, v in scores.items() if k == "heldout"]
            judged = {f"val_{k}": float(v.mean()) for k, v in scores.items()}
            if history:
                history.log(accelerator, done, judged)
                log_images(accelerator, done, pictures, validation_prompts)
        if args.checkpointing_steps and done % args.checkpointing_steps == 0:
            state = {
                "step": done,
                "seconds": spent + time.time() - started,
                "sampler": sampler.state_dict(),
                "skipped": [step_theta.skipped, step_psi.skipped],
                "heldout_scores": heldout_scores,
            }
            save_checkpoint(accelerator, args.output_dir, done, state, ema, args.checkpoints_total_limit)

    # 9. The generator after: scores, pictures, curves, and the pipeline that is shipped.
    scores, pictures = judge(eval_prompts)
    cut = cut_prompts(reward, heldout)
    if accelerator.is_main_process:
        before = load_file(before_file)
        with reference_mode(reference, args.ta_lora_rank > 0):
            reference_pictures = draw_reference(stock, pipe.decode, validation_prompts, noise, args.cfg_scale)
        titles = [f"reference, {REFERENCE_STEPS} steps", "generator before", "generator after"]
        sheet = image_grid([reference_pictures, before.pop("pictures"), pictures], titles, validation_prompts)
        sheet.save(Path(args.output_dir) / "samples.png")
        history.plot(Path(args.output_dir) / "curves.png")
        summary = {
            **compare(before, scores),
            "seconds": round(spent + time.time() - started, 1),
            "steps": done,
            "stopped_early": done < total_steps,
            "cut_prompts": cut,
            "diversity_by": diversity_features(reward, heldout)[0],
            "skipped_steps": step_theta.skipped + step_psi.skipped,
            "arguments": trackable(args),
        }
        with averaged(ema, pipe.denoiser):
            export(args, pipe, summary, type(stock), validation_prompts[0])
        report(args, summary)
    accelerator.wait_for_everyone()  # no process leaves while another still writes, or waits for its answer
    # DDP holds the process group: if it were the last to let it go, gloo's threads could wait for Python for ever.
    generator, ta, step_theta, step_psi = accelerator.free_memory(generator, ta, step_theta, step_psi)
    gc.collect()
    accelerator.end_training()


def report(args, summary):
    """Print what came out and how to use it."""
    for key in figure_names(summary):
        low, high = summary[f"{key}_gain_ci95"]
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        print(f"{key:>10}: {before:.3f} -> {after:.3f} (gain {low:+.3f} .. {high:+.3f})")
    if summary["stopped_early"]:
        print(f"Stopped after step {summary['steps']}: the held-out reward was below its best (--heldout_patience).")
    print(f"""
Wrote {args.output_dir}: pipeline, README.md, samples.png, curves.png, training_summary.json. Use it with

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{args.output_dir}", trust_remote_code=True)
    image = pipe("a red apple").images[0]
""")


if __name__ == "__main__":
    try:
        main(parse_args())
    except Mistake as error:
        sys.exit(f"error: {error}")
