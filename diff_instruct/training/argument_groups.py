"""The arguments of models, prompts, optimization and output, each with its range.

Those of the algorithm and its reward are in `algorithm_arguments.py`.
"""

from argparse import BooleanOptionalAction

from diffusers.optimization import SchedulerType

from diff_instruct.command_line import (
    decay,
    image_size,
    natural,
    non_negative,
    positive,
    positive_int,
    seed,
    text,
    whole,
)
from diff_instruct.families import FAMILIES
from diff_instruct.models.rounding import KINDS


MAX_STEPS = 8  # of the generator; published turbos take four or eight
SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # that one needs rules in code


def add_model_arguments(parser):
    g = parser.add_argument_group("models")
    g.add_argument(
        "--pretrained_model_name_or_path",
        type=text,
        help="the reference: Hub id or folder of a diffusers pipeline, or one .safetensors file",
    )
    g.add_argument(
        "--pretrained_generator_name_or_path",
        type=text,
        help="one-step model to start from: a pipeline or its network alone (Hub id or folder), or one .safetensors "
        "or .bin file (on the Hub: owner/name/file); without it the generator starts as the reference",
    )
    g.add_argument(
        "--single_file_config",
        type=text,
        help="of a reference in one .safetensors file: a pipeline of the same architecture (Hub id or folder), for "
        "configs, tokenizers and what the file does not hold; default: the one by which diffusers knows its kind",
    )
    g.add_argument(
        "--pretrained_generator_lora",
        type=text,
        help="PATH_OR_ID[:SCALE], LoRA of the reference, such as a turbo's (of several files on the Hub: "
        "owner/name/file), that the generator's adapters start as; needs --lora_rank of its rank or more",
    )
    g.add_argument("--revision", type=text, help="revision of the reference on the Hub")
    g.add_argument(
        "--variant",
        type=text,
        help="variant of the reference's files, for example fp16; of generator and VAE, where they have no plain ones",
    )
    g.add_argument("--cache_dir", type=text, help="where downloads are kept")
    g.add_argument(
        "--timestep",
        type=natural,
        nargs="+",
        help="t*, where the generator is evaluated; default: the generator's own; if it starts as the reference: "
        f"{', '.join(f'{f.timestep} ({name})' for name, f in FAMILIES.items() if not f.flow)}, 1000 (flow matching: "
        "σ = 1; at σ < 1 unit noise is stronger than the reference's x_t); or one for each step, descending",
    )
    g.add_argument(
        "--generator_steps", type=whole(1, MAX_STEPS),
        help=f"n, evaluations for an image, at most {MAX_STEPS}; default: as many as --timestep or the generator's "
        "config names, which is 1 if neither names several; from a single t* they are at t* (n − k)/n, k = 0..n − 1",
    )  # fmt: skip
    g.add_argument(
        "--input_noise", choices=["unit", "scaled"],
        help="what enters at t*: z, or σ_t z (SIM, SiD-LSG); default: the generator's own, else unit",
    )  # fmt: skip
    g.add_argument(
        "--pretrained_vae_model_name_or_path",
        type=text,
        help="another VAE with the same latents, for example one that is stable in half precision",
    )
    g.add_argument(
        "--resolution",
        type=image_size,
        nargs="+",
        help="pixels of an image's side, or WIDTHxHEIGHT; of several, each batch draws one, and the held-out prompts "
        "are judged with one after the other; default: the reference's",
    )
    g.add_argument(
        "--reference_lora",
        type=text,
        help="PATH_OR_ID[:SCALE], LoRA weights that are fused into the reference at loading",
    )
    g.add_argument(
        "--embedded_guidance", type=non_negative,
        help="guidance that networks with it as an input are given (FLUX.1-dev, Sana-Sprint): generator, TA and "
        "reference alike; default: the generator's own, else the stock pipeline's",
    )  # fmt: skip


