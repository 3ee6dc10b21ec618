"""How slowly the generator's average moves."""


def ema_decay(args, step, batch_size):
    """Decay per step of the average: constant while aligning; while pretraining, and in the regression on pairs before
    it, a half-life in images (as in EDM) that ramps up with the images seen, `batch_size` of them in each step."""
    if step >= args.pretrain_steps:
        return args.ema_decay
    steps = step + 1 if step >= 0 else step + 1 + args.ta_warmup_steps + args.pair_steps
    images_seen = steps * batch_size
    halflife = min(args.ema_halflife, args.ema_rampup_ratio * images_seen)
    return 0.5 ** (batch_size / max(halflife, 1e-8))
