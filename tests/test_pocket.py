"""The committed pocket reference, what the bare command starts from; the pocket world and its truth."""

import colorsys
import os

import pytest
import torch
from accelerate import Accelerator
from diffusers import PixArtAlphaPipeline
from PIL import Image

from diff_instruct.evaluation.noise import fixed_noise
from diff_instruct.evaluation.pictures import image_grid, measured, picture, real_pictures
from diff_instruct.mistake import Mistake
from diff_instruct.models.loading import load_generator, load_reference
from diff_instruct.models.sources import models_of
from diff_instruct.rewards.loading import load_reward
from diff_instruct.rewards.specs import RewardSpec
from diff_instruct.training.arguments import parse_args
from pocket import icons, measure, truth, world
from pocket.fit import fit, learning_rate, steps_done
from pocket.reference import caption_states
from pocket.text import KINDS, said
from tests.processes import CONTEXT, ranks
from tests.runs import run


def small_world(size=48):
    """Discs as fish (shown) and bears (held out), in every colour on every other background, as a `World`."""
    axis = torch.linspace(-1, 1, size)
    alpha = (axis[:, None] ** 2 + axis[None] ** 2 < 0.5).to(torch.uint8) * 255
    entries, icons_ = [], []
    for noun in ("fish", "bear"):
        for colour, hue in world.HUES.items():
            rgb = [round(255 * v) for v in colorsys.hls_to_rgb(hue / 360, 0.45, 0.8)]
            rgb = torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
            icons_.append(torch.cat([rgb, alpha[None]]))
            entries.append({"noun": noun, "colour": colour, "set": "noto"})
    pairs = [(i, b) for i, e in enumerate(entries) for b, name in enumerate(world.BACKGROUNDS) if name != e["colour"]]
    heldout = torch.tensor([entries[i]["noun"] == "bear" for i, _ in pairs])
    return world.World(torch.stack(icons_), entries, torch.tensor(pairs), heldout)


def discs():
    """The discs that are shown: pixels (B, 3, 48, 48), and what they mean."""
    small = small_world()
    shown = (~small.heldout).nonzero()[:, 0]
    return small.pixels(shown), [small.meaning(i) for i in shown]


def test_the_committed_generator_draws_what_it_is_asked_for(tmp_path):
    """One step, the 64 held-out prompts: far above chance (11%, 14% and 1%) by the truth."""
    args = parse_args(["--output_dir", str(tmp_path)])
    prompts = open(args.eval_prompts).read().splitlines()
    models = models_of(args)
    pipe = load_generator(models, load_reference(models, torch.float32))
    z = fixed_noise(pipe.latent_shape(), 0, len(prompts))
    images = pipe(prompts, latents=z, output_type="pt").images
    assert images.shape == (64, 3, 48, 48)
    right = load_reward(RewardSpec("pocket_truth"), trained=False).measure(images, prompts)
    assert right["background"].mean() > 0.95 and right["colour"].mean() > 0.85 and right["noun"].mean() > 0.4


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
    pixels = torch.zeros(2, 3, 48, 48)
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
    assert world.caption("apple") == "an apple" and world.caption("jeans", "blue") == "blue jeans"
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


