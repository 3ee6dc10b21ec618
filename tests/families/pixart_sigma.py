from diffusers import PixArtSigmaPipeline

from tests.tiny import pixart


SIDE = 16


def tiny_pixart_sigma():
    return pixart(PixArtSigmaPipeline)


PIPELINES = {"PixArtSigmaPipeline": tiny_pixart_sigma}
