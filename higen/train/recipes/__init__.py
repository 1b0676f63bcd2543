"""Complete recipes: each package makes one published model from public data."""
