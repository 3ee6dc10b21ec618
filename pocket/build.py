"""Build the pocket world's networks from two npm packages: `python -m pocket.build`, or one `--stage` of it.

Each stage makes what it needs of the earlier ones and continues where it was stopped, from the work directory. Nothing
in `pocket/` changes before `export` and `generator`, which run only if they are asked for.
"""

import argparse
import json
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPModel, T5EncoderModel, T5Tokenizer

from diff_instruct.evaluation.pictures import picture
from diff_instruct.files import check_apart
from diff_instruct.rewards.pocket import PocketReward
from diff_instruct.training.checkpoints import list_checkpoints
from pocket import icons, measure, world
from pocket.fit import steps_done
from pocket.reference import as_pipeline, build_reference, sample
from pocket.scorers import FOLDERS, build_scorer
from pocket.text import build_text_encoder, understood
from pocket.vae import build_vae, reconstruction_error


HERE = Path(__file__).parent
STEPS = {
    "vae": 2300, "text": 800, "reference": 2800, "pocket": 1200, "pocket_heldout": 1800
}  # fmt: skip
BEST_GUIDANCE = 2.0  # of `GUIDANCE`, by the table that `measure` writes
GENERATOR_COMMAND = (
    "--pretrained_model_name_or_path pocket/reference --train_prompts pocket/prompts_train.txt "
    "--eval_prompts pocket/prompts_heldout.txt --reward pocket --heldout_reward pocket_heldout pocket_truth "
    f"--timestep 400 --pair_steps 700 --num_pairs 4096 --pair_sampler_steps 12 --pair_cfg_scale {BEST_GUIDANCE} "
    "--max_train_steps 0 --train_batch_size 32 --learning_rate 2e-4 --lr_scheduler linear "
    "--adam_beta1 0.9 --adam_beta2 0.99 --mixed_precision bf16 --checkpointing_steps 100 --checkpoints_total_limit 1"
)


def vae_stage(work_dir, accelerator):
    """The whitened autoencoder, made once and kept in `work_dir/vae`."""
    folder = work_dir / "vae"
    if not folder.exists():
        pictures = world.load(work_dir)
        vae = build_vae(pictures, work_dir, accelerator, STEPS["vae"])
        print(f"reconstruction error {reconstruction_error(vae, pictures, accelerator):.4f}")
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(accelerator.device)


def text_stage(work_dir, accelerator):
    """Text encoder and tokenizer, trained once on the captions that are not held out and kept in `work_dir/text`."""
    folder = work_dir / "text"
    if not folder.exists():
        pictures = world.load(work_dir)
        seen, new = pictures.captions_of(heldout=False), pictures.captions_of(heldout=True)
        encoder, heads, tokenizer = build_text_encoder(seen, work_dir, accelerator, STEPS["text"])
        print(f"tokens that tell what held-out captions say: {understood(encoder, heads, tokenizer, new)}")
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return T5EncoderModel.from_pretrained(folder).to(accelerator.device), T5Tokenizer.from_pretrained(folder)


def reference_stage(work_dir, accelerator, steps):
    """Transformer after that many steps."""
    vae, text = vae_stage(work_dir, accelerator), text_stage(work_dir, accelerator)
    return build_reference(vae, *text, world.load(work_dir), work_dir, accelerator, steps)


def scorers_stage(work_dir, accelerator):
    """Both scorers, kept in `work_dir/scorer` and `work_dir/scorer_heldout` without the scale of their reward."""
    for name, folder in FOLDERS.items():
        if not (work_dir / folder).exists():
            model, tokenizer = build_scorer(name, world.load(work_dir), work_dir, accelerator, STEPS[name])
            model.save_pretrained(work_dir / folder)
            tokenizer.save_pretrained(work_dir / folder)


def pipeline(work_dir, accelerator):
    """The reference as far as it is trained, its averaged weights."""
    transformer = reference_stage(work_dir, accelerator, steps_done("reference", work_dir))
    return as_pipeline(vae_stage(work_dir, accelerator), *text_stage(work_dir, accelerator), transformer)


