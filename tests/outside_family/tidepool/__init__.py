"""A family in its own package, as other people would add one to higen (docs/families.md)."""
