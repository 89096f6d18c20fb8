"""The modules behind train.py, one per concern; imports run one way.

train, explore, why -> use, tables -> paper, bench -> fit -> checkpoint, measure
-> data, figures -> digits, folders, results -> config -> runtime

The networks, encapnet.py, import none of it.
"""
