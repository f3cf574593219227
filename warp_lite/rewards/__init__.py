"""Rewards: how they are called, reward models, classifiers."""
