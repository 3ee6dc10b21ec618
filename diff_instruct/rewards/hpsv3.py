"""Human Preference Score v3 (Ma et al., arXiv 2508.03789): Qwen2-VL-7B, and a head that gives μ and σ.

The authors' package says the words that the network was trained with; they are read out of it, and nothing else of it
is used: `pip install --no-deps hpsv3`.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from diff_instruct.mistake import Mistake
from diff_instruct.rewards.base import Scorer
from diff_instruct.rewards.pixels import CLIP_MEAN, CLIP_STD, clamp, full_precision, normalise, resize
from diff_instruct.rewards.weights import check_state, find, load_tokenizer, network, read


REPO, FILE, TOKENIZER = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
ASSISTANT = "<|im_start|>assistant\n"  # and then nothing
TOKEN = "<|Reward|>"  # whose last hidden state the head reads
AREA = 256 * 28 * 28  # pixels of a picture, as near as multiples of 28 come to it
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}


def config(vocab_size):
    """Qwen2-VL-7B in transformers' terms; `vocab_size` with the token of the reward."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**TEXT, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_parameters": rope, "vocab_size": vocab_size}
    return Qwen2VLConfig(text_config=text, vision_config={**VISION, "hidden_size": TEXT["hidden_size"]})


def words():
    """(instruction with `{text_prompt}`, its end with the token of the reward), as the authors' package has them.

    Raises:
        Mistake: if it is not installed, or is another.
    """
    package = find_spec("hpsv3")
    if package is None:
        raise Mistake("reward `hpsv3` needs the words of its authors' package: pip install --no-deps hpsv3")
    file, said = Path(package.submodule_search_locations[0]) / "dataset" / "data_collator_qwen.py", {}
    for line in ast.parse(file.read_text()).body if file.is_file() else []:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
            said[line.targets[0].id] = line.value.value
    instruction, end = (str(said.get(name)) for name in ("INSTRUCTION", "prompt_with_special_token"))
    if "{text_prompt}" not in instruction or end.count(TOKEN) != 1:
        raise Mistake(f"reward `hpsv3`: {file} does not hold the words of hpsv3 1.0.0, which is what is known here")
    return instruction, end


def head(width):
    """The head, of hidden states of this width: (μ, σ)."""
    layers = [torch.nn.Linear(width, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(1024, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))


class HPSv3(Scorer):
    """μ of the `hpsv3` package, about 0 to 15, and with no bounds.

    Args:
        model (`Qwen2VLModel`), head: the networks.
        tokenizer: Qwen2-VL's; the token of the reward is added to it.
        said: see `words`.
        area (`int`): pixels of the pictures that it looks at.
    """

    def __init__(self, model, head, tokenizer, said, area=AREA):
        super().__init__("hpsv3", tokenizer, model.config.text_config.max_position_embeddings)
        self.model, self.head, (self.instruction, self.end), self.area = model, head, said, area
        tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        tokenizer.padding_side = "right"
        self.token = tokenizer.convert_tokens_to_ids(TOKEN)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path=None, cache_dir=None):
        """From the Hub, or a local copy of HPSv3.safetensors, or a folder with it (and, maybe, the tokenizer).

        Raises:
            Mistake: if it, or the authors' package, is not there or incomplete.
        """
        said = words()
        file = find("hpsv3", path, REPO, FILE, cache_dir)
        tokenizer = load_tokenizer(AutoTokenizer, "hpsv3", path, TOKENIZER, cache_dir)
        state = read(file)
        embeddings = state.get("model.embed_tokens.weight", torch.empty(0))
        return cls.from_state(state, tokenizer, said, file, config(len(embeddings)))

    @classmethod
    def from_state(cls, state, tokenizer, said, source, config, area=AREA):
        """From the published tensors, with their published names; `source` is named if they do not fit.

        Raises:
            Mistake: if a tensor is missing or has another shape.
        """
        mlp = head(config.text_config.hidden_size)
        own = {k.removeprefix("rm_head."): v for k, v in state.items() if k.startswith("rm_head.")}
        check_state(mlp.state_dict(), own, source)
        mlp.load_state_dict(own)
        # What was `model` when it was published is the language model of today's.
        rest = {f"language_{k}" if k.startswith("model.") else k: v for k, v in state.items()}
        model = network(Qwen2VLModel, config, rest, source, dtype=rest["language_model.embed_tokens.weight"].dtype)
        return cls(model, mlp, tokenizer, said, area)

    def look(self, pixels):
        """Embeddings (B, N, D) of the N places of pixels (B, 3, H, W), row by row."""
        vision = self.model.config.vision_config
        patch, merge, times = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        sides = smart_resize(*pixels.shape[-2:], patch * merge, min_pixels=self.area, max_pixels=self.area)
        pixels = normalise(clamp(resize(clamp(pixels), *sides)), CLIP_MEAN, CLIP_STD)
        rows, columns = (side // patch for side in sides)
        # A place is a square of merge × merge patches; a picture is a film of `times` equal frames.
        patches = pixels.unflatten(3, (columns // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, times, -1, -1)
        grid = torch.tensor([[1, rows, columns]] * len(pixels), device=pixels.device)
        flat = patches.reshape(-1, 3 * times * patch**2).to(self.dtype)
        return self.model.visual(flat, grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1))

    def image_features(self, pixels):
        """Unit vectors (B, D) of pixels (B, 3, H, W): the mean over their places."""
        return F.normalize(full_precision(self.look(pixels)).mean(dim=1), dim=-1)

    def conversation(self, prompt, places):
        """What the network reads: the chat that Qwen2-VL's template makes of a picture and the instruction."""
        prompt = prompt.replace("<|", "< |")  # says no token of the chat
        picture = f"<|vision_start|>{'<|image_pad|>' * places}<|vision_end|>"
        turns = {"system": "You are a helpful assistant."}
        turns["user"] = picture + self.instruction.format(text_prompt=prompt) + self.end
        return "".join(f"<|im_start|>{who}\n{says}<|im_end|>\n" for who, says in turns.items()) + ASSISTANT

    def forward(self, pixels, prompts):
        """HPSv3 (B,) of pixels (B, 3, H, W) in [0, 1] for B prompts."""
        seen = self.look(pixels)
        tokens = self.tokenize([self.conversation(prompt, seen.shape[1]) for prompt in prompts])
        ids, language = tokens.input_ids, self.model.language_model
        embeddings = language.embed_tokens(ids)
        places = (ids == self.model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, seen.to(embeddings.dtype))
        # Places are numbered as they come: the package, unlike Qwen2-VL, gives a picture no rows and columns here.
        hidden = language(inputs_embeds=embeddings, attention_mask=tokens.attention_mask, use_cache=False)
        return full_precision(self.head(hidden.last_hidden_state[ids == self.token]))[:, 0]
