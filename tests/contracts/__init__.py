"""What the package assumes of the inside of other libraries: one small probe for each assumption.

A probe asks the library, not this package. Its marker names the library, the files that lean on
the assumption and how to break it, and every probe runs twice: as it is, and with the library
broken, where it has to fail. So none is here that cannot.

Probes also run where an untested version is installed are ``lowmem_reft.machine.contracts``.
"""
