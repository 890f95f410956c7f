"""What is constant is computed once.

With teacher forcing and a frozen base, the output of every block below the lowest trained one is a
constant of the data set (``trunk``), and so are the keys and values above it of the tokens before
the first edited position (``prefix``). ``split`` finds and feeds the trunk, ``store`` keeps it on
disk, ``reuse`` trains from it.
"""
