"""Trainings by the dozen: what one is, and the engines that run them."""
