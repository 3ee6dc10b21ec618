"""Rewards r(x, c): callables `reward(pixels, prompts) -> (B,)`, differentiable in pixels (B, 3, H, W) in [0, 1]."""
