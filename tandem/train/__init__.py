"""Pre-training: data, the FP8 recipe, the loop, long context. Read `recipe.py` first, then `loop.py`."""
