"""The sample model: a small Stable Diffusion checkpoint of coloured shapes, its training and its evaluation.

`scenes.py` defines the scenes, `rendering.py` renders them to pixels, `captions.py` describes them in English,
`judge.py` reads them off an image again. `train.py` trains the checkpoint; start there.
"""

from latentrt.telemetry import opt_out

opt_out()  # before a module of this package imports diffusers or transformers
