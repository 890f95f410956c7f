"""Checkpoints of pyreft (arXiv 2404.03592's own code): read into an adapter, and written from one.

``checkpoint`` reads a directory of pyreft's, ``parameters`` turns one intervention's tensors into
ours and back, ``importing`` and ``exporting`` are the two commands. pyreft itself is not needed,
and no code of a checkpoint is run.
"""
