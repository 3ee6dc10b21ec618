"""The generator after training: scores, pictures, curves, and the pipeline that is shipped."""

import gc

from safetensors.torch import load_file

from diff_instruct.evaluation.judge import diversity_features
from diff_instruct.evaluation.pictures import REFERENCE_STEPS, draw_reference, image_grid, measured
from diff_instruct.evaluation.shipped import shipped_difference
from diff_instruct.evaluation.statistics import compare, interval
from diff_instruct.export.card import figure_names
from diff_instruct.export.export import export, save_generator, upload
from diff_instruct.prompts.encoding import drawing
from diff_instruct.prompts.survey import rows_read
from diff_instruct.rewards.loading import truncated_prompts
from diff_instruct.rewards.numbers import NoScores
from diff_instruct.training.endings import GO_ON_LATER, Ending, writing_export
from diff_instruct.training.record import record_of
from diff_instruct.training.trackers import end_trackers
from diff_instruct.training.watch import end


def finish(run):
    """Judge, draw, export and, if asked for, upload. All processes call it."""
    args, accelerator, known, theta = run.args, run.accelerator, run.known, run.state.theta
    try:
        scores, pictures = run.judge(run.reward, run.heldout)
        difference, as_shipped = shipped_difference(run, scores, pictures)
    except NoScores as error:  # of a judge; what is trained must not be lost
        end(run, Ending(GO_ON_LATER, str(error)))
    summary = summary_of(run)
    drawn = draw_the_reference(run)
    if accelerator.is_main_process:
        before = load_file(run.before_file)
        columns = {"real": known.real} if known.real else {}
        columns |= {f"reference, {REFERENCE_STEPS} steps": drawn}
        columns |= {"generator before": before.pop("pictures"), "generator after": pictures}
        if difference is not None:
            columns |= {"merged, as shipped": as_shipped}
            summary["rounded_base"] = difference
        sheet = image_grid(columns, known.validation_prompts, measured(run.heldout, columns, known.validation_prompts))
        summary = {**compare(before, scores), **summary}
        with theta.averaged(), writing_export(args) as folder:
            sheet.save(folder / "samples.png")
            run.history.plot(folder / "curves.png")
            export(
                args,
                known.models,
                run.actors.pipe,
                summary,
                known.validation_prompts,
                pictures,
                known.license,
                folder,
            )
        report(args, summary)
    else:
        with theta.averaged():
            save_generator(args, known.models, run.actors.pipe)  # gives its share of a sharded one
    accelerator.wait_for_everyone()  # no process leaves while another still writes
    accelerator.free_memory()
    gc.collect()
    end_trackers(accelerator)
    if known.repo:
        upload(args, known.repo, run.actors.pipe)  # no process waits for the network


def summary_of(run):
    """What `training_summary.json` says of the run itself."""
    return {
        "seconds": round(run.state.seconds, 1),
        "steps": run.state.step,
        "stopped_early": run.state.step < run.total,
        "n_prompts": len(run.known.eval_prompts),
        "n_images": len(run.known.eval_prompts) * run.args.num_eval_images,
        "prompt_rows": rows_read(run.known.count, run.draws.sampler.prompts),
        "truncated_prompts": truncated_prompts(run.reward, run.heldout),
        "diversity_by": diversity_features(run.reward, run.heldout)[0],
        "skipped_steps": run.state.skipped_steps,
        "reward_scale": run.state.dial.reward_scale,
        **({"reward_standards": run.state.standards} if run.state.standards else {}),
        **record_of(run.args, run.accelerator),
    }


def draw_the_reference(run):
    """The reference's own pictures of the validation prompts, on all processes: a sharded network is whole on none."""
    known, actors, device = run.known, run.actors, run.accelerator.device
    size = [n * known.models.grid.factor for n in run.judge.noise.shape[2:]]
    with actors.ref.act(), drawing(run.args, actors.stock, run.encode, actors.networks, device):
        return draw_reference(
            known.models, actors.stock, known.validation_prompts, run.judge.noise, size, run.args.cfg_scale
        )


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
