"""What the program asks of the machine: whole files, bars, devices, processes, other libraries."""
