"""Malformed inputs by a seeded generator, each with what must become of it.

An input is made from (kind, seed) alone, so a number in a failing test is enough to have it again.
"""
