"""Generated programs: find them in a reply, run them in isolation, judge them by tests. No torch below here."""
