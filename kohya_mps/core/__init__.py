"""What every room stands on: front end, errors, reports, processes, settings, files."""
