"""The rooms of train.py, a concern each; imports run one way.

train, explore -> tables -> paper, bench -> fit -> checkpoint, data -> digits, config -> runtime

The networks, encapnet.py, import none of it.
"""
