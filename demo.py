#!/usr/bin/env python
"""A page to play with an exported generator: it draws while you type, on a CPU, too.

`python demo.py` shows the generator of the pocket reference; `python demo.py EXPORT` yours.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from diff_instruct.command_line import Parser, image_size, whole
from diff_instruct.evaluation.candidates import Contender, check, load, one_step
from diff_instruct.export import page
from diff_instruct.export.gallery import gallery
from diff_instruct.export.rounded import read_gguf
from diff_instruct.export.space import check_folder, write_space
from diff_instruct.files import NotWritten, check_apart
from diff_instruct.mistake import Mistake
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.rewards.loading import load_scorers
from diff_instruct.rewards.specs import files_of, read_scorers
from diff_instruct.training.environment import use_cores


POCKET = Path(__file__).resolve().parent / "pocket"
EXAMPLES = [
    "a red apple",
    "a purple fish on a yellow background",
    "a green guitar",
    "a blue butterfly on a pink background",
]


def build_parser():
    """All arguments."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", help="PATH or PATH,option=value, as in evaluate_one_step.py's --models without the name; "
        "default: the pocket reference's generator")  # fmt: skip
    add("--gguf", metavar="FILE", help="draw with this rounded network of the export, which export_for_apps.py wrote")
    add("--before", help="another model, written alike, for the slider; default: the pocket reference in one step, if "
        "no model is given")  # fmt: skip
    add("--reward", nargs="+", default=None, metavar="NAME", help="scores to show; default: the pocket reference's")
    add("--heldout_reward", nargs="+", default=None, metavar="NAME", help="more scores, called held-out")
    add("--reward_checkpoint", nargs="+", metavar="NAME=PATH", help="local files or folders, instead of the Hub's")
    add("--resolution", type=image_size, help="pixels of an image's side, or WIDTHxHEIGHT; default: the model's own")
    add("--title", default="One step, one picture")
    add("--examples", nargs="*", default=None, metavar="PROMPT", help="prompts to click on; default: the pocket's")
    add("--gallery", nargs="+", default=[], metavar="PATH", help="evaluation.json, or --output_dir of training runs")
    add("--export_space", metavar="DIR", help="write a Space with the model to this folder, and stop")
    add("--zero_gpu", action="store_true", help="the Space is for ZeroGPU; default: for a CPU")
    add("--push_to_hub", metavar="REPO", help="create that Space on the Hub from --export_space")
    add("--hub_token", help="token for the Hub; default: the one you logged in with")
    add("--trust_remote_code", action="store_true", help="run the pipeline_one_step.py of an export on the Hub")
    add("--cache_dir", help="where downloads are kept")
    add("--server_name", default="127.0.0.1", help="0.0.0.0: others may come, too")
    add("--server_port", type=whole(1, 65535), default=7860)
    return parser


def check_args(args):
    """Fill in the pocket model's defaults; returns the [`RewardSpec`]s of the scores.

    Raises:
        Mistake: in one line, for what cannot work.
    """
    if args.push_to_hub and not args.export_space:
        raise Mistake("--push_to_hub needs --export_space: the folder that is uploaded")
    if args.model is None:
        args.model = f"{POCKET / 'generator'},base={POCKET / 'reference'}"
        args.before = args.before or f"{POCKET / 'reference'},timestep=400"
        args.reward, args.heldout_reward = args.reward or ["pocket"], args.heldout_reward or ["pocket_heldout"]
        args.examples = EXAMPLES if args.examples is None else args.examples
    args.reward, args.heldout_reward = args.reward or [], args.heldout_reward or []
    scorers = read_scorers([*args.reward, *args.heldout_reward], args.reward_checkpoint)
    if args.export_space:
        shown = [Contender.parse(f"model={entry}") for entry in (args.model, args.before) if entry]
        inputs = [("the model", path) for contender in shown for path in (contender.path, contender.base)]
        inputs += [("--gguf", args.gguf)] if args.gguf else []
        inputs += [("--gallery", path) for path in args.gallery] + files_of(scorers, args.reward_checkpoint)
        kept = [("--cache_dir", args.cache_dir or HF_HUB_CACHE)]
        check_apart([("--export_space", args.export_space)], inputs, kept)
        check_folder(args.export_space)
    return scorers


