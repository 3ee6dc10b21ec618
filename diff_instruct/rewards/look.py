"""Whether the files of rewards are there and can be read, without loading them: for `--dry_run`."""

from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from diff_instruct.models.configs import ModelSource
from diff_instruct.models.weight_files import check_file, check_folder
from diff_instruct.rewards import aesthetic, catalogue, hpsv2, hpsv3, image_reward
from diff_instruct.rewards.clip import ClipScore
from diff_instruct.rewards.function import load_function
from diff_instruct.rewards.pickscore import PickScore
from diff_instruct.rewards.specs import read_rewards
from diff_instruct.rewards.urls import is_url
from diff_instruct.rewards.weights import check_clip_folder, find, missing, unreadable


# By name, (repository, file) of the weights; a file of None is a CLIPModel in transformers' format.
FILES = {
    "image_reward": (image_reward.REPO, image_reward.FILE),
    **{name: (hpsv2.REPO, file) for name, file in hpsv2.FILES.items()},
    "hpsv3": (hpsv3.REPO, hpsv3.FILE),
    "aesthetic": (aesthetic.REPO, aesthetic.FILE),
    "pickscore": (PickScore.REPO, None),
    "clip": (ClipScore.REPO, None),
    **{name: ("pocket", None) for name in ("pocket", "pocket_heldout", "pocket_truth")},
}


def look_at_rewards(args):
    """Look at the files of all rewards and of `--reward_decoder`: see `look_at`, whose lines this yields."""
    for spec in sum(read_rewards(args), ()):
        unseen = look_at(spec, args.cache_dir)
        if unseen:
            yield unseen
    if args.reward_decoder and Path(args.reward_decoder).exists():
        check_folder(ModelSource(args.reward_decoder))


def look_at(spec, cache_dir=None):
    """Look at the files of a [`RewardSpec`]; of a user's own, import it.

    Returns:
        What could not be looked at, in words; None if all could.

    Raises:
        Mistake: for a local file that is missing, a git-lfs pointer or damaged; for one that the Hub does not have or
            does not give; for a user's own that cannot be imported.
    """
    if spec.file is not None:
        load_function(spec.name)
        return None
    if is_url(spec.name):
        return f"reward `{spec.name}` was not asked"
    if spec.name == "hpsv3":
        hpsv3.words()
    repo, filename = FILES[spec.name]
    folder = catalogue.CATALOGUE[spec.name].folder
    path = spec.checkpoint or (folder and catalogue.POCKET / folder)
    if path is None:
        return look_on_hub(spec.name, repo, filename or "config.json", cache_dir)
    if filename is None:
        check_clip_folder(spec.name, path, repo)
        check_folder(ModelSource(str(path)))
        return None
    file = find(spec.name, path, repo, filename)
    check_file(file)
    if Path(file).suffix != ".safetensors":
        with unreadable(file):
            torch.load(file, map_location="meta", weights_only=True)
    return None


def look_on_hub(name, repo, filename, cache_dir):
    """As `look_at`, of a file on the Hub or in its cache."""
    if isinstance(try_to_load_from_cache(repo, filename, cache_dir=cache_dir), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repo, filename))
    except HfHubHTTPError as error:
        raise missing(name, filename, repo, error) from None
    except (OSError, HTTPError) as error:
        return f"reward `{name}`: {repo} could not be asked for {filename} ({str(error).splitlines()[0]})"
    return None
