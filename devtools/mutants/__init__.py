"""``nox -s mutants``: plant faults in the modules that decide, and see that a test notices each.

plant       runs mutmut; what it makes and finds lies in ``mutants/``
survivors   compares the faults that no test noticed with the list in tests/survivors.yaml
"""
