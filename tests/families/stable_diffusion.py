from tests.tiny import sd, sd2


SIDE = 16
PIPELINES = {"StableDiffusionPipeline": sd, "sd2": sd2}
