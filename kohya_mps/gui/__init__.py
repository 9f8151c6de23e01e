"""kohya's own web page."""
