"""What is kept in files: whole or not there, and known by its hash. Needs no torch and no run."""
