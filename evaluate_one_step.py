#!/usr/bin/env python
"""Score text-to-image models side by side on the prompts of a benchmark, with intervals and a paired comparison.

`python evaluate_one_step.py --models generator=pocket/generator,base=pocket/reference
reference=pocket/reference,steps=25,guidance=2 --prompts pocket/prompts_heldout.txt --rewards pocket pocket_heldout`
does it with the pocket models. The same command goes on where it was stopped.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from tqdm.auto import tqdm

from diff_instruct.command_line import Parser, image_size, positive_int, seed, text
from diff_instruct.evaluation.candidates import EXAMPLE, Contender, check, cut_of, load
from diff_instruct.evaluation.cost import Meter
from diff_instruct.evaluation.judge import diversity, first_features
from diff_instruct.evaluation.noise import noise_and_generators
from diff_instruct.evaluation.pictures import from_picture, image_grid
from diff_instruct.evaluation.prompt_sets import DEFAULT_NUMBER, PROMPT_SETS, RULES, load_prompt_set, spread
from diff_instruct.evaluation.report import markdown, report
from diff_instruct.evaluation.store import Batches, fingerprint, remember
from diff_instruct.files import NotWritten, check_apart, whole, write_text
from diff_instruct.mistake import Mistake
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.catalogue import CATALOGUE
from diff_instruct.rewards.loading import load_scorers
from diff_instruct.rewards.specs import files_of, read_scorers
from diff_instruct.training.algorithm_arguments import add_judges_arguments
from diff_instruct.training.environment import use_cores


THUMBNAIL = 256


def build_parser():
    """All arguments."""
    parser = Parser("Score text-to-image models side by side on the same prompts and seeds.")
    add = parser.add_argument
    add("--models", type=text, nargs="+", required=True, metavar="NAME=PATH",
        help=f"{EXAMPLE}: a OneStepPipeline, a multi-step reference, a one-step network in the pipeline it was "
        "made for (without base: in its own); folders or Hub ids; variant=fp16: files of that name; a comma in a "
        r"path is written \,")  # fmt: skip
    add("--baseline", type=text, help="name of the model that the others are compared with; default: the first")
    add(
        "--prompts",
        type=text,
        help=f"{', '.join(PROMPT_SETS)}, or a file or folder in any of the formats of the training script",
    )
    add("--dataset_name", type=text, help="instead: Hub id of a dataset with prompts")
    add("--dataset_config_name", type=text, help="configuration of that dataset")
    add("--dataset_split", type=text, default="train", help="split of that dataset")
    add("--caption_column", type=text, help="column with the prompts; may be left out if there is only one")
    add("--allow_bad_rows", action="store_true",
        help="leave out rows of prompts that cannot be used, even if they are more than 1%% of all")  # fmt: skip
    add("--category_column", type=text, help="column with categories, to report each of them, too")
    add("--num_prompts", type=positive_int,
        help="so many prompts, at even distances (of a dataset: the first); default: all, "
        + ", ".join(f"{number} of {name}" for name, number in DEFAULT_NUMBER.items()))  # fmt: skip
    add("--mean_over", choices=RULES, help="default: categories for hpsv2, prompts for others")
    add("--num_images", type=positive_int, default=4, help="images for each prompt; diversity needs 2")
    add("--seed", type=seed, default=1234, help="of the images; the training script judges with the default")
    add("--rewards", type=text, nargs="+", metavar="NAME",
        default=["image_reward", "hpsv2.1", "pickscore", "clip", "aesthetic"],
        help=f"any of {', '.join(CATALOGUE)}, your own as path/to/file.py:function, or a judge's URL "
        "http://host:port/path; diversity is measured with the first one that has features")  # fmt: skip
    add_judges_arguments(parser)
    add(
        "--reward_checkpoint",
        type=text,
        nargs="+",
        metavar="NAME=PATH",
        help="local files or folders, instead of the Hub's",
    )
    add("--batch_size", type=positive_int, default=16, help="images at a time, all of a prompt together")
    add("--resolution", type=image_size, help="pixels of an image's side, or WIDTHxHEIGHT; default: each model's own")
    add("--mixed_precision", choices=["no", "bf16"], help="of the models; default: what accelerate is configured for")
    add(
        "--output_dir", type=text, default="evaluation", help="evaluation.json, .md and .png, and the finished batches"
    )
    add("--grid_prompts", type=positive_int, default=8, help="rows of evaluation.png")
    add("--save_images", action="store_true", help="keep every image, in images/NAME")
    add("--cache_dir", type=text, help="where downloads are kept")
    add("--trust_remote_code", action="store_true", help="run the pipeline_one_step.py of exports on the Hub")
    return parser


def scorers_of(args):
    """The [`RewardSpec`]s of `--rewards`."""
    asking = {"timeout": args.reward_timeout, "retries": args.reward_retries}
    return read_scorers(args.rewards, args.reward_checkpoint, **asking)


def check_args(args):
    """Raises Mistake, in one line, for arguments that cannot work together."""
    if (args.prompts is None) == (args.dataset_name is None):
        raise Mistake("give either --prompts or --dataset_name")
    if args.dataset_name is not None and args.num_prompts is None:
        raise Mistake("--dataset_name is streamed: say how many prompts with --num_prompts")
    if args.batch_size < args.num_images:
        raise Mistake(f"--batch_size must be at least --num_images, {args.num_images}: a prompt's stay together")
    scorers_of(args)


def parse_models(args):
    """The contenders by name, and what is known of each without its weights.

    Raises:
        Mistake: for an entry that cannot work, or a name that is given twice.
    """
    contenders = [Contender.parse(entry) for entry in args.models]
    for name, times in Counter(c.name for c in contenders).items():
        if times > 1:
            raise Mistake(f"--models: the name `{name}` is given twice")
    contenders = {c.name: c for c in contenders}
    if args.baseline is not None and args.baseline not in contenders:
        raise Mistake(f"--baseline {args.baseline}: no model of this name; there are {', '.join(contenders)}")
    check_output_dir(args, contenders)
    known = {name: check(c, args.resolution, args.cache_dir, args.trust_remote_code) for name, c in contenders.items()}
    return contenders, known


def check_output_dir(args, contenders):
    """Raises Mistake if `--output_dir` is, holds or lies in something that is evaluated or that scores."""
    inputs = [(f"--models {c.name}", path) for c in contenders.values() for path in (c.path, c.base)]
    inputs += [("--prompts", args.prompts), ("--dataset_name", args.dataset_name)]
    inputs += files_of(scorers_of(args), args.reward_checkpoint)
    check_apart([("--output_dir", args.output_dir)], inputs, [("--cache_dir", args.cache_dir or HF_HUB_CACHE)])


def settings(args, prompts, dtype, device):
    """What the figures depend on, besides the models: an evaluation goes on only if it is the same."""
    specs = scorers_of(args)
    local = [path for spec in specs for path in (spec.file, spec.checkpoint) if path]
    names = ("num_images", "seed", "rewards", "reward_checkpoint", "batch_size", "resolution")
    return {
        "prompts": prompts.sha256,
        **{name: getattr(args, name) for name in (*names, "grid_prompts", "save_images")},
        "reward_files": {path: fingerprint(path) for path in local},
        "mixed_precision": str(dtype).removeprefix("torch."),
        "device": device.type,
    }


@torch.no_grad()
def judge(places, prompts, draw, shape, scorers, args, meter):
    """Draw and score the images of some prompts, by their places in the prompt set.

    Returns:
        (what is kept of the batch, pixels (B·n, 3, H, W)).
    """
    n, texts = args.num_images, [prompts.texts[i] for i in places]
    noise, rngs = zip(*(noise_and_generators(shape, i, n, args.seed) for i in places))
    z, rngs = torch.cat(noise).to(meter.device), [rng for group in rngs for rng in group]
    with meter:
        pixels = draw(texts, n, z, rngs)
    each = [text for text in texts for _ in range(n)]
    read = {name: set(s.truncated_prompts) for name, s in scorers.items() if isinstance(s, Scorer)}
    scores = {name: scorer(pixels, each).float().reshape(-1, n).tolist() for name, scorer in scorers.items()}
    by, features = first_features(scorers)
    if n > 1:
        scores["diversity"] = [float(diversity(f)) for f in features(pixels).split(n)]
    cut = {name: sorted(scorers[name].truncated_prompts - before) for name, before in read.items()}
    measured = {"seconds_per_image": meter.seconds / len(each), "gib": meter.gib}
    return {"scores": scores, **measured, "truncated": cut, "diversity_by": by, "latent_shape": list(shape)}, pixels


def save_pictures(pixels, places, n, folder, rows):
    """`<place>-<image>.png`: all of a batch, or only the first one of those prompts whose places are in `rows`."""
    for k, image in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))):
        if rows is None or (places[k // n] in rows and k % n == 0):
            with whole(folder / f"{places[k // n]:05d}-{k % n}.png") as aside:
                image.save(aside, "PNG")


def grid(folders, rows, prompts):
    """A column for each folder of images, a row for each of the prompts at `rows`."""

    def thumbnail(file):
        image = Image.open(file)
        side = min(image.width, THUMBNAIL)
        return from_picture(image.resize((side, round(side * image.height / image.width))))

    columns = [torch.stack([thumbnail(folder / f"{i:05d}-0.png") for i in rows]) for folder in folders.values()]
    return image_grid(dict(zip(folders, columns)), [prompts.texts[i] for i in rows])


def main(args):
    # 1. Mistakes show here, before anything large loads.
    check_args(args)
    contenders, known = parse_models(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    if device.type == "cpu":
        use_cores(accelerator.num_processes)
    prompts = load_prompt_set(args, accelerator.print)
    cuts = {name: cut_of(c, known[name], args.cache_dir, prompts.texts) for name, c in contenders.items()}
    for name, cut in cuts.items():
        if str(cut):
            accelerator.print(f"{name}: {cut}")
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output_dir {folder} cannot be made: {error.strerror}") from None
    if accelerator.is_main_process:
        described = {
            name: [c.describe(), *(fingerprint(path) for path in (c.path, c.base) if path)]
            for name, c in contenders.items()
        }
        remember(folder, settings(args, prompts, dtype, device), described)
    per_batch = args.batch_size // args.num_images
    places = [range(i, min(i + per_batch, len(prompts.texts))) for i in range(0, len(prompts.texts), per_batch)]
    rows = spread(len(prompts.texts), args.grid_prompts)
    batches = {name: Batches(folder, name, len(places)) for name in contenders}
    pictures = {name: folder / "images" / name for name in contenders}
    missing = {name: b.missing() for name, b in batches.items()}
    accelerator.wait_for_everyone()  # now all know what is missing, and may write

    # 2. Draw and score, model by model, what is not there yet.
    scorers = {}
    if any(missing.values()):
        scorers = load_scorers(scorers_of(args), device, args.cache_dir)
    for name in (name for name, numbers in missing.items() if numbers):
        meter = Meter(device)
        draw, shape = load(contenders[name], known[name], args.resolution, args.cache_dir, dtype, device)
        pictures[name].mkdir(parents=True, exist_ok=True)
        share = missing[name][accelerator.process_index :: accelerator.num_processes]
        for i in tqdm(share, desc=name, unit="batch", disable=not accelerator.is_main_process):
            batch, pixels = judge(places[i], prompts, draw, shape, scorers, args, meter)
            save_pictures(pixels, places[i], args.num_images, pictures[name], None if args.save_images else rows)
            batches[name].write(i, batch)
        del draw  # and with it the model, before the next one loads
    accelerator.wait_for_everyone()

    # 3. Figures, tables and pictures.
    if accelerator.is_main_process:
        kept = {name: b.read() for name, b in batches.items()}
        result = report(args, contenders, kept, prompts, device, cuts)
        write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
        write_text(folder / "evaluation.md", markdown(result))
        with whole(folder / "evaluation.png") as aside:
            grid(pictures, rows, prompts).save(aside, "PNG")
        print(markdown(result))
    accelerator.wait_for_everyone()  # no process leaves while another still writes
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except Mistake as error:
        sys.exit(f"error: {error}")
    except NotWritten as error:
        sys.exit(f"error: a file could not be written: {error}; make room, and give the same command again")
