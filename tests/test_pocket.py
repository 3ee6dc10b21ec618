"""The committed pocket reference: what the bare command starts from."""

import torch

from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import read_models
from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.specs import RewardSpec
from diff_instruct.training.arguments import parse_args
from pocket.build import retrieval_rate


def test_the_committed_generator_draws_what_it_is_asked_for(tmp_path):
    """One step, 96 captions: the scorer that nothing was trained on finds the right one among 100 (chance: 1%)."""
    args = parse_args(["--output_dir", str(tmp_path)])
    captions = open(args.train_prompts).read().splitlines()
    prompts = captions[::13][:96]
    models = read_models(args)
    pipe = load_generator(args, models, load_reference(args, models, torch.float32))
    z = fixed_noise(pipe.latent_shape(), 0, len(prompts))
    images = pipe(prompts, latents=z, output_type="pt").images
    assert images.shape == (96, 3, 64, 64)
    assert retrieval_rate(load_reward(RewardSpec("pocket_heldout")), images, prompts, {"names": captions}) > 0.1


def test_heldout_prompts_are_new_combinations_of_known_words(tmp_path):
    args = parse_args(["--output_dir", str(tmp_path)])
    train = open(args.train_prompts).read().splitlines()
    heldout = open(args.eval_prompts).read().splitlines()
    words = [w for caption in train for w in caption.split()]
    assert len(heldout) == 64 and not set(heldout) & set(train)
    assert all(words.count(w) >= 2 for caption in heldout for w in caption.split())
