# Not shipped: lets type checkers and editors follow the relative imports between the root folders.
