"""The paper's tasks and their kin: rows, templates, splits, metrics and what counts as an answer.

``registry`` names them and loads their rows, ``metrics`` scores predictions, ``answers`` finds the
answer in generated text, ``judge`` compares two sets of responses. No torch is imported here.
"""
