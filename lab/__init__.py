"""The rooms of train.py, a concern each; imports run one way.

train, explore, why -> use, tables -> paper, bench -> fit -> checkpoint, measure
-> data, figures -> digits, folders, results -> config -> runtime

The networks, encapnet.py, import none of it.
"""
