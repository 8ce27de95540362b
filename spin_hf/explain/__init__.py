"""See inside a classifier: what speaks for an answer, and a report of it all."""
