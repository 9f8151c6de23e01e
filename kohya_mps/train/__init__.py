"""Projects and trainings: made, started, followed, summarized, reported."""