def test_every_token_knows_what_its_caption_says(tmp_path):
    """The committed text encoder: linear maps fitted on 1,000 training captions tell noun, colour and background of
    the held-out ones from each token's state alone."""
    args = parse_args(["--output_dir", str(tmp_path)])
    stock = load_reference(models_of(args), torch.float32)
    states, answers = [], []
    for file in (args.train_prompts, args.eval_prompts):
        captions = open(file).read().splitlines()
        captions = captions[:: max(1, len(captions) // 1000)]
        hidden, masks = caption_states(stock.text_encoder, stock.tokenizer, captions)
        real = masks.bool()
        states.append(torch.cat([hidden[real], torch.ones(real.sum(), 1)], dim=1))
        answers.append(torch.tensor([said(c) for c in captions])[:, None].expand(*real.shape, 3)[real])
    for k, values in enumerate(KINDS.values()):
        maps = torch.linalg.lstsq(
            states[0], torch.nn.functional.one_hot(answers[0][:, k], len(values)).float()
        ).solution
        assert ((states[1] @ maps).argmax(dim=1) == answers[1][:, k]).float().mean() > 0.95
    assert said(world.caption("fish", "red", "blue")) == [1 + list(world.NOUNS).index("fish"), 1, 6]
    assert said("") == [0, 0, 0] and said(world.caption("fish"))[1:] == [0, 1]


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


def fit_share(folder, environment):
    """A stage whose batch the processes share, in one of them; the main one's `line.pt` remains."""
    os.environ.update(environment)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network, share = torch.nn.Linear(3, 2), slice(accelerator.process_index, None, accelerator.num_processes)

    def loss_fn(generator):
        return (network(torch.randn(8, 3, generator=generator)[share]) - 1).square().mean()

    fit("line", [network], loss_fn, steps=6, lr=1e-2, work_dir=folder, accelerator=accelerator, warmup=1, every=6)


def test_two_processes_share_a_stage(tmp_path):
    """They take the steps of one, to rounding."""
    states = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        processes = [CONTEXT.Process(target=fit_share, args=(folder, environment)) for environment in ranks(n)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        states.append(torch.load(folder / "line.pt", weights_only=True))
    for key in ("weight", "bias"):
        one, two = (state["net"][f"0.{key}"] for state in states)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    assert (one - torch.nn.Linear(3, 2).bias).abs().max() > 0.01  # 6 steps of 1e-2 are far from the start


def test_the_reference_is_measured_beside_real_pictures_on_pairs_shown_and_held_out(tiny_model, tiny_pocket):
    small = small_world()
    for heldout, noun in ((False, "fish"), (True, "bear")):
        picked = measure.some_pairs(small, heldout, 40)
        assert {small.meaning(i).noun for i in picked} == {noun} and len(set(picked.tolist())) == 40
    assert small.captions()[3] == "a red fish on a green background"
    pipe = PixArtAlphaPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    scorer = load_reward(RewardSpec("pocket", checkpoint=str(tiny_pocket / "scorer")))
    table = measure.measure_reference(pipe, small, scorer, n=3, guidance_scales=(1.0, 2.0), steps=2)
    for group in ("seen", "heldout"):
        assert list(table[group]) == ["real pictures", "through the VAE", "guidance 1", "guidance 2"]
        assert table[group]["real pictures"]["background"] == table[group]["real pictures"]["colour"] == 1
    assert measure.as_markdown(table).count("\n") == 6


def test_a_sheet_shows_real_pictures_and_what_was_measured(tmp_path):
    """A tick where the colour is right, a cross where not, neither where there is no picture."""

    class Bright(torch.nn.Linear):
        def can_measure(self, prompt):
            return prompt.startswith("a white")

        def measure(self, pixels, prompts):
            assert len(pixels) == len(prompts)
            return {"colour": (pixels.mean(dim=(1, 2, 3)) > 0.5).float()}

    prompts = ["a white cat", "a white dog"]
    white, black = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    picture(white).save(tmp_path / "a white dog.png")
    columns = {"real": real_pictures(tmp_path, prompts), "drawn": torch.stack([black, white])}
    assert columns["real"][0] is None and torch.equal(columns["real"][1], white)
    marks = measured({"other": torch.nn.Linear(1, 1), "truth": Bright(1, 1)}, columns, prompts)
    assert marks["real"]["colour"].isnan().tolist() == [True, False] and marks["real"]["colour"][1] == 1
    assert marks["drawn"]["colour"].tolist() == [0, 1]
    colours = [image_grid(columns, prompts, m).getcolors(10**6) for m in (marks, None)]
    green, red = ([{rgb: n for n, rgb in c}.get(rgb, 0) for c in colours] for rgb in ((20, 140, 40), (200, 30, 30)))
    assert green[0] > 0 and red[0] > 0 and green[1] == red[1] == 0
    assert measured({"other": torch.nn.Linear(1, 1)}, columns, prompts) is None
    assert measured({"truth": Bright(1, 1)}, columns, ["something", "else"]) == {"real": {}, "drawn": {}}


def test_a_run_shows_real_pictures(quick_args, tmp_path):
    """A column more in samples.png; a file that is no picture ends the run before it starts."""
    (tmp_path / "real").mkdir()
    file = tmp_path / "real" / "a red apple.png"
    picture(torch.rand(3, 40, 40)).save(file)
    options = ["--max_train_steps", 1, "--validation_prompts", "a red apple", "blue cat"]
    widths = []
    for name, more in (("without", []), ("with", ["--validation_images", tmp_path / "real"])):
        run([*quick_args, *options, *more, "--output_dir", tmp_path / name])
        widths.append(Image.open(tmp_path / name / "samples.png").width)
    assert widths[1] == widths[0] + (widths[0] - 230) // 3
    file.write_text("no picture")
    with pytest.raises(Mistake, match="a red apple.png is not a picture that can be read"):
        run([*quick_args, *options, "--validation_images", tmp_path / "real", "--output_dir", tmp_path / "broken"])
    assert not (tmp_path / "broken").exists()
