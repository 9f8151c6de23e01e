"""Comparing this project with the bare tools: ``parts`` has the session, the other modules measure."""
