import tempfile
from pathlib import Path

from diffusers import EulerDiscreteScheduler, KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from sentencepiece import SentencePieceTrainer

from tests.families.parts import randomised
from tests.tiny import PROMPTS, tiny_unet, tiny_vae


SIDE = 16


def tiny_chatglm():
    """Its tokenizer has a sentencepiece model in a file, which a copy goes with wherever it is saved."""
    file = Path(tempfile.mkdtemp()) / "tokenizer.model"
    with file.open("wb") as f:
        options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
        SentencePieceTrainer.train(sentence_iterator=iter(PROMPTS * 9), model_writer=f, **options)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=100, hidden_size=16, ffn_hidden_size=32, kv_channels=8, num_attention_heads=2,
        seq_length=256, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True, original_rope=True,
    )  # fmt: skip
    return ChatGLMTokenizer(str(file)), randomised(ChatGLMModel(config), 0.3)


def tiny_kolors():
    tokenizer, text_encoder = tiny_chatglm()
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.014}
    scheduler = EulerDiscreteScheduler(**schedule, num_train_timesteps=1100)
    unet = tiny_unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 2),
        use_linear_projection=True, encoder_hid_dim=16, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    return KolorsPipeline(tiny_vae().eval(), text_encoder, tokenizer, unet, scheduler)


PIPELINES = {"KolorsPipeline": tiny_kolors}