def load_model(name, entry, args, device):
    """The page's [`Model`] of `PATH[,option=value...]`.

    Raises:
        Mistake: as `evaluate_one_step.py`.
    """
    contender = Contender.parse(f"{name.replace(' ', '-')}={entry}")
    if args.gguf and entry == args.model:
        draw, shape = one_step(load_pipeline(entry, args, args.gguf).to(device), args.resolution)
    else:
        known = check(contender, args.resolution, args.cache_dir, args.trust_remote_code)
        draw, shape = load(contender, known, args.resolution, args.cache_dir, torch.float32, device)

    def of_one_prompt(prompt, z, generators):
        return draw([prompt], len(z), z.to(device), generators)

    return page.Model(name, of_one_prompt, tuple(shape))


def load_score(args, scorers, device):
    """`score(pixels, prompts)` of the rewards, or None."""
    scorers = load_scorers(scorers, device, args.cache_dir)
    heldout = {spec.rpartition(":")[2] for spec in args.heldout_reward}

    def score(pixels, prompts):
        named = {f"{name} (held out)" if name in heldout else name: s for name, s in scorers.items()}
        return {name: scorer(pixels.to(device), prompts).tolist() for name, scorer in named.items()}

    return score if scorers else None


def content_of(args, scorers, device):
    """The page's [`Content`]; the scorers are a sequence of [`RewardSpec`]."""
    found = [gallery(path) for path in args.gallery]
    return page.Content(
        title=args.title,
        text="Each picture is one evaluation of the network. Type: it redraws.",
        examples=list(args.examples or ()),
        before=load_model("before", args.before, args, device) if args.before else None,
        score=load_score(args, scorers, device),
        gallery=[item for items, _ in found for item in items],
        table="\n\n".join(text for _, text in found if text),
    )


def load_pipeline(entry, args, gguf=None):
    """The model itself, a `OneStepPipeline`; with a GGUF file's network if there is one.

    Raises:
        Mistake: if it is no one-step model, or no export to which a GGUF file could belong.
    """
    contender = Contender.parse(f"model={entry}")
    known = check(contender, args.resolution, args.cache_dir, args.trust_remote_code)
    if contender.steps is not None:
        raise Mistake("--export_space shows a one-step model, but steps=... makes it a multi-step one")
    if gguf and known is not None:
        raise Mistake("--gguf is a rounded network of an export: give the folder that the training script exported")
    if known is None:
        given = {"transformer": read_gguf(gguf, contender.path, torch.float32, args.cache_dir)} if gguf else {}
        options = given | {"variant": contender.variant, "cache_dir": args.cache_dir}
        return DiffusionPipeline.from_pretrained(contender.path, trust_remote_code=True, **options)
    return load_generator(known, load_reference(known, torch.float32))


def export_space(args):
    """Write the Space, and with --push_to_hub create it.

    Raises:
        Mistake: if the Hub refuses it.
    """
    model = Contender.parse(f"model={args.model}")
    on_hub = not Path(model.path).exists() and model == Contender("model", model.path)  # with options: not as it is
    on_hub = on_hub and not args.gguf
    model = {"hub_model": args.model} if on_hub else {"pipe": load_pipeline(args.model, args, args.gguf)}
    text = "Each picture is one evaluation of the network. Type: it redraws."
    options = {"zero_gpu": args.zero_gpu, "gguf": args.gguf}
    write_space(args.export_space, args.title, text, args.examples or (), **options, **model)
    print(f"Wrote {args.export_space}. Try it with: cd {args.export_space} && python app.py")
    if args.push_to_hub:
        options = {"repo_type": "space", "token": args.hub_token}
        try:
            repo = create_repo(args.push_to_hub, space_sdk="gradio", exist_ok=True, **options).repo_id
            upload_folder(repo_id=repo, folder_path=args.export_space, **options)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise Mistake(f"--push_to_hub {args.push_to_hub}: {str(error).splitlines()[0]}") from None


def main(args):
    scorers = check_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.export_space:
        return export_space(args)
    if find_spec("gradio") is None:
        raise Mistake("the page needs gradio: pip install -r requirements-demo.txt -c constraints.txt")
    if device.type == "cpu":
        use_cores(1)
    model = load_model("one step", args.model, args, device)
    page.launch(
        page.build(model, content_of(args, scorers, device)),
        server_name=args.server_name,
        server_port=args.server_port,
    )


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except Mistake as error:
        sys.exit(f"error: {error}")
    except NotWritten as error:
        sys.exit(f"error: the Space could not be written: {error}")
