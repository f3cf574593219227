"""Rewards: how they are called, reward models, classifiers."""

from .bradley_terry import BradleyTerry, train_bradley_terry
from .calling import call_reward, mean_reward, rollout_rewards
from .classifiers import ClassifierReward
from .loading import load_reward

__all__ = ["BradleyTerry", "ClassifierReward", "call_reward", "load_reward", "mean_reward", "rollout_rewards",
           "train_bradley_terry"]
