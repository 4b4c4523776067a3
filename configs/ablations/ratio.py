"""How many attention layers does a recurrent model need, for recall and for text?

    python -m attnx.ablate --config=configs/ablations/ratio.py

Six models of six layers, gated linear attention with 0, 1, 2, 3 or 6 layers of softmax attention, and one of linear attention
alone, at equal parameters. Minutes on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict(convert_dict=False)
    c.question = 'How many attention layers does a recurrent model need?'
    return c
