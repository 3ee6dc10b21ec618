"""With a rounded base what is judged is not quite what is shipped: how far they are apart."""

from diff_instruct.evaluation.judge import WHILE_TRAINING
from diff_instruct.models.published import as_published


def shipped_difference(run, scores, pictures):
    """What the summary says of it, and what was drawn as shipped; nothing of either if the base is not rounded.

    An export merges the adapters into the published weights. Here each layer reads its own when it computes, so that
    no whole network is in memory. All processes call it.

    Args:
        run ([`Run`]).
        scores, pictures: of the generator on its rounded base, as the run's judge gives them.

    Returns:
        `dict`: figure to its mean over the same prompts, "judged" and "shipped"; "pixels": the mean absolute
        difference of the pictures, which are in [0, 1]; "n_prompts". And the pictures (B, 3, H, W).
    """
    network = run.actors.pipe.denoiser
    if getattr(network, "published", None) is None:
        return None, None
    with as_published(network):
        merged_scores, merged_pictures = run.judge(run.reward, run.heldout, WHILE_TRAINING)
    found = {"pixels": (pictures - merged_pictures).abs().mean().item()}
    for name, values in merged_scores.items():
        judged = scores[name][: len(values)]
        found[name] = {"judged": judged.mean().item(), "shipped": values.mean().item()}
    return {**found, "n_prompts": len(next(iter(merged_scores.values())))}, merged_pictures
