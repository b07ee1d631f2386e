"""Everything that only a GPU can show, measured in stages under a budget of seconds: see README.md here."""
