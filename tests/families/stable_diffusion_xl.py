from tests.tiny import sdxl


SIDE = 16
PIPELINES = {"StableDiffusionXLPipeline": sdxl}
