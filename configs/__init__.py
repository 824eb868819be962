"""Ready-made search configurations, shipped as package data."""
