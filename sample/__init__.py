"""The sample model: a small Stable Diffusion checkpoint that draws coloured shapes, and everything it is made with.

`latentrt/sample/scenes.py` says what can be drawn, `pictures.py` draws it, `latentrt/sample/captions.py` says it in
English, `latentrt/sample/judge.py` reads it off a picture again. `train.py` makes the checkpoint of these; start there.
"""
