"""Running a bundle: sessions, generation, runs that show the routing. Needs no torch and no transformers."""
