"""How slowly the generator's average moves."""


def ema_decay(args, pretraining, batch_size, images_seen):
    """Decay per step of the average: constant while aligning; while pretraining a half-life in images (as in EDM) that
    ramps up with the images seen."""
    if not pretraining:
        return args.ema_decay
    halflife = min(args.ema_halflife, args.ema_rampup_ratio * images_seen)
    return 0.5 ** (batch_size / max(halflife, 1e-8))
