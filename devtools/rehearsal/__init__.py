"""Rehearsals: the real trainer on a simulated MPS device, on any machine.

They are for contributors who develop for Apple Silicon without a Mac. What they report is
*predicted*: nobody has seen an MPS device here.

    data/        what a Mac's torch registers for MPS, one generated file per torch version
    simulation/  runs under the trainer's interpreter and imports only torch: the device itself
    operators    reads data/;  wheel and binary make it from the macOS wheel
    request      what a rehearsal does;  record what it wrote down: for both interpreters
    runner       starts rehearsals;  verdict reports one;  matrix runs many and writes the table
"""