def add_prompt_arguments(parser):
    g = parser.add_argument_group("prompts")
    g.add_argument("--dataset_name", type=text, help="Hub id of a dataset with prompts; it is streamed")
    g.add_argument("--dataset_config_name", type=text, help="configuration of that dataset")
    g.add_argument("--dataset_split", type=text, default="train", help="split of that dataset")
    g.add_argument(
        "--train_prompts", type=text,
        help="instead: a .txt .csv .tsv .jsonl .json .parquet .tar file, also compressed, a folder of them, or one of "
        "pictures with captions beside them",
    )  # fmt: skip
    g.add_argument(
        "--caption_column", type=text,
        help="column with the prompts; may be left out if there is only one; its number, from 1, in a file without "
        "a header",
    )  # fmt: skip
    g.add_argument(
        "--eval_caption_column", type=text,
        help="column with the prompts in --eval_prompts; default: as --caption_column, if there are several",
    )  # fmt: skip
    g.add_argument(
        "--caption_choice", choices=["random", "first"], default="random",
        help="of several captions in a row one is drawn each time, or it is the first",
    )  # fmt: skip
    g.add_argument(
        "--allow_bad_rows", action="store_true",
        help="leave out rows that cannot be used, even if they are more than 1%% of all, or a whole file",
    )  # fmt: skip
    g.add_argument("--max_train_samples", type=positive_int, help="use only the first so many prompts")
    g.add_argument(
        "--shuffle_buffer_size", type=positive_int, default=10_000, help="prompts among which the stream is shuffled"
    )
    g.add_argument(
        "--eval_prompts",
        type=text,
        help="file of prompts to judge with; default: every 20th training prompt is held out",
    )
    g.add_argument(
        "--prompt_cache",
        type=text,
        help="folder that keeps the prompts' embeddings, also for later runs; text encoders then take the networks' "
        "place on the device, and are on the CPU otherwise",
    )
    g.add_argument(
        "--offload_text_encoder",
        action="store_true",
        help="text encoders on the CPU but for the encoding of new prompts",
    )
    g.add_argument("--num_eval_prompts", type=positive_int, default=64, help="how many prompts are judged, at most")
    g.add_argument("--num_eval_images", type=whole(2), default=4, help="images (seeds) for each of them; at least 2")
    g.add_argument(
        "--validation_prompts",
        type=text,
        nargs="+",
        help="prompts to draw, or one file, whose first are drawn; default: the first few eval prompts",
    )
    g.add_argument(
        "--validation_images", type=text,
        help="folder with real pictures, <prompt>.png, that samples.png shows beside the drawn ones",
    )  # fmt: skip
    g.add_argument(
        "--num_validation_prompts",
        type=positive_int,
        default=8,
        help="how many of those to draw",
    )
    g.add_argument(
        "--validation_steps", type=natural, default=100, help="draw and judge every so many steps; 0: never"
    )


