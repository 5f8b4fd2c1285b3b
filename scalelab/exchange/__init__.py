"""Exchange with the Hugging Face ecosystem: folders of `config.json` and safetensors, as `transformers` writes and
reads them.

    config, params = exchange.from_hf("gpt2")           # a folder
    logits = models.logits(config, params, tokens)      # (B, T, V), float32
    exchange.to_hf(config, params, "out")               # AutoModelForCausalLM.from_pretrained("out") agrees

`config` is the `model` section of a config, `params` the tree that checkpoints hold. `save` and `load` keep both in a
folder of our own names. A layout (`decoders.py`, `recurrent.py`) declares once how a class's fields and tensors
correspond to ours; reading and writing both follow it (`convert.py`). What the other side cannot express is refused.

Sources: the classes of transformers 5 (Apache-2.0), whose names and shapes these are.
"""

from scalelab.exchange.convert import from_hf, to_hf
from scalelab.exchange.files import load, save

__all__ = ["from_hf", "load", "save", "to_hf"]
