"""Recipes, controls and the runner that compares them."""