def measure_stage(work_dir, accelerator):
    """`report.json`, `report.md`, `samples.png` and `samples.txt` in the work directory."""
    pipe, pictures = pipeline(work_dir, accelerator), world.load(work_dir)
    scorer = PocketReward.unscaled(work_dir / FOLDERS["pocket_heldout"])
    measure.save_samples(pipe, pictures, work_dir, BEST_GUIDANCE)
    table = measure.measure_reference(pipe, pictures, scorer)
    measure.save_table(table, work_dir)
    print(measure.as_markdown(table))


def export_scorer(folder, source, pipe, prompts):
    """A scorer in half precision; its reward is in units of its spread on unguided samples of the reference."""
    CLIPModel.from_pretrained(source).to(torch.float16).save_pretrained(folder)
    T5Tokenizer.from_pretrained(source).save_pretrained(folder)
    images, scorer = sample(pipe, prompts, guidance_scale=1.0), PocketReward.unscaled(folder)
    with torch.no_grad():
        cosine = scorer(images, prompts)
    scale = {"mean": round(cosine.mean().item(), 4), "std": round(cosine.std().item(), 4)}
    (folder / "reward.json").write_text(json.dumps(scale) + "\n")


def export_prompts(pictures, n_heldout=64):
    """`prompts_train.txt`, all captions that were shown; `prompts_heldout.txt`, one prompt a line, and in `real/` a
    picture of each."""
    (HERE / "prompts_train.txt").write_text("\n".join(pictures.captions_of(heldout=False)) + "\n")
    index, captions = measure.some_pairs(pictures, True, n_heldout), pictures.captions()
    (HERE / "prompts_heldout.txt").write_text("\n".join(captions[i] for i in index) + "\n")
    shutil.rmtree(HERE / "real", ignore_errors=True)
    (HERE / "real").mkdir()
    for i, pixels in zip(index, pictures.pixels(index)):
        picture(pixels).save(HERE / "real" / f"{captions[i]}.png")


def export_stage(work_dir, accelerator):
    """Everything but the generator into `pocket/`, in half precision."""
    pictures, pipe = world.load(work_dir), pipeline(work_dir, accelerator)
    export_prompts(pictures)
    prompts = random.Random(0).sample((HERE / "prompts_train.txt").read_text().splitlines(), 256)
    for folder in FOLDERS.values():
        export_scorer(HERE / folder, work_dir / folder, pipe, prompts)
    for name in ("report.json", "samples.png", "samples.txt"):
        shutil.copyfile(work_dir / name, HERE / name)
    pipe.to(torch.float16).save_pretrained(HERE / "reference")


def generator_stage(work_dir, accelerator):
    """`pocket/generator`: the one-step generator that learns pairs of the reference's own (`--pair_steps`)."""
    out = Path(work_dir) / "generator"
    command = [
        "accelerate", "launch", "train_diff_instruct_pp.py", "--output_dir", str(out), *GENERATOR_COMMAND.split()
    ]  # fmt: skip
    if not (out / "training_summary.json").exists():
        resume = ["--resume_from_checkpoint", "latest"] if list_checkpoints(out) else []
        subprocess.run([*command, *resume], cwd=HERE.parent, check=True)
    pipe = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    pipe.transformer.to(torch.float16).save_pretrained(HERE / "generator" / "transformer")
    shutil.copyfile(out / "model_index.json", HERE / "generator" / "model_index.json")
    shutil.copyfile(out / "curves.png", HERE / "generator" / "curves.png")


STAGES = {
    "vae": vae_stage,
    "text": text_stage,
    "reference": partial(reference_stage, steps=STEPS["reference"]),
    "scorers": scorers_stage,
    "measure": measure_stage,
    "export": export_stage,
    "generator": generator_stage,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", default="pocket-build", help="where intermediate results go (about 0.5 GB)")
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=["vae", "text", "reference", "scorers", "measure"]
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="no", help="bf16 where the processor computes in it"
    )
    args = parser.parse_args()
    check_apart([("--work_dir", args.work_dir)], [("the pocket", HERE)])
    work_dir, accelerator = Path(args.work_dir), Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1 and args.stage != ["reference"]:
        parser.error("several processes share `--stage reference` alone, after the stages before it")
    icons.prepare(work_dir)
    for stage in args.stage:
        STAGES[stage](work_dir, accelerator)


if __name__ == "__main__":
    main()
