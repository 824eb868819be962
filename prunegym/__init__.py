"""prunegym."""
