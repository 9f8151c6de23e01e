"""Breaking set-ups on purpose: ``faults`` has the session, the other modules the faults by kind."""
