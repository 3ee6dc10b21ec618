from tests.tiny import pixart


SIDE = 16
PIPELINES = {"PixArtAlphaPipeline": pixart}