def add_optimization_arguments(parser):
    g = parser.add_argument_group("optimization")
    g.add_argument("--train_batch_size", type=positive_int, default=16, help="images per process and forward pass")
    g.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step"
    )
    g.add_argument("--learning_rate", type=positive, default=5e-6, help="of the generator")
    g.add_argument("--ta_learning_rate", type=positive, help="of the teaching assistant; default: as the generator")
    g.add_argument("--lora_rank", type=natural, default=0, help="train the generator as LoRA; 0: all of it")
    g.add_argument("--lora_alpha", type=positive, help="LoRA scale of the generator; default: the rank")
    g.add_argument(
        "--share_base", action=BooleanOptionalAction, default=True,
        help="with --lora_rank, the model of --pretrained_generator_name_or_path is taken as the closest LoRA of the "
        "reference, on whose weights all roles then stand; without, it is taken whole, as a base of its own",
    )  # fmt: skip
    g.add_argument(
        "--ta_lora_rank", type=natural, default=0, help="train the TA as LoRA on the reference; 0: a full copy"
    )
    g.add_argument("--ta_lora_alpha", type=positive, help="LoRA scale; default: the rank")
    g.add_argument("--surrogate_learning_rate", type=positive, help="of the surrogate; default: as the TA")
    g.add_argument(
        "--surrogate_lora_rank", type=natural, default=0,
        help="train the surrogate as LoRA on the reference; 0: a full copy",
    )  # fmt: skip
    g.add_argument("--surrogate_lora_alpha", type=positive, help="LoRA scale; default: the rank")
    g.add_argument(
        "--lora_target_modules",
        type=text,
        nargs="+",
        help="layers that get adapters, as peft has it: ends of their names, or one regular expression of whole "
        "names; or all; default: the family's",
    )
    g.add_argument(
        "--base_quantization", choices=KINDS, default="none",
        help="round the frozen base under LoRA to 8 or 4 bits while it loads; nf4 needs bitsandbytes",
    )  # fmt: skip
    g.add_argument("--lr_scheduler", choices=SCHEDULERS, default="constant", help="of diffusers")
    g.add_argument("--lr_warmup_steps", type=natural, default=0)
    g.add_argument("--adam_beta1", type=decay, default=0.0)
    g.add_argument("--adam_beta2", type=decay, default=0.999)
    g.add_argument("--adam_weight_decay", type=non_negative, default=0.0)
    g.add_argument("--adam_epsilon", type=positive, default=1e-8)
    g.add_argument("--max_grad_norm", type=positive, default=10.0)
    g.add_argument(
        "--max_nonfinite_steps", type=positive_int, default=3,
        help="end the run after so many steps in a row whose gradient was not finite",
    )  # fmt: skip
    g.add_argument(
        "--use_ema", action=BooleanOptionalAction, default=True, help="judge and export an average of the generator"
    )
    g.add_argument("--ema_decay", type=decay, default=0.95, help="of the average, per step, while aligning")
    g.add_argument(
        "--ema_halflife", type=positive, default=50_000, help="of the average, in images, while pretraining"
    )
    g.add_argument(
        "--ema_rampup_ratio", type=positive, default=0.05, help="the half-life is at most this part of the images seen"
    )
    g.add_argument("--offload_ema", action="store_true", help="keep the average on the CPU between steps")
    g.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory, more time; also in the VAE's decoder"
    )
    g.add_argument("--mixed_precision", choices=["no", "bf16"], help="default: what accelerate is configured for")
    g.add_argument("--use_8bit_adam", action="store_true", help="optimizers of bitsandbytes: a quarter of the memory")
    g.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers (UNets)"
    )
    g.add_argument(
        "--compile", action="store_true",
        help="torch.compile for the blocks of generator, TA and reference: slow first steps, faster ones after",
    )  # fmt: skip
    g.add_argument("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and newer")


def add_output_arguments(parser):
    g = parser.add_argument_group("output")
    g.add_argument("--dry_run", action="store_true", help="check, print the memory that each actor needs, and stop")
    g.add_argument(
        "--memory_gib", type=positive,
        help="with --dry_run: predict the peak, activations included, and say what fits into so much memory",
    )  # fmt: skip
    g.add_argument(
        "--output_dir", type=text, default="diff-instruct-pp", help="the exported pipeline, checkpoints and logs"
    )
    g.add_argument(
        "--overwrite_output_dir", action="store_true", help="start anew in a folder with a finished run or checkpoints"
    )
    g.add_argument("--seed", type=seed, default=0, help="of every random number of the run")
    g.add_argument("--checkpointing_steps", type=natural, default=500, help="checkpoint every so many steps; 0: never")
    g.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only so many")
    g.add_argument("--resume_from_checkpoint", type=text, help='a checkpoint, or "latest"')
    g.add_argument("--logging_steps", type=positive_int, default=10, help="log figures every so many steps")
    g.add_argument("--logging_dir", type=text, default="logs", help="tracker logs, inside --output_dir")
    g.add_argument("--report_to", type=text, default="tensorboard", help="tensorboard, wandb, trackio, all or none")
    g.add_argument("--tracker_project_name", type=text, default="diff-instruct-pp")
    g.add_argument("--run_name", type=text, help="of the run in the tracker; default: the tracker's choice")
    g.add_argument("--tracker_group", type=text, help="group of the run in the tracker (Weights & Biases, Trackio)")
    g.add_argument("--push_to_hub", action="store_true", help="upload the exported pipeline")
    g.add_argument("--hub_private_repo", action="store_true", help="create that repository as a private one")
    g.add_argument("--hub_model_id", type=text, help="repository to upload to; default: the name of --output_dir")
    g.add_argument("--hub_token", type=text, help="token for the Hub; default: the one you logged in with")
