"""The committed pocket reference, what the bare command starts from; the pocket world and its truth."""

import colorsys

import pytest
import torch
from accelerate import Accelerator

from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.mistake import Mistake
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import read_models
from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.specs import RewardSpec
from diff_instruct.training.arguments import parse_args
from pocket import icons, measure, truth, world
from pocket.build import retrieval_rate
from pocket.fit import fit, learning_rate, steps_done


def discs(size=64):
    """A disc in every colour on every other background: pixels (B, 3, 64, 64), and what they mean."""
    axis = torch.linspace(-1, 1, size)
    alpha = (axis[:, None] ** 2 + axis[None] ** 2 < 0.5).to(torch.uint8) * 255
    pixels, meanings = [], []
    for colour, hue in world.HUES.items():
        rgb = torch.tensor([round(255 * v) for v in colorsys.hls_to_rgb(hue / 360, 0.45, 0.8)], dtype=torch.uint8)
        icon = torch.cat([rgb.view(3, 1, 1).expand(3, size, size), alpha[None]])
        for b, background in enumerate(world.BACKGROUNDS):
            if background != colour:
                pixels.append(world.compose(icon[None], torch.tensor([b])))
                meanings.append(world.Meaning("heart", colour, background))
    return torch.cat(pixels), meanings


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


def test_truth_measures_background_and_colour_of_pictures_with_noise(tiny_pocket):
    pixels, meanings = discs()
    scorer = load_reward(RewardSpec("pocket", checkpoint=str(tiny_pocket / "scorer")))
    noisy = (pixels + 0.06 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for x in (pixels, noisy):
        right = truth.measure(x, meanings, scorer)
        assert right["background"].mean() == 1 and right["colour"].mean() == 1
    others = meanings[1:] + meanings[:1]  # the next one says another background, and a seventh of the time a colour
    assert truth.measure(pixels, others, scorer)["background"].mean() == 0
    assert truth.measure(pixels, others, scorer)["colour"].mean() == 1 - 7 / len(meanings)


def test_truth_takes_the_noun_from_the_scorer_among_all_nouns():
    class Knows(torch.nn.Module):
        """Image features are the first 100 pixels; the text features of a caption are its noun's place."""

        def image_features(self, pixels):
            return pixels.flatten(1)[:, :100]

        def text_features(self, prompts):
            return torch.eye(100)[[list(world.NOUNS).index(world.parse(p).noun) for p in prompts]]

    meanings = [world.Meaning("fish", "red", "blue"), world.Meaning("bear", None, "white")]
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[0].view(-1)[list(world.NOUNS).index("fish")] = 1
    pixels[1].view(-1)[list(world.NOUNS).index("bird")] = 1
    right = truth.measure(pixels, meanings, Knows())
    assert right["noun"].tolist() == [1, 0] and right["colour"].isnan().tolist() == [False, True]


def test_a_caption_says_what_parse_reads():
    for noun in world.NOUNS:
        for colour in (None, *world.HUES):
            for background in world.BACKGROUNDS:
                meaning = world.Meaning(noun, colour, background)
                assert world.parse(world.caption(noun, colour, background)) == meaning
    assert world.caption("fish", "orange", "purple") == "an orange fish on a purple background"
    assert world.caption("apple") == "an apple"
    assert world.parse("a cat left of a guitar") is None and world.parse("a red fish on a golden background") is None


def test_recolouring_keeps_lightness_and_leaves_greys():
    for fill in ("#ff6723", "#3b94d9", "#8b4513"):
        new = icons.with_hue(fill, world.HUES["purple"])
        old, new = (colorsys.rgb_to_hls(*(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5))) for c in (fill, new))
        assert abs(360 * new[0] - world.HUES["purple"]) < 1.5 and abs(new[1] - old[1]) < 0.01 and new[2] > 0.59
    assert icons.recolour('<path fill="#d3d3d3" stroke="#fff"/>', 120) == '<path fill="#d3d3d3" stroke="#fff"/>'
    assert icons.recolour('<a fill="url(#abc123xy)"/>', 120) == '<a fill="url(#abc123xy)"/>'


def test_a_tenth_of_the_pairs_is_held_out():
    heldout = icons.hold_out(set(world.NOUNS), world.NOUNS)
    assert len(heldout["colour"]) == 70 and len(heldout["background"]) == 80
    assert heldout == icons.hold_out(set(world.NOUNS), world.NOUNS)
    assert not any(background == "white" for _, background in heldout["background"])


def test_the_truth_judges_and_does_not_train(tmp_path, tiny_pocket):
    with pytest.raises(Mistake, match="pocket_truth: it only judges"):
        parse_args(["--output_dir", str(tmp_path), "--reward", "pocket", "pocket_truth"])
    scorer = load_reward(RewardSpec("pocket_truth", checkpoint=str(tiny_pocket / "scorer")), trained=False)
    pixels, meanings = discs()
    prompts = [world.caption(m.noun, m.colour, m.background) for m in meanings]
    score = scorer(pixels, prompts)
    assert score.shape == (len(prompts),) and score.min() >= 2 / 3 - 1e-6  # the noun is up to the tiny scorer
    with pytest.raises(Mistake, match="not a sentence of the pocket world"):
        scorer(pixels[:1], ["a photograph of a fish"])


def test_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(step, 1000, 1.0, warmup=100, hold=0.8) for step in (0, 99, 500, 800, 999)]
    assert rates[0] == pytest.approx(0.01) and rates[1:4] == [1.0, 1.0, 1.0] and rates[4] < 0.03


def test_a_stage_that_was_killed_continues_exactly(tmp_path):
    def run(folder, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        network, calls = torch.nn.Linear(3, 2), []

        def loss_fn(generator):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return (network(torch.randn(8, 3, generator=generator)) - 1).square().mean()

        fit("line", [network], loss_fn, steps=9, lr=1e-2, work_dir=folder, accelerator=Accelerator(cpu=True), every=3)
        return network.weight.detach(), len(calls)

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=5)
    assert steps_done("line", tmp_path / "killed") == 3
    continued, n = run(tmp_path / "killed")
    assert n == 6 and torch.equal(continued, whole)
    again, n = run(tmp_path / "killed")
    assert n == 0 and torch.equal(again, whole)


def test_pictures_are_drawn_from_pairs_that_are_shown_or_held_out():
    """Two icons of which one, a red fish, is held out: what is picked to be measured is of its own group only."""
    entries = [{"noun": n, "colour": c, "set": "noto"} for n, c in (("fish", "red"), ("bear", "blue"))]
    rgba = torch.full((2, 4, 64, 64), 255, dtype=torch.uint8)
    rgba[0, 3] = 0
    pairs = torch.tensor([(0, 3), (0, 4), (1, 3), (1, 4)])
    small = world.World(rgba, entries, pairs, torch.tensor([True, True, False, False]))
    assert sorted(measure.some_pairs(small, True, 5).tolist()) == [0, 1]
    assert sorted(measure.some_pairs(small, False, 5).tolist()) == [2, 3]
    assert small.captions()[1] == "a red fish on a green background"
    pixels = small.pixels(torch.tensor([1, 3]))
    assert torch.equal(pixels[0, :, 0, 0] * 255, torch.tensor(world.BACKGROUNDS["green"]).float())
    assert pixels[1].min() == 1  # opaque white covers it
