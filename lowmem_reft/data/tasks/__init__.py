"""The paper's tasks and their kin: rows, templates, splits, metrics and what counts as an answer.

``registry`` names them and loads their rows, ``converters`` makes examples of what the files hold,
``metrics`` scores predictions, ``answers`` finds the answer in generated text. No torch here.
"""
