"""Pages for people: repositories, rendered cards, files, history, changes."""
