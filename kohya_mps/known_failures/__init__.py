"""The known failures: the catalogue, the rules that judge facts by it, and the search in logs."""
