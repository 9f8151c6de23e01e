"""The known failures: their catalogue, the rules that judge facts, the search in logs."""
