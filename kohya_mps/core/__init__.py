"""What every other folder uses: the command line, errors, reports, processes, settings and files."""
