"""A family from outside: what a package adds to higen to run a model of its own (docs/families.md)."""
