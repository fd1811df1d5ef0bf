"""Sampling: prompts -> a flat Rollout, from the student or from the mixture of teacher and student."""
