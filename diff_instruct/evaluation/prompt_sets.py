"""The prompts of the benchmarks, with their categories, and the rule that each benchmark takes its mean by."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from diff_instruct.mistake import Mistake
from diff_instruct.prompts.files import PromptSource, open_prompts, usable
from diff_instruct.prompts.survey import read_all


COCO, PARTI, HPSV2 = "phiyodr/coco2017", "nateraw/parti-prompts", "zhwang/HPDv2"  # data sets on the Hub
HPSV2_CATEGORIES = ("anime", "concept-art", "paintings", "photo")
RULES = {
    "prompts": "mean over the prompts",
    "categories": "mean over the categories of their means, as the HPSv2 benchmark has it",
}


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark.

    Args:
        source: where they are from.
        texts: a list of P prompts.
        categories: a list of P names, None for a prompt without; or None.
        rule: "prompts" or "categories", see `RULES`.
        rows (`dict`, *optional*): of a file or data set, what was read and what left out.
    """

    source: str
    texts: list
    categories: list | None
    rule: str
    rows: dict | None = None

    @property
    def sha256(self):
        """Checksum of the prompts, one a line, in UTF-8: what `sha256sum` says of a .txt file with them."""
        return hashlib.sha256("".join(f"{text}\n" for text in self.texts).encode()).hexdigest()


def spread(total, n):
    """n places at even distances among `total`, the first one included; all of them if there are no more than n."""
    return range(total) if n is None or n >= total else [i * total // n for i in range(n)]


def coco2017():
    """The first caption of every picture of the validation split: 5,000 rows (caption, None)."""
    rows = open_prompts(PromptSource(dataset_name=COCO, split="validation", caption_column="captions"))
    return [(row["text"][0].strip(), None) for row in rows]


def parti():
    """PartiPrompts (arXiv 2206.10789): 1,632 rows (prompt, category)."""
    file = huggingface_hub.hf_hub_download(PARTI, "PartiPrompts.tsv", repo_type="dataset")
    source = PromptSource(file, caption_column="Prompt", category_column="Category")
    return list(usable(open_prompts(source), source))


def hpsv2():
    """The benchmark of HPSv2 (arXiv 2306.09341): 800 rows (prompt, category) in each of four categories."""
    rows = []
    for category in HPSV2_CATEGORIES:
        file = huggingface_hub.hf_hub_download(HPSV2, f"benchmark/{category}.json", repo_type="dataset")
        rows += [(prompt, category) for prompt in json.loads(Path(file).read_text(encoding="utf-8"))]
    return rows


PROMPT_SETS = {"coco2017": coco2017, "parti": parti, "hpsv2": hpsv2}
DEFAULT_NUMBER = {"coco2017": 1000}  # as many as the papers take; all of the others


def read_rows(args):
    """([(prompt, category or None)] of `--prompts` or `--dataset_name`, [`Count`] or None)."""
    if args.prompts in PROMPT_SETS:
        return PROMPT_SETS[args.prompts](), None
    source = PromptSource(
        args.prompts,
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        caption_column=args.caption_column,
        category_column=args.category_column,
        max_samples=args.num_prompts if args.prompts is None else None,
        cache_dir=args.cache_dir,
        allow_bad_rows=args.allow_bad_rows,
    )
    return read_all(source)


def load_prompt_set(args, tell=print):
    """The `PromptSet` that the arguments say; one line says what was read, and what left out.

    Raises:
        Mistake: if they are not there or cannot be downloaded, or there is none; see also `open_prompts`.
    """
    source = args.prompts or args.dataset_name
    if args.prompts is not None and args.prompts not in PROMPT_SETS and not Path(args.prompts).exists():
        raise Mistake(f"--prompts {args.prompts}: neither one of {', '.join(PROMPT_SETS)}, nor a file or folder")
    try:
        rows, count = read_rows(args)
    except OSError as error:
        line = str(error).splitlines()[0]
        raise Mistake(f"the prompts {source} cannot be downloaded ({line}); give a file with --prompts") from None
    rows = [(text, category) for text, category in rows if text.strip()]
    number = DEFAULT_NUMBER.get(args.prompts) if args.num_prompts is None else args.num_prompts
    rows = [rows[i] for i in spread(len(rows), number)]
    if not rows:
        raise Mistake(f"{source} has no prompts")
    texts, categories = [text for text, _ in rows], [category for _, category in rows]
    holes = [text for text, category in rows if category is None]
    rule = args.mean_over or ("categories" if args.prompts == "hpsv2" else "prompts")
    if rule == "categories" and len(holes) == len(rows):
        raise Mistake(f"--mean_over categories: {source} has none; name their column with --category_column")
    if rule == "categories" and holes:
        raise Mistake(
            f"--mean_over categories: {len(holes)} of {len(rows)} prompts of {source} have no category, the first is "
            f"`{holes[0][:60]}`: fill them in, or take --mean_over prompts"
        )
    if count is not None:
        told = [f"Prompts: {count}"]
        if args.category_column is not None and holes:
            told.append(f"{len(holes)} of {len(rows)} have no category and count in the figures of all prompts alone")
        tell("; ".join(told))
    categories = [None if c is None else str(c) for c in categories] if len(holes) < len(rows) else None
    return PromptSet(source, texts, categories, rule, count and count.as_dict())
