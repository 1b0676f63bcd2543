"""A family in a package of its own, as others would add it to higen (docs/families.md)."""
